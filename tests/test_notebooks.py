"""Every notebook runs top to bottom on the tiny Llama, and looks as a notebook of this series should."""

import ast
import re
import statistics
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
    """All notebooks run in order by ``pytest --nbmake``; 07 finds the adapter of 06 in the shared folder.

    The originals are copied first: nbmake writes the outputs into the files it runs.
    """
    folder = tmp_path_factory.mktemp("executed")
    for path in NOTEBOOKS:
        (folder / path.name).write_bytes(path.read_bytes())
    command = [
        sys.executable,
        "-m",
        "pytest",
        "--nbmake",
        "--overwrite",
        "--nbmake-timeout=180",
        "-p",
        "no:cacheprovider",
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SFT_OUTPUT_DIR", str(folder / "outputs"))
        result = subprocess.run(
            [
                *command,
                "-c",
                "/dev/null",
                "--rootdir",
                str(folder),
                *[str(folder / path.name) for path in NOTEBOOKS],
            ],
            capture_output=True,
            text=True,
        )
    return folder, result


def test_nbmake_runs_every_notebook(executed):
    _, result = executed
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
def test_the_opening_is_the_same_everywhere(path):
    cells = nbformat.read(path, as_version=4).cells
    opening = cells[0].source
    assert opening.startswith("[![Open In Colab]")
    assert f"# {path.stem[:2]} · " in opening
    assert re.search(r"GPU: .* · Time: .* · Memory: .* · Helpers: ", opening)
    install = next(cell.source for cell in cells if cell.cell_type == "code")
    first = nbformat.read(NOTEBOOKS[0], as_version=4)
    assert install == next(cell.source for cell in first.cells if cell.cell_type == "code")


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_previous_and_next_link_the_series(path):
    opening = nbformat.read(path, as_version=4).cells[0].source
    position = NOTEBOOKS.index(path)
    neighbours = NOTEBOOKS[max(position - 1, 0) : position] + NOTEBOOKS[position + 1 : position + 2]
    for neighbour in neighbours:
        assert f"({neighbour.name})" in opening


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_closing_is_the_same_everywhere(path):
    markdown = "\n".join(
        c.source for c in nbformat.read(path, as_version=4).cells if c.cell_type == "markdown"
    )
    for heading in ("## Starting point", "## What we measured", "## Exercises", "## References"):
        assert heading in markdown, heading
    assert 2 <= markdown.count("<details>") <= 4


def imports(source: str) -> bool:
    """Whether a cell imports something itself; a program in a string, for another process, does not count."""
    python = re.sub(r"^(\s*)[%!].*$", r"\1pass", source, flags=re.MULTILINE)
    return any(isinstance(node, ast.Import | ast.ImportFrom) for node in ast.walk(ast.parse(python)))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_cells_are_short_and_imports_stand_at_the_top(path):
    code = [cell.source for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
    lengths = [len([line for line in source.splitlines() if line.strip()]) for source in code]
    assert statistics.median(lengths) <= 8
    assert max(lengths) <= 30
    with_imports = [i for i, source in enumerate(code) if imports(source)]
    late = [i for i in with_imports if i > 2]
    # 01 checks the environment first: a broken package must not hide the table that names it
    assert len(late) <= (1 if path.stem == "01_environment" else 0), [code[i] for i in late]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_file_is_clean(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    widgets = notebook.metadata.get("widgets", {})
    assert all("state" in value for value in widgets.values())
    assert all("execution" not in cell.metadata for cell in notebook.cells)
    assert path.stat().st_size <= 600 * 1024
    assert not re.search(r"/(home|root|tmp|work)/", path.read_text(encoding="utf-8"))
