"""Notebook 02 in JupyterLab and headless Chromium, with the real widget, kernel and hub client.

Run with ``make test-browser``; it needs Debian's ``chromium``. Screenshots: ``test-artifacts/browser``.
"""

import re
import shutil
from pathlib import Path

import pytest
from browser_lab import ARTIFACTS, jupyter_lab, open_and_run_all, picture_of_widget, wait_for
from fake_hub import Account, FakeHub

pytestmark = pytest.mark.browser

ROOT = Path(__file__).parent.parent.parent
MODEL = "meta-llama/Meta-Llama-3-8B"
LAST_CELL = "seconds that the log-in cell waits for a token"  # a row of the table that closes the notebook
WRONG, RIGHT = "hf_WrongTokenTypedByMistake1234", "hf_RightTokenTypedInTheBrowser5678"


@pytest.fixture(scope="module")
def hub():
    with FakeHub() as hub:
        hub.repos[MODEL] = "gated"
        hub.accounts[RIGHT] = Account("ada", grants={MODEL: "accepted"})
        yield hub


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lab")
    shutil.copy(ROOT / "notebooks" / "02_login.ipynb", folder)
    return folder


@pytest.fixture(scope="module")
def page(hub, folder):
    """Notebook 02 in JupyterLab, all its cells run."""
    with (
        jupyter_lab(folder, {"HF_ENDPOINT": hub.url, "HF_HOME": str(folder / "hf")}) as address,
        open_and_run_all(f"{address}/lab/tree/02_login.ipynb?reset") as page,
    ):
        yield page


def status_of(page, state):
    """The widget's status line once it is in a state; scrolled into view."""
    line = page.locator(f"[role=status][data-state={state}]", has_text=re.compile(r"\w"))
    line.wait_for()
    line.scroll_into_view_if_needed()
    return line.text_content()


def field_of(page):
    field = page.locator("input[type=password]")
    field.wait_for()
    return field


def test_run_all_does_not_wait_for_a_token(page):
    assert "No token found" in status_of(page, "idle")
    page.get_by_role("rowheader", name=LAST_CELL).wait_for(state="attached")
    page.screenshot(path=ARTIFACTS / "1-no-token.png")
    picture_of_widget(field_of(page), "login")


def test_wrong_token_with_enter(page):
    field = field_of(page)
    field.fill(WRONG)
    page.screenshot(path=ARTIFACTS / "2-typed.png")
    field.press("Enter")
    assert "invalid-token" in status_of(page, "error")
    assert field.input_value() == ""
    page.screenshot(path=ARTIFACTS / "3-wrong-token.png")


def test_right_token_with_the_button(page, hub, folder):
    field = field_of(page)
    field.fill(RIGHT)
    page.get_by_role("button", name="Log in", exact=True).click()
    text = status_of(page, "ok")
    assert "Logged in as ada" in text
    assert f"{MODEL} is open" in text
    assert field.input_value() == ""
    page.screenshot(path=ARTIFACTS / "4-logged-in.png")
    assert (folder / "hf" / "token").read_text(encoding="utf-8") == RIGHT


def test_saved_notebook_holds_no_token(page, folder):
    notebook = folder / "02_login.ipynb"
    page.keyboard.press("Control+s")
    assert wait_for(lambda: f"<th>{LAST_CELL}</th>" in notebook.read_text(encoding="utf-8"), 20)
    saved = notebook.read_text(encoding="utf-8")
    for text in (saved, page.content(), (ARTIFACTS / "jupyterlab.log").read_text(encoding="utf-8")):
        for token in (WRONG, RIGHT):
            assert token not in text
            assert token[3:-4] not in text
