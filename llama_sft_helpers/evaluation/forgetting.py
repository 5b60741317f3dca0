"""Forgetting: how far the fine-tuning moved the model on plain text that has nothing to do with its data.

The texts (``plain_text.txt``) were written for this package, and are in no training set of the series.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd

from llama_sft_helpers.evaluation.losses import next_token_log_probs, summarize_perplexity
from llama_sft_helpers.evaluation.merging import summarize_merge_fidelity

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedTokenizerBase

_TEXTS = Path(__file__).with_name("plain_text.txt")


def measure_forgetting(
    model: PeftModel, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str] | None = None
) -> pd.DataFrame:
    """The loss on plain text without and with the adapter, and how far the predictions moved.

    Each text is a forward pass of its own, so that an 8-bit model's losses do not depend on a batch.

    Args:
        model: A ``PeftModel``; its base is the model with the adapter switched off.
        tokenizer: Its tokenizer.
        texts: Plain texts of two tokens or more; the package's own twelve by default.

    Returns:
        ``summarize_perplexity`` of ``base`` and ``tuned``, and ``kl_nats``: the mean Kullback-Leibler
        divergence of the base model's predictions from the tuned model's, in nats a token.

    Raises:
        ValueError: There are no texts.
    """
    texts = _TEXTS.read_text(encoding="utf-8").split("\n\n") if texts is None else list(texts)
    if not texts:
        raise ValueError("texts is empty; pass at least one plain text, or None for the package's own.")
    rows: dict[str, list[tuple[int, float]]] = {"base": [], "tuned": []}
    moved = []
    for text in texts:
        ids = tokenizer(text).input_ids
        row = [{"input_ids": ids, "labels": ids}]
        with model.disable_adapter():
            base = next_token_log_probs(model, row)
        tuned = next_token_log_probs(model, row)
        scored = len(ids) - 1
        for name, log_probs in (("base", base), ("tuned", tuned)):
            rows[name].append((scored, -float(log_probs[range(scored), ids[1:]].sum())))
        moved.append(scored * summarize_merge_fidelity(base, tuned)["kl_nats"])
    columns = ["tokens", "loss_nats"]
    table = summarize_perplexity({name: pd.DataFrame(found, columns=columns) for name, found in rows.items()})
    table["kl_nats"] = [0.0, *[sum(moved) / table["tokens"].iloc[0]] * 2]
    return table
