"""Notebook 06 in JupyterLab and headless Chromium: the bar and the plot while the tiny Llama trains.

Run with ``make test-browser``; it needs Debian's ``chromium``. Pictures: ``test-artifacts/browser``.
"""

import json
from pathlib import Path

import nbformat
import pytest
from browser_lab import ARTIFACTS, jupyter_lab, open_and_run_all, wait_for

pytestmark = pytest.mark.browser

ROOT = Path(__file__).parent.parent.parent
STEPS = 40
# The page itself notes what it shows, as a look from outside may be slower than the run.
WATCH = """() => {
  window.shown = { steps: [], plots: [] };
  const note = (list, value) => { if (value && list.at(-1) !== value) list.push(value); };
  const look = () => {
    const cells = [...document.querySelectorAll(".jp-CodeCell")];
    const cell = cells.find((each) => each.textContent.includes("result = trainer.train("));
    const bar = cell?.querySelector(".jp-OutputArea progress");
    note(window.shown.steps, bar && Number(bar.getAttribute("value")));
    note(window.shown.plots, cell?.querySelector(".jp-OutputArea img")?.src);
  };
  new MutationObserver(look).observe(document.body, {
    subtree: true, childList: true, attributes: true, attributeFilter: ["value", "src"],
  });
}"""


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
        page.evaluate(WATCH)
        yield page


@pytest.fixture(scope="module")
def output(page):
    """What is shown below the cell that trains."""
    cell = page.locator(".jp-CodeCell", has_text="result = trainer.train(")
    return cell.locator(".jp-OutputArea").last


def test_the_bar_and_the_plot_move_and_agree_at_the_end(output):
    plot = output.locator("img")
    plot.wait_for(timeout=300_000)
    output.screenshot(path=ARTIFACTS / "live-first.png")
    done = output.get_by_text(f"[{STEPS}/{STEPS} ")
    done.wait_for(timeout=120_000)
    assert wait_for(lambda: "<" not in done.inner_text(), 60)  # no time left is told any more
    output.screenshot(path=ARTIFACTS / "live-last.png")
    shown = output.page.evaluate("window.shown")
    *steps, last = shown["steps"]  # while it trains, the bar counts the step that runs as well: up to 41
    assert len(steps) > 2
    assert steps == sorted(steps)
    assert last == STEPS
    assert len(shown["plots"]) > 1
    assert output.locator("table").count() == plot.count() == 1
