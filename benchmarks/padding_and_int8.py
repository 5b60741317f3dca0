"""What padding does to the loss of an int8 model: LLM.int8 and the dequantized product, row by row.

    python benchmarks/padding_and_int8.py --model FOLDER --out benchmarks/results/padding_and_int8_cpu.json

The same rows go through the same int8 model as a padded batch, as one padding-free row, and each alone. The
model stays in ``eval`` mode: only there does bitsandbytes run on a CPU the LLM.int8 that a GPU always runs.
The reference multiplies by the dequantized codes and rounds nothing but float32: same weights, no rounded
activation. ``FOLDER`` holds a model and its tokenizer, or is a hub id; the rows are those of the package.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import logging
import statistics
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from bitsandbytes.nn import Linear8bitLt
from datasets import load_dataset
from report import card, source, write
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from llama_sft_helpers import speed
from llama_sft_helpers.data import to_prompt_completion
from llama_sft_helpers.profiles import read_profile

Batch = dict[str, Any]
THRESHOLD = 6.0  # llm_int8_threshold
PACKAGES = ("torch", "transformers", "trl", "bitsandbytes")


def load(folder: str, dtype: torch.dtype, device: str) -> Any:
    model = AutoModelForCausalLM.from_pretrained(
        folder,
        quantization_config=BitsAndBytesConfig(load_in_8bit=True),
        dtype=dtype,
        device_map=device,
        attn_implementation="sdpa",
    )
    return model.eval().requires_grad_(False)


def read_rows(folder: str, count: int, longest: int) -> tuple[list[Batch], int]:
    """Tokens and labels (completion and EOS only) of the package's first rows, and the pad token's id."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    path = Path(speed.__file__).parents[1] / "datasets" / "alpaca_mini.jsonl"
    rows = []
    for row in load_dataset("json", data_files=str(path), split="train"):
        parts = to_prompt_completion(row)
        prompt = tokenizer(parts["prompt"])["input_ids"]
        ids = tokenizer(parts["prompt"] + parts["completion"])["input_ids"] + [tokenizer.eos_token_id]
        if len(ids) <= longest:
            rows.append({"input_ids": ids, "labels": [-100] * len(prompt) + ids[len(prompt) :]})
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    return rows[:count], pad


def lay_out(rows: list[Batch], pad: int, device: str) -> dict[str, Batch]:
    """The rows padded and padding-free, as TRL's own collator lays them out."""
    layouts = {}
    for name, padding_free in (("padded", False), ("padding-free", True)):
        batch = DataCollatorForLanguageModeling(pad_token_id=pad, padding_free=padding_free)(rows)
        kept = ("input_ids", "labels", "attention_mask", "position_ids")
        layouts[name] = {key: batch[key].to(device) for key in kept if key in batch}
    return layouts


@torch.no_grad()
def token_losses(model: Any, batch: Batch) -> list[torch.Tensor]:
    """For each row the losses of its scored tokens, in float32: what the mean over a batch is made of."""
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    logits = model(**inputs, use_cache=False).logits[:, :-1].float()
    labels = batch["labels"][:, 1:]
    losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels, reduction="none")
    if "position_ids" not in batch:
        return [row[wanted] for row, wanted in zip(losses, labels != -100, strict=True)]
    bounds = speed.document_bounds(batch["position_ids"])[0].tolist()
    spans = [slice(start, end - 1) for start, end in itertools.pairwise(bounds)]
    return [losses[0, span][labels[0, span] != -100] for span in spans]


def alone(model: Any, batch: Batch) -> list[torch.Tensor]:
    rows = []
    for ids, labels, mask in zip(batch["input_ids"], batch["labels"], batch["attention_mask"], strict=True):
        real = mask.bool()
        row = {"input_ids": ids[real][None], "labels": labels[real][None]}
        rows += token_losses(model, row)
    return rows


# --- products ---


@contextlib.contextmanager
def dequantized(model: Any) -> Iterator[None]:
    speed.use_fast_int8(model)
    try:
        yield
    finally:
        speed.use_fast_int8(model, enabled=False)


