"""What figures share: Okabe and Ito's colours, which every kind of colour vision tells apart, and axes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Their yellow is left out: it does not show on white.
BLUE, ORANGE, GREEN, RED, PINK, SKY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9"
COLOURS = (BLUE, ORANGE, GREEN, RED, PINK, SKY, "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")

WIDTH = 4.8  # inches; text of 12 points is then still one of 9 points on a phone that is 390 pixels wide
_STYLE = {"font.size": 12, "axes.titlesize": 12, "legend.framealpha": 1}


def new_axes(height: float) -> Axes:
    """Axes of a figure of their own, in the style of all figures; the height in inches."""
    import matplotlib.pyplot as plt

    plt.rcParams.update(_STYLE)
    ax: Axes = plt.subplots(figsize=(WIDTH, height), layout="constrained")[1]
    ax.title.set_wrap(True)
    return ax


def new_diagram(
    height: float,
    boxes: Iterable[tuple[float, float, float, float, str, str]],
    arrows: Iterable[tuple[tuple[float, float], tuple[float, float]]],
) -> Axes:
    """Axes with boxes and arrows; all lengths in tenths of the figure's width, from its lower left corner.

    Args:
        height: Of the figure.
        boxes: x and y of the lower left corner, width, height, text and colour of each.
        arrows: Start and end of each, as x and y.
    """
    ax = new_axes(height * WIDTH / 10)
    ax.set(xlim=(0, 10), ylim=(0, height))
    ax.set_axis_off()
    for x, y, width, tall, text, colour in boxes:
        ax.fill_between([x, x + width], y, y + tall, facecolor=(colour, 0.25), edgecolor="black")
        ax.text(x + width / 2, y + tall / 2, text, ha="center", va="center")
    for start, end in arrows:
        ax.annotate("", end, start, arrowprops={"arrowstyle": "->", "linewidth": 1.5})
    return ax
