"""Notebook 06: watch a run, prove what it changed, and find the way back after a lost session.

Nothing here trains. The callbacks plug into ``SFTTrainer``
(https://huggingface.co/docs/transformers/main_classes/callback); the rest reads what a run left behind.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import re
import shutil
import time
import warnings
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainerCallback

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

RUN_FILE = "run.json"
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")
# In the order in which transformers writes them: the trainer's state comes last.
_NEEDED = (
    "adapter_config.json",
    "adapter_model.safetensors",
    "optimizer.pt",
    "scheduler.pt",
    "rng_state.pth",
    "trainer_state.json",
)
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_WRITE_FAILED = ("PytorchStreamWriter", "No space left", "os error 28", "Disk quota exceeded")
_ORANGE, _BLUE = "#D55E00", "#0072B2"


class CheckpointError(ValueError):
    """A checkpoint is incomplete, damaged, or belongs to another run."""


class CheckpointWriteError(OSError):
    """A checkpoint could not be written; the message names the last good one."""


# --- Watching ---


def peak_memory_gib() -> float:
    """The peak so far, in GiB: PyTorch's allocations on the GPU, or this process's memory without one."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 2**30


class ThroughputCallback(TrainerCallback):
    """Measures each optimiser step: tokens per second, peak memory, time left.

    Real tokens are counted (trl's ``num_tokens``; padding is left out), and the time that evaluation and
    saving take does not count as training time.

    Attributes:
        rows: One dict a step: ``step``, ``seconds``, ``tokens``, ``tokens_per_second``, ``peak_gib``,
            ``seconds_left``.
    """

    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []
        self._started = 0.0
        self._step_seconds = 0.0
        self._tokens_before = 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the step's clock."""
        self._started = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop the step's clock."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self._step_seconds = time.perf_counter() - self._started

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Add the row of the step that was just logged."""
        if not logs or "loss" not in logs:
            return
        total = float(logs.get("num_tokens", 0.0))
        tokens, self._tokens_before = total - self._tokens_before, total
        steps = len(self.rows) + 1
        mean = (sum(row["seconds"] for row in self.rows) + self._step_seconds) / steps
        self.rows.append(
            {
                "step": state.global_step,
                "seconds": self._step_seconds,
                "tokens": tokens,
                "tokens_per_second": tokens / self._step_seconds if self._step_seconds else 0.0,
                "peak_gib": peak_memory_gib(),
                "seconds_left": mean * (state.max_steps - state.global_step),
            }
        )

    def to_frame(self) -> pd.DataFrame:
        """``rows`` as a table, indexed by step."""
        import pandas as pd

        columns = ["step", "seconds", "tokens", "tokens_per_second", "peak_gib", "seconds_left"]
        return pd.DataFrame(self.rows, columns=columns).set_index("step")


class LiveLossCallback(TrainerCallback):
    """Draws the training and held-out loss while the run goes on, in one figure that updates in place.

    Args:
        throughput: Its figures go into the title; put it before this callback in the trainer's list.
        every_seconds: Least time between two drawings.
    """

    def __init__(self, throughput: ThroughputCallback | None = None, every_seconds: float = 2.0) -> None:
        self._throughput = throughput
        self._every_seconds = every_seconds
        self._drawn = 0.0
        self._handle: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Begin a new figure."""
        self._handle, self._drawn = None, 0.0

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Draw again, unless the last drawing is too recent."""
        if time.perf_counter() - self._drawn >= self._every_seconds:
            self._draw(state)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Draw the finished curve."""
        self._draw(state)

    def _draw(self, state: Any) -> None:
        import matplotlib.pyplot as plt
        from IPython.display import display

        if not any("loss" in row for row in state.log_history):
            return
        figure, ax = plt.subplots(figsize=(7, 3), layout="constrained")
        plot_loss(state.log_history, ax=ax)
        ax.set_title(self._title(state))
        if self._handle is None:
            self._handle = display(figure, display_id=True)
        else:
            self._handle.update(figure)
        plt.close(figure)
        self._drawn = time.perf_counter()

    def _title(self, state: Any) -> str:
        parts = [f"step {state.global_step} of {state.max_steps}"]
        if self._throughput and self._throughput.rows:
            row = self._throughput.rows[-1]
            minutes, seconds = divmod(round(row["seconds_left"]), 60)
            parts.append(f"{row['tokens_per_second']:,.0f} tokens/s")
            parts.append(f"peak {row['peak_gib']:.1f} GiB")
            parts.append(f"{minutes}:{seconds:02d} left")
        return " · ".join(parts)


