"""Record the notebooks' saved outputs: run them with profile cpu-demo and write them back, cleaned.

A notebook is run again only if its code cells, the helper modules that its imports reach, the profile or the
versions changed since its outputs were recorded (``--force`` runs all). What is written differs from run to
run only in what was measured (seconds, MiB).
A cell's metadata can hold ``alt``, the text for those who cannot see its figure, and ``picture``, the name
under which the figure is also written to ``docs/images``. The seconds go to
``benchmarks/results/cpu_demo.json``. The Korean notebooks, which carry the same outputs, are built anew.
"""

from __future__ import annotations

import argparse
import ast
import base64
import functools
import hashlib
import importlib.metadata
import io
import json
import os
import platform
import re
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbformat
import translation
from PIL import Image
from repository import Repository

from llama_sft_helpers.demo_model import models_dir
from llama_sft_helpers.run import find_notebooks, run_notebooks

if sys.platform != "win32":  # which lacks it; tests import this module there too
    import resource

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "llama_sft_helpers"
PICTURES = ROOT / "docs" / "images"
TIMES = ROOT / "benchmarks" / "results" / "cpu_demo.json"
PROFILE = "cpu-demo"
KEY = "llama_sft"
NO_WIDGET = "A widget, which a running notebook draws here."  # the site shows a picture of it
VERSIONS_OF = (
    "torch",
    "transformers",
    "peft",
    "trl",
    "bitsandbytes",
    "accelerate",
    "datasets",
    "huggingface_hub",
)


def code_sha256(notebook: Any) -> str:
    """Hash of the code behind a notebook's outputs: its code cells, in order, and the helpers they reach.

    It is the same whatever repository the install line names.
    """
    sources = [cell.source for cell in notebook.cells if cell.cell_type == "code"]
    cells = "\0".join(sources)
    files = [*helper_files("\n".join(sources)), PACKAGE / "profiles" / f"{PROFILE}.toml"]
    helpers = "\0".join(f"{file.relative_to(PACKAGE)}\0{file.read_text(encoding='utf-8')}" for file in files)
    text = re.sub(r"github\.com/[\w.-]+/[\w.-]+", "REPOSITORY", cells) + "\0" + helpers
    return hashlib.sha256(text.encode()).hexdigest()


def helper_files(code: str) -> list[Path]:
    """The helper modules that code imports, and those that they import in turn, sorted.

    Imports inside functions count, those for type checkers alone do not. Of a package inside this one all
    modules count, as its table of contents loads them by name, and so do the modules of ``core`` that it
    names. The doctor, which ``%load_ext`` attaches, does not count: it speaks under errors, and recorded
    cells have none.
    """
    python = re.sub(r"^(\s*)[%!].*$", r"\1pass", code, flags=re.MULTILINE)
    found: set[Path] = set()
    waiting = set(_imported(python, ()))
    while waiting:
        files = _files(waiting.pop()) - found
        found |= files
        for file in files:
            source = file.read_text(encoding="utf-8")
            waiting |= _imported(source, (PACKAGE.name, *file.relative_to(PACKAGE).parent.parts))
    return sorted(found)


