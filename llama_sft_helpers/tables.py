"""Tables as people read them: words for the names of columns, numbers with the digits that matter."""

from __future__ import annotations

from typing import Any

import pandas as pd

_UNITS = {"gib": "GiB", "mib": "MiB"}
_WORDS = {"eos": "EOS", "b": "B"}


def in_words(table: pd.DataFrame, decimals: int = 2, **formats: str) -> pd.DataFrame:
    """A copy to look at: ``held_out_loss`` becomes "held-out loss", ``total_gib`` "total (GiB)", 0.5 "0.50".

    Names with the word ``share`` are in percent, whole numbers with commas, True and False as yes and no, a
    shape as ``16 × 576``. Where the rows only have numbers, the first column names them instead.

    Args:
        table: Any table; it stays as it is.
        decimals: Of numbers with a fraction.
        **formats: Column -> its own format, such as ``loss="{:.4f}"``.
    """
    if table.index.name is None and pd.api.types.is_integer_dtype(table.index):
        table = table.set_index(table.columns[0])
    shown = {
        name: [_in_words(cell, formats.get(str(name)) or _usual(name, decimals)) for cell in column]
        for name, column in table.items()
    }
    return pd.DataFrame(shown, index=table.index).rename(columns=_name).rename_axis(index=_name)


def _usual(name: object, decimals: int) -> str:
    return "{:.1%}" if "share" in str(name).split("_") else f"{{:.{decimals}f}}"


def _name(name: Any) -> Any:
    if not isinstance(name, str):
        return name
    *words, last = (_WORDS.get(word, word) for word in name.replace("held_out", "held-out").split("_"))
    unit = _UNITS.get(last, last)
    return " ".join([*words, f"({unit})" if words and unit != last else unit])


def _in_words(cell: Any, form: str) -> str:
    match cell.item() if hasattr(cell, "item") else cell:  # NumPy's numbers are no int, and its bool no bool
        case bool():
            return "yes" if cell else "no"
        case int():
            return f"{cell:,}"
        case float():
            return "" if cell != cell else form.format(cell)  # noqa: PLR0124 (not a number)
        case tuple():
            return " × ".join(map(str, cell))
        case list():
            return ", ".join(map(str, cell))
    return "" if cell is None else str(cell)
