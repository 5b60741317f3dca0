"""Notebook 06 on a GPU: float16, running out of memory, and the presets on cards of their size."""

import gc
import json
import logging
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_models import SEVEN

from llama_sft_helpers import memory, training
from llama_sft_helpers.profiles import device_map, load_profile

NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _quiet(monkeypatch):
    import transformers

    # There is no notebook to draw in.
    monkeypatch.setattr(training, "LiveLossCallback", lambda *_, **__: transformers.TrainerCallback())
    monkeypatch.setenv("SFT_PROFILE", "ci-tiny")
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)


def notebook_cell(marker):
    """The source of 06's one code cell that holds ``marker``."""
    notebook = json.loads((ROOT / "notebooks" / "06_training.ipynb").read_text(encoding="utf-8"))
    sources = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    (source,) = [source for source in sources if marker in source]
    return source


def tiny_model(dtype):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig, set_seed

    model = AutoModelForCausalLM.from_pretrained(
        load_profile("ci-tiny").model_id,
        quantization_config=BitsAndBytesConfig(load_in_8bit=True),
        device_map=device_map(),
        dtype=dtype,
    )
    set_seed(42)
    return get_peft_model(model, LoraConfig(r=16, lora_alpha=16, task_type="CAUSAL_LM", target_modules=SEVEN))


def rows(count, length=256):
    """Rows that fill every micro-batch, so that memory depends on the micro-batch alone."""
    from datasets import Dataset

    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 1000, (count, length), generator=generator).tolist()
    return Dataset.from_dict({"input_ids": ids, "labels": ids})


def namespace(profile, count=64):
    """What 06's cells find defined: the model, the data, the imports."""
    import peft
    import transformers
    from trl import SFTConfig, SFTTrainer

    return {
        "training": training,
        "memory": memory,
        "get_peft_model_state_dict": peft.get_peft_model_state_dict,
        "SFTConfig": SFTConfig,
        "SFTTrainer": SFTTrainer,
        "gc": gc,
        "torch": torch,
        "set_peft_model_state_dict": peft.set_peft_model_state_dict,
        "model": tiny_model(profile.torch_dtype),
        "tokenizer": transformers.AutoTokenizer.from_pretrained(profile.model_id),
        "train_rows": rows(count),
        "held_out": rows(16),
        "profile": profile,
        "every": profile.eval_steps,
        "save_every": profile.save_steps,
        "before": None,
    }


def build(names, folder):
    exec(notebook_cell("def build_trainer"), names)
    return names["build_trainer"](names["profile"], folder)


# --- float16, as on a T4 ---


def train_as_06_does(names, folder):
    """Run 06's training cell; what it leaves in ``names`` is the result."""
    names["checkpoints"] = folder
    names["trainer"] = build(names, folder)
    state = names["get_peft_model_state_dict"](names["model"])
    names["initial_adapter"] = {name: value.clone() for name, value in state.items()}
    exec(notebook_cell("while result is None"), names)
    return names["trainer"].state.log_history


def test_the_cells_of_06_find_every_name_they_need(tmp_path):
    """Without a GPU too: the tests below would break unseen when 06 changes."""
    history = train_as_06_does(namespace(load_profile("ci-tiny", max_steps=2)), tmp_path)
    assert sum("loss" in row for row in history) == 2


@pytest.mark.gpu
@NO_GPU
def test_float16_trains_with_the_adapter_in_float32(tmp_path):
    profile = load_profile("ci-tiny", dtype="float16", max_steps=6, learning_rate=5e-3)
    names = namespace(profile)
    trainer = build(names, tmp_path)
    assert {p.dtype for p in names["model"].parameters() if p.requires_grad} == {torch.float32}
    trainer.train()
    assert trainer.accelerator.scaler is not None
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert len(losses) == 6
    assert all(math.isfinite(loss) for loss in losses)
    assert all(p.any() for name, p in names["model"].named_parameters() if "lora_B" in name)


@pytest.mark.gpu
@NO_GPU
def test_float16_crashes_in_the_scaler_as_trl_leaves_the_adapter(tmp_path):
    profile = load_profile("ci-tiny", dtype="float16", max_steps=2)
    names = namespace(profile)
    trainer = build(names, tmp_path)
    for parameter in names["model"].parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.bfloat16()
    with pytest.raises((RuntimeError, ValueError), match=r"BFloat16|unscale"):
        trainer.train()


# --- Out of memory ---


def clean():
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()


def peak_reserved(profile, folder):
    clean()
    trainer = build(namespace(profile, count=1024), folder)
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    return torch.cuda.max_memory_reserved(), losses


@pytest.mark.gpu
@NO_GPU
def test_out_of_memory_is_caught_explained_and_retried_with_half_the_micro_batch(tmp_path, capsys):
    settings = {"dtype": "bfloat16", "max_steps": 2, "eval_steps": 9, "save_steps": 9, "learning_rate": 5e-3}
    full = load_profile("ci-tiny", per_device_train_batch_size=512, **settings)
    half = memory.plan_smaller_batch(full)
    peak_reserved(half, tmp_path / "warm")  # workspaces that stay are there from now on
    enough_for_half, expected = peak_reserved(half, tmp_path / "half")
    enough_for_full, _ = peak_reserved(full, tmp_path / "full")
    assert enough_for_full > 1.4 * enough_for_half
    cap = enough_for_half + 0.6 * (enough_for_full - enough_for_half)

    clean()
    names = namespace(full, count=1024)
    torch.cuda.set_per_process_memory_fraction(cap / torch.cuda.get_device_properties(0).total_memory)
    try:
        history = train_as_06_does(names, tmp_path / "capped")
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    said = capsys.readouterr().out
    assert said.count("Out of GPU memory. Planned peak") == 1, said
    assert "its largest item: activations" in said
    tried = names["profile"]
    assert (tried.per_device_train_batch_size, tried.gradient_accumulation_steps) == (256, 2)
    losses = [row["loss"] for row in history if "loss" in row]
    assert losses == pytest.approx(expected, abs=1e-2)
    assert torch.cuda.max_memory_reserved() <= cap


# --- Presets on cards of their size ---


@pytest.mark.gpu
@NO_GPU
@pytest.mark.slow
def test_presets_train_llama3_8b_on_their_cards_with_10_percent_to_spare(tmp_path):
    out = tmp_path / "presets.json"
    script = ROOT / "benchmarks" / "calibrate_memory.py"
    subprocess.run([sys.executable, script, "--presets", "--out", out], check=True)
    results = {row["preset"]: row for row in json.loads(out.read_text(encoding="utf-8"))["results"]}
    assert set(results) == {"colab-a100", "colab-l4", "colab-t4"}
    for name, row in results.items():
        assert len(row["losses"]) == 20, name
        assert all(math.isfinite(loss) for loss in row["losses"]), name
        assert row["share_of_card"] <= 0.9, name
