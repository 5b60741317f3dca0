"""Notebook 01: what this machine has, and what of it must be fixed.

Measuring and judging are kept apart: ``_measure`` looks at the machine, ``_judge`` compares what it saw with
the versions this project is tested with. Those are read from the installed package's own metadata, which is
built from ``requirements-tested.txt`` and ``requirements-colab.txt``, so no version is written down twice.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llama_sft_helpers.core.files import free_bytes
from llama_sft_helpers.core.llama import is_llama3, load_llama3_config
from llama_sft_helpers.demo_model import demo_model_fix
from llama_sft_helpers.profiles import Profile, read_profile

if TYPE_CHECKING:
    import pandas as pd
    from packaging.specifiers import SpecifierSet

_PACKAGE = "llama-sft-helpers"
PACKAGES = (
    "torch", "transformers", "peft", "trl", "bitsandbytes", "accelerate", "datasets", "huggingface_hub",
    "tokenizers", "ipywidgets", "pyarrow", "torchao",
)  # fmt: skip
COLUMNS = ["component", "installed", "tested", "post_2025", "status", "fix"]
# What the blog post that this series began as ran on, as far as it recorded it: a fact of the past.
_POST_2025 = {
    "torch": "2.5.1+cu124", "transformers": "4.48.3", "peft": "0.14.0", "trl": "0.15.0",
    "bitsandbytes": "0.45.2", "accelerate": "1.3.0", "CUDA driver": "12.4", "CUDA toolkit": "12.5",
    "GPU": "A100", "GPU memory": "40 GB",
}  # fmt: skip
# Statuses that must be fixed, in the order to fix them: a new runtime or profile changes the
# rest, and a restart comes last, because every install may ask for another one.
MUST_FIX = (
    "no GPU", "GPU hidden", "unsupported", "too little", "missing", "broken", "too old", "too new", "restart",
)  # fmt: skip
# A bound that no package declares: peft raises on an older torchao as soon as it wraps a 16-bit Linear
# (peft.import_utils.is_torchao_available). No torchao at all is fine.
_UNDECLARED = {"torchao": ">=0.16"}
_OPTIONAL = ("torchao",)
_LEAST_CAPABILITY = (7, 5)  # LLM.int8's tensor cores: Turing, https://huggingface.co/docs/bitsandbytes
_LEAST_RAM_GIB = {"ci-tiny": 1.0}
_SHARD_RAM_GIB = 5.0  # Llama 3's largest shard is 5 GB; training on the CPU peaked at 4.7 GB in cpu-demo
_RESULTS_GIB = 1.0  # adapter and checkpoints
_TOOL_SECONDS = 10.0
_HUB_SECONDS = 5.0  # how long the hub may take to say what is left to download
_NO_ANSWER = "no answer"
_NOT_THERE = ("not there", "")
_RESTART = "Runtime > Restart session, then run from the top"
_CHANGE_RUNTIME = "Runtime > Change runtime type > A100, L4 or T4 GPU"


class EnvironmentCheckError(AssertionError):
    """Something of this machine must be fixed before the series can run."""


_Row = tuple[str, str, str, str, str, str]  # in the order of COLUMNS


@dataclasses.dataclass(frozen=True)
class Machine:
    """What ``_measure`` saw. Sizes are in GiB; None means that it is not there."""

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


def summarize_environment(profile: Profile | None = None) -> pd.DataFrame:
    """Compare this machine with what the series is tested with.

    Args:
        profile: What the machine must be able to run; None reads ``$SFT_PROFILE`` or looks at the GPU.

    Returns:
        Columns component, installed, tested, post_2025, status, fix. A status in ``MUST_FIX`` stops the
        series and ``fix`` says what to do; "ok", "other version" and "not there" do not.
    """
    import pandas as pd

    machine = _measure()
    rows = _judge(machine, profile or _default_profile(machine), _chosen(profile))
    return pd.DataFrame(rows, columns=COLUMNS)


def check_environment(profile: Profile | None = None, *, summary: pd.DataFrame | None = None) -> None:
    """Stop early, with every problem in one message, the first to fix first.

    Args:
        profile: As for ``summarize_environment``.
        summary: A table of ``summarize_environment`` to check; None makes one.

    Raises:
        EnvironmentCheckError: Something must be fixed; the message has one line for each, with its fix.
    """
    problems = list_problems(summarize_environment(profile) if summary is None else summary)
    if problems:
        count = f"{len(problems)} thing{'s' * (len(problems) > 1)} to fix, in this order:"
        raise EnvironmentCheckError("\n".join([count, *problems]))


def list_problems(summary: pd.DataFrame) -> list[str]:
    """One line for each row that must be fixed, the first to fix first."""
    bad = summary[summary["status"].isin(MUST_FIX)]
    order = sorted(bad.to_dict(orient="records"), key=lambda row: MUST_FIX.index(row["status"]))
    return [
        f"{row['component']}: {row['status']} (here: {row['installed'] or 'nothing'}; "
        f"tested or needed: {row['tested'] or 'not set'})\n    {row['fix']}"
        for row in order
    ]


def same_version(one: str, other: str) -> bool:
    """Whether two versions are equal without their local part, the text behind the "+".

    torch from PyPI calls itself 2.11.0 in its metadata and 2.11.0+cu130 in ``torch.__version__``. See
    https://packaging.python.org/en/latest/specifications/version-specifiers/#local-version-identifiers.
    """
    from packaging.version import Version

    return Version(Version(one).public) == Version(Version(other).public)


def check_imports() -> None:
    """Check that no package of the series was replaced on disk after this session had imported it.

    A notebook's kernel may have imported pandas, and pandas pyarrow, before the first cell installs a newer
    pyarrow. The old one then stays in memory, where it cannot load the new one's files.

    Raises:
        EnvironmentCheckError: Another version is in memory than on disk; only a restart helps.
    """
    both = {name: (_version_in_memory(name), _version_on_disk(name)) for name in PACKAGES}
    stale = [
        f"{name} {loaded} (now {on_disk} on disk)"
        for name, (loaded, on_disk) in both.items()
        if loaded and on_disk and not same_version(loaded, on_disk)
    ]
    if stale:
        raise EnvironmentCheckError(
            f"This session had imported {', '.join(stale)} before the installation, and Python keeps what it "
            "has imported. Nothing is broken, but the session must start anew: Runtime > Restart session, "
            "then run the notebook from its first cell. Nothing is installed a second time."
        )


# --- Measuring ---


def _measure() -> Machine:
    driver = _ask("nvidia-smi", r"CUDA (?:UMD )?Version\s*:\s*([\d.]+)")
    gpu = None if driver == _NO_ANSWER else _first_gpu()  # a driver that hangs would hang torch as well
    on_disk = {name: version for name in PACKAGES if (version := _version_on_disk(name))}
    return Machine(
        python=platform.python_version(),
        on_disk=on_disk,
        in_memory={name: version for name in PACKAGES if (version := _version_in_memory(name))},
        driver_cuda=driver,
        toolkit_cuda=_ask("nvcc", r"release ([\d.]+)", "--version"),
        gpu=gpu.name if gpu else None,
        gpu_gib=gpu.total_memory / 2**30 if gpu else 0.0,
        capability=(gpu.major, gpu.minor) if gpu else None,
        bf16=gpu.major >= 8 if gpu else False,
        free_disk_gib=_free_disk_gib(),
        ram_gib=_ram_gib(),
        colab=_on_colab(),
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
        return _NO_ANSWER
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


def _version_on_disk(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _version_in_memory(name: str) -> str | None:
    version = getattr(sys.modules.get(name), "__version__", None)
    return str(version) if version else None


def _hub_cache() -> Path:
    """Where the hub's downloads go, as the client that downloads them has worked it out."""
    try:
        from huggingface_hub import constants
    except ImportError:  # the table says so; without a client nothing is downloaded
        return Path.home() / ".cache" / "huggingface" / "hub"
    return Path(constants.HF_HUB_CACHE)


