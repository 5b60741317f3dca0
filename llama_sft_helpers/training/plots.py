"""The losses of a run as figures, of the trainer's log alone: neither PyTorch nor transformers is needed."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from llama_sft_helpers.core.findings import LEVEL
from llama_sft_helpers.core.plots import BLUE, RED, new_axes
from llama_sft_helpers.training.findings import rose, seen_again

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def held_out_losses(log_history: Sequence[Mapping[str, Any]], before: float | None) -> dict[int, float]:
    """Step -> held-out loss, ``before`` at step 0."""
    found = {} if before is None else {0: before}
    return found | {row["step"]: row["eval_loss"] for row in log_history if "eval_loss" in row}


def _finish(ax: Axes, across: str) -> None:
    ax.set(xlabel=across, ylabel="loss (nats per token)")
    ax.spines[["top", "right"]].set_visible(False)
    if ax.get_lines():
        low, high = ax.get_ylim()
        ax.set_ylim(low, high + 0.2 * (high - low))  # room for the legend above the lines
        ax.legend(loc="upper center", ncols=2, frameon=False, labelcolor="linecolor")


def plot_loss(log_history: Sequence[Mapping[str, Any]], label: str = "", before: float | None = None) -> Axes:
    """Draw the training loss (line) and the held-out loss (points) over optimizer steps.

    ``log_history`` is the trainer's or that of a ``trainer_state.json``; ``label`` tells two runs apart;
    ``before`` is the held-out loss before training, drawn at step 0.
    """
    ax = new_axes(3.4)
    train = [(row["step"], row["loss"]) for row in log_history if "loss" in row]
    held_out = held_out_losses(log_history, before)
    if train:
        ax.plot(*zip(*train, strict=True), color=BLUE, linewidth=1, label=f"{label} training".strip())
    if held_out:
        points = [*held_out], [*held_out.values()]
        ax.plot(*points, "o-", color=RED, linewidth=2, label=f"{label} held out".strip())
    ax.set_title("Loss during training")
    _finish(ax, "optimizer step")
    return ax


def plot_overfitting(log_history: Sequence[Mapping[str, Any]], before: float | None = None) -> Axes:
    """Draw training and held-out loss, and mark the step where the held-out loss was lowest.

    The training loss is averaged over the steps since the held-out loss before, so that noise of single
    batches does not hide its course.

    Args:
        log_history: ``trainer.state.log_history`` with at least one ``eval_loss``.
        before: The held-out loss before training, drawn at step 0.

    Raises:
        ValueError: No held-out loss was logged.
    """
    if not any("eval_loss" in row for row in log_history):
        raise ValueError("The history has no eval_loss; train with eval_strategy='steps'.")
    held_out = held_out_losses(log_history, before)
    ax = new_axes(3.4)
    train = []
    for since, until in itertools.pairwise(sorted({0, *held_out})):
        losses = [row["loss"] for row in log_history if "loss" in row and since < row["step"] <= until]
        train += [(until, sum(losses) / len(losses))] if losses else []
    if train:
        ax.plot(*zip(*train, strict=True), "s-", color=BLUE, label="training (mean)")
    ax.plot([*held_out], [*held_out.values()], "o-", color=RED, label="held out")
    step = min(held_out, key=lambda step: held_out[step])
    ax.axvline(step, ymax=0.83, color="black", linewidth=1)  # up to the legend
    lowest, end = held_out[step], held_out[max(held_out)]
    risen = "then rose: overfitting" if seen_again(log_history) else "then rose"
    ending = risen if rose(lowest, end) else f"at the end within {LEVEL:.0%} of that"
    ending = ending if step < max(held_out) else "the last one measured"
    course = f"Held-out loss: {held_out[min(held_out)]:.2f} at step {min(held_out)}, lowest {lowest:.2f}"
    ax.set_title(f"{course}\nat step {step} (line), {ending}")
    epochs = max(row.get("epoch", 0.0) for row in log_history)
    _finish(ax, f"optimizer step ({max(held_out)} steps: {epochs:.2g} epochs)")
    return ax
