"""What an evaluation may give: findings with advice, shown once the results are saved, never raised."""

from __future__ import annotations

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
