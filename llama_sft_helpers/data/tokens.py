"""Tokens, labels and the loss mask, seen as the model gets them.

Nothing here tokenizes for training: the batches that are drawn and counted come from ``SFTTrainer`` itself.
"""

from __future__ import annotations

import html
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import pandas as pd

from llama_sft_helpers.core.batches import IGNORED, document_bounds, rows_without_eos
from llama_sft_helpers.data.packing import TokenError
from llama_sft_helpers.data.rows import DataError

if TYPE_CHECKING:
    import torch
    from IPython.display import HTML

Batch = Mapping[str, Any]

_CHUNK_ROWS = 1000
# Role -> its name, the marks around its tokens, and Okabe-Ito hues. GitHub strips the last: the marks stay.
_STYLES = {
    "prompt": ("not scored", "{}", "background:#e3e3e3;color:#333"),
    "completion": ("scored", "«{}»", "background:#bfe3f7;color:#111;border-bottom:2px solid #0072B2"),
    "eos": ("EOS, scored", "«{}»", "background:#E69F00;color:#111;border:2px solid #111"),
    "eos_lost": ("EOS, NOT scored", "[{}]", "background:#8f2d00;color:#fff;border:2px dashed #fff"),
    "pad": ("padding", "({})", "background:#fff;color:#666;border:1px dotted #999"),
}
_STRIPES = ("background:#bfe3f7;color:#111", "background:#fbe3b0;color:#111")


# --- The tokenizer ---


def choose_pad_token(tokenizer: Any) -> str:
    """Choose a special token that exists already and means nothing else, so no embedding is resized.

    In this order: the tokenizer's own pad token if it is neither EOS nor BOS; ``<|finetune_right_pad_id|>``
    (Llama 3.1 and later); ``<|reserved_special_token_2|>`` (Llama 3.0's name of the same id 128,004); any
    special token with "pad" in its name; the first reserved one; the last special token that has no role and
    does not stand in the chat template (SmolLM2: ``<empty_output>``).

    Args:
        tokenizer: A Hugging Face tokenizer; it is not changed.

    Raises:
        DataError: ``no-pad-token``: every special token has a role.
    """
    roles = [tokenizer.eos_token, tokenizer.bos_token]
    if tokenizer.pad_token is not None and tokenizer.pad_token not in roles:
        return str(tokenizer.pad_token)
    roles += [getattr(tokenizer, f"{role}_token", None) for role in ("unk", "sep", "cls", "mask")]
    special = [token.content for _, token in sorted(tokenizer.added_tokens_decoder.items()) if token.special]
    template = str(tokenizer.chat_template or "")
    free = [token for token in special if token not in roles and token not in template]
    ordered = [
        *(token for token in ("<|finetune_right_pad_id|>", "<|reserved_special_token_2|>") if token in free),
        *(token for token in free if "pad" in token.lower()),
        *(token for token in free if "reserved" in token.lower()),
        *reversed(free),
    ]
    if not ordered:
        raise DataError(
            "no-pad-token",
            f"None of the special tokens {special} is free to be the pad token. Add one "
            '(tokenizer.add_special_tokens({"pad_token": "<|pad|>"})) and resize the embeddings yourself.',
        )
    return ordered[0]


def summarize_tokenizer(tokenizer: Any) -> pd.DataFrame:
    """Special tokens with their ids, vocabulary size and whether BOS is put in front: setting, value, id."""
    rows: list[tuple[str, Any, Any]] = [
        (f"{role} token", getattr(tokenizer, f"{role}_token"), getattr(tokenizer, f"{role}_token_id"))
        for role in ("bos", "eos", "pad")
    ]
    special = [token for token in tokenizer.added_tokens_decoder.values() if token.special]
    rows += [
        (
            "vocabulary, special tokens included",
            f"{len(tokenizer):,} tokens",
            f"0 to {len(tokenizer) - 1}",
        ),
        ("special tokens", f"{len(special):,} tokens", ""),
        ("BOS in front of every text", tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id, ""),
    ]
    return pd.DataFrame(rows, columns=["setting", "value", "id"]).set_index("setting")


