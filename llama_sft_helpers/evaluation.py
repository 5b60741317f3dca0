"""Notebook 07: did it learn, does it stop, and does the merged model still say the same.

The notebook loads, generates and merges; what is here receives its models, token ids and log-probabilities.
Losses are in nats per scored token, as in training (https://arxiv.org/abs/2005.14165 calls their exponential
perplexity), and always measured in ``eval()`` mode: on a CPU, int8 layers compute differently in ``train()``.
"""

from __future__ import annotations

import html
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch

from llama_sft_helpers.batches import IGNORED, rows_without_eos
from llama_sft_helpers.modes import evaluation_mode

if TYPE_CHECKING:
    from IPython.display import HTML
    from matplotlib.axes import Axes

    EncodedRow = Mapping[str, Sequence[int]]

# Okabe and Ito's palette, told apart by colour-blind readers; with more models it begins again.
_PALETTE = ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")


class EvaluationError(AssertionError):
    """A measured value is not the expected one."""


# --- Held-out loss ---


def encode_rows(
    tokenizer: Any, rows: Sequence[Mapping[str, str]], max_length: int
) -> list[dict[str, list[int]]]:
    """Token ids and labels of prompt-completion rows, as ``SFTTrainer`` makes them.

    Args:
        tokenizer: The model's tokenizer.
        rows: Rows with ``prompt`` and ``completion``.
        max_length: Longer rows are cut, in tokens; a cut row has lost its EOS.

    Returns:
        One dict a row: ``input_ids``, and ``labels`` where the prompt's positions hold -100.

    Raises:
        ValueError: A row without ``prompt`` or ``completion``.
    """
    encoded = []
    for index, row in enumerate(rows):
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
    return found if isinstance(found, list) else [found]


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
    input_ids = torch.full((len(rows), length), _eos_ids(model)[0])
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


def summarize_perplexity(
    rows: Mapping[str, pd.DataFrame], resamples: int = 2000, seed: int = 0
) -> pd.DataFrame:
    """Held-out loss and perplexity of models on the same rows, with bootstrap intervals.

    Whole rows are drawn with replacement, the same draws for every model (Efron and Tibshirani, 1993): tokens
    of one answer are not independent. The last row is the second model minus the first, whose perplexity
    column is their ratio.

    Args:
        rows: Name -> ``summarize_row_losses`` of that model.
        resamples: Number of draws.
        seed: Seed of the draws.

    Returns:
        Index model; ``loss_nats``, its 95 % interval ``low`` and ``high``, ``perplexity``, ``rows``,
        ``tokens``.

    Raises:
        ValueError: No model, no scored token, or models measured on different tokens.
    """
    names = list(rows)
    if not names:
        raise ValueError(
            "rows is empty: no model to compare. Pass a name and the table that summarize_row_losses returns "
            'for each model, for instance {"base": ..., "tuned": ...}.'
        )
    tokens = rows[names[0]]["tokens"].to_numpy()
    if any(not np.array_equal(rows[name]["tokens"], tokens) for name in names) or not tokens.sum():
        raise ValueError(
            f"{', '.join(names)} must be measured on the same rows with at least one scored token each; "
            "pass the same encoded rows to summarize_row_losses."
        )
    draws = np.random.default_rng(seed).integers(len(tokens), size=(resamples, len(tokens)))
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


# --- Answers ---


def summarize_generations(
    tokenizer: Any, prompts: Sequence[str], generated: Mapping[str, torch.Tensor]
) -> pd.DataFrame:
    """Answers side by side.

    Args:
        tokenizer: The tokenizer; decodes without special tokens.
        prompts: One text a row.
        generated: Name -> new token ids [prompts, new tokens], without the prompt.

    Returns:
        ``prompt``, and for every name: the answer, ``<name>_tokens`` (EOS included), ``<name>_stopped``.

    Raises:
        ValueError: The number of prompts differs from the number of answers.
    """
    table: dict[str, Any] = {"prompt": list(prompts)}
    for name, tokens in generated.items():
        if len(tokens) != len(prompts):
            raise ValueError(f"{name} has {len(tokens)} answers for {len(prompts)} prompts.")
        lengths, stopped = _answer_lengths(tokens, tokenizer.eos_token_id)
        texts = [
            tokenizer.decode(row[:n], skip_special_tokens=True)
            for row, n in zip(tokens, lengths, strict=True)
        ]
        table |= {name: texts, f"{name}_tokens": lengths, f"{name}_stopped": stopped}
    return pd.DataFrame(table)


