"""Drills, minutes long (`pytest -m slow`): kills, Ctrl-C, full and read-only disks, damaged files, two runs.

The counts are printed at the end. A drill's draw is repeated with DRILL_SEED.
"""

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import ledger as counts
import nbformat
import psutil
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from provocations import read_only, small_disk

from llama_sft_helpers.doctor import explain

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform == "win32", reason="needs fork, signals and groups of processes"),
]
SEED = int(os.environ.get("DRILL_SEED", random.randrange(10**6)))
TRAINING = Path(__file__).parents[1] / "support" / "drill_training.py"
COMMAND = [sys.executable, "-m", "llama_sft_helpers.cli"]


def survived(drill, **further):
    counts.record("drills", drill, provoked=1, survived=1, **further)


def leftovers(folder):
    """Scratch files and folders that a run should have taken away."""
    kept = ("*.part", ".*.part", ".*.tmp", ".tiny-llama.*", ".model.*", ".merged.*")
    found = [path for pattern in kept for path in folder.rglob(pattern)]
    return [path for path in found if path.suffix != ".lock"]


def start(out, notebooks, command=COMMAND, **changes):
    """Run notebooks by the command line, in another process."""
    arguments = ["run", "--profile", "ci-tiny", "--out", out, "--notebooks", notebooks]
    return subprocess.Popen([*command, *arguments], stderr=subprocess.PIPE, text=True, **changes)


def run(out, notebooks):
    process = start(out, notebooks)
    printed = process.communicate(timeout=120)[1]
    assert "Traceback" not in printed
    return process.returncode, printed


@pytest.fixture
def originals(tmp_path, tiny_model_dir):
    """Writes notebooks of these cells: 01_a, and 02_b if asked for."""
    folder = tmp_path / "originals"
    folder.mkdir()

    def write(*cells):
        for name, source in zip(("01_a", "02_b"), cells, strict=False):
            built = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source)])
            nbformat.write(built, folder / f"{name}.ipynb")
        return folder

    return write


# --- Training ---


