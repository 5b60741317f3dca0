"""What is wrong with rows, counted and shown before anything is trained on them.

``data`` offers these functions beside its own.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import pandas as pd

from llama_sft_helpers.data.formats import encode_chat, to_messages
from llama_sft_helpers.data.rows import (
    PROBLEMS,
    DataError,
    Row,
    count_tokens,
    find_layout,
    row_problems,
    to_prompt_completion,
)

_CHUNK_ROWS = 1000


def summarize_rows(
    dataset: Any, tokenizer: Any = None, max_length: int | None = None, prompt_format: str = "alpaca"
) -> pd.DataFrame:
    """Count what is wrong with the rows; nothing is changed or left out.

    Args:
        dataset: A ``Dataset`` or a list of rows; Alpaca, prompt-completion or ``messages`` columns.
        tokenizer: With it, special tokens written out in the text are found too.
        max_length: With it and a tokenizer, rows of more tokens (EOS counted) are found too.
        prompt_format: From ``choose_prompt_format``; ``chat`` counts tokens by the chat template.

    Returns:
        One line for each problem looked for: rows, share, first_indices, what_to_do.
        ``attrs["indices"]`` maps each problem to all its row numbers, ``attrs["details"]`` to what its first
        row shows; ``attrs["usable"]`` lists the rows without any, ready for ``dataset.select``.

    Raises:
        DataError: No data set, no row at all, or columns of no known layout.
    """
    _require_rows(dataset)
    indices, details = _find_problems(dataset, tokenizer, max_length, prompt_format)
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


def check_rows(
    dataset: Any, tokenizer: Any = None, max_length: int | None = None, prompt_format: str = "alpaca"
) -> None:
    """Raise if ``summarize_rows`` finds anything.

    Raises:
        DataError: With the count and the first indices of every problem found.
    """
    table = summarize_rows(dataset, tokenizer, max_length, prompt_format)
    found = table[table["rows"] > 0]
    if found.empty:
        return
    lines = [
        f"{name}: {line['rows']:,} of {len(dataset):,} rows, first {line['first_indices']}"
        f"{table.attrs['details'].get(name, '')}; {line['what_to_do']}"
        for name, line in found.iterrows()
    ]
    raise DataError(str(found.index[0]), "\n".join(lines), found["first_indices"].iloc[0][0])


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


def _find_problems(
    dataset: Any, tokenizer: Any, max_length: int | None, prompt_format: str
) -> tuple[dict[str, list[int]], dict[str, str]]:
    """Row numbers of each problem, and what the first of them shows."""
    layout = find_layout(dataset[0])
    found: dict[str, list[int]] = {name: [] for name in PROBLEMS}
    details: dict[str, str] = {}
    seen: set[str] = set()
    good: list[tuple[int, Row]] = []
    for index, row in enumerate(dataset):
        problems = dict(row_problems(row, layout, prompt_format))
        for reason, detail in problems.items():
            found[reason].append(index)
            details.setdefault(reason, f" ({detail})")
        if problems:
            continue
        key = repr(to_messages(row)) if layout == "messages" else repr(to_prompt_completion(row))
        if key in seen:
            found["duplicate"].append(index)
        seen.add(key)
        good.append((index, row))
    if tokenizer is not None:
        _find_token_problems(good, tokenizer, max_length, prompt_format, found)
    return found, details


def _find_token_problems(
    good: list[tuple[int, Row]],
    tokenizer: Any,
    max_length: int | None,
    prompt_format: str,
    found: dict[str, list[int]],
) -> None:
    """Rows with control tokens in their text, and rows longer than max_length, in chunks."""
    # all_special_tokens names a few: in Llama 3's tokenizer BOS and EOS alone of 256
    controls = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    names = sorted(controls | set(tokenizer.all_special_tokens))
    special = re.compile("|".join(map(re.escape, names)) or "(?!)")
    for start in range(0, len(good), _CHUNK_ROWS):
        indices, rows = zip(*good[start : start + _CHUNK_ROWS], strict=True)
        lengths = _count_tokens(rows, tokenizer, prompt_format)
        for index, row, tokens in zip(indices, rows, lengths, strict=True):
            if any(special.search(turn.get("content") or "") for turn in to_messages(row)):
                found["special-token"].append(index)
            if max_length is not None and tokens > max_length:
                found["too-long"].append(index)


def _count_tokens(rows: Iterable[Row], tokenizer: Any, prompt_format: str) -> list[int]:
    if prompt_format == "chat":
        return [len(encode_chat(row, tokenizer)["input_ids"]) for row in rows]
    examples = [to_prompt_completion(row) for row in rows]
    batch = {key: [example[key] for example in examples] for key in ("prompt", "completion")}
    return count_tokens(batch, tokenizer)["tokens"]