def _free_disk_gib() -> float:
    return free_bytes(_hub_cache()) / 2**30


def _ram_gib() -> float:
    import psutil

    return float(psutil.virtual_memory().total / 2**30)


def _on_colab() -> bool:
    return "google.colab" in sys.modules or "COLAB_RELEASE_TAG" in os.environ


def _default_profile(machine: Machine) -> Profile:
    if os.environ.get("SFT_PROFILE"):
        return read_profile()
    if machine.driver_cuda == _NO_ANSWER or "torch" not in machine.on_disk or machine.torch_error:
        return read_profile("cpu-demo")
    return read_profile()


def _chosen(profile: Profile | None) -> bool:
    """Whether somebody named the profile, so that one without a GPU is no mistake."""
    return profile is not None or bool(os.environ.get("SFT_PROFILE"))


# --- What is tested, and what the packages ask of each other ---


def _tested() -> dict[str, str]:
    """Package -> tested version, from the extras of this package's own metadata."""
    pins: dict[str, str] = {}
    for requirement in _requirements_of(_PACKAGE):
        exact = [item.version for item in requirement.specifier if item.operator == "=="]
        in_extra = any(_applies(requirement, extra) for extra in ("tested", "colab"))
        if exact and in_extra:
            pins[_normalized(requirement.name)] = exact[0]
    return pins


