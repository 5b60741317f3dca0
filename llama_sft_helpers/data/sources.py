"""Where rows come from: a file, a folder or the hub, told apart and read so that text stays text.

``data`` offers these functions beside its own.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llama_sft_helpers.data.rows import PROBLEMS, DataError, find_layout, row_problems

if TYPE_CHECKING:
    from datasets import Dataset

_SEPARATOR = re.compile(r"[\s,]*")  # between the elements of a JSON array
# How files begin that are no text, whatever their names end in.
_BINARY = {
    b"PAR1": "a Parquet file",
    b"ARROW1": "an Arrow file",
    b"PK\x03\x04": "a zip or Excel file",
    b"\x1f\x8b": "a gzip file",
}


def load_rows(source: str | Path, columns: str | Mapping[str, str] | None = None) -> tuple[Dataset, str]:
    """Read the rows of a CSV, JSONL, JSON or Parquet file, of a folder of them, or of a data set on the hub.

    CSV and JSON cells are taken as they stand: pandas and Arrow would make a number of ``2``, a date of
    ``2026-01-02``, and nothing of ``None`` and ``NA``. Of a folder every file of these kinds is read, in the
    order of the names, or those with "train" in their names if there are any.

    Args:
        source: A file, a folder, or ``owner/name`` on the hub, whose split ``train`` is taken.
        columns: The data's own names and what they are here, ``{"question": "instruction"}`` or
            ``"question=instruction,answer=output"``.

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
    rows = _rename(rows, _parse_columns(columns), str(source))
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
    rows = [row for _, _, row in _text_rows(path)]
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
        raise DataError("wrong-type", f"{where}: {error}. {fix}.", row) from error
    return cells


def _parse_columns(columns: str | Mapping[str, str] | None) -> dict[str, str]:
    if not isinstance(columns, str):
        return dict(columns or {})
    pairs = [pair.partition("=") for pair in columns.split(",") if pair.strip()]
    if wrong := [own for own, _, name in pairs if not own.strip() or not name.strip()]:
        raise DataError(
            "missing-column",
            f"columns={columns!r}: {wrong[0]!r} is no pair; expected question=instruction,answer=output.",
        )
    return {own.strip(): name.strip() for own, _, name in pairs}


def _rename(rows: Dataset, columns: Mapping[str, str], source: str) -> Dataset:
    there = rows.column_names
    if missing := [own for own in columns if own not in there]:
        raise DataError(
            "missing-column", f"{source} has no column {', '.join(map(repr, missing))}. Its columns: {there}."
        )
    taken = [name for own, name in columns.items() if name in there and name not in columns and name != own]
    return rows.remove_columns(taken).rename_columns({o: n for o, n in columns.items() if o != n})


def _text_rows(path: Path) -> Iterator[tuple[int, int, dict[str, Any]]]:
    """Line, number and cells of each row of a text file."""
    _require_kind(path, list(_READERS))
    found = enumerate(_READERS[path.suffix.lower()](path.name, _decode(path)))
    for index, (line, row) in found:
        if not isinstance(row, dict):
            where = f"{path.name}, line {line} (row {index})"
            raise DataError("wrong-type", f"{where}: {type(row).__name__}, expected an object.", index)
        yield line, index, row


def check_file(path: str | Path) -> None:
    """Read a CSV, JSON or JSONL file cell by cell and name the first that is broken.

    Raises:
        DataError: Names the first row that is broken, and how: ``bad-json``, ``bad-csv``,
            ``wrong-encoding``, ``missing-column``, ``null-cell``, ``cell-too-long``, ``lone-surrogate``, ...;
            ``unknown-file`` for a folder or a file of another kind.
        FileNotFoundError: There is no such file.
    """
    path, layout = Path(path), ""
    for line, index, row in _text_rows(path):
        layout = layout or find_layout(row)
        for reason, detail in row_problems(row, layout):
            where = f"{path.name}, line {line} (row {index})"
            raise DataError(reason, f"{where}: {detail}; {PROBLEMS[reason]}.", index)
    if not layout:
        raise DataError("no-rows", f"{path.name} holds no rows.")


