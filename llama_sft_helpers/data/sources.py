"""Where rows come from: a file, a folder or the hub, told apart and read so that text stays text."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llama_sft_helpers.data.rows import PROBLEMS, DataError, find_layout, row_problems

if TYPE_CHECKING:
    from datasets import Dataset

_SEPARATOR = re.compile(r"\A\s*\[\s*|\s*,\s*")  # before the first element of a JSON array, and between two
# How files begin that are no text, whatever their names end in.
_BINARY = {
    b"PAR1": "a Parquet file",
    b"ARROW1": "an Arrow file",
    b"PK\x03\x04": "a zip or Excel file",
    b"\x1f\x8b": "a gzip file",
}


def load_rows(source: str | Path, columns: str | None = None) -> tuple[Dataset, str]:
    """Read the rows of a CSV, JSONL, JSON or Parquet file, of a folder of them, or of a data set on the hub.

    CSV and JSON cells are taken as they stand: pandas and Arrow would make a number of ``2``, a date of
    ``2026-01-02``, and nothing of ``None`` and ``NA``. Of a folder every file of these kinds is read, in the
    order of the names, or those with "train" in their names if there are any.

    Args:
        source: A file, a folder, or ``owner/name`` on the hub, whose split ``train`` is taken.
        columns: The data's own names and what they are here: ``"question=instruction,answer=output"``.

    Returns:
        The rows, and their layout by their columns: ``alpaca`` (``instruction``, ``output``, perhaps
        ``input``), ``prompt-completion`` or ``messages``.

    Raises:
        DataError: A file that is broken, empty or of another kind, or columns that are not there.
        FileNotFoundError: There is no such file or folder.
    """
    rows = _read(str(source))
    if not len(rows):
        raise DataError("no-rows", f"{source} holds no rows.")
    rows = _rename(rows, columns or "", source)
    return rows, find_layout(rows.column_names)


def _read(source: str) -> Dataset:
    from datasets import concatenate_datasets, load_dataset

    path = Path(source).expanduser()
    if path.is_file():
        return _read_file(path)
    if path.is_dir():
        return concatenate_datasets([_read_file(file) for file in _data_files(path)])
    if re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", source) and path.suffix.lower() not in _SUFFIXES:
        return load_dataset(source, split="train")
    raise FileNotFoundError(
        f"There is no file or folder {path.absolute()}. Give one that is there, or a data set of the hub as "
        "owner/name."
    )


def _data_files(folder: Path) -> list[Path]:
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in _SUFFIXES and path.is_file())
    if not files:
        raise DataError("no-rows", f"The folder {folder} holds no file of the kinds {', '.join(_SUFFIXES)}.")
    return [path for path in files if "train" in path.stem.lower()] or files


def _read_file(path: Path) -> Dataset:
    from datasets import Dataset

    if path.suffix.lower() == ".parquet":
        return Dataset.from_parquet(str(path))
    rows = [row for _, row in _text_rows(path)]
    names = dict.fromkeys(name for row in rows for name in row)
    return Dataset.from_dict({name: _one_kind(path, name, [row.get(name) for row in rows]) for name in names})


def _one_kind(path: Path, name: str, cells: list[Any]) -> list[Any]:
    """The cells of a column, if a table can hold them: all text, all lists, and so on."""
    from datasets import Dataset

    try:
        Dataset.from_dict({name: cells})
    except (ValueError, TypeError) as error:
        first = next((type(cell) for cell in cells if cell is not None), str)
        row = next((n for n, cell in enumerate(cells) if not isinstance(cell, first | None)), None)
        where = f"{path.name}, column {name!r}" + ("" if row is None else f", row {row}")
        fix = "Give the column one kind of value, text for what is trained on"
        raise DataError("wrong-type", f"{where}: {error}. {fix}.") from error
    return cells


def _rename(rows: Dataset, columns: str, source: str | Path) -> Dataset:
    pairs = [[name.strip() for name in pair.split("=")] for pair in columns.split(",") if pair.strip()]
    if wrong := [pair for pair in pairs if len(pair) != 2 or not all(pair)]:
        fault = f"columns={columns!r}: {'='.join(wrong[0])!r} is no pair"
        raise DataError("missing-column", f"{fault}; expected question=instruction,answer=output.")
    there, names = rows.column_names, dict(pairs)
    if missing := [own for own in names if own not in there]:
        fault = f"{source} has no column {', '.join(map(repr, missing))}"
        raise DataError("missing-column", f"{fault}. Its columns: {there}.")
    taken = [name for own, name in names.items() if name in there and name not in names and name != own]
    return rows.remove_columns(taken).rename_columns({o: n for o, n in names.items() if o != n})


def check_file(path: str | Path) -> None:
    """Read a CSV, JSON or JSONL file cell by cell and name the first that is broken.

    Raises:
        DataError: Names the first row that is broken, and how; or a folder or a file of another kind.
        FileNotFoundError: There is no such file.
    """
    path, layout = Path(path), ""
    for where, row in _text_rows(path):
        layout = layout or find_layout(row)
        for reason, detail in row_problems(row, layout):
            raise DataError(reason, f"{where}: {detail}; {PROBLEMS[reason]}.")
    if not layout:
        raise DataError("no-rows", f"{path.name} holds no rows.")


def _text_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Place and cells of each row of a text file."""
    _require_kind(path)
    for where, row in _READERS[path.suffix.lower()](path.name, _decode(path)):
        if not isinstance(row, dict):
            raise DataError("wrong-type", f"{where}: {type(row).__name__}, expected an object.")
        yield where, row


