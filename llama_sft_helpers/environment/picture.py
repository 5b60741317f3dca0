"""The series in one picture."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llama_sft_helpers.core.plots import GREEN, ORANGE, SKY, new_diagram

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def plot_pipeline() -> Axes:
    """Draw the nine notebooks and what each hands to the next; the numbers are the notebooks'."""
    boxes = [
        (0, 10.4, 4.7, 1.5, "01 environment:\ndoes it fit?", SKY),
        (5.3, 10.4, 4.7, 1.5, "02 login: may you\ndownload it?", SKY),
        (0, 7.3, 4.7, 2.1, "03 quantization:\n8-bit weights,\nfrozen", ORANGE),
        (0, 5.4, 4.7, 1.5, "04 LoRA: small\nmatrices, trained", ORANGE),
        (0, 3.5, 4.7, 1.5, "05 data: tokens\nand labels", ORANGE),
        (6.1, 5.4, 3.9, 1.5, "06 training:\nan adapter", GREEN),
        (6.1, 3, 3.9, 1.5, "07 evaluation,\nmerge, export", GREEN),
        (0, 1.2, 10, 0.9, "08 speed: the same training, faster", GREEN),
        (0, 0, 10, 0.9, "09 your run: all of it, with your own data", GREEN),
    ]
    into_training = [((4.7, y), (6.1, end)) for y, end in ((8.2, 6.6), (6.15, 6.15), (4.4, 5.7))]
    ax = new_diagram(12, boxes, [*into_training, ((8, 5.4), (8, 4.5))])
    ax.set_title("The series: three parts, one training")
    return ax
