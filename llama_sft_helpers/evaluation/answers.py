"""Answers side by side, and whether the model knows when to stop."""

from __future__ import annotations

import html
import itertools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch

from llama_sft_helpers.core.plots import BLUE, GREEN, ORANGE, PINK, RED, SKY, new_axes

if TYPE_CHECKING:
    from IPython.display import HTML
    from matplotlib.axes import Axes

_PALETTE = (RED, BLUE, GREEN, PINK, ORANGE, SKY)  # with more models it begins again


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
    ax = ax or new_axes(1.4 + 0.8 * len(rows))
    labels, medians = [], []
    for y, (name, colour) in enumerate(zip(rows, itertools.cycle(_PALETTE), strict=False)):
        values = rows[name]["eos_probability"].dropna().to_numpy()
        spread = np.random.default_rng(0).uniform(-0.2, 0.2, len(values))
        ax.scatter(values, y + spread, s=22, color=colour, alpha=0.6, linewidths=0)
        medians.append(f"{name} {np.median(values):.2f}")
        ax.plot([np.median(values)] * 2, [y - 0.32, y + 0.32], color="black", linewidth=2)
        stopped = stops.loc[name]
        labels.append(f"{name}:\n{int(stopped['stopped'])} of {int(stopped['prompts'])}\nanswers stop")
    ax.set_yticks(range(len(rows)), labels)
    ax.set_ylim(len(rows) - 0.5, -0.5)
    ax.set_xlim(-0.02, 1.02)
    ax.set_xlabel("probability of EOS, one dot a held-out row")
    ax.set_title(f"Where an answer should end, EOS gets\n{', '.join(medians)} (median, black line)")
    ax.grid(axis="x", alpha=0.3)
    return ax