@contextlib.contextmanager
def decided_without(model: Any, left_out: torch.Tensor) -> Iterator[None]:
    """LLM.int8 whose outlier columns do not depend on the tokens ``left_out`` (bool, tokens of the batch).

    A row of activations meets the others only in the choice of columns, so two calls of bitsandbytes' own
    product, one for each group of tokens, are LLM.int8 with the decision made in each group alone.
    """

    def split(linear: Any, forward: Callable[[torch.Tensor], torch.Tensor]) -> Callable[..., torch.Tensor]:
        def run(x: torch.Tensor) -> torch.Tensor:
            flat, groups = x.reshape(-1, x.shape[-1]), (left_out, ~left_out)
            out = flat.new_empty(len(flat), linear.out_features)
            for group in groups:
                if group.any():
                    out[group] = forward(flat[group])
            return out.view(*x.shape[:-1], -1)

        return run

    linears = [module for module in model.modules() if isinstance(module, Linear8bitLt)]
    for linear in linears:
        linear.forward = split(linear, linear.forward)
    try:
        yield
    finally:
        for linear in linears:
            del linear.forward


@contextlib.contextmanager
def counted(model: Any, groups: dict[str, torch.Tensor], found: dict[str, dict[str, int]]) -> Iterator[None]:
    """Count outlier columns of each kind of linear, as each group of tokens (bool) alone decides them."""

    def watch(kind: str) -> Callable[..., None]:
        def hook(_: Any, args: tuple[torch.Tensor, ...]) -> None:
            outliers = args[0].reshape(-1, args[0].shape[-1]).half().abs() >= THRESHOLD
            for name, group in groups.items():
                columns = found.setdefault(name, {})
                columns[kind] = columns.get(kind, 0) + int(outliers[group].any(0).sum())

        return hook

    named = [(n, m) for n, m in model.named_modules() if isinstance(m, Linear8bitLt)]
    hooks = [m.register_forward_pre_hook(watch(n.rsplit(".", 1)[-1])) for n, m in named]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


# --- one batch ---


def measure_batch(model: Any, reference: Any, layouts: dict[str, Batch]) -> dict[str, Any]:
    padded, free = layouts["padded"], layouts["padding-free"]
    real = padded["attention_mask"].bool().reshape(-1)
    first = torch.zeros_like(padded["attention_mask"], dtype=torch.bool)
    first[:, 0] = True
    first, first_free = first.reshape(-1), (free["position_ids"] == 0).reshape(-1)
    columns: dict[str, dict[str, int]] = {}
    losses = {}
    groups = {
        "all tokens": torch.ones_like(real),
        "without padding": real,
        "without first tokens": real & ~first,
        "first tokens": first,
    }
    with counted(model, groups, columns):
        losses["LLM.int8, padded"] = token_losses(model, padded)
    losses["LLM.int8, padding-free"] = token_losses(model, free)
    losses["LLM.int8, each row alone"] = alone(model, padded)
    with decided_without(model, ~real):
        losses["LLM.int8, padded, padding decides no column"] = token_losses(model, padded)
    for name, batch, group in (("padded", padded, first), ("padding-free", free, first_free)):
        with decided_without(model, group):
            losses[f"LLM.int8, {name}, first tokens apart"] = token_losses(model, batch)
    with dequantized(model):
        losses["dequantized, padded"] = token_losses(model, padded)
        losses["dequantized, padding-free"] = token_losses(model, free)
        losses["dequantized, each row alone"] = alone(model, padded)
        losses |= varlen_losses(model, free)
    with dequantized(reference):
        losses["reference, padded"] = token_losses(reference, padded)
        losses["reference, padding-free"] = token_losses(reference, free)
    return {
        "rows": len(padded["input_ids"]),
        "tokens": int(real.sum()),
        "padding_share": 1 - real.float().mean().item(),
        "scored_tokens": sum(len(row) for row in losses["reference, padded"]),
        "outlier_columns": columns,
        "loss": {name: torch.cat(rows).mean().item() for name, rows in losses.items()},
        "row_losses": {name: [row.mean().item() for row in rows] for name, rows in losses.items()},
        "token_error": token_errors(losses),
    }


