"""The written configurations: read back by trl and Accelerate, and really run as two processes."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from adapter_fixture import TARGETS, load_int8
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig

from llama_sft_helpers.evaluation import write_engine_configs
from llama_sft_helpers.profiles import load_profile

ROWS = [{"prompt": f"q{i}\n", "completion": f"a “{i}”"} for i in range(8)]
LORA = LoraConfig(r=16, lora_alpha=16, lora_dropout=0, task_type="CAUSAL_LM", target_modules=TARGETS)


SIZES = {"num_hidden_layers": 1, "hidden_size": 8, "intermediate_size": 8, "vocab_size": 8}
SIZES |= {"num_attention_heads": 2, "num_key_value_heads": 2}


def peft_model(config=LlamaConfig):
    return get_peft_model(AutoModelForCausalLM.from_config(config(**SIZES)), LORA)


def write(folder, profile="ci-tiny", rows=ROWS, processes=2, model=None, **overrides):
    if isinstance(profile, str):
        from llama_sft_helpers.profiles import read_profile

        profile = read_profile(profile, **overrides)
    return write_engine_configs(
        folder,
        profile=profile,
        model=model or peft_model(),
        train_rows=rows,
        eval_rows=ROWS[:2],
        processes=processes,
    )


def read(path):
    return yaml.safe_load(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", ["ddp-int8", "fsdp-nf4"])
@pytest.mark.parametrize("profile", ["colab-a100", "ci-tiny"])
def test_trl_and_accelerate_read_every_key(tmp_path, name, profile):
    from accelerate.commands.config.config_args import load_config_from_file
    from trl.scripts.sft import make_parser

    write(tmp_path, profile, **({"dtype": "float32"} if profile == "ci-tiny" else {}))
    if profile == "colab-a100":  # trl's parser refuses bf16 on a machine that cannot compute it
        settings = read(tmp_path / f"sft_{name}.yaml")
        (tmp_path / f"sft_{name}.yaml").write_text(
            yaml.safe_dump({**settings, "bf16": False, "use_cpu": True})
        )
    script, training, model, _ = make_parser().parse_args_and_config(
        ["--config", str(tmp_path / f"sft_{name}.yaml")], fail_with_unknown_args=True
    )
    assert script.dataset_name == "data"
    assert (model.lora_r, model.lora_alpha, model.lora_dropout) == (16, 16, 0.0)
    assert sorted(model.lora_target_modules) == sorted(TARGETS)
    assert (model.load_in_8bit, model.load_in_4bit) == (
        (True, False) if name == "ddp-int8" else (False, True)
    )
    assert training.seed == 42
    config = load_config_from_file(str(tmp_path / f"accelerate_{name}.yaml"))
    assert config.num_processes == 2
    assert config.distributed_type == ("MULTI_GPU" if name == "ddp-int8" else "FSDP")


@pytest.mark.parametrize(
    ("rows", "accumulated", "processes", "expected"),
    [(2, 4, 2, (2, 2)), (2, 4, 4, (2, 1)), (4, 1, 2, (2, 1)), (4, 3, 2, (3, 2)), (1, 8, 8, (1, 1))],
)
def test_the_effective_batch_is_kept(tmp_path, rows, accumulated, processes, expected):
    settings = {"per_device_train_batch_size": rows, "gradient_accumulation_steps": accumulated}
    table = write(tmp_path, "colab-a100", processes=processes, **settings)
    assert table["effective_batch_rows"].tolist() == [rows * accumulated] * 2
    written = read(tmp_path / "sft_ddp-int8.yaml")
    assert tuple(written[key] for key in settings) == expected
    assert written["gradient_checkpointing"] is True  # trl compiles nothing


def test_the_layers_that_fsdp_shares_out_are_the_models(tmp_path):
    write(tmp_path, model=peft_model(MistralConfig))
    config = read(tmp_path / "accelerate_fsdp-nf4.yaml")["fsdp_config"]
    assert config["fsdp_transformer_layer_cls_to_wrap"] == "MistralDecoderLayer"
    settings = read(tmp_path / "sft_fsdp-nf4.yaml")
    assert settings["bnb_4bit_quant_storage"] == settings["dtype"]  # one type in FSDP's flat tensor


def test_a_float16_profile_is_written_for_bfloat16(tmp_path):
    write(tmp_path, "colab-t4")
    settings = read(tmp_path / "sft_ddp-int8.yaml")
    assert (settings["dtype"], settings["bf16"], settings["fp16"]) == ("bfloat16", True, False)


def test_rows_come_back_as_they_were(tmp_path):
    from datasets import load_dataset

    write(tmp_path)
    split = load_dataset(str(tmp_path / "data"), cache_dir=str(tmp_path / "cache"))
    assert split["train"].to_list() == ROWS
    assert split["test"].to_list() == ROWS[:2]


def test_what_cannot_be_run_is_refused(tmp_path):
    with pytest.raises(ValueError, match="processes is 1"):
        write(tmp_path, processes=1)
    with pytest.raises(ValueError, match="no training rows"):
        write(tmp_path, rows=[])
    with pytest.raises(ValueError, match=r"batch of 4 rows .* cannot be shared by processes=3"):
        write(tmp_path, processes=3)


def losses(output):
    return [float(value) for value in re.findall(r"'loss': '?([\d.]+)", output)]


def launch(arguments, folder):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment["HF_HOME"] = str(folder / "home")
    done = subprocess.run(
        [sys.executable, "-m", "accelerate.commands.launch", *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout + done.stderr


@pytest.mark.slow
def test_two_processes_train_as_one_does_and_07_loads_the_adapter(tmp_path):
    """The written command, with gloo instead of GPUs, against one process that accumulates twice."""
    from peft import PeftModel

    from llama_sft_helpers.evaluation import check_adapter, check_adapter_loaded

    profile = load_profile(
        "ci-tiny",
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        max_steps=6,
        learning_rate=2e-3,
    )
    shipped = Path(profile.dataset_id) / "alpaca_mini.jsonl"
    from llama_sft_helpers.data import to_prompt_completion

    lines = shipped.read_text(encoding="utf-8").splitlines()[:64]
    table = write(tmp_path, profile, [to_prompt_completion(json.loads(line)) for line in lines])
    command = shlex.split(table.loc["ddp-int8", "command"])
    assert command[:2] == ["accelerate", "launch"]
    together = launch(["--main_process_port", "0", *command[2:]], tmp_path)

    alone = [
        "--num_processes",
        "1",
        "--num_machines",
        "1",
        "--mixed_precision",
        "no",
        "--dynamo_backend",
        "no",
    ]
    changes = ["--gradient_accumulation_steps", "2", "--output_dir", "alone"]
    single = launch([*alone, "-m", "trl.scripts.sft", "--config", "sft_ddp-int8.yaml", *changes], tmp_path)

    # Two processes that do not know of each other would log each loss twice, and other losses.
    assert len(losses(together)) == len(losses(single)) == 6
    assert losses(together) == pytest.approx(losses(single), abs=5e-3)

    folder = tmp_path / "adapter-ddp-int8"
    base = load_int8(profile.model_id)
    check_adapter(folder, base, profile.model_id)
    model = PeftModel.from_pretrained(base, folder)
    check_adapter_loaded(model, folder)
    other = PeftModel.from_pretrained(load_int8(profile.model_id), tmp_path / "alone")
    ids = torch.arange(20)[None]
    with torch.no_grad():
        assert torch.allclose(model(ids).logits, other(ids).logits, atol=0.1)
