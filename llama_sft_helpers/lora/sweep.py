"""Notebook 04's comparison of adapters: ranks and target modules against held-out loss, drawn and judged.

A sweep is a table with one row an adapter: ``targets`` (the name of a set of modules), ``r``, ``parameters``
and ``held_out_loss`` (nats a token).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import pandas as pd

from llama_sft_helpers.core.plots import COLOURS, MARKERS, new_axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_SWEEP_COLUMNS = ("targets", "r", "parameters", "held_out_loss")
# How many (target sets, learning rates, ranks) to try, from all down to the least that the claims need. What
# is dropped first tells least: a rank between two others, then the outer rates, then the middle set.
_SIZES = ((3, 4, 4), (3, 4, 3), (3, 3, 3), (3, 2, 3), (2, 2, 3), (2, 2, 2), (2, 1, 2))


@dataclasses.dataclass(frozen=True)
class SweepPlan:
    """What a sweep trains within its budget, as many ``adapters``; printed, it says what is left out."""

    targets: tuple[str, ...]
    learning_rates: tuple[float, ...]
    ranks: tuple[int, ...]
    adapters: int
    told: str

    def __str__(self) -> str:
        return self.told


def plan_sweep(
    targets: Sequence[str],
    learning_rates: Sequence[float],
    ranks: Sequence[int],
    *,
    seconds_per_adapter: float,
    budget_seconds: float,
) -> SweepPlan:
    """Plan as much of a sweep as fits a budget of time; two sets at two ranks with one rate are the least.

    Each sequence has its most informative member first. Each set picks its own rate at the first rank, and
    is trained there once more from another seed.

    Raises:
        ValueError: Fewer than two sets, one rate or two ranks, or a time that is not above 0.
    """
    lengths = (len(targets), len(learning_rates), len(ranks))
    sizes = [size for size in (lengths, *_SIZES) if all(n <= of for n, of in zip(size, lengths, strict=True))]
    if _SIZES[-1] not in sizes:
        raise ValueError(
            f"Got {lengths} target sets, learning rates and ranks; expected at least {_SIZES[-1]}."
        )
    if not (seconds_per_adapter > 0 and budget_seconds > 0):
        raise ValueError(
            f"An adapter takes {seconds_per_adapter!r} s of {budget_seconds!r} s; expected both above 0."
        )
    # Of each set: its rates at the first rank, its other ranks, and the first rank from another seed.
    counts = [sets * (rates + kept) for sets, rates, kept in sizes]
    choice = next((n for n, count in enumerate(counts) if count * seconds_per_adapter <= budget_seconds), -1)
    (sets, rates, kept), seconds = sizes[choice], counts[choice] * seconds_per_adapter
    over = ", more than that: it is the least that the claims need" * (seconds > budget_seconds)
    rest = [f"learning rate {rate:g}" for rate in learning_rates[rates:]] + [f"r={r}" for r in ranks[kept:]]
    told = (
        f"{counts[choice]} adapters, about {seconds:.0f} s of the {budget_seconds:.0f} s that the profile "
        f"allows{over}; left out: {', '.join([*targets[sets:], *rest]) or 'nothing'}"
    )
    chosen = (tuple(targets[:sets]), tuple(learning_rates[:rates]), tuple(ranks[:kept]))
    return SweepPlan(*chosen, counts[choice], told)


def plot_sweep(sweep: pd.DataFrame, base_loss: float) -> Axes:
    """Held-out loss against trainable parameters: one line a target set, with its r, and the base model's."""
    _check_sweep(sweep)
    axes: Any = new_axes(5)
    highest = sweep.groupby("targets")["held_out_loss"].mean().idxmax()
    for i, (targets, rows) in enumerate(sweep.groupby("targets", sort=False)):
        x, y = rows["parameters"], rows["held_out_loss"]
        axes.plot(x, y, color=COLOURS[i % 7], marker=MARKERS[i % 7], label=targets)
        for r, *point in zip(rows["r"], x, y, strict=True):
            place = (0, 6 if targets == highest else -17)  # outside of the lines that lie close
            axes.annotate(f"{r}", point, place, textcoords="offset points", ha="center")
    axes.axhline(base_loss, color="0.4", linestyle="--", label="base model, no adapter")
    axes.set_xscale("log")
    axes.margins(0.12)
    lowest = sweep.loc[sweep.groupby("r")["held_out_loss"].idxmin(), "targets"].unique()
    axes.set_title(f"Lowest held-out loss at every r: {lowest[0] if len(lowest) == 1 else 'no set'}")
    axes.set(xlabel="trainable parameters", ylabel="held-out loss (nats a token)")
    axes.legend(ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.16), title="target modules; numbers: r")
    return axes


