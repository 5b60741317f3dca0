"""Prompt formats: Alpaca's template, the model's own chat template, or none; rows and prompts in that form.

A prompt must look the same in training, in evaluation and in whatever serves the model. So the template goes
with the tokenizer (``training_template``), where every server looks for it.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from llama_sft_helpers.core.batches import IGNORED
from llama_sft_helpers.data.rows import (
    DataError,
    Row,
    alpaca_parts,
    count_tokens,
    find_layout,
    to_prompt_completion,
)

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

_ALPACA = Path(__file__).parent.parent / "templates" / "alpaca.jinja"


def choose_prompt_format(layout: str, tokenizer: PreTrainedTokenizerBase, asked: str) -> tuple[str, str]:
    """Choose how rows of a layout become prompts: ``alpaca``, ``chat`` or ``plain``, and the reason.

    A chat template is right where the model knows it, and learns to stop by it: it ends an answer in the
    tokenizer's EOS. That tells an instruct model from a base model whose tokenizer merely carries a template.
    What is ``asked`` for, the profile's ``prompt_format``, comes first.

    Raises:
        DataError: What is asked for is not possible with these rows or this tokenizer.
    """
    if asked == "plain" and layout != "prompt-completion":
        fault = f"'plain' needs rows of prompt and completion, these are {layout}"
        raise DataError("wrong-format", f"{fault}; take 'auto'.")
    if asked == "chat" and not tokenizer.chat_template:
        fault = "prompt_format='chat': the tokenizer has no chat template"
        raise DataError("wrong-format", f"{fault}; take 'auto'.")
    if layout == "prompt-completion" and asked != "chat":
        return "plain", "rows with prompt and completion are trained on as they are"
    if asked in ("alpaca", "chat"):
        return asked, "asked for"
    if not tokenizer.chat_template:
        return "alpaca", "this is a base model, whose tokenizer has no chat template"
    how = f"an answer with EOS ({tokenizer.eos_token})"
    if _ends_in_eos(tokenizer):
        return "chat", f"this is an instruct model, whose chat template ends {how}"
    return "alpaca", f"this is a base model, whose chat template does not end {how}"


def format_rows(rows: Dataset, tokenizer: PreTrainedTokenizerBase, prompt_format: str) -> Dataset:
    """Rows of any layout as ``SFTTrainer`` takes them, in the form of ``choose_prompt_format``.

    Returns:
        ``prompt`` and ``completion``; for ``chat`` ``input_ids`` and ``labels``, in which every assistant
        turn is scored.
    """
    names = rows.column_names
    if prompt_format == "chat":
        return rows.map(encode_chat, fn_kwargs={"tokenizer": tokenizer}, remove_columns=names)
    return rows.map(to_prompt_completion, with_indices=True, remove_columns=names)


def encode_chat(row: Row, tokenizer: PreTrainedTokenizerBase) -> dict[str, list[int]]:
    """A conversation by the tokenizer's chat template, with the tokens of every assistant turn scored.

    A turn's text is what the template writes between the prompt for it and its EOS, EOS included; what
    follows the last EOS is left out. System and tool turns are written as the template does, and not scored.
    The row's ``tools``, if any, are handed to the template.

    Raises:
        DataError: No assistant turn, or a template that rewrites earlier turns or ends a turn without EOS.
    """
    messages, tools = to_messages(row), row.get("tools")
    text = _render(tokenizer, messages, tools)
    spans = [
        _answer_span(tokenizer, messages[: turn + 1], tools, text)
        for turn, message in enumerate(messages)
        if message["role"] == "assistant"
    ]
    if not spans:
        raise DataError("wrong-type", "messages hold no assistant turn, so there is nothing to learn.")
    encoded = tokenizer(text[: spans[-1][1]], add_special_tokens=False, return_offsets_mapping=True)
    labels = [
        token if any(start <= first < last <= end for start, end in spans) else IGNORED
        for token, (first, last) in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)
    ]
    return {"input_ids": encoded["input_ids"], "labels": labels}


def to_messages(row: Row) -> list[dict[str, Any]]:
    """A row of any layout as chat turns; keys that other rows have and this one has not are dropped."""
    layout = find_layout(row)
    if layout == "messages":
        return [{key: value for key, value in turn.items() if value is not None} for turn in row["messages"]]
    if layout == "alpaca":
        instruction, context, answer = alpaca_parts(row, layout)
        question = f"{instruction}\n\n{context}" if context else instruction
    else:
        question, answer = row["prompt"], row["completion"]
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def render_prompt(row: Row | str, tokenizer: PreTrainedTokenizerBase, prompt_format: str) -> str:
    """What a model is given to answer a row or an instruction: what stood before the answer in training.

    ``tokenizer(prompt)`` gives training's token ids: a BOS that the template writes is left to the tokenizer
    where that writes one too.
    """
    if isinstance(row, str):
        plain = prompt_format == "plain"
        row = {"prompt": row, "completion": "-"} if plain else {"instruction": row, "output": "-"}
    if prompt_format != "chat":
        return to_prompt_completion(row)["prompt"]
    prompt = _render(tokenizer, to_messages(row)[:-1], row.get("tools"), ask=True)
    return prompt.removeprefix(tokenizer.bos_token) if _writes_bos(tokenizer) else prompt


def training_template(tokenizer: PreTrainedTokenizerBase, prompt_format: str) -> str | None:
    """The chat template to save with the tokenizer, so that a server prompts the model as training did.

    Alpaca's, the model's own, or None for ``plain``, where the prompt is the text itself.
    """
    if prompt_format == "alpaca":
        bos = "{{- bos_token -}}\n" if _writes_bos(tokenizer) else ""
        return bos + _ALPACA.read_text(encoding="utf-8").rstrip("\n")
    return tokenizer.chat_template if prompt_format == "chat" else None


def count_row_tokens(rows: Dataset, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokens of each row that ``format_rows`` made, EOS counted."""
    if "input_ids" in rows.column_names:
        return [len(ids) for ids in rows["input_ids"]]
    return list(rows.map(count_tokens, batched=True, fn_kwargs={"tokenizer": tokenizer})["tokens"])


