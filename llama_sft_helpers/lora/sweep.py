"""Notebook 04's comparison of adapters: ranks and target modules against held-out loss, drawn and judged."""

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
    """What a sweep trains within its budget; printed, it says how long that takes and what is left out.

    Attributes:
        targets: Names of the target sets.
        learning_rates: Rates of which each set picks its own, at the first rank.
        ranks: Ranks of each set, at its own rate; the first rank once more from another seed.
        seconds: Planned time.
        budget_seconds: Time that was allowed; the least sweep may need more.
        left_out: What the caller offered and the budget does not allow.
    """

    targets: tuple[str, ...]
    learning_rates: tuple[float, ...]
    ranks: tuple[int, ...]
    seconds: float
    budget_seconds: float
    left_out: tuple[str, ...]

    @property
    def adapters(self) -> int:
        """Adapters to train: for each set its rates, its other ranks, and one from another seed."""
        return _count_adapters(len(self.targets), len(self.learning_rates), len(self.ranks))

    def __str__(self) -> str:
        over = ", more than that: it is the least that the claims need" * (self.seconds > self.budget_seconds)
        return (
            f"{self.adapters} adapters, about {self.seconds:.0f} s of the {self.budget_seconds:.0f} s that "
            f"the profile allows{over}; left out: {', '.join(self.left_out) or 'nothing'}"
        )


def plan_sweep(
    targets: Sequence[str],
    learning_rates: Sequence[float],
    ranks: Sequence[int],
    *,
    seconds_per_adapter: float,
    budget_seconds: float,
) -> SweepPlan:
    """Plan as much of a sweep as fits a budget of time; two sets at two ranks with one rate are the least.

    Args:
        targets: Names of the target sets, the most informative first.
        learning_rates: Rates to pick from, the most informative first.
        ranks: Ranks, the most informative first; the rates are picked at the first.
        seconds_per_adapter: What training and measuring one adapter takes.
        budget_seconds: What the profile allows (``sweep_seconds``).

    Raises:
        ValueError: Fewer than two sets, one rate or two ranks, or a time that is not above 0.
    """
    lengths = (len(targets), len(learning_rates), len(ranks))
    if not _fits(_SIZES[-1], lengths):
        raise ValueError(
            f"Got {lengths} target sets, learning rates and ranks; expected at least {_SIZES[-1]}."
        )
    if not (seconds_per_adapter > 0 and budget_seconds > 0):
        raise ValueError(
            f"An adapter takes {seconds_per_adapter!r} s of {budget_seconds!r} s; expected both above 0."
        )
    sizes = [lengths, *(size for size in _SIZES if _fits(size, lengths))]
    affordable = [size for size in sizes if _count_adapters(*size) * seconds_per_adapter <= budget_seconds]
    sets, rates, kept = affordable[0] if affordable else sizes[-1]
    return SweepPlan(
        targets=tuple(targets[:sets]),
        learning_rates=tuple(learning_rates[:rates]),
        ranks=tuple(ranks[:kept]),
        seconds=_count_adapters(sets, rates, kept) * seconds_per_adapter,
        budget_seconds=budget_seconds,
        left_out=(
            *targets[sets:],
            *(f"learning rate {rate:g}" for rate in learning_rates[rates:]),
            *(f"r={r}" for r in ranks[kept:]),
        ),
    )


def _fits(size: tuple[int, int, int], lengths: tuple[int, int, int]) -> bool:
    return all(wanted <= there for wanted, there in zip(size, lengths, strict=True))


def _count_adapters(sets: int, rates: int, ranks: int) -> int:
    """Of each set: its rates at the first rank, the other ranks, and the first rank from another seed."""
    return sets * (rates + ranks - 1 + 1)


def plot_sweep(sweep: pd.DataFrame, base_loss: float) -> Axes:
    """Held-out loss against trainable parameters, one line a target set, each point labelled with its r.

    Args:
        sweep: One row an adapter: ``targets``, ``r``, ``parameters``, ``held_out_loss`` (nats a token).
        base_loss: Held-out loss of the base model, drawn as a line.

    Raises:
        ValueError: A column is missing, or nothing was trained.
    """
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
    lowest = sweep.loc[sweep["held_out_loss"].idxmin()]
    axes.set_title(f"Lowest held-out loss: {lowest['targets']} at r = {lowest['r']}")
    axes.set(xlabel="trainable parameters", ylabel="held-out loss (nats a token)")
    axes.legend(ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.16), title="target modules; numbers: r")
    return axes