def _bounds() -> dict[str, SpecifierSet]:
    """Package -> versions that this package and the installed ones accept, taken together."""
    from packaging.specifiers import SpecifierSet

    bounds = {name: SpecifierSet(_UNDECLARED.get(name, ""), prereleases=True) for name in PACKAGES}
    for package in (_PACKAGE, *PACKAGES):
        for requirement in _requirements_of(package):
            name = _normalized(requirement.name)
            if name in bounds and _applies(requirement, ""):
                bounds[name] &= requirement.specifier
    return bounds


@functools.cache
def _requirements_of(package: str) -> list[Any]:
    from packaging.requirements import Requirement

    try:
        return [Requirement(line) for line in importlib.metadata.requires(package) or []]
    except importlib.metadata.PackageNotFoundError:
        return []


def _applies(requirement: Any, extra: str) -> bool:
    if extra and (requirement.marker is None or "extra" not in str(requirement.marker)):
        return False
    return requirement.marker is None or bool(requirement.marker.evaluate({"extra": extra}))


def _normalized(name: str) -> str:
    return name.lower().replace("-", "_")


def _tested_python() -> str:
    try:
        return importlib.metadata.metadata(_PACKAGE)["Requires-Python"] or ""
    except importlib.metadata.PackageNotFoundError:
        return ""


# --- Judging ---


def _judge(machine: Machine, profile: Profile, chosen: bool) -> list[_Row]:
    from packaging.specifiers import SpecifierSet

    tested, bounds, pythons = _tested(), _bounds(), _tested_python()
    known_python = SpecifierSet(pythons).contains(machine.python, prereleases=True)
    needed_disk, needed_ram = _needed_disk_gib(profile), _LEAST_RAM_GIB.get(profile.name, _SHARD_RAM_GIB)
    move = f"free space at {_hub_cache()}, or point HF_HOME to a larger disk"
    return [
        _row("Python", machine.python, pythons, known_python, ("unsupported", f"use a Python {pythons}")),
        *(_judge_package(machine, name, tested.get(name, ""), bounds[name]) for name in PACKAGES),
        _judge_tool("CUDA driver", machine.driver_cuda),
        _judge_tool("CUDA toolkit", machine.toolkit_cuda),
        *_judge_gpu(machine, profile, chosen),
        *_judge_demo_model(machine, profile),
        _size_row("free disk", machine.free_disk_gib, needed_disk, profile, move),
        _size_row("RAM", machine.ram_gib, needed_ram, profile, "use a machine with more memory"),
    ]


def _row(
    component: str, here: str, tested: str, good: bool = True, bad: tuple[str, str] = _NOT_THERE
) -> _Row:
    """A row that is "ok", or has the status and the fix of ``bad``."""
    status, fix = ("ok", "") if good else bad
    return component, here, tested, _POST_2025.get(component, ""), status, fix


def _size_row(component: str, here_gib: float, needed_gib: float, profile: Profile, fix: str) -> _Row:
    wanted = f"{needed_gib:.1f} GiB ({profile.name})"
    return _row(component, f"{here_gib:.1f} GiB", wanted, here_gib >= needed_gib, ("too little", fix))


