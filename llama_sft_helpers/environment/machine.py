"""What this machine has: packages, driver, GPU, memory, disk."""

from __future__ import annotations

import dataclasses
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from llama_sft_helpers.core.files import free_bytes
from llama_sft_helpers.demo_model import demo_model_fix
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
    gpu: str | None  # the first GPU that torch can use
    gpu_gib: float
    capability: tuple[int, int] | None
    bf16: bool  # computes bfloat16 natively
    free_disk_gib: float  # where the hub's downloads go
    ram_gib: float
    colab: bool
    torch_error: str = ""  # why torch, though installed, cannot be imported
    visible_devices: str | None = None  # $CUDA_VISIBLE_DEVICES; None where it is not set
    demo_model_fix: str = ""  # why the demo model cannot be built, with the command that fixes it


def measure() -> Machine:
    """Look at this machine; a tool or a driver that hangs is given up."""
    import psutil

    driver = _ask("nvidia-smi", r"CUDA (?:UMD )?Version\s*:\s*([\d.]+)")
    gpu = None if driver == NO_ANSWER else _first_gpu()  # a driver that hangs would hang torch as well
    on_disk = {name: version for name in PACKAGES if (version := version_on_disk(name))}
    return Machine(
        python=platform.python_version(),
        on_disk=on_disk,
        in_memory={name: version for name in PACKAGES if (version := version_in_memory(name))},
        driver_cuda=driver,
        toolkit_cuda=_ask("nvcc", r"release ([\d.]+)", "--version"),
        gpu=gpu.name if gpu else None,
        gpu_gib=gpu.total_memory / 2**30 if gpu else 0.0,
        capability=(gpu.major, gpu.minor) if gpu else None,
        bf16=gpu.major >= 8 if gpu else False,
        free_disk_gib=free_bytes(hub_cache()) / 2**30,
        ram_gib=psutil.virtual_memory().total / 2**30,
        colab="google.colab" in sys.modules or "COLAB_RELEASE_TAG" in os.environ,
        torch_error=_torch_error() if "torch" in on_disk else "",
        visible_devices=os.environ.get("CUDA_VISIBLE_DEVICES"),
        demo_model_fix=demo_model_fix(),
    )


def _ask(tool: str, pattern: str, *arguments: str) -> str | None:
    """What a command-line tool says of its CUDA version; None without the tool, "no answer" if it hangs."""
    if not (path := shutil.which(tool)):
        return None
    command = [path, *arguments]
    try:
        answer = subprocess.run(  # noqa: S603
            command, check=False, capture_output=True, text=True, timeout=_TOOL_SECONDS
        )
    except subprocess.TimeoutExpired:
        return NO_ANSWER
    except OSError:
        return None
    found = re.search(pattern, answer.stdout)
    return found[1] if found else None


def _first_gpu() -> Any:
    try:
        import torch

        return torch.cuda.get_device_properties(0) if torch.cuda.is_available() else None
    except (ImportError, OSError, RuntimeError):
        return None


def _torch_error() -> str:
    try:
        import torch  # noqa: F401
    except (ImportError, OSError, RuntimeError) as error:  # a library of CUDA's is missing, for instance
        return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
    return ""


def hub_cache() -> Path:
    """Where the hub's downloads go, as the client that downloads them has worked it out."""
    try:
        from huggingface_hub import constants
    except ImportError:  # the table says so; without a client nothing is downloaded
        return Path.home() / ".cache" / "huggingface" / "hub"
    return Path(constants.HF_HUB_CACHE)