def summarize_tokens(tokenizer: Any, texts: Mapping[str, str]) -> pd.DataFrame:
    """How texts fall into tokens: characters, bytes (UTF-8), tokens, bytes_per_token, round_trip.

    Args:
        tokenizer: A Hugging Face tokenizer.
        texts: Name -> text.
    """
    rows = []
    for name, text in texts.items():
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        size = len(text.encode())
        same = tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text
        rows.append((name, len(text), size, len(ids), size / max(len(ids), 1), same))
    columns = ["text", "characters", "bytes", "tokens", "bytes_per_token", "round_trip"]
    return pd.DataFrame(rows, columns=columns).set_index("text")


def render_tokens(tokenizer: Any, texts: Mapping[str, str]) -> HTML:
    """Each text with bars between its tokens, in alternating colours; an id shows under the mouse."""
    lines = []
    for name, text in texts.items():
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        spans = [_span(tokenizer, token, _STRIPES[n % 2], "") for n, token in enumerate(ids)]
        lines.append(f"<div><b>{html.escape(name)}</b> ({len(ids)} tokens)<br>{'|'.join(spans)}</div>")
    return _page(lines)


def check_boundary(rows: Any, tokenizer: Any) -> None:
    """Prove that prompt tokens + completion tokens = tokens of the whole, for every row.

    Args:
        rows: A ``Dataset`` (or list) of ``prompt`` and ``completion``.
        tokenizer: The tokenizer; EOS is put behind each completion, as SFTTrainer does.

    Raises:
        TokenError: With the first row where a token reaches across the boundary, and its tokens.
    """
    for start in range(0, len(rows), _CHUNK_ROWS):
        chunk = [rows[index] for index in range(start, min(start + _CHUNK_ROWS, len(rows)))]
        prompts = [row["prompt"] for row in chunk]
        completions = [row["completion"] + tokenizer.eos_token for row in chunk]
        left = tokenizer(prompts)["input_ids"]
        right = tokenizer(completions, add_special_tokens=False)["input_ids"]
        whole = tokenizer([p + c for p, c in zip(prompts, completions, strict=True)])["input_ids"]
        for offset, (a, b, both) in enumerate(zip(left, right, whole, strict=True)):
            if a + b != both:
                raise TokenError(
                    f"Row {start + offset}: {len(a)} prompt tokens + {len(b)} completion tokens are not the "
                    f"{len(both)} tokens of the whole. Around the boundary: "
                    f"{[tokenizer.decode([t]) for t in a[-2:] + b[:2]]} alone, "
                    f"{[tokenizer.decode([t]) for t in both[max(len(a) - 2, 0) : len(a) + 2]]} together. "
                    "End the prompt with a line break and start the completion without white space."
                )


# --- What the loss scores ---


def summarize_loss_mask(batch: Batch, tokenizer: Any) -> pd.DataFrame:
    """Count the roles of the tokens in a collated batch.

    Args:
        batch: ``input_ids`` and ``labels`` of shape (rows, tokens) with ``attention_mask`` (padded), or of
            shape (1, tokens) with ``position_ids`` (packed: each document is a line of the table).
        tokenizer: Its EOS is looked for at each document's end.

    Returns:
        row (index), prompt (tokens without a label), completion (with a label), eos (0 or 1), pad, scored
        (labels other than -100), eos_scored.
    """
    lines = []
    for ids, labels, attended in _documents(batch):
        roles = _roles(ids, labels, attended, tokenizer.eos_token_id)
        count = {role: roles.count(role) for role in _STYLES}
        eos = count["eos"] + count["eos_lost"]
        scored = int((labels != IGNORED).sum())
        lines.append((count["prompt"], count["completion"], eos, count["pad"], scored, bool(count["eos"])))
    columns = ["prompt", "completion", "eos", "pad", "scored", "eos_scored"]
    return pd.DataFrame(lines, columns=columns).rename_axis("row")


def render_loss_mask(batch: Batch, tokenizer: Any, rows: Sequence[int] = (0,)) -> HTML:
    """Mark each token of a collated batch by what the loss does with it, with colours and without.

    Args:
        batch: As in ``summarize_loss_mask``.
        tokenizer: Turns ids into text.
        rows: Which rows (packed: documents) to draw.
    """
    documents = _documents(batch)
    legend = " ".join(
        f'<span style="{style};padding:0 .4em">{marks.format(label)}</span>'
        for label, marks, style in _STYLES.values()
    )
    lines = [f"<div>{legend}</div>"]
    for row in rows:
        ids, labels, attended = documents[row]
        roles = _roles(ids, labels, attended, tokenizer.eos_token_id)
        count = ", ".join(f"{roles.count(role)} {_STYLES[role][0]}" for role in _STYLES if role in roles)
        spans = _spans(tokenizer, ids.tolist(), labels.tolist(), roles)
        lines.append(f"<div><b>Row {row}</b>, {len(roles)} tokens: {count}<br>{''.join(spans)}</div>")
    return _page(lines)


