"""``llama-sft run`` and the command line's own behaviour, on notebooks written for the test."""

import re
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pytest
from filelock import FileLock
from nbconvert import HTMLExporter
from typer.testing import CliRunner

from llama_sft_helpers.cli import app
from llama_sft_helpers.core import progress
from llama_sft_helpers.execution import RunError
from llama_sft_helpers.notebook_page import describe_figures
from llama_sft_helpers.run import find_notebooks, run_notebooks

COMMAND = [sys.executable, "-m", "llama_sft_helpers.cli"]
FIGURE = "import matplotlib.pyplot as plt; plt.plot([1, 2]); plt.show()"


def run(*arguments) -> subprocess.CompletedProcess:
    return subprocess.run([*COMMAND, *map(str, arguments)], capture_output=True, text=True, timeout=120)


def test_notebooks_are_executed_in_order_into_the_folder(write_notebooks, tmp_path):
    originals = write_notebooks(
        n02_second=["print(open('first.txt').read())", FIGURE],
        n01_first=["import os", "open('first.txt', 'w').write(os.environ['SFT_PROFILE'])"],
    )
    path = originals / "02_second.ipynb"
    notebook = nbformat.read(path, as_version=4)
    notebook.cells[1].metadata["alt"] = "A line that rises"
    nbformat.write(notebook, path)
    before = {path: path.read_bytes() for path in originals.iterdir()}
    run_notebooks("ci-tiny", only=None, out=tmp_path / "out", notebooks=originals)
    executed = nbformat.read(tmp_path / "out" / "02_second.ipynb", as_version=4)
    assert executed.cells[0].outputs[0].text == "ci-tiny\n"
    page = (tmp_path / "out" / "02_second.html").read_text(encoding="utf-8")
    assert "ci-tiny" in page
    assert 'alt="A line that rises"' in page
    index = (tmp_path / "out" / "index.html").read_text(encoding="utf-8")
    assert index.index("01_first.html") < index.index("02_second.html")
    assert {path: path.read_bytes() for path in originals.iterdir()} == before


def test_the_first_failing_cell_stops_the_run_with_its_own_message(write_notebooks, tmp_path):
    originals = write_notebooks(
        n01_bad=["print('fine')", "raise ValueError('the column output is missing')", "print('never')"],
        n02_next=["print('never')"],
    )
    saved = nbformat.read(originals / "01_bad.ipynb", as_version=4)
    saved.cells[2].outputs = [nbformat.v4.new_output("stream", text="of an earlier run")]
    nbformat.write(saved, originals / "01_bad.ipynb")
    out = tmp_path / "out"
    options = ["--profile", "ci-tiny", "--out", str(out), "--notebooks", str(originals)]
    result = CliRunner().invoke(app, ["run", *options])
    assert result.exit_code == 1
    assert "01_bad.ipynb: a cell failed with ValueError: the column output is missing" in result.stderr
    assert "Traceback" not in result.stderr
    assert "of an earlier run" not in (out / "01_bad.html").read_text(encoding="utf-8")
    assert "of an earlier run" not in (out / "01_bad.ipynb").read_text(encoding="utf-8")
    assert result.stdout.startswith("profile ci-tiny, model ")
    assert not (out / "02_next.ipynb").exists()
    index = (out / "index.html").read_text(encoding="utf-8")
    assert "0 of 2 notebooks are done; the run stopped there." in index
    assert "refresh" not in index


def test_the_result_page_is_there_from_the_start_and_can_be_opened(write_notebooks, tmp_path, monkeypatch):
    opened = []
    monkeypatch.setattr("webbrowser.open", opened.append)
    look = "page = open('index.html').read(); print('refresh' in page, page.count('running now'))"
    out = tmp_path / "out"
    originals = write_notebooks(n01_look=[look])
    run_notebooks("ci-tiny", only=None, out=out, notebooks=originals, open_page=True)
    assert opened == [(out / "index.html").as_uri()]
    assert nbformat.read(out / "01_look.ipynb", 4).cells[0].outputs[0].text == "True 1\n"
    assert '<a href="play.html">' in (out / "index.html").read_text(encoding="utf-8")
    assert '<a href="index.html">' in (out / "play.html").read_text(encoding="utf-8")
    assert "All notebooks are done." in (out / "index.html").read_text(encoding="utf-8")


MEET = """
import os, time
open("{mine}", "w").close()
while not os.path.exists("{other}"):
    time.sleep(0.1)
names = "OMP_NUM_THREADS", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES"
print(*[os.environ[name] for name in names])
"""


def test_two_notebooks_of_the_series_share_the_cores_and_07_waits_for_06(
    write_notebooks, tmp_path, monkeypatch
):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.delenv("MALLOC_MMAP_THRESHOLD_", raising=False)
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "7")  # the user's own, which stays
    monkeypatch.setattr("psutil.cpu_count", lambda logical: 4)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(8)), raising=False)
    originals = write_notebooks(
        n06_training=[MEET.format(mine="a", other="b"), "open('adapter', 'w').close()"],
        n07_evaluation=["import os; print(os.path.exists('adapter'))"],
        n08_speed=[MEET.format(mine="b", other="a")],
    )
    out = tmp_path / "out"
    run_notebooks("ci-tiny", only=None, out=out, notebooks=originals, cell_timeout_seconds=60, jobs=2)
    printed = [
        nbformat.read(path, as_version=4).cells[0].outputs[0].text for path in sorted(out.glob("0*.ipynb"))
    ]
    set_up = "2 4194304 7 glibc.malloc.hugetlb=1\n"
    assert printed == [set_up, "True\n", set_up]


