"""Looks at the surroundings of a failure: versions, files, the plan; each fills in texts, or declines.

A look gets the case and the values that the message gave; None says that the sign does not hold.
"""

from __future__ import annotations

import contextlib
import difflib
import importlib.util
import inspect
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from llama_sft_helpers.core.language import reader_language, translate
from llama_sft_helpers.doctor.cases import Case
from llama_sft_helpers.doctor.table import RENAMED_ARGUMENTS
from llama_sft_helpers.environment.versions import same_version, version_on_disk

Values = dict[str, str]
_WATCHED = (
    "transformers", "peft", "trl", "bitsandbytes", "accelerate", "datasets", "huggingface_hub", "tokenizers",
    "safetensors", "pyarrow", "numpy", "torch",
)  # fmt: skip
# Arguments of the libraries that take a folder or a name of the hub.
_PATH_ARGUMENTS = ("pretrained_model_name_or_path", "model_id", "path_or_repo_id", "path", "repo_id")


def surroundings(case: Case) -> Values:
    """What every entry may name: torch's version, the file, the repository."""
    values = {"torch": f"torch {version_on_disk('torch') or translate('not installed')}"}
    if name := getattr(case.exception, "filename", None):
        values["place"] = translate(" at {name}", name=name)
    if repo := re.search(r"(?:huggingface\.co/|/models/|model )([\w.-]+/[\w.-]+)", case.message):
        repo_id = re.sub(r"\.$", "", repo[1]).removesuffix("/resolve")
        if not repo_id.startswith(("docs/", "settings/", "api/")):
            values |= {"repo": repo_id, "page": f"https://huggingface.co/{repo_id}"}
    return values


# --- Versions ---


def _stale_package(case: Case, values: Values) -> Values | None:
    """Both versions of a package that the failure names, if the one in memory is not the one on disk."""
    if case.exception is None:  # raised in another process: this one's packages say nothing
        return None
    for name in _WATCHED:
        if re.search(rf"\b{name}\b", case.message) or f"/{name}/" in case.where:
            loaded, on_disk = getattr(sys.modules.get(name), "__version__", None), version_on_disk(name)
            if isinstance(loaded, str) and on_disk and not same_version(loaded, on_disk):
                return {"package": name, "loaded": loaded, "on_disk": on_disk}
    return None


def _unseen_bitsandbytes(case: Case, values: Values) -> Values | None:
    """By now bitsandbytes is installed, but transformers looked for it before and remembers the answer."""
    if case.exception is None or not importlib.util.find_spec("bitsandbytes"):
        return None
    on_disk = version_on_disk("bitsandbytes")
    return (
        {"package": "bitsandbytes", "loaded": translate("not installed"), "on_disk": on_disk}
        if on_disk
        else None
    )


def _renamed_argument(case: Case, values: Values) -> Values | None:
    owner, old = values["owner"], values["old"]
    modules = (sys.modules.get(name) for name in ("trl", "transformers", "peft"))
    known = next((getattr(module, owner) for module in modules if hasattr(module, owner)), None)
    if known is None and case.exception is not None:  # a class of the reader's own
        return None
    if new := RENAMED_ARGUMENTS.get(old):
        return {"advice": translate("Use {new}.", new=translate(new))}
    if known is None:
        return None
    near = difflib.get_close_matches(old, inspect.signature(known).parameters, n=1, cutoff=0.6)
    if not near:
        return {"advice": translate("See help({owner}).", owner=owner)}
    return {"advice": translate("The nearest of its arguments is {near}.", near=near[0])}


# --- Files ---


def _nearest(path: Path) -> str:
    """The name beside a missing path that is most like it, as a sentence; "" if none is."""
    with contextlib.suppress(OSError):
        near = difflib.get_close_matches(path.name, [other.name for other in path.parent.iterdir()], n=1)
        return translate("The nearest name there is {name}.", name=path.parent / near[0]) if near else ""
    return ""


def _missing_folder(case: Case, values: Values) -> Values | None:
    """A folder that is not there, which the library took for a name of the hub."""
    asked = [values.get("path"), *(value for name, value in case.variables if name in _PATH_ARGUMENTS)]
    given = next((name for name in asked if isinstance(name, str)), "")
    path = Path(given).expanduser()
    if not given or path.exists():
        return None
    near = _nearest(path)
    a_path = given[0] in "/.~" or (path.parent != Path() and path.parent.is_dir())
    return {"path": given, "cwd": str(Path.cwd()), "near": near} if a_path or near else None


def _missing_file(case: Case, values: Values) -> Values | None:
    path = Path(values["path"])
    return None if path.is_file() else {"cwd": str(Path.cwd()), "near": _nearest(path)}


def _folder_is_there(case: Case, values: Values) -> Values | None:
    return {} if Path(values["path"]).expanduser().is_dir() else None


# --- The run ---


def _cell_assert(case: Case, values: Values) -> Values | None:
    return {"line": case.line} if case.line.startswith("assert") else None


def _memory_plan(case: Case, values: Values) -> Values:
    """The plan's largest item, and the mildest change that makes the plan smaller."""
    with contextlib.suppress(Exception):  # without a plan the sign holds as well
        return _planned(case)
    return {}


def _planned(case: Case) -> Values:
    from llama_sft_helpers.core.llama import is_llama3, load_llama3_config
    from llama_sft_helpers.memory.plan import plan_memory, smaller_profiles
    from llama_sft_helpers.profiles import read_profile

    profile = read_profile()
    config: Any = _config_in(case) or (load_llama3_config() if is_llama3(profile.model_id, "8B") else None)
    plan = plan_memory(config, profile, language=reader_language())
    largest, total = plan.loc[plan["gib"].idxmax()], plan["gib"].sum()
    component = str(largest["component"])
    text = translate(
        "The plan for profile {profile} is {total:.2f} GiB; its largest item is {component}: {gib:.2f} GiB "
        "({how}).",
        profile=profile.name,
        total=total,
        component=translate(component),
        gib=largest["gib"],
        how=largest["how"],
    )
    for change, smaller in smaller_profiles(profile):
        needed = plan_memory(config, smaller)["gib"].sum()
        if needed < 0.9 * total:
            said = translate("Set {change}: planned {needed:.2f} GiB instead.", change=change, needed=needed)
            return {"plan": text, "change": said}
    return {"plan": text}


def _config_in(case: Case) -> Any:
    """The configuration of a model that stands in the traceback's frames."""
    for _, value in case.variables:
        for owner in (value, getattr(value, "model", None)):
            config = getattr(owner, "config", None)
            if hasattr(config, "num_hidden_layers") and hasattr(config, "intermediate_size"):
                return config
    return None


LOOKS: dict[str, Callable[[Case, Values], Values | None]] = {
    "stale_package": _stale_package,
    "unseen_bitsandbytes": _unseen_bitsandbytes,
    "renamed_argument": _renamed_argument,
    "missing_folder": _missing_folder,
    "missing_file": _missing_file,
    "folder_is_there": _folder_is_there,
    "cell_assert": _cell_assert,
    "memory_plan": _memory_plan,
}
