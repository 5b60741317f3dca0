"""The figures of notebook 03."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from llama_sft_helpers.core.plots import BLUE, COLOURS, GREEN, ORANGE, RED, SKY, new_axes, new_diagram
from llama_sft_helpers.quantization.layers import quantize_absmax

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes


def plot_quantization_error(errors: pd.DataFrame) -> Axes:
    """Draw the relative error of every matrix, in % on a log scale: a mark a matrix, a colour a format.

    ``errors`` is ``summarize_quantization_error``'s table, or several of them concatenated.
    """
    from matplotlib.ticker import LogLocator, NullFormatter

    ax = new_axes(4)
    modules = list(errors["module"].unique())
    for (kind, group), colour, marker in zip(
        errors.groupby("format", sort=False), COLOURS, "osD", strict=False
    ):
        places = [modules.index(module) for module in group["module"]]
        ax.plot(places, 100 * group["relative_error"], marker, ms=5, alpha=0.4, color=colour, label=kind)
    ax.set_xticks(range(len(modules)), modules, rotation=40, ha="right", rotation_mode="anchor")
    means = 100 * errors.groupby("format", sort=False)["relative_error"].mean()
    about = ", ".join(f"{kind} {mean:.2g}%" for kind, mean in means.items())
    ax.set(yscale="log", ylabel="relative error (%, log scale)", title=f"Mean error of a matrix: {about}")
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
    codes, absmax = quantize_absmax(weight)
    if not 0 <= row < len(weight):
        raise ValueError(f"row={row} is not a row of this matrix; it has rows 0 to {len(weight) - 1}.")
    values, step = weight[row].detach().float().cpu().numpy(), absmax[row].item() / 127
    if not step:
        raise ValueError(f"Row {row} holds only zeros and has no grid; choose another row.")
    counts = torch.bincount(codes[row].long().cpu() + 127, minlength=255)
    levels = [step * level for level in range(-127, 128)]
    ax = new_axes(4)
    ax.bar(levels, counts.tolist(), width=step, color=BLUE)
    used = int((counts > 0).sum())
    ax.set(
        xlabel="weight", ylabel="weights per level",
        title=f"Row {row}, {len(values)} weights: {used} of 255 levels are used; one step is {step:.3g}",
    )  # fmt: skip
    zoom = ax.inset_axes((0.66, 0.5, 0.33, 0.36))
    near = values[abs(values) < 3.5 * step]
    zoom.hist(near / step, bins=42, range=(-3.5, 3.5), color=SKY)
    for level in range(-3, 4):
        zoom.axvline(level, color=RED, lw=1)
    zoom.set_title("before rounding;\nlines: levels")
    zoom.set(xlabel="weight / step", ylabel="weights")
    zoom.locator_params(axis="y", nbins=2, integer=True)
    return ax


def plot_rounding(weights: torch.Tensor, bits: int) -> Axes:
    """Draw weights that share one scale, and by a line the level that absmax quantization takes each to.

    Args:
        weights: Of one row, shape (n,), not all 0.
        bits: Of a code, 2 to 8; there are ``2 ** bits - 1`` levels, as in int8.

    Raises:
        ValueError: Another number of bits, no weight but 0, or what ``quantize_absmax`` refuses.
    """
    values = weights.detach().cpu().half().float()  # as bitsandbytes casts them
    (codes,), (absmax,) = quantize_absmax(values[None], bits)
    if not absmax > 0:
        raise ValueError("All weights are 0 in float16, expected one that is not: no step divides them.")
    top = 2 ** (bits - 1) - 1
    step = absmax / top
    levels = (step * torch.arange(-top, top + 1)).tolist()
    error = (codes * step - values).square().mean().sqrt()
    ax = new_axes(3.2)
    ax.eventplot(levels, lineoffsets=0, linelengths=0.3, colors="0.6")
    ax.plot(torch.stack([values, codes * step]), [1, 0], "o-", ms=4, lw=0.8, color=BLUE, alpha=0.6)
    ax.set_yticks([1, 0], ["weights", "levels"])
    ax.set(xlabel="weight", ylim=(-0.3, 1.2))
    ax.set_title(
        f"{bits} bits: {len(codes.unique())} of {len(levels)} levels are used\n"
        f"step {step:.3g}, root mean square error {error:.2g}"
    )
    return ax


def plot_int8_product(x: torch.Tensor, w: torch.Tensor) -> Axes:
    """Draw how an input x and a row w of the weight, both of at most four numbers, give an output in int8."""
    codes, absmax = quantize_absmax(torch.stack([x, w]))
    total = int(codes[0].int() @ codes[1].int())
    rows = [(7.6, x, SKY), (6.5, codes[0], SKY), (4.9, w, BLUE), (3.8, codes[1], BLUE)]
    boxes = [
        (3.2 + 1.7 * place, y, 1.7, 1, f"{number:g}", colour)
        for y, row, colour in rows
        for place, number in enumerate(row.tolist())
    ]
    result = total * (absmax[0] * absmax[1] / 127**2).item()
    boxes += [(3.2, 2.1, 6.8, 1, f"{total:,}", ORANGE), (3.2, 0.4, 6.8, 1, f"{result:.4f}", GREEN)]
    ax = new_diagram(9, boxes, [((6.6, 3.8), (6.6, 3.1)), ((6.6, 2.1), (6.6, 1.4))])
    names = ["token's input", "its codes", "weight's row", "its codes", "sum in int32", "output"]
    for y, name in zip((8.1, 7, 5.4, 4.3, 2.6, 0.9), names, strict=True):
        ax.text(3, y, name, ha="right", va="center")
    ax.text(6.4, 1.75, f"times {absmax[0]:.2g} · {absmax[1]:.2g} / 127²", ha="right", va="center")
    ax.set_title(f"In int8 the output is {result:.4f}, without rounding {(x @ w).item():.4f}")
    return ax


def plot_outliers(outliers: pd.DataFrame) -> Axes:
    """Draw the eight inputs of ``summarize_outliers``'s table that have the most outlier channels.

    A bar is an input's share of outlier channels in %, the number beside it their count. Inputs without an
    outlier are left out.
    """
    few = outliers[outliers["outlier_channels"] > 0].nlargest(8, "channels_share")[::-1]
    none = int((outliers["outlier_channels"] == 0).sum())
    ax = new_axes(1.8 + 0.26 * len(few))
    names = [f"layer {row.layer}, {row.module}" for row in few.itertuples()]
    bars = ax.barh(names, 100 * few["channels_share"], color=BLUE)
    ax.bar_label(bars, labels=[str(count) for count in few["outlier_channels"]], padding=3)
    ax.set(
        xlabel="outlier channels (% of all);\nbeside each bar: how many",
        title=f"{none} of {len(outliers)} inputs have no outlier" + "; these have the most" * (len(few) > 0),
    )  # fmt: skip
    ax.margins(x=0.15)
    return ax
