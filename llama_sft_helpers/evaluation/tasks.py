"""Small tasks whose answers a program can check, scored before and after the fine-tuning.

The tasks are data (``tasks.jsonl``): what is asked, and how its answer is checked.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
import torch

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_TASKS = Path(__file__).with_name("tasks.jsonl")
_BATCH = 32  # prompts at a time; LLM.int8() depends on it, so that before and after are scored alike
_NUMBER = re.compile(r"-?\d+(?:\.\d+)?")
# How an answer is checked; each takes the answer without the space around it and what is expected.
_CHECKS: dict[str, Callable[[str, str], bool]] = {
    "exact": lambda answer, expected: answer == expected,
    "regex": lambda answer, expected: bool(re.fullmatch(expected, answer)),
    "number": lambda answer, expected: [float(n) for n in _NUMBER.findall(answer)[-1:]] == [float(expected)],
    "lines": lambda answer, expected: len(list(filter(str.strip, answer.splitlines()))) == int(expected),
}


def read_tasks() -> list[dict[str, str]]:
    """The package's own 24 tasks, each with ``kind``, ``instruction``, ``check`` and ``expected``."""
    return [json.loads(line) for line in _TASKS.read_text(encoding="utf-8").splitlines()]


def score_tasks(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[Mapping[str, str]],
    prompt_of: Callable[[str], str],
) -> pd.DataFrame:
    """Let a model answer the tasks, greedily and in batches, and check each answer.

    Args:
        model: The model; for the base of a ``PeftModel`` call this inside ``model.disable_adapter()``.
        tokenizer: Its tokenizer, with a padding token.
        tasks: ``read_tasks()``, or your own of that form. ``check`` is one of ``exact``, ``regex`` (of the
            whole answer), ``number`` (the answer's last one) and ``lines`` (how many are not empty).
        prompt_of: Makes the prompt of an instruction, in the template that training used.

    Returns:
        One row a task: ``kind``, ``instruction``, ``expected``, ``answer``, ``right``.

    Raises:
        ValueError: A task lacks a key, or names a check that does not exist.
    """
    for task in tasks:
        if set(task) != {"kind", "instruction", "check", "expected"} or task["check"] not in _CHECKS:
            raise ValueError(
                f"A task is {task}; expected kind, instruction, check and expected, and a check among "
                f"{', '.join(_CHECKS)}."
            )
    prompts = [prompt_of(task["instruction"]) for task in tasks]
    batches = (prompts[start : start + _BATCH] for start in range(0, len(prompts), _BATCH))
    table = pd.DataFrame(list(tasks))
    table["answer"] = [text for batch in batches for text in _answers(model, tokenizer, batch)]
    columns = table[["check", "answer", "expected"]].to_numpy()
    table["right"] = [_CHECKS[check](answer, expected) for check, answer, expected in columns]
    return table.drop(columns="check")


@torch.inference_mode()
def _answers(model: Any, tokenizer: PreTrainedTokenizerBase, prompts: list[str]) -> list[str]:
    batch = tokenizer(prompts, padding=True, padding_side="left", return_tensors="pt").to(model.device)
    made = model.generate(
        **batch,
        max_new_tokens=48,
        do_sample=False,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    texts = tokenizer.batch_decode(made[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    return [text.strip() for text in texts]


def summarize_tasks(before: pd.DataFrame, after: pd.DataFrame) -> pd.DataFrame:
    """How many tasks are right before and after, by kind, from ``score_tasks`` of the two models.

    Returns:
        Index kind, then ``all``: ``tasks``, ``before`` and ``after`` (right answers), ``gained``, ``lost``,
        and ``low`` and ``high``, the 95 % interval of the share right after (Wilson, 1927).

    Raises:
        ValueError: The two were not asked the same.
    """
    if list(before["instruction"]) != list(after["instruction"]):
        raise ValueError("before and after hold different tasks; score both models on the same tasks.")
    was, now = before["right"].to_numpy(bool), after["right"].to_numpy(bool)
    counted = pd.DataFrame(
        {"tasks": 1, "before": was, "after": now, "gained": now & ~was, "lost": was & ~now}
    ).astype(int)
    table = counted.groupby(after["kind"].to_numpy(), sort=False).sum()
    table.loc["all"] = table.sum()
    table[["low", "high"]] = [share_interval(*row) for row in table[["after", "tasks"]].to_numpy()]
    return table.rename_axis("kind")


def share_interval(part: int, total: int) -> tuple[float, float]:
    """The 95 % interval of a share (Wilson, 1927, https://doi.org/10.2307/2276774)."""
    share, extra = part / total, 1.96**2 / total
    middle = (share + extra / 2) / (1 + extra)
    half = math.sqrt(extra * (share * (1 - share) + extra / 4)) / (1 + extra)
    return middle - half, middle + half