def plot_loss(log_history: Sequence[Mapping[str, Any]], label: str = "", ax: Axes | None = None) -> Axes:
    """Draw the training loss (line) and the held-out loss (points) over optimiser steps.

    Args:
        log_history: ``trainer.state.log_history``, or the same list from a ``trainer_state.json``.
        label: Put before the legend's names, to tell two runs apart.
        ax: Axes to draw on; None makes a figure.
    """
    import matplotlib.pyplot as plt

    ax = ax or plt.subplots(figsize=(7, 3.4), layout="constrained")[1]
    train = [(row["step"], row["loss"]) for row in log_history if "loss" in row]
    held_out = [(row["step"], row["eval_loss"]) for row in log_history if "eval_loss" in row]
    if train:
        ax.plot(*zip(*train, strict=True), color=_BLUE, label=f"{label} training".strip())
    if held_out:
        ax.plot(*zip(*held_out, strict=True), "o--", color=_ORANGE, label=f"{label} held out".strip())
    ax.set(title="Loss during training", xlabel="optimizer step", ylabel="cross-entropy (nats per token)")
    if train or held_out:
        ax.legend(frameon=False)
    ax.spines[["top", "right"]].set_visible(False)
    return ax


# --- Proving ---


def check_gradients_reach_adapters(model: torch.nn.Module) -> None:
    """Check that every LoRA A and B got a gradient, finite and not zero, in the last backward pass.

    With B = 0 the gradient of A is exactly zero (dL/dA = B^T ...), so look after at least one update.

    Raises:
        AssertionError: A matrix got none; the message counts them and names the first.
    """
    adapters = [(name, p) for name, p in model.named_parameters() if ".lora_" in name and p.requires_grad]
    if not adapters:
        raise AssertionError(
            "Measured: 0 trainable LoRA matrices. Expected: some. Call get_peft_model first."
        )
    bad = [
        name
        for name, p in adapters
        if p.grad is None or not torch.isfinite(p.grad).all() or not torch.count_nonzero(p.grad)
    ]
    if bad:
        raise AssertionError(
            f"Measured: {len(bad)} of {len(adapters)} LoRA matrices without a finite, non-zero gradient "
            f"(first: {bad[0]}). Expected: 0. Run a backward pass after an update, and check that nothing "
            "detaches the hidden states (gradient checkpointing needs model.enable_input_require_grads())."
        )


def checksum_base(model: torch.nn.Module) -> dict[str, int]:
    """A 64-bit checksum of every frozen weight's bytes, int8 scales included, computed where they lie.

    Two sums modulo 2^64 over the bytes, one weighted by position: a single changed bit always changes it.
    """
    sums = {name: _checksum(p.data) for name, p in model.named_parameters() if not p.requires_grad}
    for name, module in model.named_modules():
        scales = _int8_scales(module)
        if scales is not None:
            sums[f"{name}.SCB"] = _checksum(scales)
    return sums


def check_base_unchanged(model: torch.nn.Module, before: Mapping[str, int]) -> None:
    """Check that the frozen weights are bit for bit those that ``checksum_base`` saw.

    Raises:
        AssertionError: A weight changed, appeared or went; the message counts them and names the first.
    """
    after = checksum_base(model)
    changed = sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))
    if changed:
        raise AssertionError(
            f"Measured: {len(changed)} of {len(before)} base weights changed (first: {changed[0]}). "
            "Expected: 0. Only the adapter may train: check requires_grad, and that it was not merged."
        )


