"""What every kept result says of itself, and how it is written."""

from __future__ import annotations

import contextlib
import importlib.metadata
import itertools
import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from llama_sft_helpers.core.files import write_text  # noqa: E402

LIBRARIES = ("torch", "transformers", "peft", "trl", "bitsandbytes", "accelerate", "datasets")


def cores() -> int:
    """Logical cores that this process may use; where the system does not say so (macOS, Windows), all."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def peak_gib() -> float:
    """The peak of this process's main memory so far."""
    if sys.platform == "win32":  # where the standard library has no module resource
        return psutil.Process().memory_info().peak_wset / 2**30
    import resource

    unit = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes, Linux KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def card() -> str:
    """The GPU that torch takes, or the CPU; torch opens the GPU for it."""
    import torch

    cpu = f"CPU, {cores()} cores, {platform.machine()}"
    return torch.cuda.get_device_name() if torch.cuda.is_available() else cpu


def cards() -> str:
    """The GPUs' names, asked of the driver, so that this process opens none."""
    names = subprocess.run(["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"],
                           capture_output=True, text=True, check=True).stdout.split("\n")  # fmt: skip
    return ", ".join(f"{len(list(group))} x {name}" for name, group in itertools.groupby(filter(None, names)))


def source(of: str, packages: Iterable[str] = LIBRARIES) -> dict[str, Any]:
    """Card (``of``), versions of the packages that are installed, and the command that is running."""
    versions = {}
    for name in packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    command = shlex.join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]])
    return {"card": of, "versions": versions, "command": command.replace(f"{ROOT}/", "")}


def write(path: Path | str, content: Mapping[str, Any]) -> None:
    """Write a result whole or not at all: a cut run leaves the file that was there."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")
