"""Record the notebooks' saved outputs: run them with profile cpu-demo and write them back, cleaned.

A notebook is run again only if its code, its helpers or the versions changed since its outputs were recorded
(``--force`` runs all). What is written differs from run to run only in what was measured (seconds, MiB).
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

import nbformat

from llama_sft_helpers.demo_model import models_dir
from llama_sft_helpers.run import find_notebooks, run_notebooks

ROOT = Path(__file__).parent.parent
PROFILE = "cpu-demo"
KEY = "llama_sft"
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
    """Hash of a notebook's code cells, in order."""
    sources = [cell.source for cell in notebook.cells if cell.cell_type == "code"]
    return hashlib.sha256("\0".join(sources).encode()).hexdigest()


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
        for output in cell.outputs:
            if "execution_count" in output:
                output.execution_count = number
            _clean_output(output, cell.metadata.get("alt"), replacements)


def _is_progress(output: Any) -> bool:
    """Progress bars and the like on stderr, which say nothing once they are over."""
    return output.get("name") == "stderr" and "%|" in output.get("text", "")


def _clean_output(output: Any, alt: str | None, replacements: dict[str, str]) -> None:
    data = output.get("data", {})
    data.pop("application/vnd.jupyter.widget-view+json", None)
    if alt and "image/png" in data:
        output.metadata["image/png"] = {"alt": alt}
    for holder, key in [(output, "text"), *((data, key) for key in data if key.startswith("text/"))]:
        if key in holder:
            text = holder[key]
            for old, new in replacements.items():
                text = text.replace(old, new)
            holder[key] = re.sub(r" at 0x[0-9a-f]+>", ">", text)


def main() -> int:
    """Record what is out of date."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--force", action="store_true", help="run every notebook again")
    arguments = parser.parse_args()
    paths = find_notebooks(ROOT / "notebooks")
    stale = [path for path in paths if arguments.force or not _is_current(path)]
    if not stale:
        print("Every notebook's outputs are up to date.")
        return 0
    if any(path.stem == "07_evaluation" for path in stale):  # it needs the adapter of 06
        stale = sorted({*stale, *(path for path in paths if path.stem == "06_training")})
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "outputs"
        run_notebooks(PROFILE, only=",".join(path.name[:2] for path in stale), out=out)
        replacements = {
            str(out): "outputs",
            str(models_dir()): "models",
            str(ROOT): ".",
            sys.prefix: ".venv",
            str(Path.home()): "~",
        }
        for path in stale:
            notebook = nbformat.read(out / path.name, as_version=4)
            clean(notebook, replacements)
            notebook.metadata[KEY] = stamp(notebook)
            path.write_text(nbformat.writes(notebook, indent=1) + "\n", encoding="utf-8")
            print(f"recorded {path.name}")
    return 0


def _is_current(path: Path) -> bool:
    notebook = nbformat.read(path, as_version=4)
    return notebook.metadata.get(KEY) == stamp(notebook)


if __name__ == "__main__":
    sys.exit(main())
