"""What a row of training data must look like: Alpaca, prompt-completion and chat rows, and their template."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

    Rows = Dataset | Sequence[Mapping[str, Any]]  # what checks and counts take

Row = Mapping[str, Any]

# The two templates of Stanford Alpaca (https://github.com/tatsu-lab/stanford_alpaca), to the letter. The line
# break after "Response:" belongs to the prompt, so that the answer starts on a token of its own.
PROMPT_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)
PROMPT_WITHOUT_INPUT = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)

MAX_CELL_CHARACTERS = 100_000  # some 25,000 tokens, three times Llama 3's context of 8192
COLUMNS = {
    "messages": ("messages",),
    "prompt-completion": ("prompt", "completion"),
    "alpaca": ("instruction", "output"),
}
PROBLEMS = {
    "missing-column": "rename a column, or leave the row out",
    "null-cell": "fill it, or leave the row out",
    "wrong-type": "convert it to text",
    "empty-output": "write an answer, or leave the row out",
    "cell-too-long": f"cut or split it: {MAX_CELL_CHARACTERS:,} characters at most",
    "lone-surrogate": "repair it: half a UTF-16 pair is no text",
    "special-token": "remove it: it would be read as a control token",
    "duplicate": "keep the first: the loss would count it twice",
    "too-long": "raise max_length, or leave the row out",
}
_SURROGATE = re.compile("[\ud800-\udfff]")


class DataError(ValueError):
    """Rows or a file that cannot be trained on as they are.

    ``reason`` is a key of the table that ``summarize_rows`` shows, or ``bad-json``, ``bad-csv``,
    ``wrong-encoding``, ``wrong-format``, ``no-rows``, ``too-few-rows``, ``unknown-file``, ``no-pad-token``.
    """

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(f"[{reason}] {message}")
        self.reason = reason


def to_prompt_completion(row: Row, index: int | None = None) -> dict[str, str]:
    """Turn a row into trl's prompt-completion form with Alpaca's template.

    Alpaca rows (``instruction``, ``output``, perhaps ``input``) fill the template. Chat rows (``messages``)
    too: the last user turn is the instruction, what came before is the input, the last answer the completion.
    ``prompt``/``completion`` rows stay as they are. White space around instruction, input and output goes: a
    line break in front of the answer would merge with the prompt's. EOS is not written here, SFTTrainer adds
    it. The error names ``index``, which ``map(..., with_indices=True)`` gives.

    Raises:
        DataError: A column is missing, or a cell is null, of the wrong type, empty, too long or not text.
    """
    where = f"Row {'?' if index is None else index}"
    layout = find_layout(row, where)
    for reason, detail in row_problems(row, layout):
        raise DataError(reason, f"{where}: {detail}; {PROBLEMS[reason]}.")
    if layout == "prompt-completion":
        return {"prompt": row["prompt"], "completion": row["completion"]}
    instruction, context, answer = alpaca_parts(row, layout)
    template = PROMPT_WITH_INPUT if context else PROMPT_WITHOUT_INPUT
    return {"prompt": template.format(instruction=instruction, input=context), "completion": answer}


def count_tokens(batch: Mapping[str, list[str]], tokenizer: PreTrainedTokenizerBase) -> dict[str, list[int]]:
    """Count the tokens of lists ``prompt`` and ``completion``, for ``map(..., batched=True)``.

    Returns:
        ``prompt_tokens`` (BOS counted if the tokenizer writes it), ``completion_tokens`` (EOS counted) and
        their sum ``tokens``.
    """
    prompts = tokenizer(batch["prompt"])["input_ids"]
    completions = tokenizer(batch["completion"], add_special_tokens=False)["input_ids"]
    prompt_tokens = [len(ids) for ids in prompts]
    completion_tokens = [len(ids) + 1 for ids in completions]
    tokens = [p + c for p, c in zip(prompt_tokens, completion_tokens, strict=True)]
    return {"prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens, "tokens": tokens}


def find_layout(columns: Iterable[str], where: str = "The data") -> str:
    """``messages``, ``prompt-completion`` or ``alpaca``, by the columns.

    Raises:
        DataError: The columns are of none of these.
    """
    names = list(columns)
    for layout, needed in COLUMNS.items():
        if all(name in names for name in needed):
            return layout
    expected = "; ".join(" + ".join(needed) for needed in COLUMNS.values())
    raise DataError(
        "missing-column",
        f"{where}: the columns are {names}, expected {expected}. Rename yours: "
        'columns="question=instruction,answer=output" for load_rows or in the profile, or '
        'dataset.rename_column("question", "instruction").',
    )


def row_problems(row: Row, layout: str, prompt_format: str = "alpaca") -> Iterator[tuple[str, str]]:
    """What is wrong with a row by itself: keys of ``PROBLEMS``, and what the row shows."""
    missing = [name for name in COLUMNS[layout] if name not in row]
    if missing:
        yield "missing-column", f"has no {', '.join(missing)} (its columns: {', '.join(row)})"
        return
    if layout == "messages" and (fault := _dialogue_fault(row["messages"], prompt_format)):
        yield fault
        return
    cells = _cells(row, layout)
    for name, cell in cells.items():
        if cell is None:
            yield "null-cell", f"{name} is null, expected text"
        elif not isinstance(cell, str):
            yield "wrong-type", f"{name} is {type(cell).__name__}, expected text"
        elif len(cell) > MAX_CELL_CHARACTERS:
            yield "cell-too-long", f"{name} has {len(cell):,} characters"
        elif found := _SURROGATE.search(cell):
            yield "lone-surrogate", f"{name} holds U+{ord(found[0]):04X}"
    for name, answer in list(cells.items())[-1:]:  # a chat of tool calls alone has none
        if isinstance(answer, str) and not answer.strip():
            yield "empty-output", f"{name} is empty"


def _dialogue_fault(messages: object, prompt_format: str) -> tuple[str, str] | None:
    """What is wrong with the shape of a chat; its texts are looked at as cells."""
    if messages is None:
        return "null-cell", "messages is null, expected a list"
    if not isinstance(messages, list) or not all(
        isinstance(m, dict) and "content" in m and isinstance(m.get("role"), str) for m in messages
    ):
        return "wrong-type", "messages is no list of {'role': ..., 'content': ...}"
    roles = [message["role"] for message in messages]
    if prompt_format == "chat":
        return None if "assistant" in roles[1:] else ("wrong-type", f"the roles {roles} hold no answer")
    if roles[-2:] != ["user", "assistant"]:
        return "wrong-type", f"messages end with the roles {roles[-2:]}, expected user, assistant"
    calls = any(message.get("tool_calls") for message in messages)
    return ("wrong-type", "messages call a tool, which only a chat template can write") if calls else None


def _cells(row: Row, layout: str) -> dict[str, Any]:
    """The texts of a row by name, the answer last."""
    if layout == "messages":
        spoken = [(n, turn) for n, turn in enumerate(row["messages"]) if not turn.get("tool_calls")]
        return {f"messages[{n}].content": turn["content"] for n, turn in spoken}
    if layout == "prompt-completion":
        return {name: row[name] for name in COLUMNS[layout]}
    context = row.get("input")
    cells = {"instruction": row["instruction"], "input": "" if context is None else context}
    return {**cells, "output": row["output"]}


def alpaca_parts(row: Row, layout: str) -> tuple[str, str, str]:
    """Instruction, input and output of an Alpaca or chat row."""
    if layout == "alpaca":
        instruction, context, answer = _cells(row, layout).values()
    else:
        *earlier, question, reply = row["messages"]
        instruction, answer = question["content"], reply["content"]
        context = "\n\n".join(f"{message['role'].capitalize()}: {message['content']}" for message in earlier)
    return instruction.strip(), context.strip(), answer.strip()