def summarize_claims(sweep: pd.DataFrame, noise: float) -> pd.DataFrame:
    """Hold QLoRA's claim, adapters on all layers matter and r hardly does, against a sweep of one's own.

    The claim is section 4 of Dettmers et al. 2023 (https://arxiv.org/abs/2305.14314). ``noise`` is the
    difference between runs that differ by their seed alone, in nats a token; a smaller one decides nothing.

    Returns:
        Index ``statement``; ``measured`` (differences in nats a token; negative speaks for the statement) and
        ``verdict``: "seen here", "the opposite is seen here" or "not decided here".

    Raises:
        ValueError: Columns or pairs are missing or double, fewer than two sets or ranks, or a negative noise.
    """
    _check_sweep(sweep)
    if not noise >= 0:
        raise ValueError(f"noise is {noise!r}; expected a difference of losses, 0 or more.")
    loss = _by_r_and_targets(sweep)
    order = sweep.groupby("targets")["parameters"].mean().sort_values().index
    widest, narrowest = order[-1], order[0]
    differences = {
        f"{widest} beats {other} at the same r": loss[widest] - loss[other] for other in order[:-1]
    }
    differences |= _same_budget(sweep, widest, narrowest)
    by_r = loss[widest].max() - loss[widest].min()
    by_targets = (loss.max(axis=1) - loss.min(axis=1)).median()
    statement = (
        f"r matters less: it moves the loss of {widest} by {by_r:.3f}, "
        f"the choice of the set by {by_targets:.3f} (median over r)"
    )
    differences[statement] = pd.Series([by_r - by_targets])
    rows = [(statement, *_verdict(gaps, noise)) for statement, gaps in differences.items()]
    return pd.DataFrame(rows, columns=["statement", "measured", "verdict"]).set_index("statement")


def _check_sweep(sweep: pd.DataFrame) -> None:
    if missing := [column for column in _SWEEP_COLUMNS if column not in sweep.columns]:
        raise ValueError(f"The sweep lacks {', '.join(missing)}; expected {', '.join(_SWEEP_COLUMNS)}.")
    if sweep.empty:
        raise ValueError("The sweep has no rows; pass one row for each trained adapter.")


def _by_r_and_targets(sweep: pd.DataFrame) -> pd.DataFrame:
    """The losses, a row for each r and a column for each set of targets, none missing."""
    if sweep.duplicated(["targets", "r"]).any():
        raise ValueError(
            "The sweep holds a pair of targets and r twice; pass one learning rate and seed each."
        )
    table = sweep.pivot(index="r", columns="targets", values="held_out_loss")
    if table.isna().any(axis=None) or min(table.shape) < 2:
        raise ValueError(
            f"The sweep has {int(table.notna().sum().sum())} losses for {table.shape[0]} ranks and "
            f"{table.shape[1]} target sets; expected one for every pair, of at least two of each."
        )
    return table


def _same_budget(sweep: pd.DataFrame, widest: str, narrowest: str) -> dict[str, pd.Series[float]]:
    """The narrow set at its largest r against the wide set with no more parameters."""
    largest = sweep[sweep["targets"] == narrowest].nlargest(1, "parameters").iloc[0]
    within = sweep[(sweep["targets"] == widest) & (sweep["parameters"] <= largest["parameters"])]
    if within.empty:
        return {f"{widest} beats {narrowest} with no more parameters": pd.Series(dtype=float)}
    rival = within.nlargest(1, "parameters").iloc[0]
    statement = (
        f"{widest} at r={rival['r']} ({rival['parameters']:,} parameters) beats "
        f"{narrowest} at r={largest['r']} ({largest['parameters']:,})"
    )
    return {statement: pd.Series([rival["held_out_loss"] - largest["held_out_loss"]])}


def _verdict(differences: pd.Series[float], noise: float) -> tuple[str, str]:
    if differences.empty:
        return "no such pair", "not decided here"
    low, high = differences.min(), differences.max()
    measured = f"{low:+.3f}" if len(differences) == 1 else f"{low:+.3f} to {high:+.3f}"
    if high < -noise:
        return measured, "seen here"
    return measured, "the opposite is seen here" if low > noise else "not decided here"
