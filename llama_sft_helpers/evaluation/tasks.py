"""Small tasks whose answers a program can check, scored before and after the fine-tuning.

The tasks are data (``tasks.jsonl``): what is asked, and how its answer is checked.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch

_TASKS = Path(__file__).with_name("tasks.jsonl")
_NUMBER = re.compile(r"-?\d+(?:\.\d+)?")
# How an answer is checked; each takes the answer without the space around it and what is expected.
_CHECKS: dict[str, Callable[[str, str], bool]] = {
    "exact": lambda answer, expected: answer == expected,
    "regex": lambda answer, expected: bool(re.fullmatch(expected, answer)),
    "number": lambda answer, expected: [float(n) for n in _NUMBER.findall(answer)[-1:]] == [float(expected)],
    "lines": lambda answer, expected: len(list(filter(str.strip, answer.splitlines()))) == int(expected),
}


def read_tasks(path: str | Path = _TASKS) -> list[dict[str, str]]:
    """Tasks from JSON lines with ``kind``, ``instruction``, ``check`` and ``expected``.

    Args:
        path: The file; the package's own 24 tasks by default. ``check`` is one of ``exact``, ``regex`` (of
            the whole answer), ``number`` (the answer's last one) and ``lines`` (how many are not empty).

    Raises:
        ValueError: A task lacks a key, or names a check that does not exist.
    """
    tasks = [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]
    for number, task in enumerate(tasks, start=1):
        if set(task) != {"kind", "instruction", "check", "expected"} or task["check"] not in _CHECKS:
            raise ValueError(
                f"Line {number} of {path} is {task}; expected kind, instruction, check and expected, and a "
                f"check among {', '.join(_CHECKS)}."
            )
    return tasks


def score_tasks(
    model: Any,
    tokenizer: Any,
    tasks: Sequence[Mapping[str, str]],
    prompt_of: Callable[[str], str],
    *,
    max_new_tokens: int = 48,
    batch_size: int = 32,
) -> pd.DataFrame:
    """Let a model answer the tasks, greedily, and check each answer.

    Args:
        model: The model; for the base of a ``PeftModel`` call this inside ``model.disable_adapter()``.
        tokenizer: Its tokenizer.
        tasks: ``read_tasks()``, or tasks of your own.
        prompt_of: Makes the prompt of an instruction, in the template that training used.
        max_new_tokens: Longest answer, in tokens.
        batch_size: Prompts at a time. LLM.int8() depends on it: score before and after alike.

    Returns:
        One row a task: ``kind``, ``instruction``, ``expected``, ``answer``, ``right``.
    """
    prompts = [prompt_of(task["instruction"]) for task in tasks]
    answers: list[str] = []
    for start in range(0, len(prompts), batch_size):
        batch = prompts[start : start + batch_size]
        answers += _answers(model, tokenizer, batch, max_new_tokens)
    table = pd.DataFrame(list(tasks))
    table["answer"] = answers
    table["right"] = [
        _CHECKS[task["check"]](text, task["expected"]) for task, text in zip(tasks, answers, strict=True)
    ]
    return table.drop(columns="check")


@torch.inference_mode()
def _answers(model: Any, tokenizer: Any, prompts: list[str], max_new_tokens: int) -> list[str]:
    """Greedy answers to a batch of prompts, padded on the left so that each is written on at its end."""
    pad = tokenizer.eos_token_id
    rows = [torch.tensor(tokenizer(prompt).input_ids) for prompt in prompts]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=pad, padding_side="left")
    ones = [torch.ones_like(row) for row in rows]
    mask = torch.nn.utils.rnn.pad_sequence(ones, batch_first=True, padding_side="left")
    made = model.generate(
        input_ids=ids.to(model.device),
        attention_mask=mask.to(model.device),
        max_new_tokens=max_new_tokens,
        do_sample=False,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=pad,
    )
    texts = tokenizer.batch_decode(made[:, ids.shape[1] :], skip_special_tokens=True)
    return [str(text).strip() for text in texts]


def summarize_tasks(before: pd.DataFrame, after: pd.DataFrame) -> pd.DataFrame:
    """How many tasks are right before and after, by kind, with the interval that so few tasks leave.

    Args:
        before: ``score_tasks`` of the base model.
        after: The same of the tuned model, on the same tasks.

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
    bounds = [share_interval(right, n) for right, n in zip(table["after"], table["tasks"], strict=True)]
    table[["low", "high"]] = bounds
    return table.rename_axis("kind")


def share_interval(part: int, total: int, z: float = 1.96) -> tuple[float, float]:
    """The 95 % interval of a share (Wilson, 1927, https://doi.org/10.2307/2276774)."""
    share, extra = part / total, z * z / total
    middle = (share + extra / 2) / (1 + extra)
    half = math.sqrt(extra * (share * (1 - share) + extra / 4)) / (1 + extra)
    return middle - half, middle + half