def _require_kind(path: Path) -> None:
    """Raise unless it is a text file of a known ending."""
    kind, fix = "", "Save its rows as one of these."
    if path.is_dir():
        kind, fix = "a folder", "Pass a file in it."
    else:
        with path.open("rb") as file:
            start = file.read(8)
        if path.suffix.lower() not in _READERS:
            kind = f"a {path.suffix!r} file"
            fix += " load_rows reads .parquet too, and check_rows looks at the rows."
        elif binary := next((name for magic, name in _BINARY.items() if start.startswith(magic)), ""):
            kind = f"{binary}, not text"
    if kind:
        raise DataError(
            "unknown-file", f"{path.name} is {kind}; expected one of {', '.join(_READERS)}. {fix}"
        )


def _decode(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise DataError(
            "wrong-encoding",
            f"{path.name}, line {line}: byte 0x{error.object[error.start]:02X} is not UTF-8. "
            "Save the file as UTF-8, or convert it: "
            f'Path("{path.name}").read_text(encoding="cp949") for Korean Windows, "cp1252" for Western.',
        ) from error


def _place(name: str, line: int, row: int) -> str:
    return f"{name}, line {line} (row {row})"


def _json_rows(name: str, text: str) -> Iterator[tuple[str, Any]]:
    """Place and value of each JSON line, or of each element of one JSON array."""
    if text.lstrip().startswith("["):
        yield from _array_rows(name, text)
        return
    lines = ((line, content) for line, content in enumerate(text.split("\n"), start=1) if content.strip())
    for row, (line, content) in enumerate(lines):
        where = _place(name, line, row)
        try:
            value = json.loads(content)
        except json.JSONDecodeError as fault:
            raise _bad_json(where, fault, "Each line must hold one complete JSON object") from fault
        yield where, value


def _array_rows(name: str, text: str) -> Iterator[tuple[str, Any]]:
    """Place, with the line on which it begins, and value of each element of a JSON array."""
    end, line, row = 0, 1, 0
    while separator := _SEPARATOR.match(text, end):
        start = separator.end()
        line += text.count("\n", end, start)
        try:
            value, end = json.JSONDecoder().raw_decode(text, start)
        except json.JSONDecodeError:
            break
        yield _place(name, line, row), value
        line += text.count("\n", start, end)
        row += 1
    try:
        json.loads(text)  # whatever ended the loop before the array's end
    except json.JSONDecodeError as fault:
        fix = "The array must hold complete JSON objects, a comma between two"
        raise _bad_json(_place(name, fault.lineno, row), fault, fix) from fault


def _bad_json(where: str, fault: json.JSONDecodeError, fix: str) -> DataError:
    return DataError(
        "bad-json", f"{where}, column {fault.colno}: {fault.msg.removesuffix(' starting at')}. {fix}."
    )


def _csv_rows(name: str, text: str) -> Iterator[tuple[str, dict[str, Any]]]:
    header = text.partition("\n")[0]
    mark = max(",;\t", key=header.count)  # Excel writes semicolons where the comma is the decimal sign
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True, delimiter=mark)
    row = 0
    try:
        for cells in reader:
            if None in cells or None in cells.values():
                raise csv.Error(f"expected {len(reader.fieldnames or ())} cells as in the header")
            yield _place(name, reader.reader.line_num, row), cells
            row += 1
    except csv.Error as error:
        reason = "cell-too-long" if "field larger" in str(error) else "bad-csv"
        fix = PROBLEMS.get(reason, "Quote cells that hold commas, quotes or line breaks")
        raise DataError(reason, f"{_place(name, reader.reader.line_num, row)}: {error}. {fix}.") from error


_READERS = {".csv": _csv_rows, ".jsonl": _json_rows, ".json": _json_rows}
_SUFFIXES = (*_READERS, ".parquet")
