"""Held-out losses, perplexity with its interval, and next-token distributions.

The notebook loads and generates; what is here receives its models and token ids. Losses are in nats per
scored token, as in training (https://arxiv.org/abs/2005.14165 calls their exponential perplexity), and always
measured in ``eval()`` mode: on a CPU, int8 layers compute differently in ``train()``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch

from llama_sft_helpers.core.batches import IGNORED, rows_without_eos
from llama_sft_helpers.core.modes import evaluation_mode

_RESAMPLES = 2000  # draws of the bootstrap

if TYPE_CHECKING:
    EncodedRow = Mapping[str, Sequence[int]]


class EvaluationError(AssertionError):
    """A measured value is not the expected one."""


def encode_rows(
    tokenizer: Any, rows: Sequence[Mapping[str, Any]], max_length: int
) -> list[dict[str, list[int]]]:
    """Token ids and labels of prompt-completion rows, as ``SFTTrainer`` makes them.

    Args:
        tokenizer: The model's tokenizer.
        rows: Rows with ``prompt`` and ``completion``, or with ``input_ids`` and ``labels`` already.
        max_length: Longer rows are cut, in tokens; a cut row has lost its EOS.

    Returns:
        One dict a row: ``input_ids``, and ``labels`` where the prompt's positions hold -100.

    Raises:
        ValueError: A row without ``prompt`` or ``completion``.
    """
    encoded = []
    for index, row in enumerate(rows):
        if {"input_ids", "labels"} <= set(row):
            encoded.append({key: list(row[key][:max_length]) for key in ("input_ids", "labels")})
            continue
        if not {"prompt", "completion"} <= set(row):
            raise ValueError(
                f"Row {index} has the columns {list(row)}, expected prompt and completion. Alpaca and chat "
                "rows become such rows by dataset.map(to_prompt_completion) (notebook 05)."
            )
        prompt = tokenizer(row["prompt"]).input_ids
        both = tokenizer(row["prompt"] + row["completion"] + tokenizer.eos_token).input_ids
        pairs = enumerate(zip(prompt, both, strict=False))
        start = next((i for i, (a, b) in pairs if a != b), min(len(prompt), len(both)))
        labels = [IGNORED] * start + both[start:]
        encoded.append({"input_ids": both[:max_length], "labels": labels[:max_length]})
    return encoded


def check_eos_in_labels(encoded: Sequence[EncodedRow], eos_token_id: int) -> None:
    """Check that every row is scored on the EOS token that ends it.

    A collator that masks the padding token where padding is EOS masks this one too, and the model never
    learns to stop.

    Args:
        encoded: Rows with ``input_ids`` and ``labels``.
        eos_token_id: The token that ends an answer.

    Raises:
        EvaluationError: A row ends otherwise.
    """
    if lost := rows_without_eos([row["labels"] for row in encoded], eos_token_id):
        raise EvaluationError(
            f"Row {lost[0]}: its last label is {encoded[lost[0]]['labels'][-1:]}, expected EOS "
            f"({eos_token_id}). Leave out rows longer than max_length, and keep EOS out of the label mask."
        )


def summarize_row_losses(model: Any, encoded: Sequence[EncodedRow], batch_size: int = 4) -> pd.DataFrame:
    """Summed loss and the probability of EOS of each row, in one pass in ``eval()`` mode.

    Rows are taken in order and padded with EOS, as ``SFTTrainer`` does: LLM.int8() picks its outlier columns
    a batch, so that an 8-bit loss depends a little on which rows share one.

    Args:
        model: A causal language model.
        encoded: Rows with ``input_ids`` and ``labels``.
        batch_size: Rows in a forward pass.

    Returns:
        One row each, in order: ``tokens`` (scored), ``loss_nats`` (summed over them), ``eos_probability``
        (at the answer's end; NaN for a cut row).
    """
    ends = _eos_ids(model)
    found = []
    for start in range(0, len(encoded), batch_size):
        for losses, target in _forward(model, encoded[start : start + batch_size]):
            last = float(torch.exp(-losses[-1])) if len(losses) and int(target[-1]) in ends else float("nan")
            found.append((len(losses), float(losses.sum()), last))
    return pd.DataFrame(found, columns=["tokens", "loss_nats", "eos_probability"])


def _eos_ids(model: Any) -> list[int]:
    found = model.config.eos_token_id
    if found is None:  # Some checkpoints name it for generation only.
        found = model.generation_config.eos_token_id
    return found if isinstance(found, list) else [found] if found is not None else []


def _forward(model: Any, rows: Sequence[EncodedRow]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Losses of each row's scored tokens [n], and the tokens [n]."""
    logits, labels = _scored_logits(model, rows)
    for index in range(len(rows)):
        target = labels[index][labels[index] != IGNORED]
        chosen = logits[index][labels[index] != IGNORED].float()
        yield torch.nn.functional.cross_entropy(chosen, target, reduction="none").double(), target


@torch.inference_mode()
def _scored_logits(model: Any, rows: Sequence[EncodedRow]) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits [rows, tokens - 1, vocabulary] and the labels they predict [rows, tokens - 1]."""
    length = max(len(row["input_ids"]) for row in rows)
    input_ids = torch.full((len(rows), length), (_eos_ids(model) or [0])[0])
    mask = torch.zeros_like(input_ids)
    labels = torch.full_like(input_ids, IGNORED)
    for index, row in enumerate(rows):
        input_ids[index, : len(row["input_ids"])] = torch.tensor(row["input_ids"])
        labels[index, : len(row["labels"])] = torch.tensor(row["labels"])
        mask[index, : len(row["input_ids"])] = 1
    device = model.device
    with evaluation_mode(model):
        logits = model(input_ids=input_ids.to(device), attention_mask=mask.to(device), use_cache=False).logits
    return logits[:, :-1], labels[:, 1:].to(device)


def summarize_perplexity(rows: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """Held-out loss and perplexity of models on the same rows, with bootstrap intervals.

    Whole rows are drawn with replacement, the same draws for every model (Efron and Tibshirani, 1993): tokens
    of one answer are not independent. The last row is the second model minus the first, whose perplexity
    column is their ratio.

    Args:
        rows: Name -> ``summarize_row_losses`` of that model.

    Returns:
        Index model; ``loss_nats``, its 95 % interval ``low`` and ``high``, ``perplexity``, ``rows``,
        ``tokens``.

    Raises:
        ValueError: No model, no scored token, or models measured on different tokens.
    """
    tables = list(rows.values()) if isinstance(rows, Mapping) else []
    if not tables or not all({"tokens", "loss_nats"} <= set(getattr(t, "columns", ())) for t in tables):
        got = f"{rows!r:.60}, a {type(rows).__name__}"
        raise ValueError(
            f"rows is {got}; expected for each model a name and the table that summarize_row_losses returns, "
            'for instance {"base": ..., "tuned": ...}.'
        )
    names = list(rows)
    tokens = rows[names[0]]["tokens"].to_numpy()
    if any(not np.array_equal(rows[name]["tokens"], tokens) for name in names) or not tokens.sum():
        raise ValueError(
            f"{', '.join(names)} must be measured on the same rows with at least one scored token each; "
            "pass the same encoded rows to summarize_row_losses."
        )
    draws = np.random.default_rng(0).integers(len(tokens), size=(_RESAMPLES, len(tokens)))
    kept = draws[tokens[draws].sum(axis=1) > 0]
    totals = {name: rows[name]["loss_nats"].to_numpy() for name in names}
    point = {name: total.sum() / tokens.sum() for name, total in totals.items()}
    drawn = {name: total[kept].sum(axis=1) / tokens[kept].sum(axis=1) for name, total in totals.items()}
    if len(names) > 1:
        difference = f"{names[1]} - {names[0]}"
        point[difference] = point[names[1]] - point[names[0]]
        drawn[difference] = drawn[names[1]] - drawn[names[0]]
    table = pd.DataFrame(
        {
            "loss_nats": point,
            "low": {name: np.quantile(values, 0.025) for name, values in drawn.items()},
            "high": {name: np.quantile(values, 0.975) for name, values in drawn.items()},
            "perplexity": {name: np.exp(value) for name, value in point.items()},
        }
    )
    table["rows"], table["tokens"] = len(tokens), int(tokens.sum())
    return table.rename_axis("model")


def next_token_log_probs(model: Any, encoded: Sequence[EncodedRow]) -> torch.Tensor:
    """Log-probabilities of the scored tokens over the vocabulary, kept on the CPU to compare models in turn.

    Args:
        model: A causal language model; run in ``eval()`` mode.
        encoded: Rows with ``input_ids`` and ``labels``, four of them in a forward pass.

    Returns:
        float32 [scored tokens, vocabulary]; 0.5 MB a token for Llama 3, so pass a few rows.
    """
    found = []
    for start in range(0, len(encoded), 4):
        logits, labels = _scored_logits(model, encoded[start : start + 4])
        found.append(torch.log_softmax(logits[labels != IGNORED].float(), dim=-1).cpu())
    return torch.cat(found)