def _int8_scales(module: torch.nn.Module) -> torch.Tensor | None:
    """The row scales of a ``Linear8bitLt``: bitsandbytes moves them from the weight at the first forward."""
    at_weight = getattr(getattr(module, "weight", None), "SCB", None)
    at_state = getattr(getattr(module, "state", None), "SCB", None)
    scales = at_state if at_weight is None else at_weight
    return scales if isinstance(scales, torch.Tensor) else None


@torch.no_grad()
def _checksum(tensor: torch.Tensor) -> int:
    data = tensor.detach().contiguous().view(-1).view(torch.uint8)
    tail = -data.numel() % 8
    words = torch.nn.functional.pad(data, (0, tail)).view(torch.int64)
    weights = torch.arange(1, 2 * words.numel() + 1, 2, device=words.device)  # odd: no bit of a word is lost
    return hash((data.numel(), int(words.sum()), int((words * weights).sum())))


# --- The way back ---


def describe_run(trainer: Any) -> dict[str, Any]:
    """What must not change between a checkpoint and its continuation: model, adapter, data, schedule."""
    args, dataset = trainer.args, trainer.train_dataset
    base = trainer.model.get_base_model()
    lora = trainer.model.peft_config[trainer.model.active_adapter]
    shape = {key: getattr(base.config, key) for key in ("hidden_size", "num_hidden_layers", "vocab_size")}
    return {
        "model": Path(str(base.config._name_or_path)).name,
        **shape,
        "quantization": str(getattr(base, "quantization_method", None) or "none").rpartition(".")[2],
        "lora": f"r={lora.r}, lora_alpha={lora.lora_alpha}, {', '.join(sorted(lora.target_modules))}",
        "rows": len(dataset),
        "data": _data_checksum(dataset),
        "max_length": args.max_length,
        "packing": args.packing,
        "effective_batch": args.per_device_train_batch_size * args.gradient_accumulation_steps,
        "max_steps": args.max_steps,
        "learning_rate": args.learning_rate,
        "seed": args.seed,
    }


