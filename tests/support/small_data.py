"""Run notebooks on a data set of few rows, with a profile's data settings and the tiny Llama.

As a script: python tests/support/small_data.py PROFILE DATA OUT 06,07 CHANGES runs these notebooks' cells one
after the other in one process, each notebook in a namespace of its own; ``load_profile`` gets the changes.
Several such runs may follow each other, which saves imports; each ends with a line ``ran`` or ``failed``.
"""

import json
import os
import sys
import traceback
from pathlib import Path

import nbformat
from IPython.core.interactiveshell import InteractiveShell

from llama_sft_helpers.profiles import read_profile

ROOT = Path(__file__).parents[2]
BATCH = ("per_device_train_batch_size", "gradient_accumulation_steps")
DATA_SETTINGS = ("eval_rows", "max_length", "packing", "train_rows", *BATCH)


def write_rows(path, count):
    """The first ``count`` shipped rows that are short enough for every profile."""
    lines = (ROOT / "llama_sft_helpers" / "datasets" / "alpaca_mini.jsonl").read_text(encoding="utf-8")
    rows = [json.loads(line) for line in lines.splitlines()]
    short = [row for row in rows if len("".join(row.values())) < 250]
    assert len(short) >= count
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in short[:count]), encoding="utf-8")
    return path.parent


def run_notebook(number, settings):
    """Run the code cells of a notebook in order."""
    path = next((ROOT / "notebooks").glob(f"{number}_*.ipynb"))
    shell = InteractiveShell(user_ns={})
    cells = [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
    for cell in cells:
        for call in ("load_profile()", "load_profile(fast=True)"):
            cell.source = cell.source.replace(call, f"load_profile('ci-tiny', **{settings!r})")
        shell.run_cell(cell.source).raise_error()
    assert any("load_profile('ci-tiny'" in cell.source for cell in cells), f"{number} loads no profile"


def main(profile_name, folder, out, numbers, changes):
    os.environ |= {"SFT_OUTPUT_DIR": out, "MPLBACKEND": "agg"}
    profile = read_profile(profile_name)
    # what of the profile concerns the data, laid over ``ci-tiny``: a tiny model, few steps
    settings = {name: getattr(profile, name) for name in DATA_SETTINGS} | {"dataset_id": folder} | changes
    for number in numbers:
        run_notebook(number, settings)


if __name__ == "__main__":
    for start in range(1, len(sys.argv), 5):
        profile_name, folder, out, numbers, changes = sys.argv[start : start + 5]
        try:
            main(profile_name, folder, out, numbers.split(","), json.loads(changes))
            print("ran", numbers, flush=True)
        except Exception:
            traceback.print_exc(file=sys.stdout)
            print("failed", numbers, flush=True)
