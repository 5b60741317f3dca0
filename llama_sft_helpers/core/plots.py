"""What figures share: Okabe and Ito's colours, which every kind of colour vision tells apart, and axes."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Their yellow is left out: it does not show on white.
BLUE, ORANGE, GREEN, RED, PINK, SKY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9"
COLOURS = (BLUE, ORANGE, GREEN, RED, PINK, SKY, "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")


def new_axes(height: float, width: float = 7) -> Axes:
    """Axes of a figure of their own; sizes in inches."""
    import matplotlib.pyplot as plt

    return plt.subplots(figsize=(width, height), layout="constrained")[1]
