"""The fast switches against the plain path, 60 steps on a real pretrained model (SmolLM2-135M, int8, CPU).

    python benchmarks/same_loss.py --out benchmarks/results/speed_same_loss.json

Same rows, same starting adapter, same order; the only change is ``use_fast_int8`` and
``compile_decoder_layers``. The model stays in ``eval`` mode (there is no dropout): in ``train`` mode
bitsandbytes dequantizes on a CPU too, and only in ``eval`` mode is plain int8 the LLM.int8() that a GPU runs,
activations rounded and outliers taken aside. Each model's held-out loss is measured as it was trained.
"""

from __future__ import annotations

import argparse
import logging
from typing import Any

import torch
from datasets import load_dataset
from peft import LoraConfig, get_peft_model
from report import card, source, write
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, set_seed
from trl import SFTConfig, SFTTrainer

from llama_sft_helpers import speed
from llama_sft_helpers.data import to_prompt_completion
from llama_sft_helpers.profiles import load_profile

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def train(fast: bool, steps: int) -> dict[str, Any]:
    profile = load_profile("cpu-demo")
    set_seed(42)
    model = AutoModelForCausalLM.from_pretrained(
        profile.model_id,
        quantization_config=BitsAndBytesConfig(load_in_8bit=True),
        dtype=torch.float32,
        device_map="cpu",
    )
    model = get_peft_model(
        model, LoraConfig(r=16, lora_alpha=16, target_modules=TARGETS, task_type="CAUSAL_LM")
    )
    rows = load_dataset(profile.dataset_id, split="train")
    rows = rows.map(to_prompt_completion, remove_columns=rows.column_names)
    split = rows.train_test_split(test_size=profile.eval_rows, seed=42)
    config = SFTConfig(
        output_dir="outputs/same_loss", max_steps=steps, per_device_train_batch_size=4, max_length=128,
        learning_rate=profile.learning_rate, gradient_checkpointing=False, bf16=False, use_cpu=True, seed=42,
        logging_steps=1, save_strategy="no", report_to="none", disable_tqdm=True,
    )  # fmt: skip
    trainer = SFTTrainer(
        model=model,
        args=config,
        train_dataset=split["train"],
        eval_dataset=split["test"],
        processing_class=AutoTokenizer.from_pretrained(profile.model_id),
    )
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    if fast:
        speed.use_fast_int8(model)
        compiled = speed.compile_decoder_layers(model, 0.9)
    model.eval()
    model.train = lambda mode=True: model  # type: ignore[method-assign, assignment]  # Trainer asks for it each step
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    if fast:
        speed.check_graphs(compiled)
    return {"losses": losses, "eval_loss": trainer.evaluate()["eval_loss"]}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", required=True)
    parser.add_argument("--steps", type=int, default=60)
    args = parser.parse_args()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    curves = {name: train(name == "fast", args.steps) for name in ("plain", "fast")}
    pairs = list(zip(curves["fast"]["losses"], curves["plain"]["losses"], strict=True))
    report = {
        "model": "SmolLM2-135M-Instruct, int8",
        **source(card(), ("torch", "transformers", "peft", "trl", "bitsandbytes")),
        "largest_loss_difference": max(abs(a - b) / b for a, b in pairs),
        "eval_loss_difference": abs(curves["fast"]["eval_loss"] / curves["plain"]["eval_loss"] - 1),
        **curves,
    }
    write(args.out, report)
    print({k: v for k, v in report.items() if k.endswith("difference")}, curves["plain"]["losses"][::10])


if __name__ == "__main__":
    main()
