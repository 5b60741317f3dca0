"""The page that ``llama-sft run`` leaves: whole, partly filled, and with what a model may write."""

import json
import subprocess
import sys

import pandas as pd
import pytest

from llama_sft_helpers.result_page import result_page

SUMMARY = {
    "eval_loss_before": 2.0, "eval_loss_after": 1.5, "train_seconds": 83.4, "train_tokens": 12643,
    "peak_gib": 4.08, "device": "CPU", "profile": "cpu-demo",
    "prompt_format": "alpaca", "adapter_sha256": "0" * 64, "data": "rows", "columns": "", "versions": {},
}  # fmt: skip
ANSWER = {"prompt": "2 < 3?", "base": "<script>alert(1)</script>", "base_tokens": 8, "base_stopped": False}
ANSWER |= {"tuned": "NA", "tuned_tokens": 2, "tuned_stopped": True}


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "training_summary.json").write_text(json.dumps(SUMMARY), encoding="utf-8")
    log = [{"step": 1, "loss": 2.1}, {"step": 1, "eval_loss": 1.9}, {"step": 2, "loss": 1.8}]
    pd.DataFrame(log).to_csv(tmp_path / "training_log.csv", index=False)
    pd.DataFrame([ANSWER]).to_csv(tmp_path / "answers.csv", index=False)
    (tmp_path / "adapter").mkdir()
    return tmp_path


def page_of(folder, seconds, at_work=None):
    return result_page(folder, "cpu-demo", "a model", seconds, at_work)


def test_a_finished_run_shows_losses_curve_answers_and_what_to_do_next(folder):
    page = page_of(folder, {"06_training": 83.4, "07_evaluation": 60.0})
    for part in ("2.000 → 1.500", "-25.0%", "1:23", "12,643 tokens", "4.1 GiB", "data:image/svg+xml;base64,"):
        assert part in page
    assert "cut after 8 tokens" in page
    assert "stopped after 2 tokens" in page
    assert "<p>NA</p>" in page  # an answer, not a missing value
    assert f"llama-sft chat {folder / 'adapter'}" in page
    assert 'href="06_training.html"' in page
    assert "refresh" not in page


def test_curve_and_answers_are_drawn_without_pytorch(folder):
    """The process that runs the notebooks must leave the memory to them."""
    code = (
        "import pathlib, sys; from llama_sft_helpers.result_page import result_page; "
        "seconds = {'06_training': 83.4, '07_evaluation': 60.0}; "
        "page = result_page(pathlib.Path(sys.argv[1]), 'cpu-demo', 'a model', seconds, None); "
        "print('svg' in page, '<p>NA</p>' in page, {'torch', 'transformers'} & set(sys.modules))"
    )
    command = [sys.executable, "-c", code, str(folder)]
    told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert told == "True True set()\n"


def test_what_a_model_wrote_is_text_and_no_page(folder):
    page = page_of(folder, {"07_evaluation": 1.0})
    assert "<script>alert" not in page
    assert "&lt;script&gt;alert(1)" in page
    assert "2 &lt; 3?" in page


def test_an_earlier_runs_results_are_not_shown(folder):
    page = page_of(folder, {"06_training": None, "07_evaluation": None}, at_work=["06_training"])
    assert "svg" not in page
    assert "2 &lt; 3?" not in page


def test_a_run_of_ones_own_is_read_from_its_folder(folder):
    (folder / "your_run").mkdir()
    (folder / "training_summary.json").rename(folder / "your_run" / "training_summary.json")
    assert "2.000 → 1.500" in page_of(folder, {"09_your_run": 83.4})


def test_nothing_is_fetched_from_a_network(folder):
    page = page_of(folder, {"07_evaluation": 1.0})
    assert "http:" not in page.replace("http-equiv", "")
    assert "https:" not in page


def test_a_page_of_the_first_minute_says_what_runs_and_waits_and_comes_anew(tmp_path):
    page = page_of(tmp_path, {"01_environment": 8.0, "04_lora": None, "05_data": None}, ["04_lora"])
    assert 'http-equiv="refresh"' in page
    assert "1 of 3 notebooks are done" in page
    assert "04 · LoRA" in page
    assert page.count("running now") == page.count("waiting") == 1
    assert "04_lora.html" not in page
    assert "Result" not in page


@pytest.mark.parametrize("damaged", ["training_summary.json", "training_log.csv"])
def test_what_is_damaged_or_missing_is_left_out(folder, damaged):
    if damaged.endswith("json"):
        (folder / damaged).write_text("{", encoding="utf-8")
    else:
        (folder / damaged).unlink()
    assert "svg" not in page_of(folder, {"06_training": 1.0})
