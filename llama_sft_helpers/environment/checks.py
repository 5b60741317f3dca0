"""The table of notebook 01: this machine held against what the series is tested with."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

from llama_sft_helpers.demo_model import demo_model_fix
from llama_sft_helpers.environment.machine import NO_ANSWER, Machine, cpu_slowdown, hub_cache, measure
from llama_sft_helpers.environment.needs import needed_disk_gib, needed_gpu_gib, needed_ram_gib
from llama_sft_helpers.environment.versions import (
    PACKAGES,
    EnvironmentCheckError,
    bounds_of_packages,
    same_version,
    tested_python,
    tested_versions,
)
from llama_sft_helpers.profiles import OWN_PROFILE, Profile, read_profile

if TYPE_CHECKING:
    import pandas as pd
    from packaging.specifiers import SpecifierSet

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
_OPTIONAL = "torchao"
_LEAST_CAPABILITY = (7, 5)  # LLM.int8's tensor cores: Turing, https://huggingface.co/docs/bitsandbytes
_BF16_CAPABILITY = (8, 0)  # Ampere
_SLOW = 1.5  # times float32's time; what a busy machine adds is less
_NOT_THERE = ("not there", "")
_Row = tuple[str, str, str, str, str, str]  # in the order of COLUMNS


def summarize_environment(profile: Profile | None = None) -> pd.DataFrame:
    """Compare this machine with what the series is tested with.

    Args:
        profile: What the machine must be able to run; None reads ``$SFT_PROFILE`` or looks at the GPU.

    Returns:
        Columns component, installed, tested, post_2025, status, fix. A status in ``MUST_FIX`` stops the
        series and ``fix`` says what to do; "ok", "other version", "slow" and "not there" do not.
    """
    import pandas as pd

    machine, named = measure(), profile or _named_profile()
    rows = _judge(machine, named or read_profile("cpu-demo" if _blind(machine) else None), named is not None)
    return pd.DataFrame(rows, columns=COLUMNS)


def check_environment(summary: pd.DataFrame | None = None) -> None:
    """Stop early, with every problem in one message, the first to fix first.

    Args:
        summary: A table of ``summarize_environment`` to check; None makes one.

    Raises:
        EnvironmentCheckError: Something must be fixed; the message has one line for each, with its fix.
    """
    problems = list_problems(summarize_environment() if summary is None else summary)
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


def _named_profile() -> Profile | None:
    """The profile that a variable or a file names; then one without a GPU is no mistake."""
    return read_profile() if os.environ.get("SFT_PROFILE") or OWN_PROFILE.is_file() else None


def _blind(machine: Machine) -> bool:
    """Whether nothing is known of a GPU: torch cannot be imported, or the driver that it would ask hangs."""
    return bool(machine.torch_error) or machine.driver_cuda == NO_ANSWER


def _judge(machine: Machine, profile: Profile, chosen: bool) -> list[_Row]:
    from packaging.specifiers import SpecifierSet

    tested, bounds, pythons = tested_versions(), bounds_of_packages(), tested_python()
    known_python = SpecifierSet(pythons).contains(machine.python, prereleases=True)
    move = f"free space at {hub_cache()}, or point HF_HOME to a larger disk"
    return [
        _row("Python", machine.python, pythons, known_python, ("unsupported", f"use a Python {pythons}")),
        *(_judge_package(machine, name, tested.get(name, ""), bounds[name]) for name in PACKAGES),
        _judge_tool("CUDA driver", machine.driver_cuda),
        _judge_tool("CUDA toolkit", machine.toolkit_cuda),
        *_judge_gpu(machine, profile, chosen),
        *_judge_demo_model(profile),
        _size_row("free disk", machine.free_disk_gib, needed_disk_gib(profile), profile, move),
        _size_row("RAM", machine.ram_gib, needed_ram_gib(profile), profile, "use a machine with more memory"),
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
        return _row(name, "", shown, False, _NOT_THERE if name == _OPTIONAL else ("missing", install))
    public = Version(here).public
    if name == "torch" and machine.torch_error:
        again = f"{_typed('%pip', 'pip')} install -q --force-reinstall --no-deps torch=={public}"
        return _row(name, f"{here}; {machine.torch_error}", shown, False, ("broken", again))
    if not bounds.contains(public):
        return _row(name, here, tested or str(bounds), False, (_side(public, bounds), install))
    if loaded and not same_version(loaded, here):
        anew = ("restart", "Runtime > Restart session, then run from the top")
        return _row(name, f"{here} on disk, {loaded} in memory", shown, False, anew)
    return _row(name, here, shown, not tested or same_version(here, tested), ("other version", ""))


def _judge_demo_model(profile: Profile) -> list[_Row]:
    if not profile.model_id.endswith("smollm2-135m-instruct"):
        return []
    fix = demo_model_fix()
    return [_row("demo model", "" if fix else "can be built", profile.name, not fix, ("missing", fix))]


def _side(here: str, bounds: SpecifierSet) -> str:
    """Whether a version lies below or above what is accepted."""
    from packaging.version import Version

    lowest = [Version(item.version) for item in bounds if item.operator in (">=", ">", "==", "~=")]
    return "too old" if any(Version(here) < version for version in lowest) else "too new"


def _install(name: str, tested: str, bounds: SpecifierSet) -> str:
    wanted = f"=={tested}" if tested and bounds.contains(tested) else str(bounds)
    alone = "--no-deps -U " if name == _OPTIONAL else ""  # else pip might replace Colab's torch
    return f'{_typed("%pip", "pip")} install -q {alone}"{name}{wanted}"'


def _use_profile(name: str) -> str:
    in_shell = f"export SFT_PROFILE={name}"
    if sys.platform == "win32":
        in_shell = f'$env:SFT_PROFILE = "{name}" in PowerShell, set SFT_PROFILE={name} in cmd'
    return _typed(f"%env SFT_PROFILE={name}", in_shell)


def _typed(in_notebook: str, in_shell: str) -> str:
    """A command as it is typed here: in a notebook a plain ``pip`` may serve another Python."""
    ipython = sys.modules.get("IPython")
    return in_notebook if ipython and ipython.get_ipython() else in_shell


def _judge_tool(component: str, version: str | None) -> _Row:
    if version == NO_ANSWER and component == "CUDA driver":
        bad = ("GPU hidden", "restart the machine: its NVIDIA driver hangs")
        return _row(component, NO_ANSWER, "", False, bad)
    return _row(component, version or "", "", version not in (None, NO_ANSWER))


def _judge_gpu(machine: Machine, profile: Profile, chosen: bool) -> list[_Row]:
    wanted = "none needed" if profile.gpu_gib == 0 else f"{profile.gpu_gib:g} GiB card ({profile.name})"
    if machine.gpu is None:
        row = _no_gpu(machine, wanted, needed=profile.gpu_gib > 0 or (machine.colab and not chosen))
        rest = (_row(name, "", "", False) for name in ("GPU memory", "compute capability"))
        return [row, *rest, _judge_cpu(machine, profile)]
    capability, gib = (machine.gpu.major, machine.gpu.minor), machine.gpu.total_memory / 2**30
    here, least = ("{}.{}".format(*pair) for pair in (capability, _LEAST_CAPABILITY))
    newer = ("unsupported", "use a T4, L4, A100 or newer GPU")
    fp16 = ("unsupported", _use_profile("colab-t4"))
    has_bf16, needs_bf16 = capability >= _BF16_CAPABILITY, profile.dtype == "bfloat16"
    bf16 = f"{'' if needs_bf16 else 'not '}needed ({profile.name})"
    return [
        _row("GPU", machine.gpu.name, wanted),
        _size_row("GPU memory", gib, needed_gpu_gib(profile), profile, _use_profile(_that_fits(gib))),
        _row("compute capability", here, f">= {least}", capability >= _LEAST_CAPABILITY, newer),
        _row("bf16", "yes" if has_bf16 else "no", bf16, has_bf16 or not needs_bf16, fp16),
    ]


def _judge_cpu(machine: Machine, profile: Profile) -> _Row:
    """The row for 16-bit numbers where the profile trains on the CPU: many CPUs have no units for them."""
    if machine.torch_error or profile.gpu_gib > 0 or profile.dtype == "float32":
        return _row("bf16", "", "", False)
    times = cpu_slowdown(profile.dtype)
    slow = ("slow", 'set dtype = "float32" in the profile')
    here = f"{profile.dtype} takes {times:.1f} x float32's time"
    return _row("bf16", here, f"needed ({profile.name})", times < _SLOW, slow)


def _no_gpu(machine: Machine, wanted: str, *, needed: bool) -> _Row:
    if _blind(machine):
        return _row("GPU", "not known", wanted, False)
    if machine.driver_cuda:
        build = machine.on_disk.get("torch", "(missing)")
        fix = f"update the NVIDIA driver: it runs CUDA up to {machine.driver_cuda}"
        if build.endswith("+cpu"):
            fix = f'{_typed("%pip", "pip")} install --force-reinstall "torch=={build.removesuffix("+cpu")}"'
        elif (hidden := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
            if not needed:  # hidden on purpose
                return _row("GPU", "hidden by CUDA_VISIBLE_DEVICES", wanted, False)
            fix = f"CUDA_VISIBLE_DEVICES={hidden!r} hides it: unset that and start anew"
        return _row("GPU", f"torch {build} does not see it", wanted, False, ("GPU hidden", fix))
    fix = f"use a machine with a GPU, or: {_use_profile('cpu-demo')}"
    if machine.colab:
        fix = "Runtime > Change runtime type > A100, L4 or T4 GPU"
    return _row("GPU", "", wanted, False, ("no GPU", fix) if needed else _NOT_THERE)


def _that_fits(gpu_gib: float) -> str:
    """The largest profile whose plan fits into a card."""
    names = ("colab-l4", "colab-t4", "cpu-demo")
    return next(name for name in names if needed_gpu_gib(read_profile(name)) <= gpu_gib)