def summarize_claims(sweep: pd.DataFrame, noise: float) -> pd.DataFrame:
    """Hold QLoRA's claim, adapters on all layers matter and r hardly does, against a sweep of one's own.

    The claim is section 4 of Dettmers et al. 2023 (https://arxiv.org/abs/2305.14314). A difference smaller
    than ``noise`` decides nothing.

    Args:
        sweep: A row for each pair of ``targets`` and ``r``: ``parameters``, ``held_out_loss`` (nats a token).
        noise: Difference between runs that differ by their seed alone, in nats a token.

    Returns:
        Index ``statement``; ``measured`` (differences in nats a token; negative speaks for the statement) and
        ``verdict``: "seen here", "the opposite is seen here" or "not decided here".

    Raises:
        ValueError: Columns or pairs are missing or double, fewer than two sets or ranks, or a negative noise.
    """
    _check_sweep(sweep)
    if not noise >= 0:
        raise ValueError(f"noise is {noise!r}; expected a difference of losses, 0 or more.")
    loss = _pivot(sweep, "held_out_loss")
    order = _pivot(sweep, "parameters").mean().sort_values().index
    widest, narrowest = order[-1], order[0]
    rows = [
        (f"{widest} beats {other} at the same r", *_verdict(loss[widest] - loss[other], noise))
        for other in order[:-1]
    ]
    rows.append(_same_budget(sweep, widest, narrowest, noise))
    by_r = loss[widest].max() - loss[widest].min()
    by_targets = (loss.max(axis=1) - loss.min(axis=1)).median()
    gap = pd.Series([by_r - by_targets])
    rows.append((f"r (in {widest}) matters less than the target set (median over r)", *_verdict(gap, noise)))
    return pd.DataFrame(rows, columns=["statement", "measured", "verdict"]).set_index("statement")


def _check_sweep(sweep: pd.DataFrame) -> None:
    if missing := [column for column in _SWEEP_COLUMNS if column not in sweep.columns]:
        raise ValueError(f"The sweep lacks {', '.join(missing)}; expected {', '.join(_SWEEP_COLUMNS)}.")
    if sweep.empty:
        raise ValueError("The sweep has no rows; pass one row for each trained adapter.")


def _pivot(sweep: pd.DataFrame, value: str) -> pd.DataFrame:
    if sweep.duplicated(["targets", "r"]).any():
        raise ValueError(
            "The sweep holds a pair of targets and r twice; pass one learning rate and seed each."
        )
    table = sweep.pivot(index="r", columns="targets", values=value)
    if table.isna().any(axis=None) or min(table.shape) < 2:
        raise ValueError(
            f"The sweep has {int(table.notna().sum().sum())} losses for {table.shape[0]} ranks and "
            f"{table.shape[1]} target sets; expected one for every pair, of at least two of each."
        )
    return table


def _same_budget(sweep: pd.DataFrame, widest: str, narrowest: str, noise: float) -> tuple[str, str, str]:
    """The narrow set at its largest r against the wide set with no more parameters."""
    largest = sweep[sweep["targets"] == narrowest].nlargest(1, "parameters").iloc[0]
    within = sweep[(sweep["targets"] == widest) & (sweep["parameters"] <= largest["parameters"])]
    if within.empty:
        return (f"{widest} beats {narrowest} with no more parameters", "no such pair", "not decided here")
    rival = within.nlargest(1, "parameters").iloc[0]
    statement = (
        f"{widest} at r={rival['r']} ({rival['parameters']:,} parameters) beats "
        f"{narrowest} at r={largest['r']} ({largest['parameters']:,})"
    )
    return (statement, *_verdict(pd.Series([rival["held_out_loss"] - largest["held_out_loss"]]), noise))


def _verdict(differences: pd.Series[float], noise: float) -> tuple[str, str]:
    low, high = differences.min(), differences.max()
    measured = f"{low:+.3f}" if len(differences) == 1 else f"{low:+.3f} to {high:+.3f}"
    if high < -noise:
        return measured, "seen here"
    return measured, "the opposite is seen here" if low > noise else "not decided here"
