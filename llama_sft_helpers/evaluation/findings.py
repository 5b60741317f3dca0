"""What an evaluation may give, in plain words: verdicts with their uncertainty and advice, never raised."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping

import pandas as pd

from llama_sft_helpers.core.findings import FEW_ROWS
from llama_sft_helpers.evaluation.tasks import share_interval


def summarize_verdict(
    losses: pd.DataFrame,
    stops: pd.DataFrame | None = None,
    tasks: pd.DataFrame | None = None,
    forgetting: pd.DataFrame | None = None,
) -> pd.DataFrame:
    """What the measurements say in plain words, each with how sure they are of it; pass those you have.

    Args:
        losses: ``summarize_perplexity`` of ``base`` and ``tuned`` on held-out rows.
        stops: ``summarize_stops`` of the same models.
        tasks: ``summarize_tasks``.
        forgetting: ``measure_forgetting``.

    Returns:
        Index ``question``; ``verdict``, a sentence that begins with the answer; ``advice``.
    """
    found = {"Did it learn what the data teach?": _of_losses(losses.to_dict("index")["tuned - base"])}
    if stops is not None:
        of_models = stops.to_dict("index")
        found["Does it know when to stop?"] = _of_stops(of_models["base"], of_models["tuned"])
    if tasks is not None:
        found["Is it better at small tasks?"] = _of_tasks(tasks.to_dict("index")["all"])
    if forgetting is not None:
        found["Did it forget?"] = _of_forgetting(forgetting.to_dict("index")["tuned - base"])
    table = pd.DataFrame(found, index=["verdict", "advice"]).T
    return table.rename_axis("question")


def _of_losses(line: Mapping[Hashable, float]) -> tuple[str, str]:
    better, worse = line["high"] < 0, line["low"] > 0
    advice = ["Lower the learning rate, take fewer steps, or add rows."] if not line["loss_nats"] < 0 else []
    if not (better or worse):
        advice.append("The interval reaches 0, so the change cannot be told from luck: hold out more rows.")
    elif line["rows"] < FEW_ROWS:
        advice.append("So few rows make the interval itself uncertain: hold out more.")
    answer = "Yes" if better else "No" if worse else "It cannot be told"
    verdict = f"{answer}: the loss on {line['rows']:.0f} held-out rows changed by {_change(line)}."
    return verdict, " ".join(advice)


def _of_stops(base: Mapping[Hashable, float], tuned: Mapping[Hashable, float]) -> tuple[str, str]:
    better = tuned["eos_probability"] > base["eos_probability"]
    verdict = (
        f"{'Yes' if better else 'No'}: where a reference answer ends, the probability of EOS went from "
        f"{base['eos_probability']:.3f} to {tuned['eos_probability']:.3f}; {tuned['stopped']:.0f} of "
        f"{tuned['prompts']:.0f} answers stop ({_shares(tuned['stopped'], tuned['prompts'])}), "
        f"{base['stopped']:.0f} did before."
    )
    return verdict, "" if better else "If its labels end in EOS, it takes more steps or more rows."


def _of_tasks(line: Mapping[Hashable, float]) -> tuple[str, str]:
    """By the sign test: without a difference each changed task is gained or lost with equal chance."""
    gained, lost = int(line["gained"]), int(line["lost"])
    changed, fewer = gained + lost, min(gained, lost)
    luck = min(1.0, 2 * sum(math.comb(changed, k) for k in range(fewer + 1)) / 2**changed)
    answer = "It cannot be told" if luck > 0.05 else "Yes" if gained > lost else "No, it is worse"
    chance = f": chance alone would divide them at least as unevenly in {luck:.0%} of cases (sign test)"
    chance = chance if changed else ""
    verdict = (
        f"{answer}: {line['before']:.0f} of {line['tasks']:.0f} were right before, {line['after']:.0f} after "
        f"({_shares(line['after'], line['tasks'])}); {gained} gained and {lost} lost{chance}."
    )
    return verdict, "Lower the learning rate, or take fewer steps." if answer.startswith("No") else ""


def _of_forgetting(line: Mapping[Hashable, float]) -> tuple[str, str]:
    forgot, kept = line["low"] > 0, line["high"] <= 0
    verdict = (
        f"{'Yes' if forgot else 'No' if kept else 'It cannot be told'}: the loss on plain text changed by "
        f"{_change(line)}, and the predictions moved by {line['kl_nats']:.3f} nats per token (KL)."
    )
    advice = "A lower learning rate, fewer steps or general rows among yours would keep more of the base."
    return verdict, advice if forgot else ""


def _change(line: Mapping[Hashable, float]) -> str:
    return f"{line['loss_nats']:+.3f} nats per token (95%: {line['low']:+.3f} to {line['high']:+.3f})"


def _shares(part: float, total: float) -> str:
    low, high = share_interval(int(part), int(total))
    return f"95%: {low:.0%} to {high:.0%}"
