"""A look-alike of Colab's image: what does installing the series move there, and do the notebooks run?

``make colab-lookalike`` builds a virtual environment from ``constraints-colab.txt`` (the image's versions),
installs the last commit on top by the notebooks' own install cell, without any constraint, imports it all
in the same process, and fails if that moved torch, numpy or pandas. Then every notebook runs on the tiny
model, and the tests of 01 and 02 run, the widget's on ipywidgets 7.7 among them. Not collected by pytest:
it downloads the image's packages.
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[2]
IMAGE = ROOT / "constraints-colab.txt"
VENV = ROOT / ".venv-colab"
MUST_STAY = ("torch", "numpy", "pandas")
IMAGE_PIP = "pip==24.1.2"
# What a fresh kernel does with a notebook's first cells: install, then import without a restart.
IN_A_KERNEL = """
import json, subprocess, sys
words, *more = json.loads(sys.argv[1]), *sys.argv[2:]
subprocess.run([sys.executable, "-m", *words, *more], check=True)
from llama_sft_helpers.environment import summarize_environment
import bitsandbytes, datasets, peft, pyarrow, transformers, trl
from llama_sft_helpers import data, evaluation, lora, quantization, speed, training
from llama_sft_helpers.profiles import read_profile
table = summarize_environment(read_profile("ci-tiny"))
restart = table.loc[table["status"] == "restart", "component"].tolist()
assert not restart, f"restart the session for {restart}"
print("the install cell ran from a git URL; everything imports in the same session, no restart needed")
"""


def main() -> int:
    """Build, install, compare, run; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--torch", default="torch==2.11.0", help="the image has 2.11.0+cu128")
    python = build_image(parser.parse_args().torch)
    before = versions(python)
    run(python, "-P", "-c", IN_A_KERNEL, json.dumps(install_line()), *image_only_requirements())
    after = versions(python)
    moved = [name for name in sorted(before | after) if before.get(name) != after.get(name)]
    print(f"{len(before)} packages of the image; installing the series moved or added {len(moved)}:")
    for name in moved:
        print(f"  {name:<24} {before.get(name, 'not there'):<12} -> {after.get(name, 'removed')}")
    if wrong := [name for name in MUST_STAY if name in moved]:
        print(f"FAILED: installing the series moved {', '.join(wrong)}")
        return 1
    exercise(python)
    print("the notebooks and the tests of 01 and 02 ran; torch, numpy and pandas stayed as they are")
    return 0


def build_image(torch: str) -> Path:
    """A fresh environment with the image's versions; its Python."""
    run(sys.executable, "-m", "venv", "--clear", VENV)
    python = VENV / "bin" / "python"
    run(python, "-m", "pip", "install", "--quiet", IMAGE_PIP)
    run(python, "-m", "pip", "install", "--quiet", torch, "--requirement", IMAGE)
    return python


def install_line() -> list[str]:
    """The notebooks' own install line as words, its repository replaced by this checkout's last commit."""
    notebook = json.loads((ROOT / "notebooks" / "01_environment.ipynb").read_text(encoding="utf-8"))
    cell = "".join(next(cell["source"] for cell in notebook["cells"] if cell["cell_type"] == "code"))
    line = next(line.strip() for line in cell.splitlines() if line.strip().startswith("%pip"))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    address = project["urls"]["Repository"]
    assert address in line, f"{address} is not in {line!r}"
    return shlex.split(line.removeprefix("%").replace(address, f"file://{ROOT}"))


def image_only_requirements() -> list[str]:
    """What the series installs only on Python 3.13, the image's, freed of that marker."""
    lines = (ROOT / "requirements-colab.txt").read_text(encoding="utf-8").splitlines()
    return [line.split(";")[0] for line in lines if 'python_version >= "3.13"' in line.split("#")[0]]


def versions(python: Path) -> dict[str, str]:
    """Package -> version in an environment, asked of its own pip."""
    command = [python, "-m", "pip", "list", "--format", "json", "--disable-pip-version-check"]
    answer = subprocess.run(command, check=True, capture_output=True, text=True)
    return {item["name"].lower().replace("-", "_"): item["version"] for item in json.loads(answer.stdout)}


def exercise(python: Path) -> None:
    """Check the environment, run the notebooks on the tiny model, and the tests of 01 and 02."""
    environment = {"SFT_PROFILE": "ci-tiny", "SFT_MODELS_DIR": str(VENV / "models"), "MPLBACKEND": "agg"}
    command = VENV / "bin" / "llama-sft"
    run(command, "check", **environment)
    run(command, "run", "--profile", "ci-tiny", "--out", VENV / "run", **environment)
    run(python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/login", "tests/environment")


def run(*command: object, **environment: str) -> None:
    """Run a command in the checkout, with the environment's programs first; stop if it fails."""
    words = [str(word) for word in command]
    print("$", " ".join(words), flush=True)
    path = os.pathsep.join([str(Path(words[0]).parent), os.environ["PATH"]])
    subprocess.run(words, check=True, cwd=ROOT, env=os.environ | {"PATH": path} | environment)


if __name__ == "__main__":
    sys.exit(main())
