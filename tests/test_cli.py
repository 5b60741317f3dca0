"""The command line's own words: version, plan's options, refusals, and Ctrl-C."""

import importlib.metadata
import json
import re
import signal
import subprocess
import sys
import time

import psutil
import pytest
from typer.testing import CliRunner

from llama_sft_helpers.cli import app


def invoke(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "200"})


def test_the_version_is_the_installed_one():
    assert invoke("--version").stdout == f"llama-sft {importlib.metadata.version('llama-sft-helpers')}\n"


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["run", "--cell-timeout", "-5"], "--cell-timeout"),
        (["plan", "--batch", "0"], "--batch"),
        (["plan", "--max-length", "0"], "--max-length"),
    ],
)
def test_numbers_that_make_no_sense_are_refused(arguments, named):
    refused = invoke(*arguments)
    assert refused.exit_code == 2
    assert named in refused.stderr
    assert "greater than or equal to" in refused.stderr or "range" in refused.stderr  # typer's words changed


def plan(*arguments):
    done = invoke("plan", "--json", *arguments)
    return done.exit_code, json.loads(done.stdout)


def test_plan_takes_length_batch_and_model(tiny_model_dir):
    def gib(*arguments):
        return sum(row["gib"] for row in plan("--profile", "colab-t4", *arguments)[1]["plan"])

    assert gib() < gib("--max-length", 2048) < gib("--max-length", 2048, "--batch", 4)
    assert gib("--model", tiny_model_dir) < 1 < gib()


def test_plan_prints_its_numbers_as_tables():
    asked = ["--profile", "colab-t4", "--gpu-gib", 24]
    printed, (code, planned) = invoke("plan", *asked), plan(*asked)
    assert printed.exit_code == code == 0
    total = sum(row["gib"] for row in planned["plan"])
    assert f"colab-t4, int8: {total:.2f} GiB in all" in printed.stdout
    for row in planned["plan"]:
        assert re.search(rf"{re.escape(row['component'])} *│ *{row['gib']:.2f} ", printed.stdout), row
    assert planned["fit"][0]["verdict"] in printed.stdout


def test_an_unknown_quantization_is_one_clear_error():
    refused = invoke("plan", "--profile", "colab-t4", "--quantization", "int3")
    assert refused.exit_code == 1
    assert re.match(r"error: .*int3.*int8, nf4", refused.stderr)


@pytest.mark.parametrize(
    ("gpu_gib", "advice"),
    [
        (8, "max_length=1024, per_device_train_batch_size=1, gradient_accumulation_steps=8, "),
        (9.5, "per_device_train_batch_size=1, gradient_accumulation_steps=8, "),
        (4, "a smaller model"),
    ],
)
def test_plan_advises_length_and_batch_before_a_smaller_model(gpu_gib, advice):
    asked = ["--profile", "colab-a100", "--quantization", "nf4"]
    code, planned = plan(*asked, "--gpu-gib", gpu_gib)
    change = planned["fit"][0]["change"]
    assert code == 1
    assert change.startswith(advice)
    settings = dict(pair.split("=") for pair in change.removesuffix(" (tight)").split(", ") if "=" in pair)
    if settings:  # what is advised fits, of the options that there are: checkpointing is in the T4's profile
        length, batch = settings.get("max_length", 2048), settings["per_device_train_batch_size"]
        asked = ["--profile", "colab-t4", "--quantization", "nf4", "--max-length", length, "--batch", batch]
        assert plan(*asked, "--gpu-gib", gpu_gib)[0] == 0


@pytest.mark.parametrize(("language", "advice"), [("ko", "원인: "), ("en", "Cause: ")])
def test_the_language_asked_for_is_that_of_page_kernel_and_advice(
    language, advice, write_notebooks, tmp_path, monkeypatch
):
    monkeypatch.setenv("SFT_LANG", {"ko": "en", "en": "ko"}[language])  # the test ends with the old value
    cell = "import os; raise OSError(28, 'No space left on device', os.environ['SFT_LANG'])"
    out = tmp_path / "out"
    arguments = ["--profile", "ci-tiny", "--out", out, "--notebooks", write_notebooks(n01_full=[cell])]
    done = invoke("run", *arguments, "--lang", language)
    assert done.exit_code == 1
    assert f"No space left on device: '{language}'" in done.stderr
    assert advice in done.stderr
    assert f'<html lang="{language}">' in (out / "index.html").read_text(encoding="utf-8")


@pytest.mark.skipif(sys.platform == "win32", reason="needs a system with signals")
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_a_run_and_its_kernel(number, code, write_notebooks, tmp_path):
    cell = "import os, time; open('in_cell', 'w').write(str(os.getpid())); time.sleep(600)"
    originals, out = write_notebooks(n01_wait=[cell]), tmp_path / "out"
    command = [sys.executable, "-m", "llama_sft_helpers.cli", "run", "--profile", "ci-tiny"]
    # a shell's background job ignores SIGINT, and so would this process, if these tests are run in one
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    process = subprocess.Popen(
        [*command, "--out", out, "--notebooks", originals],
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    signal.signal(signal.SIGINT, before)
    while process.poll() is None and not (out / "in_cell").exists():
        time.sleep(0.02)
    time.sleep(0.2)  # its number is written
    process.send_signal(number)
    printed = process.communicate(timeout=120)[1]  # on a busy machine; the cell would sleep on
    assert process.returncode == code, printed
    assert printed.rstrip().endswith("are kept: run again to resume.") == (number == signal.SIGINT)
    assert not psutil.pid_exists(int((out / "in_cell").read_text(encoding="utf-8")))
    assert not list(out.glob(".*.part"))
    for remark in ("Traceback", "Task was destroyed", "exception was never retrieved", "Aborted"):
        assert remark not in printed
