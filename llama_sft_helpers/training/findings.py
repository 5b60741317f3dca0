"""What a training may give: findings with advice, shown once the results are saved, never raised."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from llama_sft_helpers.core.findings import FEW_ROWS, LEVEL


def rose(lowest: float, end: float) -> bool:
    """Whether a held-out loss rose after its lowest point by more than is taken for level."""
    return end - lowest > LEVEL * lowest


def seen_again(log_history: Sequence[Mapping[str, Any]]) -> bool:
    """Whether rows were trained on more than once: in the first epoch none can be learned by heart."""
    return max(row.get("epoch", 0.0) for row in log_history) > 1


def summarize_training_result(
    log_history: Sequence[Mapping[str, Any]],
    before: float,
    eval_rows: int,
    best_checkpoint: str | None = None,
    *,
    best_is_saved: bool = False,
) -> pd.DataFrame:
    """Whether training lowered the held-out loss, and where in the run it was lowest.

    Args:
        log_history: ``trainer.state.log_history`` with at least one ``eval_loss``.
        before: Held-out loss before training, in nats a token.
        eval_rows: Rows held out.
        best_checkpoint: ``trainer.state.best_model_checkpoint``, which is on disk.
        best_is_saved: Whether the saved adapter is that one (``load_best_model_at_end``), not the last.

    Returns:
        One row, index ``finding``; ``hoped for``, ``measured``, ``verdict``, ``advice``.
    """
    losses = [(row["eval_loss"], row["step"]) for row in log_history if "eval_loss" in row]
    end, last = losses[-1]
    lowest, step = min(losses)
    after = lowest if best_is_saved else end
    advice = []
    if not after < before:
        advice.append(
            "The adapter learned its training rows, and nothing that helps with others. Lower the learning "
            "rate, take fewer steps, or add rows."
        )
    if lowest < end:
        kept = f"Its checkpoint is kept: {best_checkpoint}." if best_checkpoint else ""
        kept = f"The adapter of step {step} is saved." if best_is_saved else kept
        told = f"The loss was lowest after step {step} ({lowest:.4f}). By step {last} it was {end:.4f}"
        level = f"{told}, which is within {LEVEL:.0%} of that."
        name = "Overfitted. " if seen_again(log_history) else ""
        told = f"{name}{told}; max_steps={step} would do." if rose(lowest, end) else level
        advice.append(f"{told} {kept}".rstrip())
    if eval_rows < FEW_ROWS:
        advice.append(f"Rows held out: {eval_rows}. With so few, either direction may be luck.")
    verdict = "as hoped" if after < before else "not as hoped"
    row = (f"below {before:.4f}", f"{after:.4f}", verdict, " ".join(advice) or "nothing to do")
    index = pd.Index(["held-out loss"], name="finding")
    return pd.DataFrame([row], index, ["hoped for", "measured", "verdict", "advice"])
