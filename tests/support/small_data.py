"""Run notebooks on a data set of few rows, with a profile's data settings and the tiny Llama.

As a script: python tests/support/small_data.py PROFILE DATA.jsonl OUT NUMBER... runs these notebooks' cells
one after the other in one process, each notebook in a namespace of its own; ``load_profile`` gets the
overrides.
"""

import json
import os
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
DATA_SETTINGS = (
    "eval_rows",
    "max_length",
    "packing",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "train_rows",
)


def write_rows(path, count):
    """The first ``count`` shipped rows that are short enough for every profile."""
    lines = (ROOT / "llama_sft_helpers" / "datasets" / "alpaca_mini.jsonl").read_text(encoding="utf-8")
    rows = [json.loads(line) for line in lines.splitlines()]
    short = [row for row in rows if len("".join(row.values())) < 250]
    assert len(short) >= count
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in short[:count]), encoding="utf-8")
    return path.parent


def overrides(profile_name, folder, **changes):
    """What of a profile concerns the data, to be laid over ``ci-tiny``: a tiny model, few steps."""
    from llama_sft_helpers.profiles import read_profile

    profile = read_profile(profile_name)
    return {name: getattr(profile, name) for name in DATA_SETTINGS} | {"dataset_id": str(folder)} | changes


def run_notebook(number, settings):
    """The code cells of a notebook, in order; its namespace at the end."""
    import nbformat
    from IPython.core.interactiveshell import InteractiveShell

    path = next((ROOT / "notebooks").glob(f"{number}_*.ipynb"))
    shell = InteractiveShell(user_ns={})
    cells = [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
    for cell in cells:
        for call in ("load_profile()", "load_profile(fast=True)"):
            cell.source = cell.source.replace(call, f"load_profile('ci-tiny', **{settings!r})")
        shell.run_cell(cell.source).raise_error()
    assert any("load_profile('ci-tiny'" in cell.source for cell in cells), f"{number} loads no profile"
    return shell.user_ns


def main(profile_name, folder, out, numbers, changes):
    import matplotlib as mpl

    mpl.use("agg")
    os.environ["SFT_OUTPUT_DIR"] = out
    settings = overrides(profile_name, folder, **changes)
    for number in numbers:
        run_notebook(number, settings)
    print("ran", *numbers)


if __name__ == "__main__":
    main(*sys.argv[1:4], sys.argv[4].split(","), json.loads(sys.argv[5]) if len(sys.argv) > 5 else {})
