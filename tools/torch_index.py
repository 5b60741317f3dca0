"""Print the options by which pip and uv find torch: ``python tools/torch_index.py [ADDRESS]``, run by make.

An address that a user gives wins. Without one, Linux on x86-64 without an NVIDIA driver takes torch's CPU
wheels, as PyPI's bring gigabytes of CUDA. Where the tested torch is installed already, nobody is asked.
"""

from __future__ import annotations

import platform
import shutil
import sys
import urllib.request
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

CPU_WHEELS = "https://download.pytorch.org/whl/cpu"
TESTED = Path(__file__).resolve().parent.parent / "requirements-tested.txt"
SECONDS = 5


def index_options(address: str) -> str:
    """The options for ``address`` or else for this machine; empty where PyPI is right."""
    if not address and wants_cpu_wheels() and not is_installed() and answers(CPU_WHEELS):
        address = CPU_WHEELS
    return f"--no-deps --index-url {address}" if address else ""


def wants_cpu_wheels() -> bool:
    """Whether PyPI's torch would bring CUDA to a machine that has no driver for it."""
    return (platform.system(), platform.machine()) == ("Linux", "x86_64") and not shutil.which("nvidia-smi")


def is_installed() -> bool:
    """Whether torch is here in the version that was tested, from whatever index."""
    try:
        return f"torch=={version('torch').partition('+')[0]}" in TESTED.read_text(encoding="utf-8").split()
    except PackageNotFoundError:
        return False


def answers(index: str) -> bool:
    """Whether an index of packages answers within seconds, asked once; if not, a line on stderr says so."""
    try:
        with urllib.request.urlopen(f"{index}/torch/", timeout=SECONDS):  # noqa: S310  (an https address)
            return True
    except OSError as error:
        text = f"{index} did not answer ({error}), so torch comes from PyPI, CUDA's libraries with it"
        print(text, file=sys.stderr)
        return False


if __name__ == "__main__":
    print(index_options("".join(sys.argv[1:])))
