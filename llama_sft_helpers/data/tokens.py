"""Tokens, labels and the loss mask, seen as the model gets them.

Nothing here tokenizes for training: the batches that are drawn and counted come from ``SFTTrainer`` itself.
Such a ``batch`` has ``input_ids`` and ``labels`` of shape (rows, tokens) with ``attention_mask`` (padded), or
of shape (1, tokens) with ``position_ids`` (packed: each document counts as a row).
"""

from __future__ import annotations

import html
import itertools
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import pandas as pd

from llama_sft_helpers.core.batches import IGNORED, document_bounds
from llama_sft_helpers.data.packing import TokenError
from llama_sft_helpers.data.rows import DataError

if TYPE_CHECKING:
    from IPython.display import HTML
    from transformers import PreTrainedTokenizerBase

    from llama_sft_helpers.data.rows import Rows

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


def choose_pad_token(tokenizer: PreTrainedTokenizerBase) -> str:
    """Choose a special token that exists already and means nothing else, so no embedding is resized.

    In this order: the tokenizer's own pad token if it is neither EOS nor BOS; ``<|finetune_right_pad_id|>``
    (Llama 3.1 and later); ``<|reserved_special_token_2|>`` (Llama 3.0's name of the same id 128,004); any
    special token with "pad" in its name; the first reserved one; the last special token that has no role and
    does not stand in the chat template (SmolLM2: ``<empty_output>``). The tokenizer is not changed.

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


def summarize_tokenizer(tokenizer: PreTrainedTokenizerBase) -> pd.DataFrame:
    """Special tokens with their ids, vocabulary size and whether BOS is put in front: setting, value, id."""
    rows: list[tuple[str, Any, Any]] = [
        (f"{role} token", getattr(tokenizer, f"{role}_token"), getattr(tokenizer, f"{role}_token_id"))
        for role in ("bos", "eos", "pad")
    ]
    special = [token for token in tokenizer.added_tokens_decoder.values() if token.special]
    size = len(tokenizer)
    rows += [
        ("vocabulary, special tokens included", f"{size:,} tokens", f"0 to {size - 1}"),
        ("special tokens", f"{len(special):,} tokens", ""),
        ("BOS in front of every text", tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id, ""),
    ]
    return pd.DataFrame(rows, columns=["setting", "value", "id"]).set_index("setting")


def summarize_tokens(tokenizer: PreTrainedTokenizerBase, texts: Mapping[str, str]) -> pd.DataFrame:
    """How named texts fall into tokens: characters, bytes (UTF-8), tokens, bytes_per_token, round_trip."""
    rows = []
    for name, text in texts.items():
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        size = len(text.encode())
        same = tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text
        rows.append((name, len(text), size, len(ids), size / max(len(ids), 1), same))
    columns = ["text", "characters", "bytes", "tokens", "bytes_per_token", "round_trip"]
    return pd.DataFrame(rows, columns=columns).set_index("text")


def render_tokens(tokenizer: PreTrainedTokenizerBase, texts: Mapping[str, str]) -> HTML:
    """Each text with bars between its tokens, in alternating colours; an id shows under the mouse."""
    lines = []
    for name, text in texts.items():
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        spans = [_span(tokenizer, token, _STRIPES[n % 2], "") for n, token in enumerate(ids)]
        lines.append(f"<div><b>{html.escape(name)}</b> ({len(ids)} tokens)<br>{'|'.join(spans)}</div>")
    return _page(lines)


def check_boundary(rows: Rows, tokenizer: PreTrainedTokenizerBase) -> None:
    """Prove that prompt tokens + completion tokens = tokens of the whole, for every row.

    A row of a ``Dataset`` or list has ``prompt`` and ``completion``. EOS is put behind the completion, as
    SFTTrainer does. ``TokenError`` shows the first row where a token reaches across the boundary.
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


def summarize_loss_mask(batch: Batch, tokenizer: PreTrainedTokenizerBase) -> pd.DataFrame:
    """Count the roles of the tokens in a collated batch.

    Returns:
        row (index), prompt (tokens that are not scored), completion (scored), eos (0 or 1, at the row's end),
        pad, scored (completion and EOS), eos_scored.
    """
    lines = []
    for _, _, roles in _documents(batch, tokenizer):
        count = Counter(roles)
        eos, scored = count["eos"] + count["eos_lost"], count["completion"] + count["eos"]
        lines.append((count["prompt"], count["completion"], eos, count["pad"], scored, bool(count["eos"])))
    columns = ["prompt", "completion", "eos", "pad", "scored", "eos_scored"]
    return pd.DataFrame(lines, columns=columns).rename_axis("row")


