"""``training_summary.json``: what notebook 06 says of its run and others read."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llama_sft_helpers.core.files import FilesError, write_text

# What readers rely on; 06 adds more, such as ``device``.
SUMMARY_KEYS = (
    "eval_loss_before",
    "eval_loss_after",
    "train_seconds",
    "train_tokens",
    "peak_gib",
    "adapter_sha256",
    "profile",
    "versions",
)


def write_training_summary(path: str | Path, summary: Mapping[str, Any]) -> None:
    """Write ``training_summary.json`` atomically; notebook 07 reads it."""
    write_text(path, json.dumps(summary, indent=1))


def read_training_summary(path: str | Path) -> dict[str, Any]:
    """The ``training_summary.json`` that notebook 06 wrote.

    Raises:
        FilesError: The file is missing or damaged, or lacks a key.
    """
    path = Path(path)
    if not path.is_file():
        raise FilesError(f"There is no {path}. Run notebook 06 first: it writes it.")
    try:
        summary = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise FilesError(f"{path} is damaged ({error}). Run notebook 06 again.") from error
    if missing := [key for key in SUMMARY_KEYS if key not in summary]:
        raise FilesError(f"{path} lacks {', '.join(missing)}. Run notebook 06 again.")
    return dict(summary)
