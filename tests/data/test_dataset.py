"""The shipped rows: enough of them, well formed, of many kinds, and split the same way everywhere."""

import json
import re
from collections import Counter
from pathlib import Path

import pytest
from datasets import load_dataset

from llama_sft_helpers.data import check_file, check_rows, to_prompt_completion
from llama_sft_helpers.profiles import available_profiles, load_profile, read_profile

FILE = Path(__file__).parents[2] / "llama_sft_helpers" / "datasets" / "alpaca_mini.jsonl"


@pytest.fixture(scope="module")
def rows():
    return [json.loads(line) for line in FILE.read_text(encoding="utf-8").splitlines()]


def test_there_are_enough_rows_of_alpacas_three_columns(rows):
    assert len(rows) >= 320
    for row in rows:
        assert list(row) == ["instruction", "input", "output"]
        assert all(type(cell) is str for cell in row.values())
        assert row["instruction"].strip()
        assert row["output"].strip()


def test_file_is_plain_utf8_with_one_object_a_line():
    raw = FILE.read_bytes()
    assert not raw.startswith(b"\xef\xbb\xbf")
    assert raw.endswith(b"}\n")
    assert b"\r" not in raw
    assert b"\x00" not in raw
    check_file(FILE)


def test_no_row_stands_twice(rows):
    exact = Counter((row["instruction"], row["input"]) for row in rows)
    folded = Counter(re.sub(r"\W+", " ", (row["instruction"] + " " + row["input"]).lower()) for row in rows)
    assert [key for key, count in exact.items() if count > 1] == []
    assert [key for key, count in folded.items() if count > 1] == []


def test_cells_carry_no_stray_white_space_or_control_characters(rows):
    for row in rows:
        for name, cell in row.items():
            assert cell == cell.strip(), (name, cell)
            assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f\u200b\ufeff\ufffd]", cell), (name, cell)


def test_rows_with_and_without_input_short_and_long(rows):
    with_input = sum(bool(row["input"]) for row in rows)
    assert 0.2 <= with_input / len(rows) <= 0.7
    lengths = [len(row["output"]) for row in rows]
    assert sum(length < 20 for length in lengths) >= 30  # a word or a number: does the model stop?
    assert sum(length > 600 for length in lengths) >= 10


def test_several_scripts(rows):
    texts = [" ".join(row.values()) for row in rows]
    scripts = {"Korean": "[가-힣]", "Japanese": "[ぁ-んァ-ン]", "Han": "[一-鿿]", "Arabic": "[ء-ي]"}
    found = {name: sum(bool(re.search(letters, text)) for text in texts) for name, letters in scripts.items()}
    assert found["Korean"] >= 10
    assert sum(count > 0 for count in found.values()) >= 3, found


def test_load_dataset_gives_the_same_rows(rows):
    dataset = load_dataset(load_profile("ci-tiny").dataset_id, split="train")
    assert dataset.to_list() == rows
    check_rows(dataset)


def test_the_split_is_fixed_and_disjoint(rows):
    dataset = load_dataset(load_profile("ci-tiny").dataset_id, split="train")
    first, second = (dataset.train_test_split(test_size=32, seed=42) for _ in range(2))
    assert first["test"].to_list() == second["test"].to_list()
    keys = {part: {(r["instruction"], r["input"]) for r in first[part]} for part in ("train", "test")}
    assert not keys["train"] & keys["test"]
    assert len(keys["train"]) + len(keys["test"]) == len(rows)


def test_every_profile_that_uses_the_shipped_rows_finds_enough(rows):
    for name in available_profiles():
        profile = read_profile(name)
        if profile.dataset_id == "local:alpaca_mini":
            assert profile.train_rows + profile.eval_rows <= len(rows)


def test_every_row_fits_the_template(rows):
    for index, row in enumerate(rows):
        example = to_prompt_completion(row, index)
        assert example["prompt"].endswith("\n\n### Response:\n")
        assert example["completion"] == row["output"]
        assert ("### Input:" in example["prompt"]) == bool(row["input"])
