"""What the kept benchmark results must say of themselves."""

import json
from pathlib import Path

import pytest

RESULTS = sorted((Path(__file__).parents[1] / "benchmarks" / "results").glob("*.json"))


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_a_result_names_its_card_versions_and_command(path):
    result = json.loads(path.read_text(encoding="utf-8"))
    assert result["card"]
    assert result["versions"]
    assert result["command"].startswith(("python benchmarks/", "make record"))


def test_there_are_results():
    assert len(RESULTS) >= 8
