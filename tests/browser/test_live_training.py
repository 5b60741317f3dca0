"""Notebook 06 in JupyterLab and headless Chromium: the bar and the plot while the tiny Llama trains.

Run with ``make test-browser``; it needs Debian's ``chromium``. Frames: ``test-artifacts/browser``.
"""

import json
from pathlib import Path

import nbformat
import pytest
from browser_lab import ARTIFACTS, jupyter_lab, open_and_run_all, wait_for

pytestmark = pytest.mark.browser

ROOT = Path(__file__).parent.parent.parent
STEPS = 40
FRAMES = 120


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """Notebook 06 in JupyterLab, all its cells started."""
    folder = tmp_path_factory.mktemp("lab")
    notebook = nbformat.read(ROOT / "notebooks" / "06_training.ipynb", as_version=4)
    for cell in notebook.cells:
        cell.update({"outputs": []} if cell.cell_type == "code" else {})  # else the recorded run would show
    nbformat.write(notebook, folder / "06_training.ipynb")
    settings = json.dumps({"max_steps": STEPS, "eval_steps": 20, "save_steps": 20})
    environment = {"SFT_OUTPUT_DIR": str(folder / "out"), "SFT_PROFILE": "ci-tiny", "SFT_SETTINGS": settings}
    environment["OMP_NUM_THREADS"] = "1"
    with (
        jupyter_lab(folder, environment) as address,
        open_and_run_all(f"{address}/lab/tree/06_training.ipynb?reset") as page,
    ):
        yield page


@pytest.fixture(scope="module")
def output(page):
    """What is shown below the cell that trains."""
    cell = page.locator(".jp-CodeCell", has_text="result = trainer.train(")
    return cell.locator(".jp-OutputArea").last


def test_the_bar_and_the_plot_move_and_agree_at_the_end(output):
    bar, plot = output.locator("progress").first, output.locator("img")
    plot.wait_for(timeout=300_000)
    steps, plots = set(), set()
    for frame in range(FRAMES):
        steps.add(int(bar.get_attribute("value")))
        plots.add(plot.get_attribute("src"))
        output.screenshot(path=ARTIFACTS / f"live-{frame:02}.png")
        if max(steps) == STEPS:
            break
        output.page.wait_for_timeout(1000)
    assert len(steps) > 2
    assert len(plots) > 1
    done = output.get_by_text(f"[{STEPS}/{STEPS} ")
    assert wait_for(lambda: "<" not in done.inner_text(), 60)  # no time left is told any more
    assert output.locator("table").count() == plot.count() == 1
