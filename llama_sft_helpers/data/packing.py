"""Row lengths, padding and packed blocks: planned from token counts, counted in real batches.

Packing as trl does it: https://huggingface.co/papers/2404.10830
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from llama_sft_helpers.core.batches import IGNORED, document_bounds
from llama_sft_helpers.core.modes import evaluation_mode
from llama_sft_helpers.core.plots import BLUE, GREEN, ORANGE, RED, SKY, new_axes

if TYPE_CHECKING:
    import torch
    from matplotlib.axes import Axes
    from peft import PeftModel
    from transformers import PreTrainedModel

Batch = Mapping[str, Any]
_WHOLE_SHARE = 0.995  # of the rows that the recommended length leaves whole
_BLOCKS_DRAWN = 20
_ISOLATED = 1e-4  # nats by which rounding may move a document's loss


class TokenError(AssertionError):
    """Tokens, labels or losses are not what training needs."""


def summarize_lengths(lengths: Iterable[int]) -> pd.DataFrame:
    """What each max_length would cut off: powers of two, and the longest row rounded up to 64 tokens.

    ``lengths`` are the tokens of each row, EOS counted.

    Returns:
        max_length (index), rows_cut (each loses its EOS), share_of_rows_whole, share_of_tokens_kept,
        recommended (the smallest that leaves 99.5 % of the rows whole).
    """
    tokens = _lengths_array(lengths)
    candidates = sorted({128, 256, 512, 1024, 2048, 4096, -(-int(tokens.max()) // 64) * 64})
    rows = []
    for candidate in candidates:
        cut = int((tokens > candidate).sum())
        kept = np.minimum(tokens, candidate).sum() / tokens.sum()
        rows.append((candidate, cut, 1 - cut / len(tokens), float(kept)))
    table = pd.DataFrame(
        rows, columns=["max_length", "rows_cut", "share_of_rows_whole", "share_of_tokens_kept"]
    )
    best = table.loc[table["share_of_rows_whole"] >= _WHOLE_SHARE, "max_length"].min()
    return table.assign(recommended=table["max_length"] == best).set_index("max_length")


def plot_lengths(lengths: Iterable[int], max_length: int) -> Axes:
    """Histogram of row lengths with the 50th, 90th and 99th percentile, and max_length."""
    tokens = _lengths_array(lengths)
    ax = new_axes(3.6)
    ax.hist(tokens, bins=40, color=SKY, edgecolor="white", linewidth=0.4)
    for percent, color, dash in ((50, GREEN, "-"), (90, BLUE, "-."), (99, RED, ":")):
        value = float(np.percentile(tokens, percent))
        label = f"p{percent}: {value:.0f} tokens"
        ax.axvline(value, color=color, linestyle=dash, linewidth=1.8, label=label)
    label = f"max_length: {max_length} tokens"
    ax.axvline(max_length, color="black", linestyle="--", linewidth=1.6, label=label)
    title = (
        f"A max_length of {max_length:,} tokens cuts {(tokens > max_length).sum():,} of {len(tokens):,} rows"
    )
    ax.set(title=title, xlabel="tokens in a row (EOS counted)", ylabel="rows")
    ax.legend(framealpha=1)
    return ax


def _lengths_array(lengths: Iterable[int]) -> np.ndarray[Any, np.dtype[np.int64]]:
    tokens = np.asarray(list(lengths), dtype=np.int64)
    if tokens.size == 0 or tokens.min() < 1:
        raise ValueError(
            f"Lengths must be positive token counts of at least one row; got {tokens[:5].tolist()}."
        )
    return tokens


def plan_packing(lengths: Iterable[int], batch_size: int, max_length: int) -> pd.DataFrame:
    """Predict the padding of three ways to batch rows of these lengths, in tokens.

    ``padded``: the expected longest of ``batch_size`` rows drawn at random, by order statistics: at most the
    k-th shortest length with probability C(k, B) / C(n, B). ``sorted``: up to 50 batches of rows are drawn at
    random and sorted (``train_sampling_strategy="group_by_length"``); the mean of up to 20 such draws.
    ``packed``: documents stand end to end in blocks of ``max_length``; none, but at least ceil(tokens /
    max_length) blocks. Longer rows are cut.

    Returns:
        strategy (index), batches (packed: blocks), tokens, padding_share (of all slots).

    Raises:
        ValueError: Lengths that are no positive token counts, or a batch_size or max_length below 1.
    """
    for name, value in (("batch_size", batch_size), ("max_length", max_length)):
        if value < 1:
            raise ValueError(f"{name}={value} is too small, expected at least 1; pass what SFTConfig gets.")
    tokens = np.sort(np.minimum(_lengths_array(lengths), max_length))
    total, count = int(tokens.sum()), len(tokens)
    full, rest = divmod(count, batch_size)
    kinds = ((full, batch_size), (1, rest))  # how many batches of how many rows
    padded = sum(many * size * _expected_longest(tokens, size) for many, size in kinds if many * size)
    batches = full + (rest > 0)
    draws = min(20, 1 + 20_000 // count)
    in_order = float(np.mean([_grouped_slots(tokens, batch_size, seed) for seed in range(draws)]))
    rows = [
        ("padded", batches, total, 1 - total / padded),
        ("sorted", batches, total, 1 - total / in_order),
        ("packed", -(-total // max_length), total, 0.0),
    ]
    columns = ["strategy", "batches", "tokens", "padding_share"]
    return pd.DataFrame(rows, columns=columns).set_index("strategy")


def summarize_packing(loaders: Mapping[str, Iterable[Batch]], plan: pd.DataFrame) -> pd.DataFrame:
    """Count the padding in the collated batches of each strategy, and set it beside ``plan_packing``'s.

    Returns:
        strategy (index), batches, tokens, padding_tokens, predicted_padding_share, padding_share.
    """
    rows = []
    for strategy, loader in loaders.items():
        batches = tokens = slots = 0
        for batch in loader:
            mask = batch.get("attention_mask")
            batches += 1
            slots += batch["input_ids"].numel()
            tokens += batch["input_ids"].numel() if mask is None else int(mask.sum())
        predicted = float(plan.loc[strategy, "padding_share"])  # type: ignore[arg-type]
        rows.append((strategy, batches, tokens, slots - tokens, predicted, (slots - tokens) / slots))
    columns = ["strategy", "batches", "tokens", "padding_tokens", "predicted_padding_share", "padding_share"]
    return pd.DataFrame(rows, columns=columns).set_index("strategy")


def plot_packing(seq_lengths: Sequence[Sequence[int]], max_length: int) -> Axes:
    """Draw how documents fill blocks of ``max_length`` tokens, one bar a block, of the first 20.

    ``seq_lengths`` are the document lengths of each block: the column of that name in a packed data set.
    """
    filled = sum(map(sum, seq_lengths)) / (len(seq_lengths) * max_length)
    drawn = seq_lengths[:_BLOCKS_DRAWN]
    ax = new_axes(1.4 + 0.22 * len(drawn))
    for block, documents in enumerate(drawn):
        *left, end = np.cumsum([0, *documents])
        colors = [(BLUE, ORANGE)[n % 2] for n in range(len(documents))]
        ax.barh(block, documents, left=left, color=colors, edgecolor="white", linewidth=0.3, height=0.8)
        hatched: dict[str, Any] = {"color": "white", "edgecolor": "#999999", "hatch": "////", "height": 0.8}
        ax.barh(block, max_length - end, left=end, **hatched)
    ax.set_yticks(range(len(drawn)))
    ax.invert_yaxis()
    count = sum(map(len, seq_lengths))
    ax.set(
        title=f"{count:,} rows in {len(seq_lengths):,} blocks, {filled:.1%} filled (hatched: free)",
        xlabel=f"tokens (a block holds {max_length:,})",
        ylabel="block" if len(drawn) == len(seq_lengths) else f"block (first {len(drawn)})",
        xlim=(0, max_length),
    )
    return ax


def plot_packing_mask(lengths: Sequence[int]) -> Axes:
    """Draw which tokens of a packed block of short rows each token sees, and would see without positions."""
    ax = new_axes(5.2)
    row = np.repeat(np.arange(len(lengths)), lengths)
    for place, number in enumerate(row):
        for seen in range(place + 1):
            own = row[seen] == number
            look: Any = {"facecolor": BLUE} if own else {"facecolor": "#fbe3b0", "hatch": "////"}
            ax.fill_between([seen, seen + 1], place, place + 1, edgecolor="white" if own else ORANGE, **look)
    middles = np.cumsum(lengths) - np.array(lengths) / 2
    names = [f"row {number}" for number in range(len(lengths))]
    ax.set_xticks(middles, names)
    ax.set_yticks(middles, names)
    ax.set(
        xlim=(0, len(row)),
        ylim=(len(row), 0),
        aspect="equal",
        xlabel="token that is read",
        ylabel="token that reads",
    )
    ax.set_title("Filled: a token sees its own row. Hatched: what it would see without position_ids")
    return ax


def summarize_isolation(model: PreTrainedModel | PeftModel, batch: Batch) -> pd.DataFrame:
    """Compare each document's loss in a packed batch with its loss alone, in evaluation mode.

    The batch has ``input_ids``, ``labels`` and ``position_ids`` of shape (1, tokens), and no mask. The third
    loss is the failing case: the same tokens without ``position_ids``, so that every document sees those
    before it.

    Returns:
        row (index), tokens, alone, packed, packed_minus_alone, without_position_ids: mean losses in nats a
        scored token.
    """
    import torch

    device = model.get_input_embeddings().weight.device
    ids, labels, positions = (batch[key].to(device) for key in ("input_ids", "labels", "position_ids"))
    bounds = document_bounds(positions)[0].tolist()
    rows = []
    with evaluation_mode(model), torch.no_grad():
        packed = _hidden_states(model, ids, positions)
        leaking = _hidden_states(model, ids, None)
        for row, (start, end) in enumerate(itertools.pairwise(bounds)):
            part = slice(start, end)
            alone = _hidden_states(model, ids[:, part], positions[:, part])
            states = (alone, packed[:, part], leaking[:, part])
            by_itself, in_block, leaked = (_loss(model, each, labels[0, part]) for each in states)
            rows.append((row, end - start, by_itself, in_block, in_block - by_itself, leaked))
    columns = ["row", "tokens", "alone", "packed", "packed_minus_alone", "without_position_ids"]
    return pd.DataFrame(rows, columns=columns).set_index("row")


def check_isolation(table: pd.DataFrame, column: str = "packed") -> None:
    """Raise ``TokenError`` if this loss of ``summarize_isolation`` is not that of each document alone."""
    difference = (table[column] - table["alone"]).abs()
    if not (difference <= _ISOLATED).all():
        worst = difference.fillna(np.inf).idxmax()
        raise TokenError(
            f"Row {worst} of the block: loss {table.loc[worst, column]:.6f} in the block, "
            f"{table.loc[worst, 'alone']:.6f} alone, expected equal within {_ISOLATED:g}: it sees its "
            "neighbours. Pass position_ids that start at 0 in each row, no attention_mask, and "
            "use_cache=False."
        )


def _hidden_states(model: Any, ids: torch.Tensor, positions: torch.Tensor | None) -> torch.Tensor:
    """States before the output layer; of shape (1, tokens, hidden)."""
    causal = model.get_base_model() if hasattr(model, "get_base_model") else model
    return causal.base_model(input_ids=ids, position_ids=positions, use_cache=False)[0]


def _loss(model: PreTrainedModel | PeftModel, states: torch.Tensor, labels: torch.Tensor) -> float:
    """Mean cross-entropy of one document: the state at t predicts the label at t + 1."""
    import torch

    logits = model.get_output_embeddings()(states[0, :-1]).float()
    return float(torch.nn.functional.cross_entropy(logits, labels[1:], ignore_index=IGNORED))


def _expected_longest(ordered: np.ndarray[Any, np.dtype[np.int64]], size: int) -> float:
    """Mean of the longest of ``size`` lengths drawn without replacement; ``ordered`` is ascending."""
    draws = math.comb(len(ordered), size)
    at_most = [math.comb(k, size) / draws for k in range(len(ordered) + 1)]
    return float((ordered * np.diff(at_most)).sum())


def _grouped_slots(tokens: np.ndarray[Any, np.dtype[np.int64]], batch_size: int, seed: int) -> int:
    """Slots of one epoch in the order of transformers' LengthGroupedSampler."""
    import torch
    from transformers.trainer_pt_utils import get_length_grouped_indices

    generator = torch.Generator().manual_seed(seed)
    ordered = tokens[get_length_grouped_indices(tokens.tolist(), batch_size, generator=generator)]
    batches = [ordered[start : start + batch_size] for start in range(0, len(ordered), batch_size)]
    return sum(int(batch.max()) * len(batch) for batch in batches)
