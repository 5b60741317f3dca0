"""The shipped rows as ``load_dataset`` gives them: the same, split the same way, enough for each profile."""

import json
from pathlib import Path

import pytest
from datasets import load_dataset

from llama_sft_helpers.data import check_file, check_rows, to_prompt_completion
from llama_sft_helpers.profiles import available_profiles, load_profile, read_profile

FILE = Path(__file__).parents[2] / "llama_sft_helpers" / "datasets" / "alpaca_mini.jsonl"
ROWS = [json.loads(line) for line in FILE.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def dataset():
    return load_dataset(load_profile("ci-tiny").dataset_id, split="train")


def test_load_dataset_gives_the_rows_of_the_file(dataset):
    assert dataset.to_list() == ROWS
    check_file(FILE)
    check_rows(dataset)


def test_the_split_is_fixed_and_disjoint(dataset):
    first, second = (dataset.train_test_split(test_size=32, seed=42) for _ in range(2))
    assert first["test"].to_list() == second["test"].to_list()
    keys = {part: {(r["instruction"], r["input"]) for r in first[part]} for part in ("train", "test")}
    assert not keys["train"] & keys["test"]
    assert len(keys["train"]) + len(keys["test"]) == len(ROWS)


def test_every_profile_that_uses_the_shipped_rows_finds_enough():
    profiles = [read_profile(name) for name in available_profiles()]
    shipped = [profile for profile in profiles if profile.dataset_id == "local:alpaca_mini"]
    assert all(profile.train_rows + profile.eval_rows <= len(ROWS) for profile in shipped)


def test_every_row_fits_the_template():
    for index, row in enumerate(ROWS):
        example = to_prompt_completion(row, index)
        assert example["prompt"].endswith("\n\n### Response:\n")
        assert example["completion"] == row["output"]
        assert ("### Input:" in example["prompt"]) == bool(row["input"])
