"""Held-out losses, perplexity with its interval, and next-token distributions.

The notebook loads and generates; what is here receives its models and token ids. Losses are in nats per
scored token, as in training (https://arxiv.org/abs/2005.14165 calls their exponential perplexity), and always
measured in ``eval()`` mode: on a CPU, int8 layers compute differently in ``train()``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from torch.nn.utils.rnn import pad_sequence

from llama_sft_helpers.core.batches import IGNORED
from llama_sft_helpers.core.modes import evaluation_mode

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    EncodedRow = Mapping[str, Sequence[int]]


class EvaluationError(AssertionError):
    """A measured value is not the expected one."""


def encode_rows(
    tokenizer: PreTrainedTokenizerBase, rows: Sequence[Mapping[str, Any]], max_length: int
) -> list[dict[str, list[int]]]:
    """Token ids and labels of prompt-completion rows, as ``SFTTrainer`` makes them.

    Rows have ``prompt`` and ``completion``, or ``input_ids`` and ``labels`` already. Those longer than
    ``max_length`` tokens are cut, and lose their EOS. Labels are -100 where the prompt stands.

    Raises:
        ValueError: A row has other columns.
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


def summarize_row_losses(
    model: PreTrainedModel | PeftModel, encoded: Sequence[EncodedRow], batch_size: int = 4
) -> pd.DataFrame:
    """Summed loss and the probability of EOS of each row, in one pass in ``eval()`` mode.

    Rows of like length share a batch, as after ``data.sort_by_length``, and are padded with EOS, as by
    ``SFTTrainer``: LLM.int8() picks its outlier columns a batch, so that an 8-bit loss depends a little on
    which rows share one.

    Returns:
        One row each, in the order given: ``tokens`` (scored), ``loss_nats`` (summed over them),
        ``eos_probability`` (at the answer's end; NaN for a cut row).
    """
    ends, found = _eos_ids(model), []
    order = sorted(range(len(encoded)), key=lambda row: len(encoded[row]["input_ids"]))
    for start in range(0, len(encoded), batch_size):
        batch = [encoded[row] for row in order[start : start + batch_size]]
        for logits, labels in zip(*_scored_logits(model, batch), strict=True):
            target, chosen = labels[labels != IGNORED], logits[labels != IGNORED].float()
            losses = torch.nn.functional.cross_entropy(chosen, target, reduction="none").double()
            last = float(torch.exp(-losses[-1])) if len(losses) and int(target[-1]) in ends else float("nan")
            found.append((len(losses), float(losses.sum()), last))
    columns = ["tokens", "loss_nats", "eos_probability"]
    return pd.DataFrame(found, columns=columns, index=order).sort_index()


def _eos_ids(model: PreTrainedModel | PeftModel) -> list[int]:
    found = model.config.eos_token_id
    if found is None:  # Some checkpoints name it for generation only.
        found = model.generation_config.eos_token_id
    return found if isinstance(found, list) else [found] if found is not None else []


@torch.inference_mode()
def _scored_logits(
    model: PreTrainedModel | PeftModel, rows: Sequence[EncodedRow]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits [rows, places, vocabulary] from the first scored place on, and the labels they predict."""
    texts, labels = ([torch.tensor(row[key]) for row in rows] for key in ("input_ids", "labels"))
    input_ids = pad_sequence(texts, batch_first=True, padding_value=(_eos_ids(model) or [0])[0])
    mask = pad_sequence([torch.ones_like(text) for text in texts], batch_first=True)
    targets = pad_sequence(labels, batch_first=True, padding_value=IGNORED)
    scored = (targets[:, 1:] != IGNORED).any(dim=0).nonzero()
    first, device = int(scored[0]) if len(scored) else 0, model.device
    inputs = {"input_ids": input_ids.to(device), "attention_mask": mask.to(device), "use_cache": False}
    with evaluation_mode(model):
        logits = model(**inputs, logits_to_keep=targets.shape[1] - first).logits
    return logits[:, :-1], targets[:, first + 1 :].to(device)


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
        raise ValueError(
            f"rows is {rows!r:.60}, a {type(rows).__name__}; expected for each model a name and the table "
            'that summarize_row_losses returns, for instance {"base": ..., "tuned": ...}.'
        )
    tokens = tables[0]["tokens"].to_numpy()
    if any(not np.array_equal(table["tokens"], tokens) for table in tables) or not tokens.sum():
        raise ValueError(
            f"{', '.join(rows)} must be measured on the same rows with at least one scored token each; "
            "pass the same encoded rows to summarize_row_losses."
        )
    draws = np.random.default_rng(0).integers(len(tokens), size=(2000, len(tokens)))
    samples = np.vstack([np.arange(len(tokens)), draws[tokens[draws].sum(axis=1) > 0]])
    means = {
        name: table["loss_nats"].to_numpy()[samples].sum(axis=1) / tokens[samples].sum(axis=1)
        for name, table in rows.items()
    }
    if len(means) > 1:
        first, second, *_ = means
        means[f"{second} - {first}"] = means[second] - means[first]
    found = {
        name: [mean[0], *np.quantile(mean[1:], [0.025, 0.975]), np.exp(mean[0])]
        for name, mean in means.items()
    }
    columns = ["loss_nats", "low", "high", "perplexity"]
    table = pd.DataFrame.from_dict(found, orient="index", columns=columns)
    return table.assign(rows=len(tokens), tokens=int(tokens.sum())).rename_axis("model")


def next_token_log_probs(model: PreTrainedModel | PeftModel, encoded: Sequence[EncodedRow]) -> torch.Tensor:
    """Log-probabilities of the scored tokens over the vocabulary, kept on the CPU to compare models in turn.

    Returns:
        float32 [scored tokens, vocabulary]; 0.5 MB a token for Llama 3, so pass a few rows.
    """
    found = []
    for start in range(0, len(encoded), 4):
        logits, labels = _scored_logits(model, encoded[start : start + 4])
        found.append(torch.log_softmax(logits[labels != IGNORED].float(), dim=-1).cpu())
    return torch.cat(found)
