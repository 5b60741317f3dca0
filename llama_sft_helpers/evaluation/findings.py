"""What an evaluation may give: findings with advice, shown once the results are saved, never raised."""

from __future__ import annotations

import math
from typing import Any

import pandas as pd

from llama_sft_helpers.core.findings import FEW_ROWS, finding


def summarize_gain(losses: pd.DataFrame) -> pd.DataFrame:
    """Whether the tuned model's held-out loss is lower than the base model's, by more than luck.

    Args:
        losses: ``summarize_perplexity`` of ``base`` and ``tuned``.
    """
    line = losses.loc["tuned - base"]
    change, low, high = (float(line[column]) for column in ("loss_nats", "low", "high"))
    advice = []
    if not change < 0:
        advice.append("The adapter made it worse on these rows: see the advice in 06, and train again.")
    if not high < 0:
        advice.append(
            f"Its interval (rows held out: {int(line['rows'])}) reaches 0 or above, so a gain cannot be told "
            "from luck: hold out more rows."
        )
    elif line["rows"] < FEW_ROWS:
        advice.append(
            f"Rows held out: {int(line['rows'])}. So few make the interval itself uncertain: hold out more."
        )
    measured = f"{change:+.4f} ({low:+.4f} to {high:+.4f})"
    return finding("change of the held-out loss", "below 0", measured, change < 0, advice)


def summarize_stopping(stops: pd.DataFrame) -> pd.DataFrame:
    """Whether the tuned model gives EOS a higher probability at an answer's end than the base model.

    Args:
        stops: ``summarize_stops`` of ``base`` and ``tuned``.
    """
    base, tuned = (float(stops.loc[name, "eos_probability"]) for name in ("base", "tuned"))  # type: ignore[arg-type]
    advice = (
        [] if tuned > base else ["Its labels end in EOS, so more steps or more rows are what is missing."]
    )
    return finding("probability of EOS", f"above {base:.3f}", f"{tuned:.3f}", tuned > base, advice)


def summarize_rounding(total: pd.Series[float]) -> pd.DataFrame:
    """Whether a merge into int8 would lose part of the update, as it does for a pretrained model.

    Args:
        total: The line ``all`` of ``summarize_int8_merge``.
    """
    error = float(total["update_error"])
    advice = "The update is large beside the weights, so int8 keeps it: was the learning rate meant?"
    return finding(
        "part of the update that int8 loses",
        "above 0.05",
        f"{error:.3f}",
        error > 0.05,
        [advice] * (error <= 0.05),
    )


def summarize_verdict(
    losses: pd.DataFrame, tasks: pd.DataFrame | None = None, forgetting: pd.DataFrame | None = None
) -> pd.DataFrame:
    """What the measurements say in plain words, each with how sure they are of it.

    Args:
        losses: ``summarize_perplexity`` of ``base`` and ``tuned`` on held-out rows.
        tasks: ``summarize_tasks``, if they were scored.
        forgetting: ``measure_forgetting``, if it was measured.

    Returns:
        Index ``question``; ``verdict``, a sentence or two.
    """
    verdicts = {"Did it learn what the data teach?": _verdict_of_losses(losses)}
    if tasks is not None:
        verdicts["Is it better at small tasks?"] = _verdict_of_tasks(tasks.loc["all"])
    if forgetting is not None:
        verdicts["Did it forget?"] = _verdict_of_forgetting(forgetting.loc["tuned - base"])
    return pd.Series(verdicts, name="verdict", dtype=object).rename_axis("question").to_frame()


def _interval(line: Any) -> str:
    return f"{line['loss_nats']:+.3f} nats a token (95 %: {line['low']:+.3f} to {line['high']:+.3f})"


def _verdict_of_losses(losses: pd.DataFrame) -> str:
    line = losses.loc["tuned - base"]
    answer = "Yes" if line["high"] < 0 else "No" if line["low"] > 0 else "It cannot be told"
    few = " So few rows make the interval itself uncertain." if line["rows"] < FEW_ROWS else ""
    return f"{answer}: the loss on {line['rows']:.0f} held-out rows changed by {_interval(line)}.{few}"


def _verdict_of_tasks(line: Any) -> str:
    """By the sign test: without a difference each changed task is gained or lost with equal chance."""
    gained, lost = int(line["gained"]), int(line["lost"])
    changed, fewer = gained + lost, min(gained, lost)
    luck = min(1.0, 2 * sum(math.comb(changed, k) for k in range(fewer + 1)) / 2**changed)
    answer = "It cannot be told" if luck > 0.05 else "Yes" if gained > lost else "No, it is worse"
    return (
        f"{answer}: {line['before']:.0f} of {line['tasks']:.0f} were right before, {line['after']:.0f} after "
        f"(95 %: {line['low']:.0%} to {line['high']:.0%}); {gained} gained, {lost} lost, which luck alone "
        f"does in {luck:.0%} of cases."
    )


def _verdict_of_forgetting(line: Any) -> str:
    answer = "Yes" if line["low"] > 0 else "No" if line["high"] <= 0 else "It cannot be told"
    return (
        f"{answer}: the loss on plain text changed by {_interval(line)}, and its predictions moved by "
        f"{line['kl_nats']:.3f} nats a token (KL)."
    )
