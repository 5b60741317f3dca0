"""What a ladder of runs measured, from the plain recipe to the fast one."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llama_sft_helpers.core.plots import BLUE, new_axes

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

_ACROSS = {
    "tokens_per_second": "tokens per second",
    "peak_reserved_gib": "peak of reserved memory (GiB)",
}


def read_results(name: str) -> dict[str, Any]:
    """A file of ``benchmarks/results``, such as ``speed_h200_40gib``, with its card, versions and command.

    Raises:
        FileNotFoundError: No such file; the message lists those that are there.
    """
    package = Path(__file__).parent.parent
    folders = (package / "results", package.parent / "benchmarks" / "results")  # of a wheel; of the checkout
    for folder in folders:
        if (file := folder / f"{name}.json").is_file():
            results: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
            return results
    known = sorted({path.stem for folder in folders for path in folder.glob("*.json")})
    raise FileNotFoundError(f"no results {name!r}; expected one of {', '.join(known) or 'none: reinstall'}.")


def summarize_ladder(results: Mapping[str, Any], epoch_tokens: int, price_per_hour: float) -> pd.DataFrame:
    """One row for each rung: speed, memory, distance to the ceiling, hours and price of an epoch.

    ``results`` are those of ``benchmarks/speed_ladder.py``; the price of an hour is in any currency.

    Raises:
        ValueError: The results have no rungs.
    """
    import pandas as pd

    rungs = [rung for rung in results.get("rungs", []) if "tokens_per_second" in rung]
    if not rungs:
        raise ValueError("the results hold no finished rung; run benchmarks/speed_ladder.py first.")
    table = pd.DataFrame(rungs).set_index("rung")
    first = results["rungs"][0]["rung"]  # NaN where it did not finish: nothing to compare with
    table["times_plain"] = table["tokens_per_second"] / table["tokens_per_second"].get(first, float("nan"))
    table["epoch_hours"] = epoch_tokens / table["tokens_per_second"] / 3600
    table["epoch_price"] = table["epoch_hours"] * price_per_hour
    columns = ["tokens_per_second", "times_plain", "peak_reserved_gib", "share_of_ceiling", "compile_seconds"]
    return table[[c for c in columns if c in table] + ["epoch_hours", "epoch_price"]]


def plot_ladder(
    table: pd.DataFrame, column: str, ax: Axes | None = None, missing: str = "did not finish"
) -> Axes:
    """Horizontal bars of one column of ``summarize_ladder``, the first rung on top, each with its value.

    Values that differ by over a percent are never told alike. A rung without a value has ``missing`` in its
    place.

    Raises:
        ValueError: The table has no such column; the message lists those it has.
    """
    if column not in table:
        raise ValueError(f"there is no column {column!r}; expected one of {', '.join(table.columns)}.")
    ax = ax or new_axes(0.36 * len(table) + 1.2)
    values = table[column]
    bars = ax.barh(range(len(values)), values.fillna(0), color=BLUE)
    labels = values.map(f"{{:,.{_decimals(values)}f}}".format, na_action="ignore")
    ax.bar_label(bars, labels=labels.fillna(missing), padding=3)
    ax.set_yticks(range(len(values)), [str(name) for name in values.index])
    ax.invert_yaxis()
    ax.set_xlim(0, float(values.max()) * 1.3)
    ax.locator_params(axis="x", nbins=5)
    ax.set_xlabel(_ACROSS.get(column, column.replace("_", " ")))
    ax.xaxis.set_major_formatter("{x:,g}")
    ax.set_title(f"{column.replace('_', ' ').replace(' gib', '')} by rung")
    return ax


def _decimals(values: pd.Series[float]) -> int:
    """As few decimals as tell apart the values that differ by over a percent; one at least below 100."""
    decimals, rising = 0 if values.max() > 100 else 1, sorted(values.dropna())
    apart = [(a, b) for a, b in itertools.pairwise(rising) if b > 1.01 * a]
    while any(f"{a:.{decimals}f}" == f"{b:.{decimals}f}" for a, b in apart):
        decimals += 1
    return decimals