def _data_checksum(dataset: Any) -> str:
    rows = range(0, len(dataset), max(1, len(dataset) // 64))
    sample = [list(dataset[row]["input_ids"]) for row in rows]
    return hashlib.sha256(json.dumps(sample).encode()).hexdigest()[:16]


class RunGuardCallback(TrainerCallback):
    """Writes ``run.json`` beside the checkpoints, and refuses to save where the disk has no room.

    Args:
        run: From ``describe_run``.
    """

    def __init__(self, run: Mapping[str, Any]) -> None:
        self._run = dict(run)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Refuse a folder of another run, else write ``run.json``."""
        folder = Path(args.output_dir)
        if _checkpoints(folder):
            _check_same_run(folder, self._run)
        folder.mkdir(parents=True, exist_ok=True)
        _write_json(folder / RUN_FILE, self._run)

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Before a checkpoint is written: is there room for it?"""
        if not control.should_save or model is None:
            return
        trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
        needed = 3 * 4 * trainable * 1.1 + 2**24  # adapter and AdamW's two averages, tokenizer, small files
        free = shutil.disk_usage(args.output_dir).free
        if free < needed:
            raise CheckpointWriteError(
                _no_room(Path(args.output_dir), f"{needed / 2**20:,.0f} MiB are needed")
            )


@contextlib.contextmanager
def checkpoint_errors(output_dir: str | Path) -> Iterator[None]:
    """Turn a failed write inside the block into an error that names the folder and the last good checkpoint.

    Raises:
        CheckpointWriteError: A file could not be written for want of space.
    """
    try:
        yield
    except CheckpointWriteError:
        raise
    except (OSError, RuntimeError, ValueError) as error:
        full = getattr(error, "errno", None) in _NO_SPACE or any(sign in str(error) for sign in _WRITE_FAILED)
        if not full or isinstance(error, CheckpointError):
            raise
        raise CheckpointWriteError(_no_room(Path(output_dir), "writing stopped half-way")) from error


def latest_checkpoint(output_dir: str | Path, run: Mapping[str, Any] | None = None) -> str | None:
    """The newest complete checkpoint, for ``train(resume_from_checkpoint=...)``; None to start afresh.

    transformers writes a checkpoint file by file in its final folder, so a killed run leaves a half-written
    one; such a folder is skipped with a warning that says what is wrong with it.

    Args:
        output_dir: The trainer's ``output_dir``; it need not exist.
        run: From ``describe_run``; checkpoints of another run are refused.

    Raises:
        CheckpointError: The folder's checkpoints belong to another model or other settings.
    """
    folder = Path(output_dir)
    for checkpoint in _checkpoints(folder):
        try:
            check_checkpoint(checkpoint)
        except CheckpointError as error:
            warnings.warn(f"Skipped: {error}", stacklevel=2)
            continue
        if run is not None:
            _check_same_run(folder, run)
        return str(checkpoint)
    return None


def check_checkpoint(folder: str | Path) -> None:
    """Check that a checkpoint has every file that resuming reads, each complete.

    Raises:
        CheckpointError: A file is missing, cut short or unreadable; the message names it.
    """
    folder = Path(folder)
    for name in _NEEDED:
        path = folder / name
        problem = "is missing" if not path.is_file() else _damage(path)
        if problem:
            raise CheckpointError(
                f"{path} {problem}. The checkpoint is incomplete: delete {folder.name}, or resume from an "
                "older one (latest_checkpoint finds it)."
            )
    step = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8")).get("global_step")
    if not folder.name.endswith(f"-{step}"):
        raise CheckpointError(
            f"{folder} holds step {step}: it was renamed or overwritten. Resume from another."
        )


def _checkpoints(folder: Path) -> list[Path]:
    """Checkpoint folders, newest step first."""
    found = [(int(match[1]), path) for path in folder.glob("checkpoint-*") if (match := _match(path))]
    return [path for _, path in sorted(found, reverse=True)]


def _match(path: Path) -> re.Match[str] | None:
    return _CHECKPOINT.fullmatch(path.name) if path.is_dir() else None


def _damage(path: Path) -> str:
    """What is wrong with a file, or nothing: safetensors header, zip directory and JSON must be whole."""
    from safetensors import SafetensorError, safe_open

    try:
        if path.suffix == ".safetensors":
            with safe_open(str(path), framework="pt") as tensors:
                return "" if tensors.keys() else "holds no tensors"
        if path.suffix == ".json":
            json.loads(path.read_text(encoding="utf-8"))
            return ""
        with zipfile.ZipFile(path) as archive:
            return f"is damaged in {broken}" if (broken := archive.testzip()) else ""
    except (SafetensorError, ValueError, OSError, zipfile.BadZipFile) as error:
        return f"is cut short or damaged ({error})"


def _check_same_run(folder: Path, run: Mapping[str, Any]) -> None:
    path = folder / RUN_FILE
    if not path.is_file():
        return
    before = json.loads(path.read_text(encoding="utf-8"))
    differing = [key for key in before.keys() | run.keys() if before.get(key) != run.get(key)]
    if differing:
        said = "; ".join(
            f"{key}: {before.get(key)!r} there, {run.get(key)!r} here" for key in sorted(differing)
        )
        raise CheckpointError(
            f"The checkpoints in {folder} belong to another run ({said}). Set these back to continue it, or "
            "choose another output folder (SFT_OUTPUT_DIR) to start a new one."
        )


def _no_room(folder: Path, what: str) -> str:
    free = shutil.disk_usage(folder).free / 2**20
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        last = latest_checkpoint(folder)
    kept = f"the last good checkpoint is {Path(last).name}, intact" if last else "there is no checkpoint yet"
    return (
        f"The disk of {folder} is full: {what}, {free:,.0f} MiB are free; {kept}. Free some space (old "
        "checkpoints, Google Drive's bin) and run this cell again to go on from there."
    )


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    scratch = path.with_name(f".{path.name}.tmp")
    scratch.write_text(json.dumps(content, indent=1, default=str), encoding="utf-8")
    scratch.replace(path)


def write_training_summary(path: str | Path, summary: Mapping[str, Any]) -> None:
    """Write ``training_summary.json`` atomically; notebook 07 reads it."""
    _write_json(Path(path), summary)
