"""What a legitimate run may give: findings with advice, shown once the results are saved, never raised.

A finding is a table of one row: what was hoped for, what was measured, whether it is so, and what to do.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

_FEW_ROWS = 30  # held-out rows below which a difference may well be luck


def summarize_training_result(
    log_history: Sequence[Mapping[str, Any]], before: float, eval_rows: int
) -> pd.DataFrame:
    """Whether training lowered the held-out loss, and where in the run it was lowest.

    Args:
        log_history: ``trainer.state.log_history`` with at least one ``eval_loss``.
        before: Held-out loss before training, in nats a token.
        eval_rows: Rows held out.

    Returns:
        Index ``finding``; ``hoped_for``, ``measured``, ``verdict``, ``advice``.
    """
    losses = [(row["eval_loss"], row["step"]) for row in log_history if "eval_loss" in row]
    after, last = losses[-1]
    lowest, step = min(losses)
    advice = []
    if not after < before:
        advice.append(
            "The adapter learned its training rows, and nothing that helps with others. Lower the learning "
            "rate, take fewer steps, or add rows."
        )
    if lowest < after and step < last:
        advice.append(
            f"The loss was lowest after step {step} ({lowest:.4f}) and rose again: max_steps={step} would do."
        )
    if eval_rows < _FEW_ROWS:
        advice.append(f"Rows held out: {eval_rows}. With so few, either direction may be luck.")
    return _finding("held-out loss", f"below {before:.4f}", f"{after:.4f}", after < before, advice)


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
    elif line["rows"] < _FEW_ROWS:
        advice.append(
            f"Rows held out: {int(line['rows'])}. So few make the interval itself uncertain: hold out more."
        )
    measured = f"{change:+.4f} ({low:+.4f} to {high:+.4f})"
    return _finding("change of the held-out loss", "below 0", measured, change < 0, advice)


def summarize_stopping(stops: pd.DataFrame) -> pd.DataFrame:
    """Whether the tuned model gives EOS a higher probability at an answer's end than the base model.

    Args:
        stops: ``summarize_stops`` of ``base`` and ``tuned``.
    """
    base, tuned = (float(stops.loc[name, "eos_probability"]) for name in ("base", "tuned"))  # type: ignore[arg-type]
    advice = (
        [] if tuned > base else ["Its labels end in EOS, so more steps or more rows are what is missing."]
    )
    return _finding("probability of EOS", f"above {base:.3f}", f"{tuned:.3f}", tuned > base, advice)


def summarize_rounding(total: pd.Series[float]) -> pd.DataFrame:
    """Whether a merge into int8 would lose part of the update, as it does for a pretrained model.

    Args:
        total: The line ``all`` of ``summarize_int8_merge``.
    """
    error = float(total["update_error"])
    advice = "The update is large beside the weights, so int8 keeps it: was the learning rate meant?"
    return _finding(
        "part of the update that int8 loses",
        "above 0.05",
        f"{error:.3f}",
        error > 0.05,
        [advice] * (error <= 0.05),
    )


def _finding(name: str, hoped_for: str, measured: str, holds: bool, advice: Sequence[str]) -> pd.DataFrame:
    verdict = "as hoped" if holds else "not as hoped"
    row = (name, hoped_for, measured, verdict, " ".join(advice) or "nothing to do")
    columns = ["finding", "hoped_for", "measured", "verdict", "advice"]
    return pd.DataFrame([row], columns=columns).set_index("finding")
