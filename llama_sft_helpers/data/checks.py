"""What is wrong with rows, counted and shown before anything is trained on them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

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

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from llama_sft_helpers.data.rows import Rows

_CHUNK_ROWS = 1000


def summarize_rows(
    dataset: Rows,
    tokenizer: PreTrainedTokenizerBase | None = None,
    max_length: int | None = None,
    prompt_format: str = "alpaca",
) -> pd.DataFrame:
    """Count what is wrong with the rows; nothing is changed or left out.

    Args:
        dataset: A ``Dataset`` or a list of rows; Alpaca, prompt-completion or ``messages`` columns.
        tokenizer: With it, special tokens written out in the text are found too.
        max_length: With it and a tokenizer, rows of more tokens (EOS counted) are found too.
        prompt_format: From ``choose_prompt_format``; ``chat`` counts tokens by the chat template.

    Returns:
        One line for each problem looked for: rows, share, first_rows, what_to_do. ``attrs["usable"]``
        lists the rows without any, ready for ``dataset.select``; ``attrs["details"]`` maps each problem to
        what the first such row shows.

    Raises:
        DataError: No data set, no row at all, or columns of no known layout.
    """
    _require_rows(dataset)
    found: dict[str, list[int]] = {name: [] for name in PROBLEMS}
    details: dict[str, str] = {}
    for reason, index, detail in _find_problems(dataset, tokenizer, max_length, prompt_format):
        found[reason].append(index)
        details.setdefault(reason, detail)
    lines = [
        (name, len(rows), len(rows) / len(dataset), rows[:5], PROBLEMS[name]) for name, rows in found.items()
    ]
    table = pd.DataFrame(lines, columns=["problem", "rows", "share", "first_rows", "what_to_do"])
    bad = {index for rows in found.values() for index in rows}
    table.attrs["usable"] = [index for index in range(len(dataset)) if index not in bad]
    table.attrs["details"] = details
    return table.set_index("problem")


def check_rows(
    dataset: Rows, tokenizer: PreTrainedTokenizerBase | None = None, max_length: int | None = None
) -> None:
    """Raise ``DataError`` with count and first indices of every problem that ``summarize_rows`` finds."""
    table = summarize_rows(dataset, tokenizer, max_length)
    found = table[table["rows"] > 0]
    lines = [
        f"{name}: {line['rows']:,} of {len(dataset):,} rows, first {line['first_rows']}"
        f"{table.attrs['details'][name]}; {line['what_to_do']}"
        for name, line in found.iterrows()
    ]
    if lines:
        raise DataError(str(found.index[0]), "\n".join(lines))


def _require_rows(dataset: Any) -> None:
    wanted = "expected a Dataset or a list of rows, each a mapping of columns to texts"
    kind = type(dataset).__name__
    if isinstance(dataset, Mapping):
        fix = f"Pass one split, such as dataset[{next(iter(dataset), 'train')!r}]."
        raise DataError("wrong-type", f"Got a {kind} with the keys {list(dataset)}; {wanted}. {fix}")
    if isinstance(dataset, pd.DataFrame):
        raise DataError("wrong-type", f"Got a DataFrame; {wanted}. Pass Dataset.from_pandas(frame).")
    if isinstance(dataset, str) or not hasattr(dataset, "__len__"):
        raise DataError(
            "wrong-type", f"Got {dataset!r}, a {kind}; {wanted}. Read a file with load_rows first."
        )
    if len(dataset) == 0:
        raise DataError("no-rows", "The data set has no rows; check the file or the filter before this.")
    if not isinstance(dataset[0], Mapping):
        got = f"In the data set row 0 is {dataset[0]!r}, a {type(dataset[0]).__name__}"
        raise DataError("wrong-type", f"{got}; {wanted}.")


def _find_problems(
    dataset: Rows, tokenizer: PreTrainedTokenizerBase | None, max_length: int | None, prompt_format: str
) -> Iterator[tuple[str, int, str]]:
    """A problem, the number of the row that has it, and what that row shows."""
    layout = find_layout(dataset[0])
    seen: set[str] = set()
    good: list[tuple[int, Row]] = []
    for index, row in enumerate(dataset):
        if problems := dict(row_problems(row, layout, prompt_format)):
            yield from ((reason, index, f" ({detail})") for reason, detail in problems.items())
            continue
        key = repr(to_messages(row)) if layout == "messages" else repr(to_prompt_completion(row))
        if key in seen:
            yield "duplicate", index, ""
        seen.add(key)
        good.append((index, row))
    if tokenizer is not None:
        yield from _find_token_problems(good, tokenizer, max_length, prompt_format)


def _find_token_problems(
    good: list[tuple[int, Row]],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int | None,
    prompt_format: str,
) -> Iterator[tuple[str, int, str]]:
    """Rows with control tokens in their text, and rows longer than max_length, in chunks."""
    # all_special_tokens names a few: in Llama 3's tokenizer BOS and EOS alone of 256
    controls = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    names = sorted(controls | set(tokenizer.all_special_tokens))
    special = re.compile("|".join(map(re.escape, names)) or "(?!)")
    for start in range(0, len(good), _CHUNK_ROWS):
        chunk = good[start : start + _CHUNK_ROWS]
        lengths = _count_tokens([row for _, row in chunk], tokenizer, prompt_format)
        for (index, row), tokens in zip(chunk, lengths, strict=True):
            if any(special.search(turn.get("content") or "") for turn in to_messages(row)):
                yield "special-token", index, ""
            if max_length is not None and tokens > max_length:
                yield "too-long", index, ""


def _count_tokens(rows: list[Row], tokenizer: PreTrainedTokenizerBase, prompt_format: str) -> list[int]:
    if prompt_format == "chat":
        return [len(encode_chat(row, tokenizer)["input_ids"]) for row in rows]
    examples = [to_prompt_completion(row) for row in rows]
    batch = {key: [example[key] for example in examples] for key in ("prompt", "completion")}
    return count_tokens(batch, tokenizer)["tokens"]
