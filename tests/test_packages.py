"""What a reader meets when importing: a table of contents that answers, and nothing heavy."""

import importlib
import subprocess
import sys
from pathlib import Path

import pytest
from check_package import STEPS
from repository import Repository

CONTENTS = Repository(Path(__file__).parent.parent).contents
HEAVY = {"torch", "transformers", "pandas", "matplotlib", "peft", "trl", "huggingface_hub", "ipywidgets"}


@pytest.mark.parametrize("package", CONTENTS)
def test_a_package_offers_what_its_table_of_contents_names(package):
    imported = importlib.import_module(f"llama_sft_helpers.{package}")
    assert dir(imported) == sorted(imported.__all__) == sorted(CONTENTS[package])
    assert all(getattr(imported, name) is not None for name in CONTENTS[package])
    with pytest.raises(AttributeError, match=f"llama_sft_helpers.{package} has no 'nothing'; it offers "):
        imported.nothing  # noqa: B018


@pytest.mark.parametrize("name", ["", *(f".{name}" for name in (*STEPS, "memory", "doctor", "profiles"))])
def test_importing_a_step_imports_nothing_heavy_and_is_quick(name):
    code = (
        "import sys, time; start = time.process_time(); "
        f"import llama_sft_helpers{name}; print(time.process_time() - start, *sys.modules)"
    )
    command = [sys.executable, "-c", code]
    runs = [subprocess.run(command, capture_output=True, text=True, check=True).stdout for _ in range(3)]
    assert min(float(run.split()[0]) for run in runs) < 0.2
    assert not HEAVY & set(runs[0].split())