REGISTERED = """
import atexit, gc
class Look:
    registered = []
    def __eq__(self, other):
        self.registered.append(other)
        return False
atexit.unregister(Look())  # which compares it with all that is registered
print(Look.registered.count(gc.freeze))
"""


def test_a_kernel_freezes_its_objects_at_its_end_and_its_notebook_begins_with_no_name(
    write_notebooks, tmp_path, monkeypatch
):
    monkeypatch.delenv("PYTHONPATH", raising=False)  # by which the tests' own kernels do so anyway
    out = tmp_path / "out"
    originals = write_notebooks(n01_look=["print({'gc', 'atexit'} & set(dir()))", REGISTERED])
    run_notebooks("ci-tiny", only=None, out=out, notebooks=originals, cell_timeout_seconds=60)
    cells = nbformat.read(out / "01_look.ipynb", 4).cells
    assert [cell.outputs[0].text for cell in cells] == ["set()\n", "1\n"]


def test_a_failing_notebook_stops_the_one_beside_it(write_notebooks, tmp_path):
    originals = write_notebooks(
        n06_training=["import time; time.sleep(300); print('never')"], n04_lora=["1 / 0"], n08_speed=["1"]
    )
    out = tmp_path / "out"
    start = time.monotonic()
    with pytest.raises(RunError, match=r"04_lora.ipynb: a cell failed with ZeroDivisionError"):
        run_notebooks("ci-tiny", only=None, out=out, notebooks=originals, jobs=2)
    assert time.monotonic() - start < 200
    assert not (out / "08_speed.ipynb").exists()
    assert (out / "index.html").read_text(encoding="utf-8").count("not done") == 3


REPORTS = "import time; from llama_sft_helpers.core.progress import report_step; report_step(1, 2, 0.5, 83.4)"


@pytest.mark.parametrize("terminal", [False, True])
def test_a_log_shows_cells_and_training_steps_in_plain_lines(
    terminal, write_notebooks, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(progress, "_SECONDS_BETWEEN_LINES", 0)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal)
    originals = write_notebooks(n01_a=["1", f"{REPORTS}; time.sleep(1)", "time.sleep(0.5)"])
    run_notebooks("ci-tiny", only=None, out=tmp_path / "out", notebooks=originals)
    printed = capsys.readouterr().out
    told = "".join(line + "\n" for line in printed.splitlines() if line.startswith("01_a: "))
    step = "01_a: 1 of 3 cells, training step 1 of 2, loss 0.5000, 1:23 left\n"
    finished = re.escape(f"{step}01_a: 2 of 3 cells\n") + r"(.*\n)?01_a: done in \d:\d\d\n$"
    assert not told if terminal else re.search(finished, told), told
    assert "\r" not in printed


def test_nobody_holds_the_file_open_that_the_kernel_reports_in(write_notebooks, tmp_path):
    """Windows lets no second process open it then."""
    look = "import os, psutil; print(*[file.path for file in psutil.Process().parent().open_files()])"
    originals = write_notebooks(
        n01_a=[
            look,
            "print(os.path.isfile(os.environ['SFT_PROGRESS_FILE']))",
            "print(os.environ['SFT_PROGRESS_FILE'])",
        ]
    )
    run_notebooks("ci-tiny", only=None, out=tmp_path / "out", notebooks=originals)
    cells = nbformat.read(tmp_path / "out" / "01_a.ipynb", as_version=4).cells
    held, is_there, path = (cell.outputs[0].text.strip() for cell in cells)
    assert is_there == "True"
    assert ".llama-sft-run.lock" in held
    assert path not in held


def test_a_dead_kernel_and_a_slow_cell_are_named(write_notebooks, tmp_path):
    dead = write_notebooks(n01_dead=["import os; os._exit(9)"])
    with pytest.raises(RunError, match=r"01_dead.ipynb: the kernel died"):
        run_notebooks("ci-tiny", only=None, out=tmp_path / "out", notebooks=dead)
    slow = write_notebooks(n02_slow=["import time; time.sleep(60)"])
    with pytest.raises(RunError, match=r"02_slow.ipynb: a cell took longer than 1 seconds"):
        run_notebooks("ci-tiny", only="2", out=tmp_path / "out", notebooks=slow, cell_timeout_seconds=1)


