"""Versions: what is installed, what this process has imported, and what the packages ask of each other.

What is tested is read from the installed package's own metadata, which is built from the requirement files:
no version is written down twice.
"""

from __future__ import annotations

import email.message
import functools
import importlib.metadata
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from packaging.requirements import Requirement
    from packaging.specifiers import SpecifierSet

_PACKAGE = "llama-sft-helpers"
PACKAGES = (
    "torch", "transformers", "peft", "trl", "bitsandbytes", "accelerate", "datasets", "huggingface_hub",
    "tokenizers", "ipywidgets", "pyarrow", "torchao",
)  # fmt: skip
# A bound that no package declares: peft raises on an older torchao as soon as it wraps a 16-bit Linear
# (peft.import_utils.is_torchao_available). No torchao at all is fine.
_UNDECLARED = {"torchao": ">=0.16"}


class EnvironmentCheckError(AssertionError):
    """Something of this machine must be fixed before the series can run."""


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
    both = {name: (version_in_memory(name), version_on_disk(name)) for name in PACKAGES}
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


def version_on_disk(name: str) -> str | None:
    """The version that is installed; None if none is."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def version_in_memory(name: str) -> str | None:
    """The version that this process has imported; None if it has not."""
    version = getattr(sys.modules.get(name), "__version__", None)
    return str(version) if version else None


def tested_versions() -> dict[str, str]:
    """Package -> tested version, from the extras of this package's own metadata."""
    pins: dict[str, str] = {}
    for requirement in _requirements_of(_PACKAGE):
        exact = [item.version for item in requirement.specifier if item.operator == "=="]
        if exact and any(_applies(requirement, extra) for extra in ("tested", "colab")):
            pins[_normalized(requirement.name)] = exact[0]
    return pins


def bounds_of_packages() -> dict[str, SpecifierSet]:
    """Package -> versions that this package and the installed ones accept, taken together."""
    from packaging.specifiers import SpecifierSet

    bounds = {name: SpecifierSet(_UNDECLARED.get(name, ""), prereleases=True) for name in PACKAGES}
    for package in (_PACKAGE, *PACKAGES):
        for requirement in _requirements_of(package):
            name = _normalized(requirement.name)
            if name in bounds and (_applies(requirement) or _applies(requirement, "widgets")):
                bounds[name] &= requirement.specifier
    return bounds


@functools.cache
def _requirements_of(package: str) -> list[Requirement]:
    from packaging.requirements import Requirement

    return [Requirement(line) for line in _metadata_of(package).get_all("Requires-Dist", [])]


def _metadata_of(package: str) -> Any:
    """What a package says of itself; nothing where it is not installed."""
    try:
        return importlib.metadata.metadata(package)
    except importlib.metadata.PackageNotFoundError:
        return email.message.Message()


def _applies(requirement: Requirement, extra: str = "") -> bool:
    return requirement.marker is None or bool(requirement.marker.evaluate({"extra": extra}))


def _normalized(name: str) -> str:
    return name.lower().replace("-", "_")


def tested_python() -> str:
    """The Pythons that this package accepts."""
    return str(_metadata_of(_PACKAGE).get("Requires-Python", ""))
