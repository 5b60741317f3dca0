"""Every notebook runs top to bottom on the tiny Llama without a flood of warnings."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("[0-9][0-9]_*.ipynb"))
WARNING_LINES = 5


@pytest.fixture(scope="module")
def executed(tmp_path_factory, tiny_model_dir):
    """All notebooks run in order by ``pytest --nbmake``; 07 finds the adapter of 06 in the shared folder."""
    folder = tmp_path_factory.mktemp("executed")
    return folder, run_by_nbmake(NOTEBOOKS, folder)


def run_by_nbmake(notebooks, folder):
    """Run copies of notebooks in a folder: nbmake writes the outputs into the files it runs."""
    copies = [shutil.copy(path, folder) for path in notebooks]
    options = ["--nbmake", "--overwrite", "--nbmake-timeout=180", "-p", "no:cacheprovider", "-c", "/dev/null"]
    command = [sys.executable, "-m", "pytest", *options, "--rootdir", folder, *copies]
    environment = {**os.environ, "SFT_OUTPUT_DIR": str(folder / "outputs")}
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def test_nbmake_runs_every_notebook(executed):
    _, result = executed
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]
    assert f"{len(NOTEBOOKS)} passed" in result.stdout


@pytest.mark.slow
def test_nbmake_runs_the_korean_notebooks(tmp_path, tiny_model_dir):
    """Their code is that of the English ones; this is for what else a file can break."""
    korean = {path.name: path for path in (ROOT / "notebooks" / "ko").glob("*.ipynb")}
    result = run_by_nbmake([korean.get(path.name, path) for path in NOTEBOOKS], tmp_path)
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]
    assert f"{len(NOTEBOOKS)} passed" in result.stdout


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_no_warning_flood(executed, path):
    folder, _ = executed
    for index, cell in enumerate(nbformat.read(folder / path.name, as_version=4).cells):
        outputs = cell.get("outputs", [])
        stderr = "".join(output.text for output in outputs if output.get("name") == "stderr")
        lines = [line for line in re.split(r"[\r\n]", stderr) if line.strip() and "%|" not in line]
        assert len(lines) <= WARNING_LINES, f"{path.name}, cell {index}:\n" + "\n".join(lines[:20])


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_outputs_speak_without_styles(executed, path):
    """GitHub strips styles and scripts: what colour or bold type says, the text must say too."""
    folder, _ = executed
    outputs = [out for cell in nbformat.read(folder / path.name, 4).cells for out in cell.get("outputs", [])]
    for page in [out.data["text/html"] for out in outputs if "text/html" in out.get("data", {})]:
        assert not re.search(r"#T_\w+row\d[^{}]*{[^}]*(color|weight|decoration)", page)
        bare = re.sub(r"<(style|script)\b.*?</\1>|<[^>]*>", "", page, flags=re.DOTALL)
        assert bare.strip()
        assert "background:" not in page or re.search(r"[«|]", bare), "only colours tell its tokens apart"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_controls_leave_a_still_picture(executed, path):
    """No page that runs no widgets may show their names in place of what they control."""
    folder, _ = executed
    for cell in nbformat.read(folder / path.name, as_version=4).cells:
        if re.search(r"^interact\(", cell.source, re.MULTILINE):
            shown = [output.get("data", {}) for output in cell.outputs]
            assert any("image/png" in data or "text/html" in data for data in shown)
            assert not any("application/vnd.jupyter.widget-view+json" in data for data in shown)
