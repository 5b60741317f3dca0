"""The two ways through a frozen int8 layer, drawn."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llama_sft_helpers.core.plots import BLUE, GREEN, ORANGE, SKY, new_diagram

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def plot_int8_units() -> Axes:
    """Draw the product of ``use_fast_int8`` on the left and that of ``use_int8_units`` on the right."""
    boxes = [
        (0, 7.6, 2.2, 1.5, "weight,\nint8", ORANGE),
        (2.5, 7.6, 2.2, 1.5, "inputs,\n16 bits", SKY),
        (0, 5.2, 2.2, 1.5, "weight,\n16 bits", SKY),
        (0.3, 2.8, 4.1, 1.5, "product on the\n16-bit units", BLUE),
        (0.3, 0.2, 4.1, 1.7, "plus LoRA\nin 16 bits", SKY),
        (5.3, 7.6, 2.2, 1.5, "weight,\nint8", ORANGE),
        (7.8, 7.6, 2.2, 1.5, "inputs,\n16 bits", SKY),
        (7.3, 5.2, 1.9, 1.5, "inputs,\nint8", ORANGE),
        (5.3, 2.8, 3.1, 1.5, "product on the\nint8 units", GREEN),
        (5.3, 0.2, 4.7, 1.7, "times scales, plus LoRA\nand outlier columns\nin 16 bits", SKY),
    ]
    arrows = [
        ((1.1, 7.6), (1.1, 6.7)),
        ((1.1, 5.2), (1.9, 4.3)),
        ((3.6, 7.6), (2.9, 4.3)),
        ((2.35, 2.8), (2.35, 1.9)),
        ((8.6, 7.6), (8.4, 6.7)),
        ((6.4, 7.6), (6.4, 4.3)),
        ((7.9, 5.2), (7.2, 4.3)),
        ((6.9, 2.8), (6.9, 1.9)),
        ((9.6, 7.6), (9.6, 1.9)),
    ]
    ax = new_diagram(9.4, boxes, arrows)
    ax.set_title('"fast" turns the weight into 16 bits (left),\n"int8 units" the inputs into int8 (right)')
    return ax
