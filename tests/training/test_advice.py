"""The advice by size of data: the table worked out by hand, the kept results and 09's words about them."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from llama_sft_helpers.core.findings import LEVEL
from llama_sft_helpers.speed import read_results
from llama_sft_helpers.training import summarize_advice

ROOT = Path(__file__).parents[2]


def run(rows, rate, rank, *losses, seed=0):
    setting = {"rows": rows, "learning_rate": rate, "rank": rank, "seed": seed}
    return setting | {"loss_before": 2.0, "held_out_loss": list(losses)}


def test_the_best_of_each_size_by_hand():
    runs = [
        run(40, 1e-3, 16, 1.6, 1.5, 1.7),
        run(40, 1e-3, 16, 1.4, 1.45, 1.5, seed=1),  # lower, but with other rows
        run(40, 1e-3, 4, 1.6, 1.51, 1.7),
        run(40, 1e-3, 64, 1.6, 1.59, 1.7),
        run(40, 2e-4, 16, 1.7, 1.6, 1.505),
        run(120, 2e-4, 4, 1.4, 1.3, 1.2),
    ]
    few, many = summarize_advice({"runs": runs}).reset_index().to_dict("records")
    assert few == pytest.approx(
        {"rows": 40, "learning_rate": 1e-3, "rank": 16, "epochs": 2, "before": 2.0, "lowest": 1.5,
         "at_the_end": 1.7, "rates_as_good": "0.0002", "ranks_as_good": "4", "seeds_differ_by": 0.1}
    )  # fmt: skip
    assert (many["epochs"], many["at_the_end"], many["rates_as_good"]) == (3, 1.2, "none")
    assert many["seeds_differ_by"] != many["seeds_differ_by"]  # one seed


def test_results_without_a_run_are_refused():
    with pytest.raises(ValueError, match=r"no run; run benchmarks/advice_sweep\.py"):
        summarize_advice({"runs": []})


def test_the_kept_results_are_whole_and_09_explains_what_it_shows_of_them():
    results = read_results("advice_sweep")
    for row in results["runs"]:
        assert len(row["held_out_loss"]) == len(row["training_loss"]) == results["settings"]["epochs"]
        # the same held-out rows in every run
        assert row["loss_before"] == pytest.approx(results["runs"][0]["loss_before"], rel=1e-3)
    table = summarize_advice(results)
    cells = json.loads((ROOT / "notebooks" / "09_your_run.ipynb").read_text(encoding="utf-8"))["cells"]
    (text,) = ("".join(cell["source"]) for cell in cells if cell["id"] == "09-016a")
    assert [name for name in table if name.replace("_", " ") not in text] == []
    assert f"within {LEVEL:.0%}".replace("%", " %") in text


@pytest.mark.slow
def test_the_sweep_trains_what_is_missing(tmp_path):
    script, out = ROOT / "benchmarks" / "advice_sweep.py", tmp_path / "sweep.json"
    command = [sys.executable, str(script), "--tiny", "--seeds", "1", "--out", str(out)]
    subprocess.run([*command, "--at-a-time", "2"], check=True, timeout=600)
    report = json.loads(out.read_text())
    report["runs"].pop()
    out.write_text(json.dumps(report))
    subprocess.run([*command, "--add"], check=True, timeout=600)
    runs = json.loads(out.read_text())["runs"]
    assert {(row["rows"], row["rank"]) for row in runs} == {(8, 4), (8, 8), (16, 4), (16, 8)}
    assert len(runs) == 4
    # the same rows held out, and an adapter that changes nothing before it is trained
    assert len({row["loss_before"] for row in runs}) == 1
    assert summarize_advice(json.loads(out.read_text()))["lowest"].lt(runs[0]["loss_before"]).all()
