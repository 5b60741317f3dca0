"""``llama-sft run`` and the command line's own behaviour, on notebooks written for the test."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pytest
from typer.testing import CliRunner

from llama_sft_helpers.cli import app
from llama_sft_helpers.run import RunError, describe_figures, find_notebooks, run_notebooks


@pytest.fixture
def write_notebooks(tmp_path, tiny_model_dir):
    def write(**cells_by_name: list[str]) -> Path:
        folder = tmp_path / "originals"
        folder.mkdir(exist_ok=True)
        for name, sources in cells_by_name.items():
            notebook = nbformat.v4.new_notebook(
                cells=[nbformat.v4.new_code_cell(source) for source in sources]
            )
            nbformat.write(notebook, folder / f"{name.removeprefix('n')}.ipynb")
        return folder

    return write


def run(*arguments) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "llama_sft_helpers.cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def test_notebooks_are_executed_in_order_into_the_folder(write_notebooks, tmp_path):
    originals = write_notebooks(
        n02_second=["print(open('first.txt').read())"],
        n01_first=["import os", "open('first.txt', 'w').write(os.environ['SFT_PROFILE'])"],
    )
    before = {path: path.read_bytes() for path in originals.iterdir()}
    run_notebooks("ci-tiny", only=None, out=tmp_path / "out", notebooks=originals)
    executed = nbformat.read(tmp_path / "out" / "02_second.ipynb", as_version=4)
    assert executed.cells[0].outputs[0].text == "ci-tiny\n"
    assert "ci-tiny" in (tmp_path / "out" / "02_second.html").read_text(encoding="utf-8")
    index = (tmp_path / "out" / "index.html").read_text(encoding="utf-8")
    assert index.index("01_first.html") < index.index("02_second.html")
    assert {path: path.read_bytes() for path in originals.iterdir()} == before


def test_the_first_failing_cell_stops_the_run_with_its_own_message(write_notebooks, tmp_path):
    originals = write_notebooks(
        n01_bad=["print('fine')", "raise ValueError('the column output is missing')", "print('never')"],
        n02_next=["print('never')"],
    )
    out = tmp_path / "out"
    result = run("run", "--profile", "ci-tiny", "--out", out, "--notebooks", originals)
    assert result.returncode == 1
    assert "01_bad.ipynb: a cell failed with ValueError: the column output is missing" in result.stderr
    assert "Traceback" not in result.stderr
    assert (out / "01_bad.html").is_file()
    assert not (out / "02_next.ipynb").exists()
    assert not (out / "index.html").exists()


def test_a_dead_kernel_and_a_slow_cell_are_named(write_notebooks, tmp_path):
    dead = write_notebooks(n01_dead=["import os, signal; os.kill(os.getpid(), signal.SIGKILL)"])
    with pytest.raises(RunError, match=r"01_dead.ipynb: the kernel died"):
        run_notebooks("ci-tiny", only=None, out=tmp_path / "out", notebooks=dead)
    slow = write_notebooks(n02_slow=["import time; time.sleep(60)"])
    with pytest.raises(RunError, match=r"02_slow.ipynb: a cell took longer than 1 seconds"):
        run_notebooks("ci-tiny", only="2", out=tmp_path / "out", notebooks=slow, cell_timeout_seconds=1)


def test_a_second_run_into_the_same_folder_is_refused(write_notebooks, tmp_path):
    originals = write_notebooks(n01_wait=["import time; time.sleep(60)"])
    out = tmp_path / "out"
    command = [sys.executable, "-m", "llama_sft_helpers.cli", "run", "--profile", "ci-tiny"]
    first = subprocess.Popen(
        [*command, "--out", str(out), "--notebooks", str(originals)],
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        deadline = time.monotonic() + 60
        while not (out / ".llama-sft-run.lock").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        with pytest.raises(RunError, match="Another run is writing to"):
            run_notebooks("ci-tiny", only=None, out=out, notebooks=originals)
    finally:
        os.killpg(first.pid, signal.SIGKILL)
        first.wait()


def test_an_output_folder_that_cannot_be_written_is_named(write_notebooks, tmp_path):
    originals = write_notebooks(n01_any=["1"])
    (tmp_path / "file").write_text("kept")
    result = run("run", "--profile", "ci-tiny", "--out", tmp_path / "file" / "out", "--notebooks", originals)
    assert result.returncode == 1
    assert "Cannot write to the output folder" in result.stderr
    assert (tmp_path / "file").read_text() == "kept"


def test_bad_names_are_one_clear_line_each(write_notebooks, tmp_path):
    originals = write_notebooks(n01_any=["1"])
    runner = CliRunner()
    for arguments, expected in [
        (["--profile", "nope"], "There is no profile 'nope'"),
        (["--profile", "ci-tiny", "--set", "max_stepz=3"], "no setting 'max_stepz'"),
        (["--profile", "ci-tiny", "--set", "3"], "expected key=value"),
        (["--profile", "ci-tiny", "--only", "07"], "There is no notebook 07. Valid numbers: 01"),
        (["--profile", "ci-tiny", "--notebooks", str(tmp_path / "none")], "No notebooks in"),
    ]:
        result = runner.invoke(
            app, ["run", "--out", str(tmp_path / "out"), "--notebooks", str(originals), *arguments]
        )
        assert result.exit_code == 1
        assert expected in result.stderr


def test_find_notebooks_selects_by_number():
    root = Path(__file__).parent.parent / "notebooks"
    assert [path.name for path in find_notebooks(root, "3, 04")] == ["03_quantization.ipynb", "04_lora.ipynb"]


def test_demo_model_command_prints_the_folder_and_refuses_a_foreign_one(tiny_model_dir, tmp_path):
    runner = CliRunner()
    good = runner.invoke(app, ["demo-model", str(tiny_model_dir), "--name", "tiny-llama"])
    assert good.exit_code == 0
    assert good.stdout.strip() == str(tiny_model_dir)
    (tmp_path / "other").write_text("")
    bad = runner.invoke(app, ["demo-model", str(tmp_path)])
    assert bad.exit_code == 1
    assert "was not written by this series" in bad.stderr


def test_figures_get_the_text_of_their_cell_in_order_and_escaped():
    def cell(alt, figures=1):
        metadata = {"alt": alt} if alt else {}
        made = nbformat.v4.new_code_cell("draw()", metadata=metadata)
        made.outputs = [nbformat.v4.new_output("display_data", {"image/png": "iVBORw0KGgo="})] * figures
        return made

    notebook = nbformat.v4.new_notebook(
        cells=[cell('Bars of "x" <y>'), cell(None), cell("A line", figures=2)]
    )
    from nbconvert import HTMLExporter

    page, _ = HTMLExporter().from_notebook_node(notebook)
    found = re.findall(r'<img[^>]* alt="([^"]*)"', describe_figures(page, notebook))
    none = "No description has been provided for this image"
    assert found == ["Bars of &quot;x&quot; &lt;y&gt;", none, "A line", "A line"]


def test_a_runs_page_describes_its_figures(write_notebooks, tmp_path):
    figure = "import matplotlib.pyplot as plt; plt.plot([1, 2]); plt.show()"
    originals = write_notebooks(n01_figure=[figure])
    path = originals / "01_figure.ipynb"
    notebook = nbformat.read(path, as_version=4)
    notebook.cells[0].metadata["alt"] = "A line that rises"
    nbformat.write(notebook, path)
    run_notebooks("ci-tiny", only=None, out=tmp_path / "out", notebooks=originals)
    assert 'alt="A line that rises"' in (tmp_path / "out" / "01_figure.html").read_text(encoding="utf-8")


def test_settings_reach_every_notebook(write_notebooks, tmp_path, monkeypatch):
    show = "from llama_sft_helpers.profiles import load_profile; p = load_profile()"
    originals = write_notebooks(n01_a=[show, "print(p.name, p.max_steps, p.epochs, p.dataset_id, p.columns)"])
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("SFT_PROFILE")
    (tmp_path / "my.csv").touch()
    own = 'profile = "ci-tiny"\nsettings = { max_steps = 3, columns = "q=prompt" }'
    (tmp_path / "llama-sft.toml").write_text(own, encoding="utf-8")
    options = ["--data", "my.csv", "--set", "max_steps=4", "--set", "learning_rate=0.1"]
    result = CliRunner().invoke(app, ["run", "--out", "out", "--notebooks", str(originals), *options])
    assert result.exit_code == 0, result.output
    (output,) = nbformat.read(tmp_path / "out" / "01_a.ipynb", as_version=4).cells[1].outputs
    assert output.text == f"ci-tiny 4 None {tmp_path / 'my.csv'} q=prompt\n"


@pytest.mark.parametrize("command", [["run"], ["plan"]])
def test_a_model_that_cannot_be_built_is_one_clear_error(command, tmp_path, monkeypatch):
    (tmp_path / "taken").write_text("a file where the models' folder should be")
    monkeypatch.setenv("SFT_MODELS_DIR", str(tmp_path / "taken"))
    extra = ["--out", tmp_path / "out"] if command == ["run"] else []
    done = run(*command, "--profile", "ci-tiny", *extra)
    assert done.returncode == 1
    assert "Cannot write the model to" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_originals_folder_is_no_output_folder_and_an_empty_choice_is_no_run(write_notebooks, tmp_path):
    originals = write_notebooks(n01_first=["1"])
    before = (originals / "01_first.ipynb").read_bytes()
    with pytest.raises(RunError, match="holds the originals, which are never written"):
        run_notebooks("ci-tiny", only=None, out=originals, notebooks=originals)
    assert (originals / "01_first.ipynb").read_bytes() == before
    with pytest.raises(RunError, match="--only ',' names no notebook"):
        run_notebooks("ci-tiny", only=",", out=tmp_path / "out", notebooks=originals)
