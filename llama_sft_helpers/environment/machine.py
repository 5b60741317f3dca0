"""What this machine has: packages, driver, GPU, memory, disk."""

from __future__ import annotations

import dataclasses
import os
import platform
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from llama_sft_helpers.core.files import free_bytes
from llama_sft_helpers.environment.versions import PACKAGES, version_in_memory, version_on_disk

_TOOL_SECONDS = 10.0
NO_ANSWER = "no answer"


@dataclasses.dataclass(frozen=True)
class Machine:
    """What ``measure`` saw. Sizes are in GiB; None means that it is not there."""

    python: str
    on_disk: dict[str, str]  # package -> version that is installed
    in_memory: dict[str, str]  # package -> version that this process has imported
    driver_cuda: str | None  # newest CUDA the driver runs, by nvidia-smi; "no answer" if that hangs
    toolkit_cuda: str | None  # CUDA of nvcc; "no answer" if it hangs
    gpu: Any  # torch's properties of the first GPU that it can use: name, total_memory, major, minor
    free_disk_gib: float  # where the hub's downloads go
    ram_gib: float
    colab: bool
    torch_error: str = ""  # why torch cannot be imported


def measure() -> Machine:
    """Look at this machine; a tool or a driver that hangs is given up."""
    import psutil

    driver = _ask("nvidia-smi", r"CUDA (?:UMD )?Version\s*:\s*([\d.]+)")
    gpu, torch_error = _ask_torch(driver_hangs=driver == NO_ANSWER)
    return Machine(
        python=platform.python_version(),
        on_disk={name: version for name in PACKAGES if (version := version_on_disk(name))},
        in_memory={name: version for name in PACKAGES if (version := version_in_memory(name))},
        driver_cuda=driver,
        toolkit_cuda=_ask("nvcc", r"release ([\d.]+)", "--version"),
        gpu=gpu,
        free_disk_gib=free_bytes(hub_cache()) / 2**30,
        ram_gib=psutil.virtual_memory().total / 2**30,
        colab="google.colab" in sys.modules or "COLAB_RELEASE_TAG" in os.environ,
        torch_error=torch_error,
    )


def _ask(tool: str, pattern: str, *arguments: str) -> str | None:
    """What a command-line tool says of its CUDA version; None without the tool, "no answer" if it hangs."""
    try:
        answer = subprocess.run(  # noqa: S603
            [tool, *arguments], check=False, capture_output=True, text=True, timeout=_TOOL_SECONDS
        )
    except subprocess.TimeoutExpired:
        return NO_ANSWER
    except OSError:  # there is no such program
        return None
    found = re.search(pattern, answer.stdout)
    return found[1] if found else None


def _ask_torch(*, driver_hangs: bool) -> tuple[Any, str]:
    """The first GPU that torch can use, and why torch cannot be imported; a hanging driver is not asked."""
    try:
        import torch
    except (ImportError, OSError, RuntimeError) as error:  # a library of CUDA's is missing, for instance
        return None, f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
    try:
        seen = not driver_hangs and torch.cuda.is_available()
        return torch.cuda.get_device_properties(0) if seen else None, ""
    except RuntimeError:
        return None, ""


def cpu_slowdown(dtype: str) -> float:
    """How many times as long as in float32 this CPU takes for a product in another type.

    PyTorch has no public way to ask a CPU for its 16-bit units, and one that lacks them can still be quick.
    So two products of small matrices are timed, which takes some tenths of a second.

    Args:
        dtype: A type of torch's by name, such as ``bfloat16``.
    """
    import torch
    from torch.utils.benchmark import Timer

    def seconds(kind: torch.dtype) -> float:
        square = torch.ones(256, 256, dtype=kind)
        timer = Timer("square @ square", globals={"square": square})
        return float(timer.blocked_autorange(min_run_time=0.02).median)

    return seconds(getattr(torch, dtype)) / seconds(torch.float32)


def hub_cache() -> Path:
    """Where the hub's downloads go, as the client that downloads them has worked it out."""
    try:
        from huggingface_hub import constants
    except ImportError:  # the table says so; without a client nothing is downloaded
        return Path.home() / ".cache" / "huggingface" / "hub"
    return Path(constants.HF_HUB_CACHE)
