"""LoRA's detour, drawn."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llama_sft_helpers.core.plots import BLUE, ORANGE, new_diagram

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def plot_detour(d_in: int, d_out: int, r: int) -> Axes:
    """Draw W beside B and A, each with its shape; r is drawn wider than to scale, to be seen."""
    boxes = [
        (0.4, 2.6, 4, 4, f"W, frozen\n{d_out:,} × {d_in:,}\n{d_out * d_in:,}\nweights", BLUE),
        (5.6, 2.6, 4, 0.8, f"A  {r} × {d_in:,}", ORANGE),
        (7.2, 4.2, 0.8, 2.4, "B", ORANGE),
    ]
    arrows = [
        *(((5, 1), (x, 2.6)) for x in (2.4, 7.6)),
        ((7.6, 3.4), (7.6, 4.2)),
        *(((x, 6.6), (5, 8.2)) for x in (2.4, 7.6)),
    ]
    ax = new_diagram(9, boxes, arrows)
    ax.text(5, 0.9, "x", ha="center", va="top")
    ax.text(5, 8.3, "y = W x + α/r · B (A x)", ha="center")
    ax.text(8.2, 5.4, f"{d_out:,} × {r}", va="center")
    ax.text(6.7, 7.4, "times α/r", ha="left")
    ax.set_title(f"The detour trains {r * (d_in + d_out) / (d_in * d_out):.2%} as many weights as W has")
    return ax
