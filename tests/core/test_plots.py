"""The drawn diagrams: what they say is computed, and a phone shows it in a size that can be read."""

import re
from pathlib import Path

import matplotlib.pyplot as plt
import pytest
import torch

from llama_sft_helpers import data, environment, lora, quantization

NOTEBOOKS = sorted((Path(__file__).parents[2] / "notebooks").glob("0*.ipynb"))
X, W = torch.tensor([0.5, -1.0, 0.25, 0.03]), torch.tensor([0.02, -0.01, 0.04, 0.003])
DIAGRAMS = {
    "pipeline": environment.plot_pipeline,
    "detour": lambda: lora.plot_detour(4096, 4096, 16),
    "int8 product": lambda: quantization.plot_int8_product(X, W),
    "packing mask": lambda: data.plot_packing_mask([5, 3, 4]),
}


@pytest.fixture(params=DIAGRAMS)
def drawn(request):
    yield DIAGRAMS[request.param]()
    plt.close("all")


def words(ax):
    ticks = [*ax.get_xticklabels(), *ax.get_yticklabels(), ax.xaxis.label, ax.yaxis.label] * ax.axison
    return [text for text in [ax.title, *ax.texts, *ticks] if text.get_text()]


def test_a_phone_shows_text_of_nine_points_and_nothing_is_cut(drawn):
    drawn.figure.canvas.draw()
    phone_points = 358 * 72 / 96  # a screen of 390 pixels without its margins
    scale = phone_points / (72 * drawn.figure.get_size_inches()[0] + 8)  # with the margin of a saved figure
    for text in words(drawn):
        assert text.get_fontsize() * scale >= 9, text
        box = text.get_window_extent()
        assert box.x0 >= 0, text
        assert box.x1 <= drawn.figure.bbox.x1, text


def test_the_pipeline_names_every_notebook():
    shown = "\n".join(text.get_text() for text in words(environment.plot_pipeline()))
    assert sorted(re.findall(r"\b0\d\b", shown)) == [path.name[:2] for path in NOTEBOOKS]


def test_the_detour_counts_its_weights():
    assert "0.78%" in lora.plot_detour(4096, 4096, 16).get_title()  # 16 * 8192 of 4096 * 4096


def test_the_int8_product_is_that_of_the_codes():
    shown = [text.get_text() for text in words(DIAGRAMS["int8 product"]())]
    assert {"64", "-127", "32", "4", "127", "10"} <= set(shown)
    assert f"{64 * 64 + 127 * 32 + 32 * 127 + 4 * 10:,}" in shown
    assert f"{(X @ W).item():.4f}" in " ".join(shown)


def test_the_mask_fills_each_rows_own_triangle():
    squares = data.plot_packing_mask([5, 3, 4]).collections
    hatched = sum(bool(square.get_hatch()) for square in squares)
    assert len(squares) == 12 * 13 // 2
    assert len(squares) - hatched == 5 * 6 // 2 + 3 * 4 // 2 + 4 * 5 // 2
