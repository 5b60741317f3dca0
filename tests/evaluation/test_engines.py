"""The written configurations: read back by trl and Accelerate, and really run as two processes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from datasets import load_dataset
from peft import LoraConfig, get_peft_model
from tiny_models import SEVEN
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig
from trl.scripts.sft import make_parser

from llama_sft_helpers.evaluation import write_engine_configs
from llama_sft_helpers.profiles import read_profile

ROOT = Path(__file__).parents[2]
ROWS = [{"prompt": f"q{i}\n", "completion": f"a “{i}”"} for i in range(8)]
SIZES = {"num_hidden_layers": 1, "hidden_size": 8, "intermediate_size": 8, "vocab_size": 8}
SIZES |= {"num_attention_heads": 2, "num_key_value_heads": 2}


def write(folder, profile, rows=ROWS, processes=2, config=LlamaConfig, **changes):
    lora = LoraConfig(r=16, lora_alpha=16, lora_dropout=0, task_type="CAUSAL_LM", target_modules=SEVEN)
    return write_engine_configs(
        folder,
        profile=read_profile(profile, **changes),
        model=get_peft_model(AutoModelForCausalLM.from_config(config(**SIZES)), lora),
        train_rows=rows,
        eval_rows=ROWS[:2],
        processes=processes,
    )


def read(path):
    return yaml.safe_load(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("profile", ["colab-a100", "ci-tiny"])
@pytest.mark.parametrize(
    ("name", "in_bits", "distributed"),
    [("ddp-int8", (True, False), "MULTI_GPU"), ("fsdp-nf4", (False, True), "FSDP")],
)
def test_trl_and_accelerate_read_every_key(tmp_path, name, in_bits, distributed, profile):
    write(tmp_path, profile, dtype="float32")
    path = tmp_path / f"sft_{name}.yaml"
    # trl's parser refuses bf16 on a machine that cannot compute it
    path.write_text(yaml.safe_dump(read(path) | {"bf16": False, "use_cpu": True}), encoding="utf-8")
    parser = make_parser()
    script, training, model, _ = parser.parse_args_and_config(
        ["--config", str(path)], fail_with_unknown_args=True
    )
    assert (script.dataset_name, training.seed) == ("data", 42)
    assert (model.lora_r, model.lora_alpha, model.lora_dropout) == (16, 16, 0.0)
    assert sorted(model.lora_target_modules) == sorted(SEVEN)
    assert (model.load_in_8bit, model.load_in_4bit) == in_bits
    config = load_config_from_file(str(tmp_path / f"accelerate_{name}.yaml"))
    assert (config.num_processes, config.distributed_type) == (2, distributed)


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


@pytest.mark.parametrize(
    ("profile", "rows", "processes"),
    [("colab-a100", 8, 2), ("colab-l4", 9, 3), ("colab-t4", 8, 2), ("cpu-demo", 4, 2), ("one row", 2, 2)],
)
def test_every_profile_can_be_shared(tmp_path, profile, rows, processes):
    one = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 1}
    name, settings = ("cpu-demo", one) if profile == "one row" else (profile, {})
    table = write(tmp_path, name, processes=None, **settings)
    assert table["effective_batch_rows"].tolist() == [rows] * 2
    assert read(tmp_path / "accelerate_ddp-int8.yaml")["num_processes"] == processes


def test_what_fsdp_needs_is_written(tmp_path):
    write(tmp_path, "ci-tiny", config=MistralConfig)
    config = read(tmp_path / "accelerate_fsdp-nf4.yaml")["fsdp_config"]
    assert config["fsdp_transformer_layer_cls_to_wrap"] == "MistralDecoderLayer"
    settings = read(tmp_path / "sft_fsdp-nf4.yaml")
    assert settings["bnb_4bit_quant_storage"] == settings["dtype"]  # FSDP shares out one type
    assert config["fsdp_version"] == 2  # under version 1, PEFT 0.21 saves an empty adapter
    assert settings["gradient_checkpointing_kwargs"] == {"use_reentrant": False}


def test_a_float16_profile_is_written_for_bfloat16(tmp_path):
    write(tmp_path, "colab-t4")
    settings = read(tmp_path / "sft_ddp-int8.yaml")
    assert (settings["dtype"], settings["bf16"], settings["fp16"]) == ("bfloat16", True, False)


def test_rows_come_back_as_they_were(tmp_path):
    write(tmp_path, "ci-tiny")
    split = load_dataset(str(tmp_path / "data"), cache_dir=str(tmp_path / "cache"))
    assert (split["train"].to_list(), split["test"].to_list()) == (ROWS, ROWS[:2])


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"processes": 1}, "processes is 1"),
        ({"processes": 3}, r"batch of 4 rows .* cannot be shared by processes=3"),
        ({"rows": []}, "no training rows"),
    ],
)
def test_what_cannot_be_run_is_refused(tmp_path, change, told):
    with pytest.raises(ValueError, match=told):
        write(tmp_path, "ci-tiny", **change)


def results(name="several_gpus"):
    return json.loads((ROOT / f"benchmarks/results/{name}.json").read_text(encoding="utf-8"))


def test_the_speed_page_says_what_two_gpus_gave():
    text, result = (ROOT / "docs" / "speed.md").read_text(encoding="utf-8"), results()
    runs = {(row["part"], row["processes"]): row for row in result["runs"] if row["part"] != "resume"}
    for part in ("ddp-int8", "fast", "fsdp-nf4", "70b"):
        pair = [runs[part, processes] for processes in (1, 2)]
        speed = [f"{run['tokens_per_second']:,.0f}" for run in pair]
        memory = [f"{max(run['peak_gib']):.1f}" for run in pair]
        assert f"| {' | '.join([*speed, *memory])} |" in text
    assert all(run["exit"] == 0 for run in runs.values())
    differences = {row["part"]: row["largest_loss_difference"] for row in result["scaling"]}
    assert max(differences[part] for part in ("ddp-int8", "fast")) < 0.001
    assert max(differences[part] for part in ("fsdp-nf4", "70b")) < 0.007
    assert "within 0.1 % of one GPU's over 20 updates under DDP, within 0.7 % under FSDP" in text
    adapters = [said for part in result["adapters"].values() for said in part.values()]
    assert len(adapters) == 9
    assert all(said.startswith("loaded") for said in adapters)
    loaded = [runs[part, 2]["loaded_gib"] for part in ("fsdp-nf4", "70b")]
    assert loaded == [[6.2, 6.2], [8.3, 8.3]]
    assert "6.2 GiB with what CUDA takes for itself, 8.3 GiB for 70B's layers" in text


def test_how_far_two_gpus_results_repeat_is_said():
    text = (ROOT / "docs" / "speed.md").read_text("utf-8")
    times = {row["part"]: row["times_one_process"] for row in results()["scaling"]}
    assert [round(times[part], 1) for part in ("ddp-int8", "fast", "fsdp-nf4", "70b")] == [1.5, 1.5, 1.2, 1.1]
    assert "1.5 times as fast as one under DDP, and 1.1 to 1.2 times under FSDP" in text
    earlier = results("several_gpus_earlier")
    ddp = {row["part"]: row["times_one_process"] for row in earlier["scaling"]}
    (fsdp,) = [
        row
        for row in earlier["fsdp"]["scaling"]
        if row.get("fsdp_version") == 2 and not row.get("beside_other_jobs")
    ]
    one, two = (run["tokens_per_second"] for run in earlier["repeated"]["runs"][:2])
    times = [ddp["ddp-int8"], two / one, ddp["fast"], fsdp["times_one_process"]]
    said = "{:.1f} and {:.1f} (`ddp-int8`), {:.1f} (the fast recipe) and {:.1f} (`fsdp-nf4`)"
    assert said.format(*times) in text


def test_what_is_said_of_fsdp_and_a_killed_rank_is_in_the_results():
    rows = [row for row in results("several_gpus_earlier")["fsdp"]["scaling"] if row["part"] == "fsdp-nf4"]
    loads = {
        (r["fsdp_version"], r["peft"]): r["adapter"].startswith("loaded") for r in rows if "adapter" in r
    }
    assert loads == {(1, "0.21.0"): False, (1, "0.20.0"): True, (2, "0.21.0"): True}
    (exported,) = [row for row in results()["scaling"] if row["part"] == "fsdp-nf4"]
    notebook = (ROOT / "notebooks/07_evaluation.ipynb").read_text("utf-8")
    assert f"{100 * exported['times_one_process']:.0f}% of the tokens per second" in notebook
    assert exported["largest_loss_difference"] < 0.005
    assert "within 0.5% of one process's" in notebook
    resume = results()["resume"]
    seconds, updates = resume["seconds_until_the_launcher_ended"], resume["updates_after_resuming"]
    said = f"ended after {seconds} s, and the {updates} updates"
    assert said in (ROOT / "docs" / "speed.md").read_text("utf-8")
    assert resume["largest_loss_difference"] < 0.002
    assert "losses within 0.2 % of" in (ROOT / "docs" / "speed.md").read_text("utf-8")


@pytest.mark.slow
def test_two_processes_train_as_one_and_go_on_after_a_kill(tmp_path, tiny_model_dir):
    """The written commands, with gloo instead of GPUs: the benchmark for several GPUs on the tiny Llama."""
    options = ["--device", "cpu", "--model", tiny_model_dir, "--steps", "12"]
    options += ["--part", "ddp-int8", "--part", "resume", "--max-length", "512"]
    options += ["--work", tmp_path / "work", "--out", tmp_path / "out.json"]
    script = [sys.executable, ROOT / "benchmarks" / "several_gpus.py"]
    done = subprocess.run([*script, *options], capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))
    assert found["effective_batch_rows"] == 2
    (two,) = found["scaling"]
    assert (two["processes"], two["updates"]) == (2, 12)
    assert two["largest_loss_difference"] < 0.01
    assert found["resume"]["updates_after_resuming"] == 7  # of 12, after the checkpoint of update 5
    assert found["resume"]["largest_loss_difference"] < 0.01
    adapters = found["adapters"]["ddp-int8"] | found["adapters"]["resume"]
    assert set(adapters) == {"ddp-int8-1", "ddp-int8-2", "resumed"}
    assert all(said.startswith("loaded") for said in adapters.values())