def test_a_second_run_into_the_same_folder_is_refused(write_notebooks, tmp_path):
    originals = write_notebooks(n01_any=["1"])
    with FileLock(tmp_path / ".llama-sft-run.lock"), pytest.raises(RunError, match="Another run is writing"):
        run_notebooks("ci-tiny", only=None, out=tmp_path, notebooks=originals)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--profile", "nope"], "There is no profile 'nope'"),
        (["--set", "max_stepz=3"], "no setting 'max_stepz'"),
        (["--set", "3"], "expected key=value"),
        (["--only", "07"], "There is no notebook 07. Valid numbers: 01"),
        (["--only", ","], "--only ',' names no notebook"),
        (["--notebooks", "none"], "No notebooks in"),
        (["--out", "file/out"], "Cannot write to the output folder"),
        (["--out", "originals"], "holds the originals, which are never written"),
    ],
)
def test_a_run_that_cannot_start_is_one_clear_line(
    arguments, expected, write_notebooks, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("kept", encoding="utf-8")
    before = (write_notebooks(n01_any=["1"]) / "01_any.ipynb").read_bytes()
    options = ["--profile", "ci-tiny", "--out", "out", "--notebooks", "originals", *arguments]
    result = CliRunner().invoke(app, ["run", *options])
    assert result.exit_code == 1
    assert expected in result.stderr
    assert (tmp_path / "file").read_text(encoding="utf-8") == "kept"
    assert (tmp_path / "originals" / "01_any.ipynb").read_bytes() == before


@pytest.mark.parametrize("command", ["run", "train"])
def test_without_the_runner_a_run_names_what_is_missing_and_the_command(command, tmp_path, monkeypatch):
    for name in ("nbclient", "nbformat"):
        monkeypatch.setitem(sys.modules, name, None)
    result = CliRunner().invoke(app, [command, "--profile", "ci-tiny", "--out", str(tmp_path / "out")])
    assert result.exit_code == 1
    assert 'not installed here: nbclient, nbformat. Install them: pip install "llama-sft-' in result.stderr
    assert not (tmp_path / "out").exists()


def test_find_notebooks_selects_by_number():
    root = Path(__file__).parent.parent / "notebooks"
    assert [path.name for path in find_notebooks(root, "3, 04")] == ["03_quantization.ipynb", "04_lora.ipynb"]


@pytest.mark.parametrize(
    ("asked", "system", "folder"),
    [(None, "ko_KR.UTF-8", "ko"), ("en", "ko_KR.UTF-8", "."), (None, "C.UTF-8", "."), ("ko", "C", "ko")],
)
def test_notebooks_are_in_the_language_asked_for_or_the_systems(asked, system, folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("LC_ALL", raising=False)
    monkeypatch.setenv("LANG", system)
    monkeypatch.setenv("SFT_LANG", asked or "")
    for place in (Path("notebooks"), Path("notebooks", "ko")):
        place.mkdir()
        (place / "03_quantization.ipynb").touch()
    assert find_notebooks() == [Path("notebooks", folder, "03_quantization.ipynb")]


def test_a_readers_own_notebooks_are_not_taken_for_the_series(tmp_path, monkeypatch):
    (tmp_path / "notebooks").mkdir()
    (tmp_path / "notebooks" / "01_mine.ipynb").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SFT_LANG", "en")
    series = Path(__file__).parent.parent / "notebooks"
    assert find_notebooks(only="1, 9") == [series / "01_environment.ipynb", series / "09_your_run.ipynb"]


def test_demo_model_command_prints_the_folder_and_refuses_a_foreign_one(tiny_model_dir, tmp_path):
    runner = CliRunner()
    good = runner.invoke(app, ["demo-model", str(tiny_model_dir), "--name", "tiny-llama"])
    assert good.exit_code == 0
    assert good.stdout.strip() == str(tiny_model_dir)
    (tmp_path / "other").write_text("", encoding="utf-8")
    bad = runner.invoke(app, ["demo-model", str(tmp_path)])
    assert bad.exit_code == 1
    assert "was not written by this series" in bad.stderr


def test_figures_get_the_text_of_their_cell_in_order_and_escaped():
    def cell(alt, figures=1):
        metadata = {"alt": alt} if alt else {}
        made = nbformat.v4.new_code_cell("draw()", metadata=metadata)
        made.outputs = [nbformat.v4.new_output("display_data", {"image/png": "iVBORw0KGgo="})] * figures
        return made

    cells = [cell('Bars of "x" <y>'), cell(None), cell("A line", figures=2)]
    notebook = nbformat.v4.new_notebook(cells=cells)
    page, _ = HTMLExporter().from_notebook_node(notebook)
    found = re.findall(r'<img[^>]* alt="([^"]*)"', describe_figures(page, notebook))
    none = "No description has been provided for this image"
    assert found == ["Bars of &quot;x&quot; &lt;y&gt;", none, "A line", "A line"]


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
    (tmp_path / "taken").write_text("a file where the models' folder should be", encoding="utf-8")
    monkeypatch.setenv("SFT_MODELS_DIR", str(tmp_path / "taken"))
    extra = ["--out", tmp_path / "out"] if command == ["run"] else []
    done = run(*command, "--profile", "ci-tiny", *extra)
    assert done.returncode == 1
    assert "Cannot write the model tiny-llama to" in done.stderr
    assert "Traceback" not in done.stderr