def _judge_package(machine: Machine, name: str, tested: str, bounds: SpecifierSet) -> _Row:
    from packaging.version import Version

    here, loaded = machine.on_disk.get(name), machine.in_memory.get(name)
    shown, install = tested or "none needed", _install(name, tested, bounds)
    if here is None:
        return _row(name, "", shown, False, _NOT_THERE if name in _OPTIONAL else ("missing", install))
    if name == "torch" and machine.torch_error:
        again = f"pip install -q --force-reinstall --no-deps torch=={Version(here).public}"
        return _row(name, f"{here}; {machine.torch_error}", shown, False, ("broken", again))
    public = Version(here).public
    if not bounds.contains(public):
        return _row(name, here, tested or str(bounds), False, (_side(public, bounds), install))
    if loaded and not same_version(loaded, here):
        return _row(name, f"{here} on disk, {loaded} in memory", shown, False, ("restart", _RESTART))
    return _row(name, here, shown, not tested or same_version(here, tested), ("other version", ""))


def _judge_demo_model(machine: Machine, profile: Profile) -> list[_Row]:
    if not profile.model_id.endswith("smollm2-135m-instruct"):
        return []
    here = "" if machine.demo_model_fix else "can be built"
    return [_row("demo model", here, profile.name, bool(here), ("missing", machine.demo_model_fix))]


def _side(here: str, bounds: SpecifierSet) -> str:
    """Whether a version lies below or above what is accepted."""
    from packaging.version import Version

    lowest = [Version(item.version) for item in bounds if item.operator in (">=", ">", "==", "~=")]
    return "too old" if any(Version(here) < version for version in lowest) else "too new"


def _install(name: str, tested: str, bounds: SpecifierSet) -> str:
    wanted = f"=={tested}" if tested and bounds.contains(tested) else str(bounds)
    alone = "--no-deps -U " if name in _OPTIONAL else ""  # else pip might replace Colab's torch
    return f'{_pip()} install -q {alone}"{name}{wanted}"'


def _pip() -> str:
    """``%pip`` in a notebook, where a plain ``pip`` may serve another Python."""
    return "%pip" if _in_notebook() else "pip"


def _use_profile(name: str) -> str:
    return f"{'%env' if _in_notebook() else 'export'} SFT_PROFILE={name}"


def _in_notebook() -> bool:
    ipython = sys.modules.get("IPython")
    return bool(ipython and ipython.get_ipython())


def _judge_tool(component: str, version: str | None) -> _Row:
    if version == _NO_ANSWER and component == "CUDA driver":
        bad = ("GPU hidden", "restart the machine: its NVIDIA driver hangs")
        return _row(component, _NO_ANSWER, "", False, bad)
    return _row(component, version or "", "", version not in (None, _NO_ANSWER))


def _judge_gpu(machine: Machine, profile: Profile, chosen: bool) -> list[_Row]:
    wanted = "none needed" if profile.gpu_gib == 0 else f"{profile.gpu_gib:g} GiB card ({profile.name})"
    if machine.gpu is None or machine.capability is None:
        row = _no_gpu(machine, wanted, needed=profile.gpu_gib > 0 or (machine.colab and not chosen))
        rest = ("GPU memory", "compute capability", "bf16")
        return [row, *(_row(name, "", "", False) for name in rest)]
    memory, least = _needed_gpu_gib(profile), ".".join(map(str, _LEAST_CAPABILITY))
    here = ".".join(map(str, machine.capability))
    newer = ("unsupported", "use a T4, L4, A100 or newer GPU")
    fp16 = ("unsupported", _use_profile("colab-t4"))
    needs_bf16 = profile.dtype == "bfloat16"
    bf16 = f"{'' if needs_bf16 else 'not '}needed ({profile.name})"
    return [
        _row("GPU", machine.gpu, wanted),
        _size_row("GPU memory", machine.gpu_gib, memory, profile, _use_profile(_that_fits(machine.gpu_gib))),
        _row("compute capability", here, f">= {least}", machine.capability >= _LEAST_CAPABILITY, newer),
        _row("bf16", "yes" if machine.bf16 else "no", bf16, machine.bf16 or not needs_bf16, fp16),
    ]