def sort_by_length(rows: Dataset, tokenizer: PreTrainedTokenizerBase) -> Dataset:
    """Rows that ``format_rows`` made from the shortest to the longest, equally long ones in their order.

    For held-out rows: rows of like length share a batch, so that little of it is padding.
    """
    tokens = count_row_tokens(rows, tokenizer)
    return rows.select(sorted(range(len(rows)), key=tokens.__getitem__))


def _render(
    tokenizer: PreTrainedTokenizerBase,
    messages: list[dict[str, Any]],
    tools: list[Any] | None,
    *,
    ask: bool = False,
) -> str:
    return str(
        tokenizer.apply_chat_template(messages, tools=tools, tokenize=False, add_generation_prompt=ask)
    )


def _answer_span(
    tokenizer: PreTrainedTokenizerBase, turns: list[dict[str, Any]], tools: list[Any] | None, text: str
) -> tuple[int, int]:
    """Where the last turn's answer begins in the text, and where its EOS ends."""
    before = _render(tokenizer, turns[:-1], tools, ask=True) if turns[:-1] else ""
    through = _render(tokenizer, turns, tools)
    end = through.rfind(tokenizer.eos_token)
    if not (through.startswith(before) and text.startswith(through)) or end < len(before):
        raise DataError(
            "wrong-format",
            f"Turn {len(turns) - 1} cannot be found in what the chat template writes: the template changes "
            f"earlier turns, or ends an answer without {tokenizer.eos_token}. Take prompt_format='alpaca'.",
        )
    return len(before), end + len(tokenizer.eos_token)


def _ends_in_eos(tokenizer: PreTrainedTokenizerBase) -> bool:
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "ANSWER"}]
    after = _render(tokenizer, turns, None).rpartition("ANSWER")[2]
    return after.strip().startswith(tokenizer.eos_token)


def _writes_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    return tokenizer.bos_token_id is not None and tokenizer("").input_ids[:1] == [tokenizer.bos_token_id]
