"""What a profile needs of a machine: GPU memory, disk, RAM; in GiB."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import Any

from llama_sft_helpers.core.llama import Shape, is_llama3, load_llama3_config
from llama_sft_helpers.core.waiting import within
from llama_sft_helpers.environment.machine import hub_cache
from llama_sft_helpers.profiles import Profile

_RESULTS_GIB = 1.0  # adapter and checkpoints
_HUB_SECONDS = 5.0  # how long the hub may take to say what is left to download


def needed_ram_gib(profile: Profile) -> float:
    """Main memory that loading and training take."""
    # Llama 3's largest shard is 5 GB; training on the CPU peaked at 3.3 GiB in cpu-demo
    return 1.0 if profile.name == "ci-tiny" else 5.0


def needed_gpu_gib(profile: Profile) -> float:
    """GPU memory that training takes: the plan for Llama 3 8B, nine tenths of the card for other models."""
    from llama_sft_helpers.memory.plan import plan_memory

    if profile.gpu_gib == 0 or not is_llama3(profile.model_id, "8B"):
        return 0.9 * profile.gpu_gib
    return float(plan_memory(load_llama3_config(), profile)["gib"].sum())


def needed_disk_gib(profile: Profile) -> float:
    """Space for what is still to be downloaded (16-bit weights) and for the results."""
    if not is_llama3(profile.model_id, "8B") or Path(profile.model_id).is_dir():
        return _RESULTS_GIB
    left = _left_to_download_gib(profile.model_id)
    return (_planned_download_gib(profile.model_id) if left is None else left) + _RESULTS_GIB


def _planned_download_gib(model_id: str) -> float:
    """The size that the model's shape gives, less what lies in the cache already."""
    shape = Shape.of(load_llama3_config())
    download = 2 * (shape.linear_weights + shape.unquantized) / 2**30
    blobs = hub_cache() / f"models--{model_id.replace('/', '--')}" / "blobs"
    done = sum(path.stat().st_size for path in blobs.glob("*")) / 2**30
    return max(download - done, 0.0)


def _left_to_download_gib(model_id: str) -> float | None:
    """What the hub's client would still download; None if the hub does not say so in time."""
    # No network, no token, no access, an old client: whatever it is, the planned size stands in.
    with contextlib.suppress(Exception):
        if found := within(_HUB_SECONDS, lambda: _dry_run(model_id)):
            return sum(file.file_size for file in found if file.will_download) / 2**30
    return None


def _dry_run(model_id: str) -> list[Any]:
    """The files that ``from_pretrained`` reads of a repository, and which of them are here already."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils import tqdm

    class Silent(tqdm):
        def __init__(self, *arguments: object, **options: object) -> None:
            super().__init__(*arguments, **{**options, "disable": True})

    return snapshot_download(
        model_id,
        dry_run=True,
        allow_patterns=["*.safetensors", "*.json", "tokenizer*"],
        ignore_patterns="original/*",  # the same weights once more, in Meta's own format
        etag_timeout=_HUB_SECONDS,
        token=False if "google.colab" in sys.modules else None,  # else the reader is asked for the secret
        tqdm_class=Silent,
    )