def _require_kind(path: Path, suffixes: list[str]) -> None:
    """Raise unless it is a text file of a known ending."""
    wanted = f"expected one of {', '.join(suffixes)}"
    if path.is_dir():
        raise DataError("unknown-file", f"{path.name} is a folder; {wanted}. Pass a file in it.")
    suffix = path.suffix.lower()
    with path.open("rb") as file:
        start = file.read(8)
    kind = next((kind for magic, kind in _BINARY.items() if start.startswith(magic)), "")
    if suffix not in suffixes:
        loader = "parquet" if suffix == ".parquet" else "text"
        raise DataError(
            "unknown-file",
            f"{path.name} is a {suffix!r} file; {wanted}. Save it as one of these, or load it with "
            f'load_dataset("{loader}", data_files="{path.name}", split="train") and pass that to check_rows.',
        )
    if kind:
        raise DataError(
            "unknown-file", f"{path.name} is {kind}, not text; {wanted}. Save its rows as one of these."
        )


def _decode(path: Path) -> str:
    raw = path.read_bytes()
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        before = raw[: error.start]
        line = before.count(b"\n") + 1
        row = max(line - 1 - (path.suffix.lower() == ".csv"), 0)
        raise DataError(
            "wrong-encoding",
            f"{path.name}, line {line}: byte 0x{raw[error.start]:02X} is not UTF-8. "
            "Save the file as UTF-8, or convert it: "
            f'Path("{path.name}").read_text(encoding="cp949") for Korean Windows, "cp1252" for Western.',
            row,
        ) from error


def _json_rows(name: str, text: str) -> Iterator[tuple[int, Any]]:
    """Line number and value of each JSON line, or of each element of one JSON array."""
    if text.lstrip().startswith("["):
        yield from _array_rows(name, text)
        return
    row = 0
    for line, content in enumerate(text.split("\n"), start=1):
        if content.strip():
            try:
                value = json.loads(content)
            except json.JSONDecodeError as fault:
                fix = "Each line must hold one complete JSON object"
                raise _bad_json(name, fault, line, row, fix) from fault
            yield line, value
            row += 1


def _array_rows(name: str, text: str) -> Iterator[tuple[int, Any]]:
    """The line on which each element of a JSON array begins, and the element."""
    fault = _syntax_error(text)
    stop = fault.pos if fault else len(text)
    end, line, row = text.index("[") + 1, 1 + text.count("\n", 0, text.index("[")), 0
    while (start := _SEPARATOR.match(text, end).end()) < stop and text[start] != "]":  # type: ignore[union-attr]
        line += text.count("\n", end, start)
        try:
            value, end = json.JSONDecoder().raw_decode(text, start)
        except json.JSONDecodeError:
            break  # at the same place as ``fault``, in this row
        yield line, value
        line += text.count("\n", start, end)
        row += 1
    if fault:
        raise _bad_json(name, fault, 1, row, "The array must hold complete JSON objects, a comma between two")


def _syntax_error(text: str) -> json.JSONDecodeError | None:
    try:
        json.loads(text)
    except json.JSONDecodeError as error:
        return error
    return None


def _bad_json(name: str, fault: json.JSONDecodeError, line: int, row: int, fix: str) -> DataError:
    where = f"{name}, line {line + fault.lineno - 1} (row {row}), column {fault.colno}"
    return DataError("bad-json", f"{where}: {fault.msg}. {fix}.", row)


def _csv_rows(name: str, text: str) -> Iterator[tuple[int, dict[str, Any]]]:
    header = text.partition("\n")[0]
    mark = max(",;\t", key=header.count)  # Excel writes semicolons where the comma is the decimal sign
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True, delimiter=mark)
    row = 0
    try:
        for cells in reader:
            if None in cells or None in cells.values():
                raise csv.Error(f"expected {len(reader.fieldnames or ())} cells as in the header")
            yield reader.reader.line_num, cells
            row += 1
    except csv.Error as error:
        too_long = "field larger" in str(error)
        reason = "cell-too-long" if too_long else "bad-csv"
        fix = PROBLEMS["cell-too-long"] if too_long else "Quote cells that hold commas, quotes or line breaks"
        raise DataError(
            reason, f"{name}, line {reader.reader.line_num} (row {row}): {error}. {fix}.", row
        ) from error


_READERS = {".csv": _csv_rows, ".jsonl": _json_rows, ".json": _json_rows}
_SUFFIXES = (*_READERS, ".parquet")