def training_drill(which, folder, times):
    command = [sys.executable, TRAINING, which, folder, str(SEED), str(times)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, f"DRILL_SEED={SEED}: {done.stderr[-3000:]}"
    report = json.loads(done.stdout.splitlines()[-1])
    return report, f"DRILL_SEED={SEED}: {report}"


def test_training_killed_at_ten_random_moments(tmp_path, tiny_model_dir):
    report, where = training_drill("kill", tmp_path / "drill", 10)
    lost, ended = report["lost_checkpoints"], report["equal_ends"]
    further = {"lost checkpoints": lost, "runs ended bit for bit": ended}
    name = "SIGKILL at random moments of a training"
    counts.record("drills", name, provoked=report["kills"], survived=report["kills"] - lost, **further)
    assert (report["kills"], lost, ended) == (10, 0, report["runs"]), where
    assert sum(step > 0 for step in report["resumed_from"]) >= 5, where  # else nothing was there to lose


def test_a_hundred_damaged_checkpoint_files(tmp_path, tiny_model_dir):
    report, where = training_drill("corrupt", tmp_path / "drill", 100)
    detected, harmless = report["detected"] + report["refused"], report["harmless"]
    told = {"detected": detected, "harmless": harmless, "silently wrong": len(report["wrong"])}
    whole = detected + harmless - len(report["unclear"])
    counts.record("drills", "damaged checkpoint files", provoked=100, survived=whole, **told)
    assert not report["wrong"], where
    assert whole == 100, where
    assert report["detected"] > 50, where


def test_the_disk_fills_up_while_a_checkpoint_is_written(tmp_path, tiny_model_dir):
    with small_disk(tmp_path / "probe", 64):
        pass
    report, where = training_drill("full", tmp_path / "drill", 8)
    full, lost = report["full"], report["lost_checkpoints"]
    told = {"explained": report["explained"], "lost checkpoints": lost}
    counts.record("drills", "disk full at a checkpoint", provoked=full, survived=full - lost, **told)
    assert full >= 5, where
    assert report["clear"] == report["explained"] == full, where
    assert (lost, report["equal_ends"]) == (0, 8), where


# --- Full and read-only disks elsewhere ---


def test_the_disk_is_full_at_the_model_build(tmp_path):
    from llama_sft_helpers import demo_model

    for kib in (8, 64, 256, 500, 600, 700, 750):
        with small_disk(tmp_path / f"disk-{kib}", kib) as disk:
            with pytest.raises(demo_model.ModelBuildError, match="Nothing was overwritten") as caught:
                demo_model.ensure_model("tiny-llama", disk / "model")
            assert explain(caught.value).key == "disk-full"
            assert not (disk / "model").exists()
            assert not leftovers(disk)
            survived("disk full at the model build", explained=1)
            subprocess.run(["mount", "-o", "remount,size=8m", str(disk)], check=True)
            assert demo_model.is_complete(demo_model.ensure_model("tiny-llama", disk / "model"))


def test_the_disk_is_full_at_the_merge(tmp_path, tiny_model):
    from llama_sft_helpers.core.files import FilesError
    from llama_sft_helpers.evaluation import new_folder
    from llama_sft_helpers.training import hash_files

    size = tiny_model.get_memory_footprint()
    for kib, needed in ((100, size), (300, 0), (700, 0)):
        with small_disk(tmp_path / f"disk-{kib}", 2000) as disk:
            with new_folder(disk / "merged") as folder:
                tiny_model.save_pretrained(folder)
            before = hash_files(disk / "merged")
            (disk / "film").write_bytes(bytes(shutil.disk_usage(disk).free - kib * 1024))

            def merge_again(disk=disk, needed=needed):
                with new_folder(disk / "merged", needed_bytes=needed) as folder:
                    tiny_model.save_pretrained(folder)
                    tiny_model.save_pretrained(folder / "second")

            with pytest.raises(FilesError) as caught:
                merge_again()
            assert explain(caught.value).key == "disk-full", caught.value
            assert hash_files(disk / "merged") == before
            assert sorted(path.name for path in disk.iterdir()) == ["film", "merged"]
            survived("disk full at the merge", explained=1)


def test_the_disk_is_full_at_the_runs_output(tmp_path, originals):
    folder = originals("print('x' * 20_000)", "print('y' * 20_000)")
    for kib in (4, 16, 40, 150, 340, 400):
        with small_disk(tmp_path / f"disk-{kib}", kib) as disk:
            code, printed = run(disk / "out", folder)
            assert code == 1, (kib, printed)
            assert "Cannot write" in printed, (kib, printed)
            assert "The disk is full" in printed, (kib, printed)
            assert not leftovers(disk)
            for path in disk.rglob("*.ipynb"):
                nbformat.read(path, as_version=4)  # whole
            survived("disk full at the run's output", explained=1)


def test_read_only_folders(tmp_path, originals, tiny_model):
    from llama_sft_helpers.demo_model import ModelBuildError, ensure_model

    folder = originals("1")
    with small_disk(tmp_path / "disk", 2000) as disk:
        (disk / "kept.txt").write_text("kept", encoding="utf-8")
        read_only(disk)
        command = [*COMMAND, "demo-model", disk / "model", "--name", "tiny-llama"]
        built = subprocess.run(command, capture_output=True, text=True, timeout=120)
        for code, printed in (run(disk / "out", folder), run(disk, folder), (built.returncode, built.stderr)):
            assert code == 1, printed
            assert "Cannot write" in printed
            assert "Read-only file system" in printed
            assert "Traceback" not in printed
        with pytest.raises(ModelBuildError) as build:
            ensure_model("tiny-llama", disk / "model")
        with pytest.raises(OSError, match="Read-only") as save:
            tiny_model.save_pretrained(disk / "merged")
        assert explain(build.value).key == explain(save.value).key == "folder-not-writable"
        assert [path.name for path in disk.iterdir()] == ["kept.txt"]
    counts.record("drills", "read-only folders", provoked=5, explained=5, survived=5)


# --- Ctrl-C ---

IN_CELL = "open('in_cell', 'w').close()\n"
SLEEP = "import time; time.sleep(60)"
COMPUTE = """
import torch
model = torch.nn.Linear(400, 400)
while True:
    model(torch.ones(400, 400)).sum().backward()
"""
# The command line, where the tiny model takes a minute instead of the blink of copying it.
SLOW_COPY = """
import time
from llama_sft_helpers import demo_model
from llama_sft_helpers.cli import app

def copy_and_wait(folder, copy=demo_model._copy_tiny_llama):
    copy(folder)
    time.sleep(60)

demo_model._BUILDERS["tiny-llama"] = copy_and_wait
app()
"""


def exists(pattern):
    return lambda process, out: bool(list(out.glob(pattern)))


def kernels_of(process):
    """The run's kernels; none once it has ended."""
    with contextlib.suppress(psutil.Error):
        children = psutil.Process(process.pid).children()
        return [child for child in children if "ipykernel_launcher" in " ".join(child.cmdline())]
    return []


def page_is_written(process, out):
    return (out / "01_a.ipynb").exists() and not (out / "01_a.html").exists()


def wait_until(reached, process, out):
    deadline = time.monotonic() + 90
    while not reached(process, out):
        assert time.monotonic() < deadline, "not reached in time"
        assert process.poll() is None, "the run ended first"
        time.sleep(0.002)


def left_alive(kernels, seconds):
    """The kernels that are still there after some seconds, which are ended."""
    _, alive = psutil.wait_procs(kernels, timeout=seconds)
    for kernel in alive:
        kernel.kill()
    return alive


# phase -> (the cell of 01, when it is reached)
_PHASES = {
    "start": ("1", exists(".llama-sft-run.lock")),
    "model build": ("1", exists("../models/.tiny-llama.*/new")),
    "kernel start": ("1", lambda process, out: bool(kernels_of(process))),
    "cell that sleeps": (IN_CELL + SLEEP, exists("in_cell")),
    "cell that computes": (IN_CELL + COMPUTE, exists("in_cell")),
    "cell that ignores Ctrl-C": (
        "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)\n" + IN_CELL + SLEEP,
        exists("in_cell"),
    ),
    "page being written": ("for n in range(3): print('x' * 3_000_000)", page_is_written),
    "next notebook": ("1", exists("01_a.html")),
}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["SIGINT", "SIGTERM"])
@pytest.mark.parametrize("phase", _PHASES)
def test_a_run_interrupted_in_every_phase(tmp_path, originals, phase, number):
    cell, reached = _PHASES[phase]
    folder = originals(cell, SLEEP)
    before = {path: path.read_bytes() for path in folder.iterdir()}
    out, models, command = tmp_path / "out", tmp_path / "models", COMMAND
    out.mkdir()
    models.mkdir()
    environment = dict(os.environ)
    if phase == "model build":
        environment["SFT_MODELS_DIR"], command = str(models), [sys.executable, "-c", SLOW_COPY]
    process = start(out, folder, command, env=environment, start_new_session=True)
    try:
        wait_until(reached, process, out)
        kernels = kernels_of(process)
        os.killpg(process.pid, number)  # as a terminal's Ctrl-C: to the whole group
        printed = process.communicate(timeout=20)[1]
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert not left_alive(kernels, 5), "an orphaned kernel"
    assert process.returncode == 128 + number, printed
    for remark in ("Traceback", "Task was destroyed", "exception was never retrieved", "Aborted"):
        assert remark not in printed
    assert ("run again to resume" in printed) == (number is signal.SIGINT)
    assert not leftovers(tmp_path), leftovers(tmp_path)
    assert {path: path.read_bytes() for path in folder.iterdir()} == before
    page = out / "index.html"  # there from the first kernel on; whole, and no longer "running"
    assert page.exists() == (phase not in ("start", "model build"))
    if page.exists():
        text = page.read_text(encoding="utf-8")
        assert text.rstrip().endswith("</html>")
        assert "refresh" not in text
    for path in out.glob("*.ipynb"):
        nbformat.read(path, as_version=4)
    survived(f"{number.name} in every phase of a run")


