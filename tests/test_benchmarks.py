"""Scripts in ``benchmarks/``: what they make of what they measured."""

import json
from types import SimpleNamespace

import cpu_profile
import minutes
import psutil
import pytest


def run_of(number, commit, seconds, code=0, peak=1.0):
    return {
        "part": "demo",
        "round": number,
        "commit": commit,
        "seconds": seconds,
        "exit": code,
        "peak_gib": peak,
    }


def test_a_summary_leaves_out_rounds_in_which_a_run_failed():
    runs = [
        run_of(0, "a", 120, peak=4.5), run_of(0, "b", 60, peak=3.5),
        run_of(1, "a", 600), run_of(1, "b", 6, code=1, peak=9.0),
        run_of(2, "a", 3, code=-9), run_of(2, "b", 300),
        run_of(3, "a", 180), run_of(3, "b", 45),
        run_of(4, "a", 100),  # its second run is still to come
    ]  # fmt: skip
    expected = {
        "rounds": 2, "new_over_old": 0.375, "ratios": [0.5, 0.25], "minutes_old": 2.5, "minutes_new": 0.88,
        "peak_gib_old": 4.5, "peak_gib_new": 3.5,
    }  # fmt: skip
    assert minutes.summarize(runs, "a", "b") == {"demo": expected}
    assert minutes.summarize(runs[2:6], "a", "b") == {}


def test_of_a_run_its_end_and_its_notebooks_are_kept():
    output = "\n".join([*map(str, range(40)), "06_training: 9 of 40 cells", "06_training: done in 6:22"])
    output += "\n10_no notebook: done in 0:01\n01_environment: done in 0:07\nafter 01_x: done in 0:01\n\n"
    found = minutes.words_of("demo", 0, output)
    assert found["notebook_seconds"] == {"06_training": 382, "01_environment": 7}
    assert found["last_lines"][0] == "10_no notebook: done in 0:01"
    assert len(minutes.words_of("tests", 2, output)["last_lines"]) == 30
    assert "notebook_seconds" not in minutes.words_of("tests", 0, output)


def test_a_failed_run_is_told_with_its_output(capsys):
    minutes.tell({**run_of(1, "b", 6, code=3), "last_lines": ["[red]why"]})
    assert (
        "FAILED with exit code 3, so this round does not count: demo at b\n[red]why\n"
        in capsys.readouterr().out
    )


def test_adapters_are_counted_in_what_04_printed(tmp_path):
    path = tmp_path / "04_lora.ipynb"
    assert minutes.adapters_of(path) is None
    path.write_text('"print(f\\"{trained} adapters trained in {seconds:.0f} s\\")\\n"')  # the cell, no output
    assert minutes.adapters_of(path) is None
    path.write_text('"21 adapters, about 9 s", "21 adapters trained in 214 s\\n"')
    assert minutes.adapters_of(path) == 21


class FakeProcess:
    def __init__(self, resident, shared_once, started=()):
        self.resident, self.shared_once, self.started, self.asked = resident, shared_once, started, 0

    def children(self, *, recursive):
        return self.started

    def memory_info(self):
        if self.resident is None:
            raise psutil.NoSuchProcess(1)
        return SimpleNamespace(rss=self.resident * 2**30)

    def memory_full_info(self):
        self.memory_info()
        self.asked += 1
        return SimpleNamespace(pss=self.shared_once * 2**30)


def test_memory_that_processes_share_is_asked_for_only_where_the_peak_may_rise():
    started = [FakeProcess(2, 1.5), FakeProcess(None, 0)]
    process = FakeProcess(1, 0.5, started)
    assert (minutes.memory_gib(process, above=3), process.asked) == (3, 0)
    assert (minutes.memory_gib(process, above=2.9), process.asked) == (2, 1)


@pytest.mark.parametrize(
    ("commits", "limit", "refused"),
    [
        (["a", "b"], "avx2", ""),
        (["a", "c"], "avx2", "rounds of {'b'}"),
        (["a", "b"], "none", "--limit avx2, got none"),
    ],
)
def test_rounds_are_added_to_those_of_the_same_kind(tmp_path, commits, limit, refused):
    path, runs = tmp_path / "minutes.json", [run_of(0, "a", 2), run_of(0, "b", 1)]
    path.write_text(json.dumps({"limit": "avx2", "runs": runs}), encoding="utf-8")
    if refused:
        with pytest.raises(ValueError, match=refused):
            minutes.earlier_runs(path, commits, limit)
    else:
        assert minutes.earlier_runs(path, commits, limit) == runs


@pytest.mark.parametrize(
    ("path", "cause"),
    [
        (["aten::mm", "aten::matmul", "ChunkedLogProbFunction"], "trl's head"),
        (["aten::_int_mm", "bitsandbytes::int8_linear_matmul", "MatMul8bitLt"], "int8 products"),
        (["aten::mm", "aten::linear", "MatMul8bitFp"], "float32 products, int8 layers"),
        (["aten::mul_", "MatMul8bitFpBackward"], "dequantizing"),
        (["aten::round_", "bitsandbytes::int8_vectorwise_quant", "MatMul8bitLt"], "rounding and rescaling"),
        (["aten::copy_", "aten::clone", "aten::reshape"], "copies, as of keys and values"),
        (["aten::copy_", "aten::clone", "aten::scaled_dot_product_attention"], "attention"),
        (["aten::mm", "aten::linear"], "float32 products, LoRA and head"),
        (["aten::add_", "autograd::engine::evaluate_function: MatMul8bitFpBackward"], "norms, SwiGLU, sums"),
        (["MatMul8bitLt"], "Python and calls"),
    ],
)
def test_a_cause_is_known_by_the_callers(path, cause):
    assert cpu_profile.cause_of(path) == cause
    found = cpu_profile.by_cause([(path, 2.0)], wall=3.0)
    assert sum(found.values()) == 3
    assert found[cause] == (3 if cause == "Python and calls" else 2)