def varlen_losses(model: Any, free: Batch) -> dict[str, list[torch.Tensor]]:
    """The padding-free row once more with attention by PyTorch's kernel for documents, where it runs."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        attention = speed.register_varlen_attention()
    if attention != "varlen":
        return {}
    model.set_attn_implementation(attention)
    losses = token_losses(model, free)
    model.set_attn_implementation("sdpa")
    return {"dequantized, padding-free, varlen": losses}


def token_errors(losses: dict[str, list[torch.Tensor]]) -> dict[str, dict[str, float]]:
    """Of each path's error against the reference: its mean, and its root mean square over tokens."""
    exact = torch.cat(losses["reference, padded"])
    errors = {name: torch.cat(rows) - exact for name, rows in losses.items()}
    return {
        name: {"mean": error.mean().item(), "root_mean_square": error.square().mean().sqrt().item()}
        for name, error in errors.items()
    }


# --- all batches ---


def summarize(batches: list[dict[str, Any]]) -> dict[str, Any]:
    """Relative differences of batch losses: each path against the reference, and pairs of paths."""

    def apart(ours: str, theirs: str) -> dict[str, float]:
        values = [abs(b["loss"][ours] / b["loss"][theirs] - 1) for b in batches]
        return {"mean": statistics.mean(values), "largest": max(values)}

    def rows_apart(ours: str, theirs: str) -> dict[str, float]:
        pairs = [zip(b["row_losses"][ours], b["row_losses"][theirs], strict=True) for b in batches]
        values = [abs(x / y - 1) for pair in pairs for x, y in pair]
        return {"mean": statistics.mean(values), "median": statistics.median(values), "largest": max(values)}

    names = list(batches[0]["loss"])
    pairs = [
        ("LLM.int8, padding-free", "LLM.int8, padded"),
        ("LLM.int8, padding-free", "LLM.int8, padded, padding decides no column"),
        ("LLM.int8, padding-free, first tokens apart", "LLM.int8, padded, first tokens apart"),
        ("LLM.int8, each row alone", "LLM.int8, padded"),
        ("dequantized, padding-free", "dequantized, padded"),
        ("dequantized, each row alone", "dequantized, padded"),
        ("dequantized, padding-free, varlen", "dequantized, padding-free"),
        ("dequantized, padding-free, varlen", "dequantized, padded"),
        ("reference, padding-free", "reference, padded"),
    ]
    kept = [(ours, theirs) for ours, theirs in pairs if ours in names]
    return {
        "error_against_reference": {name: apart(name, "reference, padded") for name in names},
        "row_error_against_reference": {name: rows_apart(name, "reference, padded") for name in names},
        "difference": {f"{ours} | {theirs}": apart(ours, theirs) for ours, theirs in kept},
        "row_difference": {f"{ours} | {theirs}": rows_apart(ours, theirs) for ours, theirs in kept},
        "token_error": {
            name: statistics.mean(b["token_error"][name]["root_mean_square"] for b in batches)
            for name in names
        },
    }


def measure(args: argparse.Namespace, dtype: torch.dtype, device: str) -> dict[str, Any]:
    rows, pad = read_rows(args.model, args.batches * args.batch_size, args.max_length)
    model = load(args.model, dtype, device)
    reference = model if dtype == torch.float32 else load(args.model, torch.float32, device)
    batches = []
    for start in range(0, len(rows), args.batch_size):
        layouts = lay_out(rows[start : start + args.batch_size], pad, device)
        batches.append(measure_batch(model, reference, layouts))
        print(dtype, start, {name: round(loss, 4) for name, loss in batches[-1]["loss"].items()}, flush=True)
    return {"summary": summarize(batches), "batches": batches}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="", help="folder or hub id; built as for cpu-demo if left out")
    parser.add_argument("--out", required=True)
    parser.add_argument("--batches", type=int, default=8)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--max-length", type=int, default=2048)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    args = parser.parse_args()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    if not args.model:
        from llama_sft_helpers.demo_model import ensure_model

        args.model = str(ensure_model(read_profile("cpu-demo").model_id.removeprefix("local:")))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    report = {
        **source(card(), PACKAGES),
        "model": Path(args.model).name,
        **{name: measure(args, getattr(torch, name), device) for name in args.dtypes},
    }
    write(args.out, report)
    print(json.dumps({name: report[name]["summary"] for name in args.dtypes}, indent=1))


if __name__ == "__main__":
    main()