def test_a_killed_run_leaves_no_kernel(tmp_path, originals):
    out = tmp_path / "out"
    process = start(out, originals(IN_CELL + SLEEP), start_new_session=True)
    wait_until(exists("in_cell"), process, out)
    kernels = kernels_of(process)
    process.kill()
    process.wait()
    assert kernels
    assert not left_alive(kernels, 15)
    assert run(out, originals("1"))[0] == 0  # the lock died with its holder
    survived("SIGKILL of a run")


# --- Two at once ---


def test_two_runs_into_one_folder_at_once(tmp_path, originals):
    folder = originals("import time; time.sleep(6)\nprint('whole')")
    for attempt in range(5):
        out = tmp_path / f"out-{attempt}"
        both = [start(out, folder) for _ in range(2)]
        printed = [process.communicate(timeout=90)[1] for process in both]
        codes = [process.returncode for process in both]
        assert sorted(codes) == [0, 1], printed
        assert "Another run is writing to" in printed[codes.index(1)]
        assert "whole" in (out / "01_a.ipynb").read_text(encoding="utf-8")
        survived("two runs into one folder", refused=1)


def test_two_model_builds_at_once(tmp_path):
    code = (
        "import sys; from llama_sft_helpers.demo_model import ensure_model; "
        "print(ensure_model('tiny-llama', sys.argv[1]))"
    )
    command = [sys.executable, "-c", code, tmp_path / "model"]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    assert [process.communicate(timeout=90)[0].strip() for process in both] == [str(tmp_path / "model")] * 2
    assert not leftovers(tmp_path)
    survived("two model builds at once")


