"""Where a CPU's time goes, by cause: a training step, a batch of an evaluation, a step of generation.

    python benchmarks/cpu_profile.py --out benchmarks/results/cpu_profile.json

SmolLM2, LoRA and both switches for CPUs as in notebook 06 with profile ``cpu-demo``, on one thread, under
each ``--limit`` of the instruction sets. A limit holds only if it is set before PyTorch starts, so each runs
in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import datasets
import report
import torch
import transformers
from minutes import LIMITS
from peft import LoraConfig, get_peft_model
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, TrainerCallback
from trl import SFTConfig, SFTTrainer

from llama_sft_helpers import data, speed
from llama_sft_helpers.profiles import Profile, load_profile

REPEATS = 3
GENERATED = 32  # rows that generate together
REMARK = (
    "Other processes ran on the machine (load_average) and stretched the wall time that the profiler counts. "
    "So of each cause its least time in a repeat was taken, and scaled to the CPU time."
)
PYTHON = "Python and calls"
PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm")
# A cause, what its operators are called from, and how they begin; the first that fits counts.
CAUSES: list[tuple[str, tuple[str, ...], tuple[str, ...]]] = [
    ("trl's head", ("ChunkedLogProbFunction", "ChunkedLogProbFunctionBackward"), ("",)),
    ("int8 products", ("bitsandbytes::int8_linear_matmul",), ("aten::",)),
    ("float32 products, int8 layers", ("MatMul8bitFp", "MatMul8bitFpBackward", "MatMul8bitLt"), PRODUCTS),
    ("dequantizing", ("MatMul8bitFp", "MatMul8bitFpBackward"), ("aten::",)),
    ("rounding and rescaling", ("MatMul8bitLt",), ("aten::",)),
    (
        "attention",
        ("aten::scaled_dot_product_attention", "ScaledDotProductFlashAttentionForCpuBackward0"),
        ("aten::",),
    ),
    ("optimizer", ("Optimizer.step#AdamW.step",), ("aten::",)),
    ("copies, as of keys and values", ("aten::cat", "aten::clone"), ("aten::",)),
    ("float32 products, LoRA and head", (), PRODUCTS),
    ("norms, SwiGLU, sums", (), ("aten::",)),
]


def cause_of(path: Sequence[str]) -> str:
    """The cause of an operator's own time, by its name and the names of those that it was called from."""
    for cause, callers, beginnings in CAUSES:
        if path[0].startswith(beginnings) and (not callers or set(callers) & set(path)):
            return cause
    return PYTHON


class Watch:
    """Profiles a piece of work several times."""

    def __init__(self) -> None:
        self._walls: list[float] = []
        self._cpus: list[float] = []
        self._found: list[dict[str, float]] = []  # seconds by cause

    def start(self) -> None:
        """Begin a repeat."""
        self._profile = profile(activities=[ProfilerActivity.CPU])
        self._profile.start()
        self._began = time.perf_counter(), time.process_time()

    def stop(self) -> None:
        """End a repeat."""
        self._walls.append(time.perf_counter() - self._began[0])
        self._cpus.append(time.process_time() - self._began[1])
        self._profile.stop()
        events = [(names(event), event.self_cpu_time_total / 1e6) for event in self._profile.events()]
        self._found.append(by_cause(events, self._walls[-1]))

    def result(self) -> dict[str, Any]:
        """The least of the repeats; seconds of each cause are scaled to the CPU time."""
        least = {cause: min(found[cause] for found in self._found) for cause in self._found[0]}
        cpu, total = min(self._cpus), sum(least.values())
        seconds = {cause: round(value / total * cpu, 4) for cause, value in least.items() if value}
        return {"cpu_seconds": round(cpu, 3), "wall_seconds": round(min(self._walls), 3), "seconds": seconds}


def by_cause(events: Iterable[tuple[Sequence[str], float]], wall: float) -> dict[str, float]:
    """Seconds of each cause; Python's are those in which no operator ran."""
    found = dict.fromkeys([cause for cause, *_ in CAUSES] + [PYTHON], 0.0)
    for path, seconds in events:
        found[cause_of(path)] += seconds
    found[PYTHON] += wall - sum(found.values())
    return found


def names(event: Any) -> list[str]:
    path = []
    while event is not None:
        path.append(event.name)
        event = event.cpu_parent
    return path


class WatchSteps(TrainerCallback):
    """Profiles each training step but the first."""

    def __init__(self, watch: Watch) -> None:
        self._watch = watch

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """The first step is slower, so it is left out."""
        if state.global_step:
            self._watch.start()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """The step is done, the optimizer's part too."""
        if state.global_step > 1:
            self._watch.stop()