def check_eos_is_trained(batch: Batch, tokenizer: Any) -> None:
    """Raise unless every row of a collated batch ends in an EOS with a label.

    Raises:
        TokenError: With the rows that would not teach the model to stop.
    """
    documents = _documents(batch)
    labels = [
        [label for label, seen in zip(labels.tolist(), attended, strict=True) if seen]
        for _, labels, attended in documents
    ]
    if lost := rows_without_eos(labels, tokenizer.eos_token_id):
        raise TokenError(
            f"{len(lost)} of {len(labels)} rows train no EOS ({tokenizer.eos_token}), expected 0; first rows "
            f"{lost[:5]}. Such rows teach the model never to stop. Set a pad token other than EOS "
            "(choose_pad_token), and leave out rows longer than max_length."
        )


def _documents(batch: Batch) -> list[tuple[torch.Tensor, torch.Tensor, list[bool]]]:
    """(ids, labels, attended) of each row; of each document where rows are packed without padding."""
    ids, labels = batch["input_ids"].cpu(), batch["labels"].cpu()
    if (mask := batch.get("attention_mask")) is not None:
        return [(i, lab, m.bool().tolist()) for i, lab, m in zip(ids, labels, mask.cpu(), strict=True)]
    if batch.get("position_ids") is None:
        raise ValueError(
            f"The batch has {sorted(batch)}, expected attention_mask or position_ids beside labels."
        )
    bounds = document_bounds(batch["position_ids"])[0].tolist()
    return [
        (ids[0, start:end], labels[0, start:end], [True] * (end - start))
        for start, end in itertools.pairwise(bounds)
    ]


def _roles(ids: torch.Tensor, labels: torch.Tensor, attended: list[bool], eos_token_id: int) -> list[str]:
    last = max((position for position, seen in enumerate(attended) if seen), default=-1)
    roles = []
    for position, (token, label, seen) in enumerate(
        zip(ids.tolist(), labels.tolist(), attended, strict=True)
    ):
        if not seen:
            roles.append("pad")
        elif position == last and token == eos_token_id:
            roles.append("eos_lost" if label == IGNORED else "eos")
        else:
            roles.append("prompt" if label == IGNORED else "completion")
    return roles


def _spans(tokenizer: Any, ids: list[int], labels: list[int], roles: list[str]) -> Iterator[str]:
    """One span a token, marks around those of a role; of several pad tokens the first and their number."""
    position = 0
    for role, run in itertools.groupby(roles):
        label, marks, style = _STYLES[role]
        length = len(list(run))
        shown = range(position, position + (1 if role == "pad" else length))
        spans = [_span(tokenizer, ids[place], style, f"label {labels[place]}, {label}") for place in shown]
        times = f" &times; {length}" if length > len(spans) else ""
        yield marks.format("".join(spans) + times)
        position += length


def _span(tokenizer: Any, token: int, style: str, note: str) -> str:
    text = html.escape(_token_text(tokenizer, token)).replace("\n", "⏎<wbr>")
    end = "<br>" * _token_text(tokenizer, token).count("\n")
    return (
        f'<span style="{style};border-radius:3px;margin:0 1px" title="id {token} {note}">{text}</span>{end}'
    )


def _token_text(tokenizer: Any, token: int) -> str:
    """A token's text; its bytes in hexadecimal where it holds only part of a character."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    text = str(tokenizer.decode([token], clean_up_tokenization_spaces=False))
    if "\ufffd" not in text:
        return text
    to_byte = {character: byte for byte, character in bytes_to_unicode().items()}
    piece = str(tokenizer.convert_ids_to_tokens(token))
    return "‹" + " ".join(f"{to_byte[c]:02X}" if c in to_byte else c for c in piece) + "›"


def _page(lines: Iterable[str]) -> HTML:
    from IPython.display import HTML

    style = "font-family:monospace;line-height:1.9;white-space:pre-wrap;overflow-wrap:anywhere;max-width:60em"
    return HTML(f'<div style="{style}">{"".join(lines)}</div>')