def _answer_lengths(tokens: torch.Tensor, eos_token_id: int) -> tuple[list[int], list[bool]]:
    """Tokens of each answer up to and with its first EOS, and whether there is one."""
    ends = tokens.cpu() == eos_token_id
    first = torch.where(ends.any(dim=1), ends.int().argmax(dim=1) + 1, tokens.shape[1])
    return first.tolist(), ends.any(dim=1).tolist()


def render_generations(table: pd.DataFrame) -> HTML:
    """``summarize_generations`` as a page: prompt, then each model's answer and how it ended.

    Args:
        table: What ``summarize_generations`` returned.

    Returns:
        An object that a notebook shows; all text is escaped.
    """
    from IPython.display import HTML

    names = [column for column in map(str, table) if f"{column}_stopped" in table]
    style = "text-align:left;vertical-align:top;white-space:pre-wrap;padding:4px 8px;max-width:22em"
    head = "".join(f"<th style='text-align:left'>{html.escape(name)}</th>" for name in ["prompt", *names])
    body = ""
    for row in table.to_dict("records"):
        cells = [html.escape(str(row["prompt"]))]
        for name in names:
            ending = "stopped" if row[f"{name}_stopped"] else "cut"
            note = f"{ending} after {row[f'{name}_tokens']} tokens"
            cells.append(f"{html.escape(str(row[name]).strip())}<br><small><i>{note}</i></small>")
        body += "<tr>" + "".join(f"<td style='{style}'>{cell}</td>" for cell in cells) + "</tr>"
    return HTML(f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>")


# --- Does it stop ---


def summarize_stops(
    rows: Mapping[str, pd.DataFrame],
    generated: Mapping[str, torch.Tensor],
    eos_token_id: int,
) -> pd.DataFrame:
    """Whether answers end: the probability of EOS where the reference ends, and how many end by themselves.

    Args:
        rows: Name -> ``summarize_row_losses`` of that model.
        generated: Name -> new token ids [prompts, max_new_tokens or fewer].
        eos_token_id: The token that ends an answer.

    Returns:
        Index model; ``eos_probability`` (median over rows), ``stopped``, ``prompts``, ``stopped_share``,
        ``median_tokens`` (of the answers as generated).
    """
    table = {}
    for name, tokens in generated.items():
        lengths, stopped = _answer_lengths(tokens, eos_token_id)
        table[name] = {
            "eos_probability": float(rows[name]["eos_probability"].median()),
            "stopped": sum(stopped),
            "prompts": len(stopped),
            "stopped_share": sum(stopped) / len(stopped),
            "median_tokens": float(np.median(lengths)),
        }
    frame = pd.DataFrame(table).T.rename_axis("model")
    return frame.astype({"stopped": int, "prompts": int})


def plot_stops(rows: Mapping[str, pd.DataFrame], stops: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """The probability of EOS at each reference answer's end, one dot a row, and each model's median.

    Args:
        rows: Name -> ``summarize_row_losses`` of that model.
        stops: ``summarize_stops`` of the same models.
        ax: Axes to draw on; a new figure by default.
    """
    import matplotlib.pyplot as plt

    if ax is None:
        _, ax = plt.subplots(figsize=(7, 1.2 + 0.9 * len(rows)), layout="constrained")
    labels = []
    for y, (name, colour) in enumerate(zip(rows, itertools.cycle(_PALETTE), strict=False)):
        values = rows[name]["eos_probability"].dropna().to_numpy()
        spread = np.random.default_rng(0).uniform(-0.2, 0.2, len(values))
        ax.scatter(values, y + spread, s=22, color=colour, alpha=0.6, linewidths=0)
        ax.plot([np.median(values)] * 2, [y - 0.32, y + 0.32], color="black", linewidth=2)
        stopped = stops.loc[name]
        labels.append(f"{name}\n{int(stopped['stopped'])} of {int(stopped['prompts'])} answers stop")
    ax.set_yticks(range(len(rows)), labels)
    ax.set_ylim(len(rows) - 0.5, -0.5)
    ax.set_xlim(-0.02, 1.02)
    ax.set_xlabel("probability of EOS where the reference answer ends (line: median)")
    ax.set_title("Does the model know when to stop?")
    ax.grid(axis="x", alpha=0.3)
    return ax


# --- Merging ---


def next_token_log_probs(model: Any, encoded: Sequence[EncodedRow], batch_size: int = 4) -> torch.Tensor:
    """Log-probabilities of the scored tokens over the vocabulary, kept on the CPU to compare models in turn.

    Args:
        model: A causal language model; run in ``eval()`` mode.
        encoded: Rows with ``input_ids`` and ``labels``.
        batch_size: Rows in a forward pass.

    Returns:
        float32 [scored tokens, vocabulary]; 0.5 MB a token for Llama 3, so pass a few rows.
    """
    found = []
    for start in range(0, len(encoded), batch_size):
        logits, labels = _scored_logits(model, encoded[start : start + batch_size])
        found.append(torch.log_softmax(logits[labels != IGNORED].float(), dim=-1).cpu())
    return torch.cat(found)


def summarize_merge_fidelity(reference: torch.Tensor, merged: torch.Tensor) -> pd.Series[float]:
    """How far the merged model's next-token distributions are from the unmerged model's.

    Args:
        reference: ``next_token_log_probs`` of base plus adapter [tokens, vocabulary].
        merged: The same of the merged model.

    Returns:
        ``kl_nats`` (mean Kullback-Leibler divergence a token), ``worst_kl_nats``, ``top1_agreement`` (share
        of tokens with the same first choice), ``tokens``.

    Raises:
        ValueError: The shapes differ.
    """
    if reference.shape != merged.shape:
        raise ValueError(
            f"Shapes {tuple(reference.shape)} and {tuple(merged.shape)} differ; use the same rows."
        )
    kl = (reference.double().exp() * (reference.double() - merged.double())).sum(dim=-1)
    agree = (reference.argmax(dim=-1) == merged.argmax(dim=-1)).double().mean()
    return pd.Series(
        {
            "kl_nats": float(kl.mean()),
            "worst_kl_nats": float(kl.max()),
            "top1_agreement": float(agree),
            "tokens": len(reference),
        }
    )


def check_merge_fidelity(
    reference: torch.Tensor,
    merged: torch.Tensor,
    without_adapter: torch.Tensor,
    max_share: float = 0.1,
) -> None:
    """Check that merging kept what the adapter does.

    Rounding the sum of weight and update to 16 bits moves every prediction a little, so no fixed distance
    is right for all models. The yardstick is the adapter itself: how far the model is without it.

    Args:
        reference: ``next_token_log_probs`` of base plus adapter [tokens, vocabulary].
        merged: The same of the merged model.
        without_adapter: The same of the base model alone.
        max_share: Largest divergence allowed, as a share of that of the base model alone. The share of
            tokens whose first choice changes must not exceed the base model's either.

    Raises:
        EvaluationError: The merged model differs more than that, or is not finite.
    """
    found = summarize_merge_fidelity(reference, merged)
    yardstick = summarize_merge_fidelity(reference, without_adapter)
    most_kl = max_share * yardstick["kl_nats"]
    if not (found["kl_nats"] <= most_kl and found["top1_agreement"] >= yardstick["top1_agreement"]):
        raise EvaluationError(
            f"The merged model differs: KL {found['kl_nats']:.2g} nats a token, expected at most "
            f"{most_kl:.2g} ({max_share:.0%} of what the adapter itself changes); same first choice in "
            f"{found['top1_agreement']:.1%} (without the adapter {yardstick['top1_agreement']:.1%}). "
            "Merge onto a fresh 16-bit or 32-bit base, not onto the quantized one, and check the adapter's "
            "base model."
        )
