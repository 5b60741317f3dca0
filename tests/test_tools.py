"""The tools that keep badges, recorded outputs and the site true."""

import importlib.util
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).parent.parent


def load_tool(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "tools" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def record():
    return load_tool("record")


def test_badges_restamps_every_place_and_refuses_a_bad_name(tmp_path, monkeypatch):
    badges = load_tool("badges")
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, tmp_path / name)
    shutil.copytree(ROOT / "notebooks", tmp_path / "notebooks")
    monkeypatch.setattr(badges, "ROOT", tmp_path)
    changed = badges.restamp("someone/fork")
    assert len(changed) == 2 + len(list((ROOT / "notebooks").glob("*.ipynb")))
    assert badges.current_repository() == "someone/fork"
    assert "llama-sft/llama-sft-notebooks" not in (tmp_path / "README.md").read_text(encoding="utf-8")
    with pytest.raises(ValueError, match="REPO='': expected owner/name"):
        badges.restamp("")


def test_the_hash_follows_the_code_and_not_the_prose(record):
    code, prose = nbformat.v4.new_code_cell("1 + 1"), nbformat.v4.new_markdown_cell("text")
    before = record.code_sha256(nbformat.v4.new_notebook(cells=[code, prose]))
    prose.source = "other text"
    assert record.code_sha256(nbformat.v4.new_notebook(cells=[code, prose])) == before
    code.source = "1 + 2"
    assert record.code_sha256(nbformat.v4.new_notebook(cells=[code, prose])) != before


def test_cleaning_drops_what_differs_for_no_reason_and_keeps_results(record):
    cell = nbformat.v4.new_code_cell(
        "f()", execution_count=17, metadata={"execution": {"shell.execute_reply": "12:00"}, "alt": "Two bars"}
    )
    cell.outputs = [
        nbformat.v4.new_output("stream", name="stderr", text="Loading: 100%|####| 3/3\n"),
        nbformat.v4.new_output(
            "stream", name="stdout", text="saved to /home/me/out/adapter <X at 0x7f00ab>\n"
        ),
        nbformat.v4.new_output(
            "display_data", data={"image/png": "iVBOR", "application/vnd.jupyter.widget-view+json": {}}
        ),
    ]
    notebook = nbformat.v4.new_notebook(cells=[cell], metadata={"widgets": {"no": "state"}})
    record.clean(notebook, {"/home/me/out": "outputs"})
    assert cell.execution_count == 1
    assert "execution" not in cell.metadata
    assert [output.output_type for output in cell.outputs] == ["stream", "display_data"]
    assert cell.outputs[0].text == "saved to outputs/adapter <X>\n"
    assert list(cell.outputs[1].data) == ["image/png"]
    assert cell.outputs[1].metadata["image/png"]["alt"] == "Two bars"
    assert "widgets" not in notebook.metadata


def test_a_changed_cell_makes_recorded_outputs_stale(record, tmp_path):
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("1")])
    notebook.metadata[record.KEY] = record.stamp(notebook)
    path = tmp_path / "01_x.ipynb"
    nbformat.write(notebook, path)
    assert record._is_current(path)
    notebook.cells[0].source = "2"
    nbformat.write(notebook, path)
    assert not record._is_current(path)


@pytest.mark.parametrize(
    ("target", "limits"),
    [
        (
            "test-avx2",
            {
                "ATEN_CPU_CAPABILITY": "avx2",
                "ONEDNN_MAX_CPU_ISA": "AVX2",
                "MKL_ENABLE_INSTRUCTIONS": "AVX2",
            },
        ),
        ("test-default", {"ATEN_CPU_CAPABILITY": "default"}),
        ("test-one-thread", {"OMP_NUM_THREADS": "1"}),
    ],
)
def test_the_tests_of_other_cpus_run_under_their_limits_and_in_a_fresh_models_folder(
    tmp_path, target, limits
):
    """``make`` runs a stand-in for Python that writes its environment down."""
    bin_folder = tmp_path / "bin"
    bin_folder.mkdir()
    python = bin_folder / "python"
    python.write_text(f'#!/bin/sh\nenv > {tmp_path}/seen\nls -A "$SFT_MODELS_DIR" > {tmp_path}/models\n')
    python.chmod(0o755)
    (tmp_path / ".installed").touch()
    names = ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS", "OMP_NUM_THREADS")
    outside = {name: value for name, value in os.environ.items() if name not in names}
    command = ["make", "-C", str(ROOT), target, f"VENV={tmp_path}", f"BIN={bin_folder}"]
    subprocess.run(command, env=outside, check=True, capture_output=True)
    seen = dict(line.split("=", 1) for line in (tmp_path / "seen").read_text().splitlines() if "=" in line)
    assert {name: seen[name] for name in names if name in seen} == limits
    assert (tmp_path / "models").read_text() == ""
    assert seen["SFT_MODELS_DIR"] != os.environ["SFT_MODELS_DIR"]
    assert not Path(seen["SFT_MODELS_DIR"]).exists()  # taken away again


def test_each_instruction_set_has_a_compile_cache_of_its_own():
    """One shared cache gives C++ code for AVX2 to a run without it, where it does not compile."""
    code = "import os, conftest; print(os.environ.get('TORCHINDUCTOR_CACHE_DIR'))"
    seen = []
    for limit in ({}, {"ATEN_CPU_CAPABILITY": "default"}, {"ATEN_CPU_CAPABILITY": "avx2"}):
        names = ("ATEN_CPU_CAPABILITY", "TORCHINDUCTOR_CACHE_DIR")
        outside = {name: value for name, value in os.environ.items() if name not in names}
        command = [sys.executable, "-c", code]
        done = subprocess.run(
            command, cwd=ROOT / "tests", env=outside | limit, capture_output=True, text=True, check=True
        )
        seen.append(done.stdout.strip())
    assert seen[0] == "None"  # torch's own choice
    assert seen[1].endswith("inductor-default")
    assert seen[2].endswith("inductor-avx2")


@pytest.mark.slow
def test_the_wheel_installs_in_a_clean_venv_with_data_inside(tmp_path):
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", tmp_path, ROOT], check=True
    )
    wheel = next(tmp_path.glob("*.whl"))
    names = zipfile.ZipFile(wheel).namelist()
    assert "llama_sft_helpers/datasets/alpaca_mini.jsonl" in names
    assert "llama_sft_helpers/profiles/colab-a100.toml" in names
    assert "llama_sft_helpers/configs/llama3_8b.json" in names
    assert "llama_sft_helpers/results/speed_h100_40gib.json" in names
    assert "llama_sft_helpers/models/tiny-llama/model.safetensors" in names
    assert not [name for name in names if name.startswith(("tests", "tools", "notebooks"))]
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    python = tmp_path / "venv" / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", "-q", "--no-deps", wheel], check=True)
    code = "from llama_sft_helpers.profiles import available_profiles; print(*available_profiles())"
    result = subprocess.run([python, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "colab-a100" in result.stdout
    packages = Path(importlib.util.find_spec("filelock").origin).parents[1]  # what the wheel needs is here
    code = f"import sys; sys.path.append({str(packages)!r}); "
    code += "from llama_sft_helpers.demo_model import ensure_model; print(ensure_model('tiny-llama', 'tiny'))"
    subprocess.run([python, "-c", code], cwd=tmp_path, check=True)
    shipped = ROOT / "llama_sft_helpers" / "models" / "tiny-llama"
    assert {path.name: path.read_bytes() for path in (tmp_path / "tiny").iterdir()} == {
        path.name: path.read_bytes() for path in shipped.iterdir()
    }
