"""Answers side by side, and whether the model knows when to stop."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from llama_sft_helpers.core.language import translate
from llama_sft_helpers.core.plots import BLUE, GREEN, ORANGE, PINK, RED, SKY, new_axes

if TYPE_CHECKING:
    import torch
    from IPython.display import HTML
    from matplotlib.axes import Axes
    from transformers import PreTrainedTokenizerBase

_COLOURS = (RED, BLUE, GREEN, PINK, ORANGE, SKY)  # with more models they begin again


def summarize_generations(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], generated: Mapping[str, torch.Tensor]
) -> pd.DataFrame:
    """Answers side by side, from each model's new token ids [prompts, new tokens], without the prompt.

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
        whole = [row[:n] for row, n in zip(tokens, lengths, strict=True)]
        texts = [tokenizer.decode(row, skip_special_tokens=True) for row in whole]
        table |= {name: texts, f"{name}_tokens": lengths, f"{name}_stopped": stopped}
    return pd.DataFrame(table)


def _answer_lengths(tokens: torch.Tensor, eos_token_id: int) -> tuple[list[int], list[bool]]:
    """Tokens of each answer up to and with its first EOS, and whether there is one."""
    import torch

    ends = tokens.cpu() == eos_token_id
    first = torch.where(ends.any(dim=1), ends.int().argmax(dim=1) + 1, tokens.shape[1])
    return first.tolist(), ends.any(dim=1).tolist()


def list_answers(table: pd.DataFrame, language: str = "en") -> list[tuple[str, list[tuple[str, str, str]]]]:
    """Each prompt of ``summarize_generations`` with its answers: model, how the answer ended, text."""
    names = [column for column in map(str, table) if f"{column}_stopped" in table]

    def ending(row: Mapping[Any, Any], name: str) -> str:
        stopped, tokens = row[f"{name}_stopped"], row[f"{name}_tokens"]
        return translate(
            "stopped after {n} tokens" if stopped else "cut after {n} tokens", language, n=tokens
        )

    return [
        (str(row["prompt"]), [(name, ending(row, name), str(row[name])) for name in names])
        for row in table.to_dict("records")
    ]


def render_generations(table: pd.DataFrame) -> HTML:
    """``summarize_generations`` as a page: prompt, then each model's answer and how it ended."""
    from IPython.display import HTML

    style = "text-align:left;vertical-align:top;white-space:pre-wrap;padding:4px 8px;max-width:22em"
    body, names = "", ["prompt"]
    for prompt, answers in list_answers(table):
        names = ["prompt", *(name for name, _, _ in answers)]
        cells = [html.escape(prompt)]
        for _, ending, text in answers:
            cells.append(f"{html.escape(text.strip())}<br><small><i>{ending}</i></small>")
        body += "<tr>" + "".join(f"<td style='{style}'>{cell}</td>" for cell in cells) + "</tr>"
    head = "".join(f"<th style='text-align:left'>{html.escape(name)}</th>" for name in names)
    return HTML(f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>")


def summarize_stops(
    rows: Mapping[str, pd.DataFrame], generated: Mapping[str, torch.Tensor], eos_token_id: int
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
    return pd.DataFrame.from_dict(table, orient="index").rename_axis("model")


def plot_stops(rows: Mapping[str, pd.DataFrame], stops: pd.DataFrame) -> Axes:
    """The probability of EOS at each reference answer's end, one dot a row, and each model's median."""
    ax, labels, medians = new_axes(1.4 + 0.8 * len(rows)), [], []
    for y, name in enumerate(rows):
        values = rows[name]["eos_probability"].dropna().to_numpy()
        spread = np.random.default_rng(0).uniform(-0.2, 0.2, len(values))
        ax.scatter(values, y + spread, s=22, color=_COLOURS[y % len(_COLOURS)], alpha=0.6, linewidths=0)
        medians.append(f"{name} {np.median(values):.3f}")
        ax.plot([np.median(values)] * 2, [y - 0.32, y + 0.32], color="black", linewidth=2)
        stopped = stops.loc[name]
        labels.append(f"{name}:\n{int(stopped['stopped'])} of {int(stopped['prompts'])}\nanswers stop")
    ax.set_yticks(range(len(rows)), labels)
    ax.set_ylim(len(rows) - 0.5, -0.5)
    ax.set_xlim(-0.02, 1.02)
    ax.set_xlabel("probability of EOS, one dot per held-out row")
    ax.set_title(f"Where an answer should end, EOS gets\n{', '.join(medians)} (median, black line)")
    ax.grid(axis="x", alpha=0.3)
    return ax
