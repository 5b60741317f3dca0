"""The figures of notebook 03."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from llama_sft_helpers.core.llama import LINEARS
from llama_sft_helpers.core.plots import BLUE, COLOURS, RED, SKY, new_axes
from llama_sft_helpers.quantization.layers import quantize_absmax

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes


def plot_quantization_error(errors: pd.DataFrame) -> Axes:
    """Draw the relative error of every projection over the depth of the model.

    Args:
        errors: ``summarize_quantization_error``'s table, or several of them concatenated.

    Returns:
        Axes: decoder layer against relative Frobenius error in %, log scale; a colour per module, a line
        style per format.
    """
    from matplotlib.lines import Line2D
    from matplotlib.ticker import MaxNLocator

    ax = new_axes(4.6, 7.2)
    styles = dict(zip(errors["format"].unique(), (("-", "o"), ("--", "s"), (":", "^")), strict=False))
    colours = dict(zip(errors["module"].unique(), COLOURS, strict=False))
    for (module, kind), group in errors.groupby(["module", "format"], sort=False):
        line, marker = styles[kind]
        shown = group.sort_values("layer")
        style = {"marker": marker, "ms": 3, "lw": 1.2, "color": colours[module]}
        ax.plot(shown["layer"], 100 * shown["relative_error"], line, **style)
    handles = [Line2D([], [], color=colour, lw=3, label=module) for module, colour in colours.items()]
    handles += [
        Line2D([], [], color="#555555", ls=ls, marker=m, label=kind) for kind, (ls, m) in styles.items()
    ]
    ax.legend(handles=handles, loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    ax.set(
        yscale="log", xlabel="decoder layer", ylabel="relative error of the weight (%)",
        title=f"Error that quantization adds to each weight matrix ({', '.join(styles)})",
    )  # fmt: skip
    _percent_ticks(ax)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    return ax


def plot_weight_grid(weight: torch.Tensor, row: int = 0) -> Axes:
    """Draw one row of a weight on the 255 levels of its int8 grid.

    Args:
        weight: Matrix before quantization, shape (d_out, d_in).
        row: Output feature to show.

    Returns:
        Axes: weights per level over the weight's value; an inset enlarges six steps around zero.

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
    """Draw how many channels of each layer's input are outliers.

    Args:
        outliers: ``summarize_outliers``'s table.

    Returns:
        Axes: a heat map, decoder layer by module. Colour: share of channels in %; number: their count.
    """
    from matplotlib.colors import PowerNorm

    order = sorted(outliers["module"].unique(), key=lambda m: (*LINEARS, m).index(m))
    shares = 100 * outliers.pivot_table(index="layer", columns="module", values="channels_share")[order]
    counts = outliers.pivot_table(index="layer", columns="module", values="outlier_channels")[order]
    ax = new_axes(1.6 + 0.26 * len(shares), 7.2)
    # a square root scale, so that one channel among hundreds differs from none
    image = ax.imshow(shares, aspect="auto", cmap="cividis", norm=PowerNorm(0.5, vmin=0))
    ax.figure.colorbar(image, ax=ax, label="outlier channels (% of the input's channels)")
    for y in range(len(shares)):
        for x in range(len(order)):
            dark = image.norm(float(shares.to_numpy()[y, x])) < 0.5
            ax.text(
                x, y, f"{counts.iloc[y, x]:.0f}", ha="center", va="center", fontsize=8,
                color="white" if dark else "black",
            )  # fmt: skip
    ax.set_xticks(range(len(order)), order)
    ax.set_yticks(range(len(shares)), shares.index)
    ax.set(
        xlabel="module whose input is measured", ylabel="decoder layer", title="Outlier channels per layer"
    )
    return ax


def _percent_ticks(ax: Axes) -> None:
    """Plain numbers on a log axis that may span less than a decade."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    ax.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    ax.yaxis.set_minor_formatter(NullFormatter())
    ax.grid(alpha=0.3)