@functools.cache  # nine notebooks reach the same helpers
def _imported(code: str, package: tuple[str, ...]) -> set[str]:
    """Dotted names that may be modules; ``package`` is what relative imports start from."""
    names: set[str] = set()
    for node in _executed(ast.parse(code)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            start = package[: len(package) + 1 - node.level] if node.level else ()
            module = ".".join([*start, *filter(None, [node.module])])
            names |= {module, *(f"{module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Constant) and str(node.value).startswith("core."):
            names.add(f"{PACKAGE.name}.{node.value}")  # a table of contents offers a module of core
    return {name for name in names if name.startswith(f"{PACKAGE.name}.")}


def _executed(node: ast.AST) -> Iterator[ast.AST]:
    """A tree's nodes without what stands under ``if TYPE_CHECKING``."""
    yield node
    for child in ast.iter_child_nodes(node):
        if not (isinstance(child, ast.If) and ast.unparse(child.test).endswith("TYPE_CHECKING")):
            yield from _executed(child)


def _files(name: str) -> set[Path]:
    """A module's file, or all files of a package; nothing for the name of a function."""
    path = PACKAGE.joinpath(*name.split(".")[1:])
    module = path.with_suffix(".py")
    return {module} if module.is_file() else set(path.rglob("*.py"))


def versions() -> dict[str, str]:
    """Versions that the outputs depend on."""
    return {name: importlib.metadata.version(name).partition("+")[0] for name in VERSIONS_OF}


def stamp(notebook: Any) -> dict[str, Any]:
    """What a notebook's recorded outputs are valid for."""
    return {"profile": PROFILE, "code_sha256": code_sha256(notebook), "versions": versions()}


def clean(notebook: Any, replacements: dict[str, str]) -> None:
    """Drop what differs between runs for no reason: times, counts of runs, paths, widget state."""
    notebook.metadata.pop("widgets", None)
    notebook.metadata.get("language_info", {}).pop("version", None)
    for number, cell in enumerate((c for c in notebook.cells if c.cell_type == "code"), start=1):
        cell.metadata.pop("execution", None)
        cell.execution_count = number
        cell.outputs = [output for output in cell.outputs if not _is_progress(output)]
        for place, output in enumerate(cell.outputs):
            if "execution_count" in output:
                output.execution_count = number
            _clean_output(output, cell.metadata.get("alt"), replacements, f"T_{number}_{place}")


def _is_progress(output: Any) -> bool:
    """Progress bars and the like on stderr, which say nothing once they are over."""
    return output.get("name") == "stderr" and "%|" in output.get("text", "")


def _clean_output(output: Any, alt: str | None, replacements: dict[str, str], table_id: str) -> None:
    data = output.get("data", {})
    if data.pop("application/vnd.jupyter.widget-view+json", None) is not None:
        data["text/plain"] = NO_WIDGET
    if "image/png" in data:
        data["image/png"] = _in_few_colours(data["image/png"])
    if alt and "image/png" in data:
        output.metadata.setdefault("image/png", {})["alt"] = alt  # beside the size of a figure of 2x pixels
    for holder, key in [(output, "text"), *((data, key) for key in data if key.startswith("text/"))]:
        if key in holder:
            text = holder[key]
            for old, new in replacements.items():
                text = text.replace(old, new)
            text = re.sub(r" at 0x[0-9a-f]+>", ">", text)
            holder[key] = re.sub(r"\bT_[0-9a-f]{5}\b", table_id, text)  # pandas draws a style's id by lot


def _in_few_colours(png: str) -> str:
    """A figure of 128 colours looks like one of millions and takes a third of the bytes."""
    image, smaller = Image.open(io.BytesIO(base64.b64decode(png))), io.BytesIO()
    if image.mode == "P":
        return png
    image.convert("RGB").quantize(128).save(smaller, "PNG", optimize=True)
    return base64.b64encode(smaller.getvalue()).decode()


def pictures(notebook: Any) -> dict[str, bytes]:
    """Name -> PNG of each figure whose cell names a picture; of several figures the last."""
    found = {}
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            if "image/png" in output.get("data", {}) and "picture" in cell.metadata:
                found[cell.metadata["picture"]] = base64.b64decode(output.data["image/png"])
    return found


def write_times(seconds: dict[str, float]) -> None:
    """Keep how long each notebook took, and on what."""
    everything = {path.stem for path in find_notebooks(ROOT / "notebooks")} == set(seconds)
    known = json.loads(TIMES.read_text(encoding="utf-8")) if TIMES.is_file() and not everything else {}
    peak_gib = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
    report = {
        "card": f"CPU, {os.cpu_count()} cores, {platform.machine()}",
        "versions": versions(),
        "command": "make record",
        "profile": PROFILE,
        "peak_gib_of_a_process": round(max(peak_gib, known.get("peak_gib_of_a_process", 0)), 2),
        "seconds": {**known.get("seconds", {}), **{name: round(value) for name, value in seconds.items()}},
    }
    TIMES.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def main() -> int:
    """Record what is out of date, and build the Korean edition of it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--force", action="store_true", help="run every notebook again")
    parser.add_argument("--only", help="notebooks, as 03,04; all if left out")
    parser.add_argument("--clean", action="store_true", help="run nothing: clean the outputs that are there")
    arguments = parser.parse_args()
    os.environ["SFT_LANG"] = "en"  # both editions have the same outputs
    paths = find_notebooks(ROOT / "notebooks", arguments.only)
    if arguments.clean:
        for path in paths:
            _clean_in_place(path)
    else:
        _record([path for path in paths if arguments.force or not _is_current(path)], paths)
    translation.build_all(Repository(ROOT))
    return 0


def _record(stale: list[Path], paths: list[Path]) -> None:
    """Run what is stale and save its outputs, pictures and seconds."""
    if not stale:
        print("Every notebook's outputs are up to date.")
        return
    together = {path for path in paths if path.stem in ("06_training", "07_evaluation")}
    if together & set(stale):  # 07 judges the adapter of 06
        stale = sorted({*stale, *together})
    PICTURES.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "outputs"
        seconds = run_notebooks(PROFILE, only=",".join(path.name[:2] for path in stale), out=out)
        for path in stale:
            notebook = nbformat.read(out / path.name, as_version=4)
            clean(notebook, {str(out): "outputs", **_machine_paths()})
            notebook.metadata[KEY] = stamp(notebook)
            _write(notebook, path)
            for name, content in pictures(notebook).items():
                (PICTURES / f"{name}.png").write_bytes(content)
            print(f"recorded {path.name}")
        write_times(seconds)


def _machine_paths() -> dict[str, str]:
    """This machine's folders, and what stands for them in outputs."""
    return {str(models_dir()): "models", str(ROOT): ".", sys.prefix: ".venv", str(Path.home()): "~"}


def _clean_in_place(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    clean(notebook, _machine_paths())
    _write(notebook, path)


def _write(notebook: Any, path: Path) -> None:
    path.write_text(nbformat.writes(notebook, indent=1).rstrip("\n") + "\n", encoding="utf-8")


def _is_current(path: Path) -> bool:
    notebook = nbformat.read(path, as_version=4)
    return notebook.metadata.get(KEY) == stamp(notebook)


if __name__ == "__main__":
    sys.exit(main())
