"""Rows from every form of data, against the rows that were written."""

import datasets
import pytest
from data_forms import CHATS, FORMS, OWN, PAIRED, write_form

from llama_sft_helpers.data import DataError, check_file, load_rows

ALPACA = [{"instruction": row["question"], "output": row["answer"]} for row in OWN]
EXPECTED = {"alpaca": ALPACA, "messages": CHATS, "prompt-completion": PAIRED}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_rows_that_were_written(form, tmp_path, monkeypatch):
    source, columns, layout = write_form(form, tmp_path)
    if form == "hub":
        rows = datasets.Dataset.from_list(OWN)
        monkeypatch.setattr(
            datasets, "load_dataset", lambda name, split: {("me/own", "train"): rows}[name, split]
        )
        source = "me/own"
    loaded, found = load_rows(source, columns)
    assert found == layout
    assert loaded.to_list() == EXPECTED[layout]


def test_a_renamed_column_takes_the_place_of_another(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("instruction;output;short\na;long answer;b\n", encoding="utf-8")  # as Excel writes it
    rows, _ = load_rows(path, " short = output,")
    assert rows.to_list() == [{"instruction": "a", "output": "b"}]


def test_a_column_that_only_later_rows_have_is_kept(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(
        '{"instruction": "a", "output": "b"}\n{"instruction": "c", "input": "d", "output": "e"}\n'
    )
    assert load_rows(path)[0]["input"][:] == [None, "d"]


def test_of_a_folder_the_training_files_are_read_in_order(tmp_path):
    for name, answer in (("train-2", "2"), ("train-1", "1"), ("test", "0")):
        (tmp_path / f"{name}.csv").write_text(f"instruction,output\na,{answer}\n", encoding="utf-8")
    assert load_rows(tmp_path)[0]["output"][:] == ["1", "2"]


@pytest.mark.parametrize(
    ("name", "content", "columns", "expected"),
    [
        ("a.csv", "q,a\n1,2\n", None, r"missing-column.*\['q', 'a'\].*columns="),
        ("a.csv", "q,a\n1,2\n", "question=instruction", r"no column 'question'.*\['q', 'a'\]"),
        ("a.csv", "q,a\n1,2\n", "q", r"'q' is no pair"),
        ("a.csv", "", None, "no-rows"),
        ("a.csv", "instruction,output\n", None, "no-rows"),
        ("a.json", "[]", None, "no-rows"),
        ("a.jsonl", "\n \n", None, "no-rows"),
        ("a.jsonl", "{", None, "bad-json.*line 1"),
        ("a.jsonl", "[1]", None, "line 1.*expected an object"),
        ("a.txt", "x", None, "unknown-file"),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path, name, content, columns, expected):
    path = tmp_path / name
    path.write_text(content, encoding="utf-8")
    with pytest.raises(DataError, match=expected):
        load_rows(path, columns)
    if columns is None:
        with pytest.raises(DataError, match=expected):
            check_file(path)


def test_a_column_of_two_kinds_is_named(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"output": "1"}\n{"output": 2}', encoding="utf-8")
    with pytest.raises(DataError, match=r"wrong-type.*'output', row 1"):
        load_rows(path)


def test_a_missing_file_is_named_and_an_empty_folder_too(tmp_path, monkeypatch):
    for source in (tmp_path / "none.csv", "none.csv", "./none", "data/none.jsonl"):
        with pytest.raises(FileNotFoundError, match=r"no file or folder .*none"):
            load_rows(source)
    with pytest.raises(DataError, match=r"holds no file of the kinds \.csv, "):
        load_rows(tmp_path)