def _no_gpu(machine: Machine, wanted: str, *, needed: bool) -> _Row:
    if machine.driver_cuda not in (None, _NO_ANSWER):
        build = machine.on_disk.get("torch", "(missing)")
        fix = f"update the NVIDIA driver: it runs CUDA up to {machine.driver_cuda}"
        if build.endswith("+cpu"):
            fix = f'{_pip()} install --force-reinstall "torch=={build.removesuffix("+cpu")}"'
        elif machine.visible_devices is not None:
            if not needed:  # hidden on purpose
                return _row("GPU", "hidden by CUDA_VISIBLE_DEVICES", wanted, False)
            fix = f"CUDA_VISIBLE_DEVICES={machine.visible_devices!r} hides it: unset that and start anew"
        return _row("GPU", f"torch {build} does not see it", wanted, False, ("GPU hidden", fix))
    other = f"use a machine with a GPU, or: {_use_profile('cpu-demo')}"
    fix = _CHANGE_RUNTIME if machine.colab else other
    return _row("GPU", "", wanted, False, ("no GPU", fix) if needed else _NOT_THERE)


def _that_fits(gpu_gib: float) -> str:
    """The largest profile whose plan fits into a card."""
    names = ("colab-l4", "colab-t4", "cpu-demo")
    return next(name for name in names if _needed_gpu_gib(read_profile(name)) <= gpu_gib)


# --- What a profile needs ---


def _needed_gpu_gib(profile: Profile) -> float:
    """GPU memory that training takes: the plan for Llama 3 8B, nine tenths of the card for other models."""
    from llama_sft_helpers.memory.plan import plan_memory

    if profile.gpu_gib == 0 or not is_llama3(profile.model_id, "8B"):
        return 0.9 * profile.gpu_gib
    return float(plan_memory(load_llama3_config(), profile)["gib"].sum())


def _needed_disk_gib(profile: Profile) -> float:
    """Space for what is still to be downloaded (16-bit weights) and for the results."""
    if not is_llama3(profile.model_id, "8B") or Path(profile.model_id).is_dir():
        return _RESULTS_GIB
    left = _left_to_download_gib(profile.model_id)
    return (_planned_download_gib(profile) if left is None else left) + _RESULTS_GIB


def _planned_download_gib(profile: Profile) -> float:
    """The size that the model's shape gives, less what lies in the cache already."""
    from llama_sft_helpers.core.llama import Shape
    from llama_sft_helpers.memory.counts import weight_rows

    sixteen_bit = dataclasses.replace(profile, dtype="bfloat16")
    weights = weight_rows(Shape.of(load_llama3_config()), sixteen_bit, quantization="16-bit")
    download = sum(size for _, size, _ in weights) / 2**30
    blobs = _hub_cache() / f"models--{profile.model_id.replace('/', '--')}" / "blobs"
    done = sum(path.stat().st_size for path in blobs.glob("*")) / 2**30
    return max(download - done, 0.0)


def _left_to_download_gib(model_id: str) -> float | None:
    """What the hub's client would still download; None if the hub does not say so in time."""
    found: list[Any] = []

    def ask() -> None:
        # No network, no token, no access, an old client: whatever it is, the planned size stands in.
        with contextlib.suppress(Exception):
            found.extend(_dry_run(model_id))

    # A thread of its own: neither a slow name server nor a hanging proxy knows of the client's time limits.
    thread = threading.Thread(target=ask, name="dry run", daemon=True)
    thread.start()
    thread.join(_HUB_SECONDS)
    if thread.is_alive() or not found:
        return None
    return sum(file.file_size for file in found if file.will_download) / 2**30


def _dry_run(model_id: str) -> list[Any]:
    """The files that ``from_pretrained`` reads of a repository, and which of them are here already."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils import tqdm  # type: ignore[attr-defined]

    class Silent(tqdm):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **{**options, "disable": True})

    return snapshot_download(
        model_id,
        dry_run=True,
        allow_patterns=["*.safetensors", "*.json", "tokenizer*"],
        ignore_patterns="original/*",  # the same weights once more, in Meta's own format
        etag_timeout=_HUB_SECONDS,
        tqdm_class=Silent,
    )
