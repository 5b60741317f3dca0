"""What a row of training data must look like: Alpaca, prompt-completion and chat rows, checked and templated.

``data`` offers these functions beside its own.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import pandas as pd

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
_CHUNK_ROWS = 1000


class DataError(ValueError):
    """Rows or a file that cannot be trained on as they are.

    Attributes:
        reason: A key of the table that ``summarize_rows`` shows, or ``bad-json``, ``bad-csv``,
            ``wrong-encoding``, ``no-rows``, ``too-few-rows``, ``unknown-file``, ``no-pad-token``.
        row: 0-based index of the first row concerned; None where no row is to blame.
    """

    def __init__(self, reason: str, message: str, row: int | None = None) -> None:
        super().__init__(f"[{reason}] {message}")
        self.reason = reason
        self.row = row


def to_prompt_completion(row: Row, index: int | None = None) -> dict[str, str]:
    """Turn a row into trl's prompt-completion form with Alpaca's template.

    Alpaca rows (``instruction``, ``output``, perhaps ``input``) fill the template. Chat rows (``messages``)
    too: the last user turn is the instruction, what came before is the input, the last answer the completion.
    ``prompt``/``completion`` rows stay as they are. White space around instruction, input and output goes: a
    line break in front of the answer would merge with the prompt's. EOS is not written here, SFTTrainer adds
    it.

    Args:
        row: One row.
        index: Its number for the error message, as ``map(..., with_indices=True)`` gives it.

    Returns:
        ``prompt`` (ends in ``### Response:`` and a line break) and ``completion``.

    Raises:
        DataError: A column is missing, or a cell is null, of the wrong type, empty, too long or not text.
    """
    layout = find_layout(row, index)
    for reason, detail in row_problems(row, layout):
        raise DataError(
            reason, f"Row {'?' if index is None else index}: {detail}; {PROBLEMS[reason]}.", index
        )
    if layout == "prompt-completion":
        return {"prompt": row["prompt"], "completion": row["completion"]}
    instruction, context, answer = _alpaca_parts(row, layout)
    template = PROMPT_WITH_INPUT if context else PROMPT_WITHOUT_INPUT
    return {"prompt": template.format(instruction=instruction, input=context), "completion": answer}


def summarize_rows(dataset: Any, tokenizer: Any = None, max_length: int | None = None) -> pd.DataFrame:
    """Count what is wrong with the rows; nothing is changed or left out.

    Args:
        dataset: A ``Dataset`` or a list of rows; Alpaca, prompt-completion or ``messages`` columns.
        tokenizer: With it, special tokens written out in the text are found too.
        max_length: With it and a tokenizer, rows of more tokens (EOS counted) are found too.

    Returns:
        One line for each problem looked for: rows, share, first_indices, what_to_do.
        ``attrs["indices"]`` maps each problem to all its row numbers, ``attrs["details"]`` to what its first
        row shows; ``attrs["usable"]`` lists the rows without any, ready for ``dataset.select``.

    Raises:
        DataError: No data set, no row at all, or columns of no known layout.
    """
    _require_rows(dataset)
    indices, details = _find_problems(dataset, tokenizer, max_length)
    lines = [
        (name, len(found), len(found) / len(dataset), found[:5], PROBLEMS[name])
        for name, found in indices.items()
    ]
    table = pd.DataFrame(lines, columns=["problem", "rows", "share", "first_indices", "what_to_do"])
    bad = {index for found in indices.values() for index in found}
    table.attrs["indices"] = indices
    table.attrs["details"] = details
    table.attrs["usable"] = [index for index in range(len(dataset)) if index not in bad]
    return table.set_index("problem")


def check_rows(dataset: Any, tokenizer: Any = None, max_length: int | None = None) -> None:
    """Raise if ``summarize_rows`` finds anything.

    Raises:
        DataError: With the count and the first indices of every problem found.
    """
    table = summarize_rows(dataset, tokenizer, max_length)
    found = table[table["rows"] > 0]
    if found.empty:
        return
    lines = [
        f"{name}: {line['rows']:,} of {len(dataset):,} rows, first {line['first_indices']}"
        f"{table.attrs['details'].get(name, '')}; {line['what_to_do']}"
        for name, line in found.iterrows()
    ]
    raise DataError(str(found.index[0]), "\n".join(lines), found["first_indices"].iloc[0][0])


def count_tokens(batch: Mapping[str, list[str]], tokenizer: Any) -> dict[str, list[int]]:
    """Count tokens, for ``map(..., batched=True)``.

    Args:
        batch: Lists ``prompt`` and ``completion``.
        tokenizer: A fast tokenizer.

    Returns:
        ``prompt_tokens`` (BOS counted if the tokenizer writes it), ``completion_tokens`` (EOS counted) and
        their sum ``tokens``.
    """
    prompts = tokenizer(batch["prompt"], return_attention_mask=False)["input_ids"]
    completions = tokenizer(batch["completion"], return_attention_mask=False, add_special_tokens=False)[
        "input_ids"
    ]
    prompt_tokens = [len(ids) for ids in prompts]
    completion_tokens = [len(ids) + 1 for ids in completions]
    tokens = [p + c for p, c in zip(prompt_tokens, completion_tokens, strict=True)]
    return {"prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens, "tokens": tokens}


def _require_rows(dataset: Any) -> None:
    wanted = "expected a Dataset or a list of rows, each a mapping of columns to texts"
    if isinstance(dataset, Mapping):
        split = f"dataset[{next(iter(dataset), 'train')!r}]"
        got = f"Got a {type(dataset).__name__} with the keys {list(dataset)}"
        raise DataError("wrong-type", f"{got}; {wanted}. Pass one split, such as {split}.")
    if isinstance(dataset, pd.DataFrame):
        raise DataError("wrong-type", f"Got a DataFrame; {wanted}. Pass Dataset.from_pandas(frame).")
    if isinstance(dataset, str) or not hasattr(dataset, "__len__"):
        got = f"Got {dataset!r}, a {type(dataset).__name__}"
        raise DataError("wrong-type", f"{got}; {wanted}. Read a file with load_dataset first.")
    if len(dataset) == 0:
        raise DataError("no-rows", "The data set has no rows; check the file or the filter before this.")
    if not isinstance(dataset[0], Mapping):
        got = f"In the data set row 0 is {dataset[0]!r}, a {type(dataset[0]).__name__}"
        raise DataError("wrong-type", f"{got}; {wanted}.", 0)


def find_layout(columns: Iterable[str], index: int | None = 0) -> str:
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
        f"Row {'?' if index is None else index}: the columns are {names}, expected {expected}. "
        'Rename yours: columns="question=instruction,answer=output" for load_rows or in the profile, or '
        'dataset.rename_column("question", "instruction").',
        index,
    )


def row_problems(row: Row, layout: str) -> Iterator[tuple[str, str]]:
    """What is wrong with a row by itself: keys of ``PROBLEMS``, and what the row shows."""
    missing = [name for name in COLUMNS[layout] if name not in row]
    if missing:
        yield "missing-column", f"has no {', '.join(missing)} (its columns: {', '.join(row)})"
        return
    if layout == "messages" and (fault := _dialogue_fault(row["messages"])):
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
        elif _SURROGATE.search(cell):
            yield "lone-surrogate", f"{name} holds U+{ord(_SURROGATE.search(cell).group()):04X}"  # type: ignore[union-attr]
    answer = list(cells.values())[-1]
    if isinstance(answer, str) and not answer.strip():
        yield "empty-output", f"{list(cells)[-1]} is empty"


def _dialogue_fault(messages: Any) -> tuple[str, str] | None:
    """What is wrong with the shape of a chat; its texts are looked at as cells."""
    if messages is None:
        return "null-cell", "messages is null, expected a list"
    if not isinstance(messages, list) or not all(
        isinstance(m, dict) and "content" in m and isinstance(m.get("role"), str) for m in messages
    ):
        return "wrong-type", "messages is no list of {'role': ..., 'content': ...}"
    roles = [message.get("role") for message in messages]
    if roles[-2:] != ["user", "assistant"]:
        return "wrong-type", f"messages end with the roles {roles[-2:]}, expected user, assistant"
    return None


def _cells(row: Row, layout: str) -> dict[str, Any]:
    """The texts of a row by name, the answer last."""
    if layout == "messages":
        return {f"messages[{n}].content": message["content"] for n, message in enumerate(row["messages"])}
    if layout == "prompt-completion":
        return {name: row[name] for name in COLUMNS[layout]}
    context = row.get("input")
    cells = {"instruction": row["instruction"], "input": "" if context is None else context}
    return {**cells, "output": row["output"]}


def _alpaca_parts(row: Row, layout: str) -> tuple[str, str, str]:
    """Instruction, input, output."""
    if layout == "alpaca":
        instruction, context, answer = _cells(row, layout).values()
    else:
        *earlier, question, reply = row["messages"]
        instruction, answer = question["content"], reply["content"]
        context = "\n\n".join(f"{message['role'].capitalize()}: {message['content']}" for message in earlier)
    return instruction.strip(), context.strip(), answer.strip()


def _find_problems(
    dataset: Any, tokenizer: Any, max_length: int | None
) -> tuple[dict[str, list[int]], dict[str, str]]:
    """Row numbers of each problem, and what the first of them shows."""
    layout = find_layout(dataset[0])
    found: dict[str, list[int]] = {name: [] for name in PROBLEMS}
    details: dict[str, str] = {}
    seen: set[tuple[str, str]] = set()
    good: list[tuple[int, dict[str, str]]] = []
    for index, row in enumerate(dataset):
        problems = dict(row_problems(row, layout))
        for reason, detail in problems.items():
            found[reason].append(index)
            details.setdefault(reason, f" ({detail})")
        if problems:
            continue
        example = to_prompt_completion(row)
        key = (example["prompt"], example["completion"])
        if key in seen:
            found["duplicate"].append(index)
        seen.add(key)
        good.append((index, example))
    if tokenizer is not None:
        _find_token_problems(good, tokenizer, max_length, found)
    return found, details


def _find_token_problems(
    good: list[tuple[int, dict[str, str]]],
    tokenizer: Any,
    max_length: int | None,
    found: dict[str, list[int]],
) -> None:
    """Rows with control tokens in their text, and rows longer than max_length, in chunks."""
    # all_special_tokens names a few: in Llama 3's tokenizer BOS and EOS alone of 256
    controls = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    names = sorted(controls | set(tokenizer.all_special_tokens))
    special = re.compile("|".join(map(re.escape, names)) or "(?!)")
    for start in range(0, len(good), _CHUNK_ROWS):
        indices, examples = zip(*good[start : start + _CHUNK_ROWS], strict=True)
        batch = {key: [example[key] for example in examples] for key in ("prompt", "completion")}
        for index, example, tokens in zip(
            indices, examples, count_tokens(batch, tokenizer)["tokens"], strict=True
        ):
            if special.search(example["prompt"]) or special.search(example["completion"]):
                found["special-token"].append(index)
            if max_length is not None and tokens > max_length:
                found["too-long"].append(index)
