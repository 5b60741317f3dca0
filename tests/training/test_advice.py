"""The advice by size of data: the table worked out by hand, the kept results and 09's words about them."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from llama_sft_helpers.core.findings import LEVEL
from llama_sft_helpers.profiles import read_profile
from llama_sft_helpers.speed import read_results
from llama_sft_helpers.training import summarize_advice, summarize_rates

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


def test_the_rates_of_a_rank_by_hand():
    runs = [
        run(40, 2e-4, 16, 1.7, 1.6, 1.65),
        run(40, 1e-3, 16, 1.6, 1.5, 1.7),
        run(40, 1e-3, 16, 1.2, 1.1, 1.1, seed=1),
        run(40, 1e-3, 4, 1.6, 1.45, 1.7),
        run(20, 1e-3, 16, 1.9, 1.8, 2.1),
    ]
    table = summarize_rates({"runs": runs}, rank=16)
    assert table.index.tolist() == [20, 40, 40]
    assert table["learning_rate"].tolist() == [1e-3, 2e-4, 1e-3]
    assert table["epochs"].tolist() == [2, 2, 2]
    assert table["above_the_best"].tolist() == pytest.approx([0, 0.15, 0.05])
    assert table["at_the_end"].tolist() == [2.1, 1.65, 1.7]
    with pytest.raises(ValueError, match="rank=8 was not tried; expected one of 4, 16"):
        summarize_rates({"runs": runs}, rank=8)


def test_what_09_says_of_the_rates_is_what_the_sweep_found():
    cells = json.loads((ROOT / "notebooks" / "09_your_run.ipynb").read_text(encoding="utf-8"))["cells"]
    (text,) = ("".join(cell["source"]) for cell in cells if cell["id"] == "09-016c")
    results = read_results("advice_sweep")
    table = summarize_rates(results, rank=16).set_index("learning_rate", append=True)
    worse = (table["at_the_end"] > table["before"]).groupby("learning_rate")
    assert worse.all()[0.005]
    assert not worse.any()[:0.0002].any()
    assert table["above_the_best"].xs(0.0002, level="learning_rate").gt(0).all()
    rates = [read_profile(name).learning_rate for name in ("colab-a100", "colab-l4", "colab-t4", "cpu-demo")]
    assert rates == [0.0002, 0.0002, 0.0002, 0.0005]
    assert "Llama 3 8B is trained at 0.0002, the small model of `cpu-demo` at 0.0005" in text
    assert not set(summarize_advice(results)["learning_rate"]) & set(rates)
    assert 0.0005 not in table.index.get_level_values("learning_rate")
    assert (results["settings"]["model"], results["settings"]["epochs"]) == ("smollm2-135m-instruct", 6)


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
    assert f"within {LEVEL:.0%}" in text


@pytest.mark.slow
def test_the_sweep_trains_what_is_missing(tmp_path):
    script, out = ROOT / "benchmarks" / "advice_sweep.py", tmp_path / "sweep.json"
    command = [sys.executable, str(script), "--tiny", "--seeds", "1", "--out", str(out)]
    subprocess.run([*command, "--at-a-time", "2"], check=True, timeout=600)
    report = json.loads(out.read_bytes())
    report["runs"].pop()
    out.write_text(json.dumps(report), encoding="utf-8")
    subprocess.run([*command, "--add"], check=True, timeout=600)
    runs = json.loads(out.read_bytes())["runs"]
    assert {(row["rows"], row["rank"]) for row in runs} == {(8, 4), (8, 8), (16, 4), (16, 8)}
    assert len(runs) == 4
    # the same rows held out, and an adapter that changes nothing before it is trained
    assert len({row["loss_before"] for row in runs}) == 1
    assert summarize_advice(json.loads(out.read_bytes()))["lowest"].lt(runs[0]["loss_before"]).all()
