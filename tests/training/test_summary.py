"""The training summary: one schema for the notebook that writes it and all who read it."""

import ast
import json
from pathlib import Path

import nbformat
import pytest

from llama_sft_helpers import run, training
from llama_sft_helpers.training import summary

ROOT = Path(__file__).parents[2]


def test_notebook_06_writes_what_the_readers_rely_on():
    cells = nbformat.read(ROOT / "notebooks" / "06_training.ipynb", 4).cells
    source = next(cell.source for cell in cells if "write_training_summary(profile" in cell.source)
    dicts = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Dict)]
    written = {key.value for key in dicts[0].keys if isinstance(key, ast.Constant)}
    assert set(summary.SUMMARY_KEYS) <= written


def test_writer_and_readers_are_the_same_functions():
    assert training.write_training_summary is summary.write_training_summary
    assert training.read_training_summary is summary.read_training_summary
    assert run.read_training_summary is summary.read_training_summary


def test_a_report_names_the_losses_or_what_the_summary_lacks(tmp_path, capsys):
    path = tmp_path / "training_summary.json"
    facts = dict.fromkeys(summary.SUMMARY_KEYS, 0.5)
    summary.write_training_summary(path, facts)
    run._report(tmp_path)
    assert "held-out loss: 0.5000 before, 0.5000 after training" in capsys.readouterr().out
    path.write_text(json.dumps({"eval_loss_before": 1.0}), encoding="utf-8")
    with pytest.raises(run.RunError, match=r"lacks eval_loss_after, .*Run notebook 06 again"):
        run._report(tmp_path)