# --- Malformed data files ---

_GOOD = [
    {"instruction": "Add 2 and 2.", "input": "", "output": "4"},
    {"instruction": "Translate.", "input": "안녕하세요", "output": "Hello."},
    {"instruction": "Name a colour.", "input": "", "output": "Blue, or green."},
]


def _jsonl(*rows):
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def _with(**cells):
    return _jsonl(_GOOD[0], {**_GOOD[1], **cells}, _GOOD[2])


# what is wrong -> (file name, content)
_MALFORMED = {
    "empty file": ("a.jsonl", b""),
    "only blank lines": ("a.jsonl", b"\n\n \n"),
    "cut in the middle": ("a.jsonl", _jsonl(*_GOOD)[:-20]),
    "no JSON at all": ("a.jsonl", b"instruction;output\nAdd;4\n"),
    "single quotes": ("a.jsonl", b"{'instruction': 'Add.', 'output': '4'}\n"),
    "trailing comma": ("a.jsonl", b'{"instruction": "Add.", "output": "4",}\n'),
    "two objects on a line": ("a.jsonl", b'{"instruction": "a", "output": "b"}{"instruction": "c"}\n'),
    "a list instead of an object": ("a.jsonl", b'["Add.", "4"]\n'),
    "a bare number": ("a.jsonl", b"42\n"),
    "null": ("a.jsonl", b"null\n"),
    "NUL bytes": ("a.jsonl", _jsonl(*_GOOD) + bytes(64)),
    "UTF-16": ("a.jsonl", _jsonl(*_GOOD).decode().encode("utf-16")),
    "Korean Windows": ("a.jsonl", _jsonl(*_GOOD).decode().encode("cp949")),
    "Latin-1": ("a.jsonl", '{"instruction": "Café", "output": "é"}\n'.encode("latin-1")),
    "a binary file": ("a.jsonl", bytes(range(256)) * 8),
    "column missing in one row": ("a.jsonl", _jsonl(_GOOD[0], {"instruction": "Add."}, _GOOD[2])),
    "column missing everywhere": ("a.jsonl", _jsonl({"question": "Add.", "answer": "4"})),
    "column misspelt": ("a.jsonl", _jsonl({"Instruction": "Add.", "Output": "4"})),
    "null output": ("a.jsonl", _with(output=None)),
    "number as output": ("a.jsonl", _with(output=4)),
    "list as output": ("a.jsonl", _with(output=["4"])),
    "object as instruction": ("a.jsonl", _with(instruction={"text": "Add."})),
    "empty output": ("a.jsonl", _with(output="")),
    "white space as output": ("a.jsonl", _with(output=" \n\t")),
    "cell of 1 MB": ("a.jsonl", _with(output="x" * 2**20)),
    "lone surrogate": ("a.jsonl", b'{"instruction": "Add.", "output": "\\ud83d"}\n'),
    "chat without roles": ("a.jsonl", _jsonl({"messages": [{"content": "hi"}, {"content": "ho"}]})),
    "chat without an answer": ("a.jsonl", _jsonl({"messages": [{"role": "user", "content": "hi"}]})),
    "chat that is text": ("a.jsonl", _jsonl({"messages": "hi"})),
    "CSV with a short row": ("a.csv", b"instruction,input,output\nAdd.,,4\nAdd.\n"),
    "CSV with a long row": ("a.csv", b"instruction,input,output\nAdd.,,4,5,6\n"),
    "CSV with an open quote": ("a.csv", b'instruction,input,output\n"Add.,,4\n'),
    "CSV without its header": ("a.csv", b"Add.,,4\nAdd.,,5\n"),
    "a suffix that is not known": ("a.txt", _jsonl(*_GOOD)),
}


