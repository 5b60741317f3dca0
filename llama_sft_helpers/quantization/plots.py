"""The figures of notebook 03."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from llama_sft_helpers.core.plots import BLUE, COLOURS, RED, SKY, new_axes
from llama_sft_helpers.quantization.layers import quantize_absmax

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes


def plot_quantization_error(errors: pd.DataFrame) -> Axes:
    """Draw the relative error of every matrix, in % on a log scale: a dot a matrix, a colour a format.

    ``errors`` is ``summarize_quantization_error``'s table, or several of them concatenated.
    """
    from matplotlib.ticker import LogLocator, NullFormatter

    ax = new_axes(4.2, 7.2)
    modules = list(errors["module"].unique())
    for (kind, group), colour, marker in zip(
        errors.groupby("format", sort=False), COLOURS, "osD", strict=False
    ):
        places = [modules.index(module) for module in group["module"]]
        ax.plot(places, 100 * group["relative_error"], marker, ms=5, alpha=0.4, color=colour, label=kind)
    ax.set_xticks(range(len(modules)), modules)
    ax.set(
        yscale="log", ylabel="relative error of the weight (%)",
        title=f"Error that quantization adds to each matrix ({', '.join(errors['format'].unique())})",
    )  # fmt: skip
    ax.legend(loc="center right")
    ax.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))  # the axis may span less than a decade
    ax.yaxis.set_major_formatter("{x:g}")
    ax.yaxis.set_minor_formatter(NullFormatter())
    ax.grid(alpha=0.3)
    return ax


def plot_weight_grid(weight: torch.Tensor, row: int) -> Axes:
    """Draw one row of a weight on the 255 levels of its int8 grid; an inset enlarges six steps around zero.

    Args:
        weight: Matrix before quantization, shape (d_out, d_in).
        row: Output feature to show.

    Raises:
        ValueError: The matrix has no such row.
    """
    import numpy as np

    codes, absmax = quantize_absmax(weight)
    if not 0 <= row < len(weight):
        raise ValueError(f"row={row} is not a row of this matrix; it has rows 0 to {len(weight) - 1}.")
    values, step = weight[row].detach().float().cpu().numpy(), absmax[row].item() / 127
    if not step:
        raise ValueError(f"Row {row} holds only zeros and has no grid; choose another row.")
    counts = torch.bincount(codes[row].long().cpu() + 127, minlength=255)
    levels = [step * level for level in range(-127, 128)]
    ax = new_axes(4.2, 7.2)
    ax.bar(levels, counts.tolist(), width=step, color=BLUE)
    ax.set(
        xlabel="weight", ylabel="weights per level",
        title=f"Row {row}: {len(values)} weights on 255 levels, one step = {step:.3g}",
    )  # fmt: skip
    ax.margins(y=0.1)
    top = ax.secondary_xaxis("top", functions=(lambda x: np.divide(x, step), lambda x: np.multiply(x, step)))
    top.set_xlabel("int8 code")
    zoom = ax.inset_axes((0.66, 0.5, 0.33, 0.42))
    near = values[abs(values) < 3.5 * step]
    zoom.hist(near / step, bins=42, range=(-3.5, 3.5), color=SKY)
    for level in range(-3, 4):
        zoom.axvline(level, color=RED, lw=1)
    zoom.set_title("before rounding; lines: levels", fontsize=8)
    zoom.tick_params(labelsize=8)
    zoom.set_xlabel("weight / step", fontsize=8)
    return ax


def plot_outliers(outliers: pd.DataFrame) -> Axes:
    """Draw the twelve inputs of ``summarize_outliers``'s table that have the most outlier channels.

    A bar is an input's share of outlier channels in %, the number beside it their count. Inputs without an
    outlier are left out.
    """
    few = outliers[outliers["outlier_channels"] > 0].nlargest(12, "channels_share")[::-1]
    none = int((outliers["outlier_channels"] == 0).sum())
    ax = new_axes(1.6 + 0.26 * len(few), 7.2)
    names = [f"layer {row.layer}, {row.module}" for row in few.itertuples()]
    bars = ax.barh(names, 100 * few["channels_share"], color=BLUE)
    ax.bar_label(bars, labels=[str(count) for count in few["outlier_channels"]], padding=3)
    ax.set(
        xlabel="outlier channels (% of the input's channels; number: their count)",
        title=f"The {len(few)} inputs with the most outliers; {none} have none",
    )  # fmt: skip
    ax.margins(x=0.1)
    return ax
