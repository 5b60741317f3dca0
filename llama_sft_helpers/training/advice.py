"""Learning rate, rank and epochs by size of data, from what ``benchmarks/advice_sweep.py`` measured."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pandas as pd

from llama_sft_helpers.core.findings import LEVEL


def summarize_advice(results: Mapping[str, Any]) -> pd.DataFrame:
    """The setting with the lowest held-out loss for each size of data, and which others do as well.

    Settings are compared by their runs of the first seed, which have the same rows. A setting does as well if
    its lowest loss is within 1 % of the best one's.

    Args:
        results: What ``benchmarks/advice_sweep.py`` wrote, for example ``read_results("advice_sweep")``.

    Returns:
        Index ``rows``, the number trained on. Of the best setting ``learning_rate``, ``rank``, ``epochs``
        until its loss was lowest, and the losses ``before``, ``lowest`` and ``at_the_end``, in nats a token;
        ``rates_as_good`` at its rank, ``ranks_as_good`` at its rate; ``seeds_differ_by``, by how much other
        rows and another start changed the lowest loss at that rate, NaN where only one seed ran.

    Raises:
        ValueError: The results hold no run.
    """
    runs = _read_runs(results)
    first = runs[runs["seed"] == runs["seed"].min()]
    best = first.loc[first.groupby("rows")["lowest"].idxmin()]
    others = [_as_good(first, row) | _spread(runs, row) for _, row in best.iterrows()]
    table = best.reset_index(drop=True).join(pd.DataFrame(others)).set_index("rows")
    columns = ["learning_rate", "rank", "epochs", "before", "lowest", "at_the_end"]
    return table[[*columns, "rates_as_good", "ranks_as_good", "seeds_differ_by"]]


def summarize_rates(results: Mapping[str, Any], rank: int) -> pd.DataFrame:
    """What each learning rate gave at one rank: how low the loss came, and what later epochs did to it.

    Args:
        results: As for ``summarize_advice``, which has the same columns; runs of the first seed are taken.
        rank: One of the ranks that were tried.

    Returns:
        Index ``rows``, the number trained on; ``learning_rate``, ``epochs`` until the loss was lowest, and
        the losses ``before``, ``lowest``, ``above_the_best`` (of all rates and ranks), ``at_the_end``.

    Raises:
        ValueError: The results hold no run, or none of that rank.
    """
    runs = _read_runs(results)
    first = runs[runs["seed"] == runs["seed"].min()]
    if rank not in set(first["rank"]):
        tried = ", ".join(map(str, sorted(set(first["rank"]))))
        raise ValueError(f"rank={rank} was not tried; expected one of {tried}.")
    first = first.assign(above_the_best=first["lowest"] - first.groupby("rows")["lowest"].transform("min"))
    table = first[first["rank"] == rank].sort_values(["rows", "learning_rate"]).set_index("rows")
    return table[["learning_rate", "epochs", "before", "lowest", "above_the_best", "at_the_end"]]


def _read_runs(results: Mapping[str, Any]) -> pd.DataFrame:
    """The runs, with what their held-out losses by epoch say."""
    if not results.get("runs"):
        raise ValueError("the results hold no run; run benchmarks/advice_sweep.py first.")
    runs = pd.DataFrame(results["runs"])
    runs["lowest"] = runs["held_out_loss"].map(min)
    runs["epochs"] = [losses.index(min(losses)) + 1 for losses in runs["held_out_loss"]]
    runs["at_the_end"] = runs["held_out_loss"].str[-1]
    runs["before"] = runs["loss_before"]
    return runs


def _as_good(first: pd.DataFrame, best: pd.Series[Any]) -> dict[str, str]:
    """The other rates at the best rank, and ranks at the best rate, whose lowest loss is about as low."""
    good = first[(first["rows"] == best["rows"]) & (first["lowest"] <= (1 + LEVEL) * best["lowest"])]
    rates = good.loc[good["rank"] == best["rank"], "learning_rate"].drop(best.name)
    ranks = good.loc[good["learning_rate"] == best["learning_rate"], "rank"].drop(best.name)
    values = {"rates_as_good": rates, "ranks_as_good": ranks}
    return {name: ", ".join(f"{value:g}" for value in found) or "none" for name, found in values.items()}


def _spread(runs: pd.DataFrame, best: pd.Series[Any]) -> dict[str, float]:
    """The largest difference between seeds at the best rate, over the ranks that have several."""
    same = runs[(runs["rows"] == best["rows"]) & (runs["learning_rate"] == best["learning_rate"])]
    lowest = same.groupby("rank")["lowest"]
    differences = (lowest.max() - lowest.min())[lowest.count() > 1]
    return {"seeds_differ_by": differences.max()}