def through_05(path, cache):
    """Notebook 05's path for one's own data; returns the prompt-completion rows."""
    from datasets import load_dataset

    from llama_sft_helpers import data

    data.check_file(path)
    kind = "csv" if path.suffix == ".csv" else "json"
    rows = load_dataset(kind, data_files=str(path), split="train", cache_dir=str(cache))
    data.check_rows(rows)
    return rows.map(data.to_prompt_completion, with_indices=True, remove_columns=rows.column_names)


@pytest.mark.parametrize("what", _MALFORMED)
def test_malformed_files_by_hand(what, tmp_path):
    from llama_sft_helpers.data import DataError

    name, content = _MALFORMED[what]
    path = tmp_path / name
    path.write_bytes(content)
    counts.record("drills", "malformed data files, by hand", provoked=1)
    with pytest.raises(DataError) as caught:
        through_05(path, tmp_path / "cache")
    assert caught.value.reason
    assert len(str(caught.value)) < 2000
    assert path.read_bytes() == content
    counts.record("drills", "malformed data files, by hand", explained=1, survived=1)


_EDITS = st.lists(
    st.tuples(st.sampled_from(["flip", "cut", "insert", "repeat"]), st.floats(0, 1), st.binary(max_size=6)),
    min_size=1,
    max_size=3,
)


def _edited(content, edits):
    for kind, share, extra in edits:
        at = int(share * len(content))
        if kind == "flip" and at < len(content):
            content = content[:at] + bytes([content[at] ^ 0x24]) + content[at + 1 :]
        elif kind == "cut":
            content = content[:at] + content[at + 1 + len(extra) :]
        elif kind == "insert":
            content = content[:at] + extra + content[at:]
        elif kind == "repeat":
            content = content[:at] + content
    return content


@settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(_EDITS)
def test_malformed_files_by_hypothesis(tmp_path, edits):
    from llama_sft_helpers.data import DataError, to_prompt_completion

    content = _edited(_jsonl(*_GOOD), edits)
    path = tmp_path / f"{abs(hash(content))}.jsonl"
    path.write_bytes(content)
    counts.record("drills", "malformed data files, by Hypothesis", provoked=1)
    try:
        rows = through_05(path, tmp_path / "cache")
    except DataError:
        counts.record("drills", "malformed data files, by Hypothesis", explained=1, survived=1)
        return
    # harmless: what is trained on is what an independent reader finds in the file
    lines = content.decode("utf-8-sig").split("\n")
    read = [to_prompt_completion(json.loads(line)) for line in lines if line.strip()]
    assert list(rows) == read, content
    counts.record("drills", "malformed data files, by Hypothesis", harmless=1, survived=1)
