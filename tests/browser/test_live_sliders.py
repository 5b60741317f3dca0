"""Notebook 01's controls in JupyterLab and headless Chromium: the figure follows them.

Run with ``make test-browser``; it needs Debian's ``chromium``. Screenshots: ``test-artifacts/browser``.
"""

import shutil
from pathlib import Path

import pytest
from browser_lab import ARTIFACTS, jupyter_lab, open_and_run_all

pytestmark = pytest.mark.browser

NOTEBOOK = Path(__file__).parent.parent.parent / "notebooks" / "01_environment.ipynb"


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """Notebook 01 in JupyterLab, all its cells run."""
    folder = tmp_path_factory.mktemp("lab")
    shutil.copy(NOTEBOOK, folder)
    with (
        jupyter_lab(folder, {"SFT_PROFILE": "ci-tiny"}) as address,
        open_and_run_all(f"{address}/lab/tree/{NOTEBOOK.name}?reset") as page,
    ):
        page.set_default_timeout(180_000)
        yield page


def test_the_figure_follows_the_controls(page):
    box = page.locator(".widget-interact")
    box.wait_for()
    box.scroll_into_view_if_needed()
    figure = box.locator("img")
    figure.wait_for()
    box.screenshot(path=ARTIFACTS / "sliders-1-as-the-notebook-sets-them.png")
    seen = {figure.get_attribute("src")}
    for change in (
        lambda: box.get_by_role("combobox").select_option("colab-l4"),
        lambda: box.get_by_role("checkbox").check(),
    ):
        change()
        page.wait_for_function(
            "seen => !seen.includes(document.querySelector('.widget-interact img')?.src ?? seen[0])",
            arg=list(seen),
        )
        seen.add(figure.get_attribute("src"))
    box.screenshot(path=ARTIFACTS / "sliders-2-another-card-and-checkpointing.png")
    assert len(seen) == 3