def build_model(settings: Profile) -> Any:
    model = AutoModelForCausalLM.from_pretrained(
        settings.model_id,
        quantization_config=BitsAndBytesConfig(load_in_8bit=True),
        device_map={"": "cpu"},
        dtype=settings.torch_dtype,
    )
    projections = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    lora = LoraConfig(r=16, lora_alpha=16, lora_dropout=0, task_type="CAUSAL_LM", target_modules=projections)
    return get_peft_model(model, lora)


def build_trainer(model: Any, tokenizer: Any, rows: Any, settings: Profile, folder: str) -> SFTTrainer:
    batch = settings.per_device_train_batch_size
    config = SFTConfig(
        output_dir=folder,
        max_length=settings.max_length,
        per_device_train_batch_size=batch,
        per_device_eval_batch_size=batch,
        max_steps=1 + REPEATS,
        learning_rate=settings.learning_rate,
        bf16=False,
        gradient_checkpointing=False,
        save_strategy="no",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        report_to="none",
    )
    rows = rows.select(range(batch))
    trainer = SFTTrainer(model, config, train_dataset=rows, eval_dataset=rows, processing_class=tokenizer)
    for parameter in (weight for weight in model.parameters() if weight.requires_grad):
        parameter.data = parameter.data.float()  # as in notebook 06: trl had made them bf16
    return trainer


def training_step(trainer: SFTTrainer) -> Watch:
    watch = Watch()
    trainer.add_callback(WatchSteps(watch))
    trainer.train()
    return watch


def evaluation_batch(trainer: SFTTrainer, batch: Any) -> Watch:
    watch = Watch()
    trainer.model.eval()
    trainer.prediction_step(trainer.model, batch, prediction_loss_only=True)  # the first one is slower
    for _ in range(REPEATS):
        watch.start()
        trainer.prediction_step(trainer.model, batch, prediction_loss_only=True)
        watch.stop()
    return watch


@torch.inference_mode()
def generation_step(model: Any, batch: Any) -> Watch:
    """The step after the prompts, with their keys and values in the cache; each repeat adds a token."""
    watch, mask = Watch(), batch["attention_mask"]
    model.eval()
    out = model(**batch, use_cache=True)
    for _ in range(REPEATS):
        ids = out.logits[:, -1:].argmax(-1)
        mask = torch.cat([mask, torch.ones_like(ids)], dim=1)
        watch.start()
        out = model(input_ids=ids, attention_mask=mask, past_key_values=out.past_key_values, use_cache=True)
        watch.stop()
    return watch


def measure() -> dict[str, Any]:
    """All three in this process, under the limit that its environment sets."""
    settings = load_profile("cpu-demo")
    model, tokenizer = build_model(settings), AutoTokenizer.from_pretrained(settings.model_id)
    rows, _ = data.load_rows(settings.dataset_id)
    rows = data.format_rows(rows, tokenizer, settings.prompt_format)
    prompts = tokenizer(rows["prompt"][:GENERATED], padding=True, padding_side="left", return_tensors="pt")
    with tempfile.TemporaryDirectory() as folder:
        trainer = build_trainer(model, tokenizer, rows, settings, folder)
        batch = next(iter(trainer.get_eval_dataloader()))
        watches = {
            "training step": training_step(trainer),
            "evaluation batch": evaluation_batch(trainer, batch),
        }
    watches["generation step"] = generation_step(model, prompts)
    shapes = [batch["input_ids"].shape, batch["input_ids"].shape, prompts["input_ids"].shape]
    return {
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "load_average": round(os.getloadavg()[0], 1),
        **{
            name: {"rows": shape[0], "padded_tokens_of_a_row": shape[1], **watch.result()}
            for (name, watch), shape in zip(watches.items(), shapes, strict=True)
        },
    }


def measure_apart(limit: str) -> dict[str, Any]:
    """The same in a process of its own, on one thread."""
    environment = {**os.environ, **LIMITS[limit], "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "found.json")
        command = [sys.executable, __file__, "--limit", limit, "--here", "--out", str(path)]
        subprocess.run(command, env=environment, check=True)
        return dict(json.loads(path.read_text(encoding="utf-8")))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--limit", nargs="+", choices=LIMITS, default=list(LIMITS))
    parser.add_argument("--here", action="store_true", help="in this process, as its environment is")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    if args.here:
        logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
        transformers.utils.logging.disable_progress_bar()
        datasets.disable_progress_bars()
        speed.use_cpu_kernels()
        speed.score_labels_only()
        report.write(args.out, measure())
        return
    result = {
        **report.source(report.card()),
        "remark": REMARK,
        "threads": 1,
        "repeats": REPEATS,
        "limits": {},
    }
    for limit in args.limit:
        result["limits"][limit] = measure_apart(limit)
        print(limit, json.dumps(result["limits"][limit], indent=1), flush=True)
        report.write(args.out, result)


if __name__ == "__main__":
    main()
