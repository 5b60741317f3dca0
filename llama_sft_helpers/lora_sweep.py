"""Notebook 04's comparison of adapters: ranks and target modules against held-out loss, drawn and judged."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pandas as pd

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito's colours, told apart by every kind of colour vision; yellow is left out on white.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
BYTES = 16  # float32: a trainable parameter, its gradient and Adam's two means
_SWEEP_COLUMNS = ("targets", "r", "parameters", "held_out_loss")


def plot_sweep(sweep: pd.DataFrame, base_loss: float) -> Axes:
    """Held-out loss against trainable parameters, one line a target set, each point labelled with its r.

    Args:
        sweep: One row an adapter: ``targets``, ``r``, ``parameters``, ``held_out_loss`` (nats a token).
        base_loss: Held-out loss of the base model, drawn as a line.

    Raises:
        ValueError: A column is missing, or nothing was trained.
    """
    import matplotlib.pyplot as plt

    _check_sweep(sweep)
    _, axes = plt.subplots(figsize=(7.5, 4.4), layout="constrained")
    for i, (targets, rows) in enumerate(sweep.groupby("targets", sort=False)):
        x, y = rows["parameters"], rows["held_out_loss"]
        axes.plot(x, y, color=COLOURS[i % 7], marker=MARKERS[i % 7], label=targets)
        for r, *point in zip(rows["r"], x, y, strict=True):
            place = (0, -13 if i % 2 else 6)  # neighbouring lines carry their labels on different sides
            axes.annotate(f"r={r}", point, place, textcoords="offset points", ha="center", fontsize=8)
    axes.axhline(base_loss, color="0.4", linestyle="--", label="base model, no adapter")
    axes.set_xscale("log")
    axes.margins(y=0.12)
    top = axes.secondary_xaxis(
        "top", functions=(lambda count: count * BYTES / 2**20, lambda mib: mib * 2**20 / BYTES)
    )
    top.set_xlabel(f"weights, gradients and Adam's means (MiB, {BYTES} bytes a parameter)")
    axes.set_title("The same short training, by rank and target modules")
    axes.set(xlabel="trainable parameters", ylabel="held-out loss (nats a token)")
    axes.legend(ncols=4, loc="upper center", bbox_to_anchor=(0.5, -0.16), title="target_modules")
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
