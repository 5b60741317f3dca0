"""A trained adapter in the layout of notebook 06: ``adapter/`` and ``training_summary.json``."""

import json
import logging
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import pytest


def train_adapter(profile, folder: Path):
    """Train with the recipe of the series and save as notebook 06 does; what was made is returned by name."""
    from datasets import load_dataset
    from peft import LoraConfig, get_peft_model
    from tiny_models import SEVEN, build_trainer, load_int8
    from transformers import AutoTokenizer, set_seed

    from llama_sft_helpers.data import sort_by_length, to_prompt_completion, training_template

    set_seed(42)
    rows = load_dataset(profile.dataset_id, split="train")
    rows = rows.map(to_prompt_completion, remove_columns=rows.column_names)
    split = rows.train_test_split(test_size=profile.eval_rows, seed=42)
    tokenizer = AutoTokenizer.from_pretrained(profile.model_id)
    held_out = sort_by_length(split["test"], tokenizer)
    lora = {"lora_alpha": 16, "lora_dropout": 0, "bias": "none", "task_type": "CAUSAL_LM"}
    model = get_peft_model(load_int8(profile.model_id), LoraConfig(r=16, target_modules=SEVEN, **lora))
    trainer = build_trainer(
        model,
        folder / "checkpoints",
        tokenizer,
        split["train"].select(range(profile.train_rows or len(split["train"]))),
        eval_rows=held_out,
        max_length=profile.max_length,
        per_device_train_batch_size=profile.per_device_train_batch_size,
        per_device_eval_batch_size=profile.per_device_train_batch_size,
        max_steps=profile.max_steps,
        learning_rate=profile.learning_rate,
        lr_scheduler_type="linear",
    )
    before = trainer.evaluate()["eval_loss"]
    seconds = trainer.train().metrics["train_runtime"]
    after = trainer.evaluate()["eval_loss"]
    tokenizer.chat_template = training_template(tokenizer, "alpaca")
    trainer.save_model(str(folder / "adapter"))
    packages = ("torch", "transformers", "peft", "trl", "bitsandbytes")
    summary = {"eval_loss_before": before, "eval_loss_after": after, "profile": profile.name}
    summary |= {"train_seconds": seconds, "train_tokens": 1234, "peak_gib": 0.5}
    summary["versions"] = {name: version(name) for name in packages}
    (folder / "training_summary.json").write_text(json.dumps(summary), encoding="utf-8")
    made = {"model": model.eval(), "tokenizer": tokenizer, "trainer": trainer, "eval_rows": held_out}
    places = {"folder": folder, "adapter": folder / "adapter"}
    return SimpleNamespace(summary=summary, profile=profile, **made, **places)


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """A tiny adapter, trained once for all test files; they must not change it."""
    from llama_sft_helpers.profiles import load_profile

    return train_adapter(load_profile("ci-tiny"), tmp_path_factory.mktemp("trained"))


@pytest.fixture
def chat_command(monkeypatch, caplog):
    """``llama-sft chat`` in this process; what it makes quiet for its own is as before after the test."""
    import transformers
    from typer.testing import CliRunner

    from llama_sft_helpers.cli import app

    monkeypatch.setattr(transformers.utils.logging, "disable_progress_bar", lambda: None)
    for name in ("bitsandbytes", "huggingface_hub", "torch.utils._pytree"):
        caplog.set_level(logging.ERROR, name)
    return lambda *arguments: CliRunner().invoke(app, ["chat", *map(str, arguments)])