def render_loss_mask(batch: Batch, tokenizer: PreTrainedTokenizerBase, rows: Sequence[int]) -> HTML:
    """Mark the tokens of these rows of a collated batch by what the loss does with them."""
    documents = _documents(batch, tokenizer)
    legend = " ".join(
        f'<span style="{style};padding:0 .4em">{marks.format(label)}</span>'
        for label, marks, style in _STYLES.values()
    )
    lines = [f"<div>{legend}</div>"]
    for row in rows:
        ids, labels, roles = documents[row]
        spans = "".join(_spans(tokenizer, ids, labels, roles))
        lines.append(f"<div><b>Row {row}</b>, {len(roles)} tokens: {_counts(roles)}<br>{spans}</div>")
    return _page(lines)


def _counts(roles: list[str]) -> str:
    """How many tokens of a row are scored, EOS among them, and how many of each other kind."""
    eos = roles.count("eos")
    scored = f"{roles.count('completion') + eos} scored" + ", 1 of them EOS" * eos
    others = [f"{roles.count(role)} {_STYLES[role][0]}" for role in ("prompt", "eos_lost", "pad")]
    return "; ".join([scored, *(other for other in others if not other.startswith("0 "))])


def check_eos_is_trained(batch: Batch, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise ``TokenError`` unless every row of a collated batch ends in an EOS with a label."""
    scored = summarize_loss_mask(batch, tokenizer)["eos_scored"]
    if lost := scored.index[~scored].tolist():
        raise TokenError(
            f"{len(lost)} of {len(scored)} rows train no EOS ({tokenizer.eos_token}), expected 0; first rows "
            f"{lost[:5]}. Such rows teach the model never to stop. Set a pad token other than EOS "
            "(choose_pad_token), and leave out rows longer than max_length."
        )


def _documents(
    batch: Batch, tokenizer: PreTrainedTokenizerBase
) -> list[tuple[list[int], list[int], list[str]]]:
    """Ids, labels and roles of each row; of each document where rows are packed without padding."""
    ids, labels = batch["input_ids"].tolist(), batch["labels"].tolist()
    if (mask := batch.get("attention_mask")) is not None:
        rows = list(zip(ids, labels, mask.tolist(), strict=True))
    elif batch.get("position_ids") is not None:
        bounds = itertools.pairwise(document_bounds(batch["position_ids"])[0].tolist())
        rows = [(ids[0][start:end], labels[0][start:end], [1] * (end - start)) for start, end in bounds]
    else:
        raise ValueError(
            f"The batch has {sorted(batch)}, expected attention_mask or position_ids beside labels."
        )
    return [(*row[:2], _roles(*row, tokenizer.eos_token_id)) for row in rows]


def _roles(ids: list[int], labels: list[int], attended: list[int], eos_token_id: int) -> list[str]:
    last = max((position for position, seen in enumerate(attended) if seen), default=-1)
    roles = []
    for position, (token, label, seen) in enumerate(zip(ids, labels, attended, strict=True)):
        scored = label != IGNORED and position > 0  # no token stands before the first that could predict it
        if not seen:
            roles.append("pad")
        elif position == last and token == eos_token_id:
            roles.append("eos" if scored else "eos_lost")
        else:
            roles.append("completion" if scored else "prompt")
    return roles


def _spans(
    tokenizer: PreTrainedTokenizerBase, ids: list[int], labels: list[int], roles: list[str]
) -> Iterator[str]:
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


def _span(tokenizer: PreTrainedTokenizerBase, token: int, style: str, note: str) -> str:
    text = _token_text(tokenizer, token)
    shown, end = html.escape(text).replace("\n", "⏎<wbr>"), "<br>" * text.count("\n")
    style += ";border-radius:3px;margin:0 1px"
    return f'<span style="{style}" title="id {token} {note}">{shown}</span>{end}'


def _token_text(tokenizer: PreTrainedTokenizerBase, token: int) -> str:
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
