"""Notebook 06, the way back: which checkpoint is whole, whose it is, and what to do when the disk is full.

transformers writes a checkpoint file by file in its final folder
(https://huggingface.co/docs/transformers/main_classes/trainer#checkpoints), so a killed run leaves a
half-written one behind. ``RunGuardCallback`` seals each with checksums when it is complete: without its seal,
or unlike it, a checkpoint is not used.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import shutil
import warnings
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback

from llama_sft_helpers.core.files import free_bytes, is_full_disk, write_text

if TYPE_CHECKING:
    import torch
    from datasets import Dataset
    from transformers import TrainerControl, TrainerState, TrainingArguments

RUN_FILE = "run.json"
CHECKSUMS_FILE = "checksums.json"


class CheckpointError(ValueError):
    """A checkpoint is incomplete, damaged, or belongs to another run."""


class CheckpointWriteError(OSError):
    """A checkpoint could not be written; the message names the last good one."""


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
        "lora": f"r={lora.r}, lora_alpha={lora.lora_alpha}, {_describe(lora.target_modules)}",
        "rows": len(dataset),
        "data": _data_checksum(dataset),
        "max_length": args.max_length,
        "packing": args.packing,
        "effective_batch": args.per_device_train_batch_size * args.gradient_accumulation_steps,
        "max_steps": args.max_steps,
        "learning_rate": args.learning_rate,
        "seed": args.seed,
    }


def _describe(target_modules: str | Collection[str]) -> str:
    """The names of LoRA's target modules, or the one pattern that a text is to PEFT."""
    if isinstance(target_modules, str):
        return f"modules matching {target_modules!r}"
    return ", ".join(sorted(target_modules))


def _data_checksum(dataset: Dataset) -> str:
    rows = range(0, len(dataset), max(1, len(dataset) // 64))
    sample = [list(dataset[row]["input_ids"]) for row in rows]
    return hashlib.sha256(json.dumps(sample).encode()).hexdigest()[:16]


class RunGuardCallback(TrainerCallback):
    """Writes what ``describe_run`` gave beside the checkpoints, seals each, and saves only with room."""

    def __init__(self, run: Mapping[str, Any]) -> None:
        self._run = dict(run)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Refuse a folder of another run, else write ``run.json``."""
        folder = Path(str(args.output_dir))
        if _checkpoints(folder):
            _check_same_run(folder, self._run)
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / RUN_FILE, json.dumps(self._run, indent=1))

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: torch.nn.Module | None = None,
        **kwargs: object,
    ) -> None:
        """Before a checkpoint is written: make its place free, and is there room for it?"""
        if not control.should_save or model is None:
            return
        output_dir = str(args.output_dir)
        # A damaged checkpoint that was skipped may stand there; PEFT would read the README in it.
        shutil.rmtree(Path(output_dir) / f"checkpoint-{state.global_step}", ignore_errors=True)
        trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
        needed = 3 * 4 * trainable * 1.1 + 2**24  # adapter and AdamW's two averages, tokenizer, small files
        if free_bytes(output_dir) < needed:
            raise CheckpointWriteError(_no_room(output_dir, f"{needed / 2**20:,.0f} MiB are needed"))

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Seal the checkpoint, whose files hold no checksum of their own, without PEFT's empty model card."""
        folder = Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"
        (folder / "README.md").unlink(missing_ok=True)  # PEFT has no option to leave it out
        sums = {path.name: _sha256(path) for path in sorted(folder.iterdir()) if path.is_file()}
        write_text(folder / CHECKSUMS_FILE, json.dumps(sums, indent=1))


@contextlib.contextmanager
def checkpoint_errors(output_dir: str | Path) -> Iterator[None]:
    """Turn a failed write inside the block into an error that names the folder and the last good checkpoint.

    Raises:
        CheckpointWriteError: A file could not be written for want of space.
    """
    try:
        yield
    except Exception as error:  # safetensors' own error is of no common kind
        if not is_full_disk(error):
            raise
        raise CheckpointWriteError(_no_room(output_dir, "writing stopped half-way")) from error


def latest_checkpoint(
    output_dir: str | Path, run: Mapping[str, Any] | None = None, before_step: float = math.inf
) -> str | None:
    """The newest whole checkpoint, for ``train(resume_from_checkpoint=...)``; None to start afresh.

    Others are skipped with a warning that says what is wrong with them.

    Args:
        output_dir: The trainer's ``output_dir``; it need not exist.
        run: From ``describe_run``; checkpoints of another run are refused.
        before_step: Only checkpoints of earlier steps. Give it ``max_steps``: resumed from its last step, a
            finished run would train one step too many.

    Raises:
        CheckpointError: The folder's checkpoints belong to another model or other settings.
    """
    folder = Path(output_dir)
    if run is not None and _checkpoints(folder):
        _check_same_run(folder, run)
    for checkpoint in (path for step, path in _checkpoints(folder) if step < before_step):
        try:
            check_checkpoint(checkpoint)
        except CheckpointError as error:
            warnings.warn(f"Skipped: {error}", stacklevel=2)
        else:
            return str(checkpoint)
    return None


def check_checkpoint(folder: str | Path) -> None:
    """Check that a checkpoint is as it was sealed: every file there, and none changed since.

    Raises:
        CheckpointError: It has no seal, a file is missing or changed, or the folder was renamed.
    """
    folder = Path(folder)
    if problem := _problem(folder):
        raise CheckpointError(
            f"{problem}. The checkpoint is incomplete: delete {folder.name}, or resume from an older one "
            "(latest_checkpoint finds it)."
        )


def _problem(folder: Path) -> str:
    """What is wrong with a checkpoint, or nothing."""
    seal = folder / CHECKSUMS_FILE
    if not seal.is_file():
        return f"{seal} is missing: the run ended before it was written"
    try:
        sums = json.loads(seal.read_text(encoding="utf-8"))
    except ValueError as error:
        return f"{seal} is cut short or damaged ({error})"
    for path in map(folder.joinpath, sums):
        if not path.is_file():
            return f"{path} is missing"
        if _sha256(path) != sums[path.name]:
            return f"{path} is cut short or damaged: its checksum differs"
    step = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))["global_step"]
    same = folder.name == f"checkpoint-{step}"
    return "" if same else f"{folder} holds step {step}: it was renamed or overwritten"


def _checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """Step and folder of each checkpoint, the newest first."""
    folders = [path for path in folder.glob("checkpoint-*") if path.is_dir()]
    named = [(path.name.removeprefix("checkpoint-"), path) for path in folders]
    return sorted(((int(step), path) for step, path in named if step.isdecimal()), reverse=True)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


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


def _no_room(output_dir: str | Path, what: str) -> str:
    free = free_bytes(output_dir) / 2**20
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        last = latest_checkpoint(output_dir)
    kept = f"the last good checkpoint is {Path(last).name}, intact" if last else "there is no checkpoint yet"
    return (
        f"The disk of {output_dir} is full: {what}, {free:,.0f} MiB are free; {kept}. Free some space (old "
        "checkpoints, Google Drive's bin) and run this cell again to go on from there."
    )
