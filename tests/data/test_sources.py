"""Rows from every form of data, against the rows that were written."""

import json

import datasets
import pandas as pd
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
        '{"instruction": "a", "output": "b"}\n{"instruction": "c", "input": "d", "output": "e"}\n',
        encoding="utf-8",
    )
    assert load_rows(path)[0]["input"][:] == [None, "d"]


def test_of_a_folder_the_training_files_are_read_in_order(tmp_path):
    for name, answer in (("train-2", "2"), ("train-1", "1"), ("test", "0")):
        (tmp_path / f"{name}.csv").write_text(f"instruction,output\na,{answer}\n", encoding="utf-8")
    assert load_rows(tmp_path)[0]["output"][:] == ["1", "2"]


ROW = '{"instruction": "a", "output": "b"}'
HANGUL = '{"instruction": "수도", "output": "a"}\n'.encode("cp949")
ARRAY = f"[{ROW},\n {ROW},\n "
TEXT_KINDS = r"expected one of \.csv, \.jsonl, \.json\. "


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("a.csv", "q,a\n1,2\n", r"missing-column.*\['q', 'a'\].*columns="),
        ("a.csv", "", "no-rows"),
        ("a.csv", "instruction,output\n", "no-rows"),
        ("a.json", "[]", "no-rows"),
        ("a.jsonl", "\n \n", "no-rows"),
        ("a.jsonl", f"{ROW}\n{ROW[:-3]}\n{ROW}\n", r"bad-json\] a\.jsonl, line 2 \(row 1\)"),
        ("a.jsonl", f"{ROW}\n[1, 2]\n", r"wrong-type\] a\.jsonl, line 2 \(row 1\): list, expected an object"),
        (
            "a.jsonl",
            f"{ROW}\n".encode() + HANGUL,
            r"wrong-encoding\] a\.jsonl, line 2: byte 0xBC is not UTF-8",
        ),
        ("a.jsonl", b"\xef\xbb\xbf" + HANGUL, "line 1: byte 0xBC is not UTF-8"),
        ("a.csv", "instruction,output\na,b\n수도,c\n".encode("cp949"), "line 3: byte 0xBC is not UTF-8"),
        ("a.csv", "instruction,input,output\na,,b\nc,d\n", r"bad-csv\] a\.csv, line 3 \(row 1\)"),
        ("a.csv", 'instruction,output\na,b\n"c,d\n', r"bad-csv\] a\.csv, line 3 \(row 1\)"),
        ("a.csv", f"instruction,output\na,b\nc,{'x' * 2**20}\n", r"cell-too-long\] a\.csv, line 3 \(row 1\)"),
        ("a.json", ARRAY + '{"instruction": "c",\n  "output" "d"}]', r"bad-json\] a\.json, line 4 \(row 2\)"),
        ("a.json", f"{ARRAY}{ROW}\n {{}}]", r"bad-json\] a\.json, line 4 \(row 3\)"),  # a comma is missing
        ("a.json", f"{ARRAY}{ROW}", r"bad-json\] a\.json, line 3 \(row 3\)"),  # cut off
        ("a.json", f"{ARRAY}{ROW}] x", r"bad-json\] a\.json, line 3 \(row 3\)"),  # something follows
        ("a.txt", "x", rf"unknown-file\] a\.txt is a '\.txt' file; {TEXT_KINDS}.*load_rows reads \.parquet"),
        ("a.jsonl", b"PAR1\x00", rf"a\.jsonl is a Parquet file, not text; {TEXT_KINDS}"),
        ("a.csv", b"PK\x03\x04\xde", rf"a\.csv is a zip or Excel file, not text; {TEXT_KINDS}"),
    ],
)
def test_a_file_that_cannot_be_read_is_named_in_one_line(tmp_path, name, content, told):
    path = tmp_path / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    for read in (load_rows, check_file):
        with pytest.raises(DataError, match=rf"^\[.*{told}[^\n]*$"):
            read(path)


def test_check_file_names_a_broken_row_and_a_folder(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("instruction,input,output\na,,b\nc,,\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"\[empty-output\] a\.csv, line 3 \(row 1\): output is empty"):
        check_file(path)
    with pytest.raises(DataError, match=rf"unknown-file.* is a folder; {TEXT_KINDS}Pass a file in it"):
        check_file(tmp_path)


@pytest.mark.parametrize("indent", [None, 0, 4])
def test_an_array_names_the_line_on_which_the_row_begins(tmp_path, indent):
    path = tmp_path / "a.json"
    rows = [{"instruction": "a", "output": answer} for answer in ("}], [{\n", "b", "c", 4, "d")]
    path.write_text("\n" + json.dumps(rows, indent=indent), encoding="utf-8")
    # counted by a second way: the fourth line that opens an object, or the one line of all
    lines = path.read_text(encoding="utf-8").split("\n")
    opening = [number for number, line in enumerate(lines, 1) if line.strip() == "{"]
    line = opening[3] if indent is not None else 2
    with pytest.raises(DataError, match=rf"\[wrong-type\] a\.json, line {line} \(row 3\)"):
        check_file(path)


def test_good_files_pass_and_give_their_rows(tmp_path):
    rows = [
        {"instruction": "a", "output": "b"},
        {"instruction": 'a "quoted", cell\nof two', "output": "수\u2028x"},
    ]
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    files = {
        "a.jsonl": "\n".join(lines) + "\n\n",
        "b.json": "[" + ",\n".join(lines) + "]",
        "c.csv": pd.DataFrame(rows).to_csv(index=False),
        "d.csv": "\ufeff" + pd.DataFrame(rows).to_csv(index=False),
    }
    for name, content in files.items():
        path = tmp_path / name
        path.write_text(content, encoding="utf-8")
        check_file(path)
        assert load_rows(path)[0].to_list() == rows, name


@pytest.mark.parametrize(
    ("columns", "told"),
    [("question=instruction", r"no column 'question'.*\['q', 'a'\]"), ("q", "'q' is no pair")],
)
def test_columns_that_cannot_be_renamed_are_named(tmp_path, columns, told):
    path = tmp_path / "a.csv"
    path.write_text("q,a\n1,2\n", encoding="utf-8")
    with pytest.raises(DataError, match=told):
        load_rows(path, columns)


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


def test_a_set_with_dollys_columns_is_read_as_alpaca_rows(tmp_path):
    row = {
        "instruction": "물은 몇 도에서 끓나요?",
        "context": "",
        "response": "100도입니다.",
        "category": "open_qa",
    }
    path = tmp_path / "dolly_ko.jsonl"
    path.write_text(json.dumps(row, ensure_ascii=False) + "\n", encoding="utf-8")
    rows, layout = load_rows(path, "context=input,response=output")
    assert layout == "alpaca"
    assert (rows[0]["instruction"], rows[0]["input"], rows[0]["output"]) == (
        row["instruction"],
        "",
        row["response"],
    )
