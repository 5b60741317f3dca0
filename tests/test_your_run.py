"""``llama-sft train`` and notebook 09: from every form of data to an adapter with its template."""

import json

import nbformat
import pytest
from data_forms import FORMS, write_form
from small_data import write_rows
from typer.testing import CliRunner

from llama_sft_helpers.cli import app
from llama_sft_helpers.data import to_prompt_completion

# a hub name is read by load_dataset as it is, see tests/data/test_sources.py
LOCAL = [form for form in FORMS if form != "hub"]
SHORT = ["--set", "max_steps=2", "--set", "eval_rows=4", "--set", "max_new_tokens=2"]


def train(source, columns, out, *options):
    command = ["train", "--profile", "ci-tiny", "--data", str(source), "--out", str(out), *options]
    command += ["--columns", columns] if columns else []
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    summary = json.loads((out / "your_run" / "training_summary.json").read_text(encoding="utf-8"))
    notebook = nbformat.read(out / "09_your_run.ipynb", as_version=4)
    return summary, json.dumps([cell.get("outputs") for cell in notebook.cells])


@pytest.mark.parametrize(
    "form", [LOCAL[0], *(pytest.param(form, marks=pytest.mark.slow) for form in LOCAL[1:])]
)
def test_a_file_becomes_an_adapter_that_keeps_its_template(form, tmp_path, tiny_model_dir):
    from transformers import AutoTokenizer

    source, columns, layout = write_form(form, tmp_path / "data")
    summary, shown = train(source, columns, tmp_path / "out", "--model", str(tiny_model_dir), *SHORT)
    assert summary["data"] == str(source)
    assert summary["prompt_format"] == ("plain" if layout == "prompt-completion" else "alpaca")
    assert f"layout: {layout}" in shown
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out" / "your_run" / "adapter")
    if layout == "prompt-completion":
        assert tokenizer.chat_template is None
        return
    asked = [{"role": "user", "content": "Add 2 and 2."}]
    prompt = to_prompt_completion({"instruction": "Add 2 and 2.", "output": "4"})["prompt"]
    saved = tokenizer.apply_chat_template(asked, tokenize=False)
    assert saved == tokenizer.bos_token + prompt


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--data", "none.csv"], "There is no file or folder"),
        (["--columns", "question=instruction"], "has no column 'question'"),
        (["--set", "epochs=-1"], "not above 0"),
    ],
)
def test_what_cannot_be_trained_is_one_clear_error(options, told, tmp_path):
    result = CliRunner().invoke(app, ["train", "--profile", "ci-tiny", "--out", str(tmp_path), *options])
    assert result.exit_code == 1
    assert told in result.stderr


@pytest.mark.slow
def test_an_overfitted_run_keeps_everything_and_its_best_adapter(tmp_path):
    source = write_rows(tmp_path / "data" / "rows.jsonl", 12)
    options = ["--set", "epochs=12", "--set", "learning_rate=0.02", "--set", "max_new_tokens=2"]
    summary, shown = train(source, None, tmp_path / "out", *options)
    folder = tmp_path / "out" / "your_run"
    assert "Overfitted: the loss was lowest after step" in shown
    assert "each row is seen 12 times. That is often" in shown
    log = (folder / "training_log.csv").read_text(encoding="utf-8")
    assert f"{summary['eval_loss_after']:.6f}"[:7] in log
    assert (folder / "adapter" / "adapter_model.safetensors").is_file()
    assert (folder / "adapter.zip").is_file()
