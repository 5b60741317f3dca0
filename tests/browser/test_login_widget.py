"""Notebook 02 in JupyterLab and headless Chromium, with the real widget, kernel and hub client.

Run with ``make test-browser``; it needs Debian's ``chromium``. Screenshots: ``test-artifacts/browser``.
"""

import contextlib
import os
import re
import shutil
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from fake_hub import Account, FakeHub, wait_for

pytestmark = pytest.mark.browser

ROOT = Path(__file__).parent.parent.parent
ARTIFACTS = ROOT / "test-artifacts" / "browser"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
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
def lab(hub, folder):
    """The address of a JupyterLab that serves a copy of notebook 02."""
    pytest.importorskip("jupyterlab", reason="pip install jupyterlab playwright")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    options = [
        f"--ServerApp.port={port}",
        f"--ServerApp.root_dir={folder}",
        "--ServerApp.token=",
        "--ServerApp.open_browser=False",
        "--ServerApp.allow_root=True",
        "--LabApp.news_url=None",
        "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate",
    ]
    environment = {
        **os.environ,
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(folder / "hf"),
        "JUPYTER_CONFIG_DIR": str(folder / "config"),
        "JUPYTER_RUNTIME_DIR": str(folder / "runtime"),
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
    }
    ARTIFACTS.mkdir(parents=True, exist_ok=True)
    with (ARTIFACTS / "jupyterlab.log").open("w") as log:
        server = subprocess.Popen(
            [sys.executable, "-m", "jupyterlab", *options],
            cwd=folder,
            env=environment,
            stdout=log,
            stderr=log,
        )
        try:
            address = f"http://127.0.0.1:{port}"
            assert wait_for(lambda: _answers(f"{address}/api"), 60), "JupyterLab did not start; see its log"
            yield address
        finally:
            server.terminate()
            server.wait(20)


def _answers(address):
    with (
        contextlib.suppress(OSError, urllib.error.URLError),
        urllib.request.urlopen(address, timeout=2) as page,
    ):
        return page.status == 200
    return False


@pytest.fixture(scope="module")
def page(lab):
    """Notebook 02 in JupyterLab, all its cells run."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="pip install jupyterlab playwright")
    if not CHROMIUM:
        pytest.skip("no chromium: apt-get install chromium")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        page = browser.new_page(viewport={"width": 1100, "height": 900})
        page.set_default_timeout(60_000)
        page.goto(f"{lab}/lab/tree/02_login.ipynb?reset")
        page.get_by_text("Python 3 (ipykernel) | Idle").wait_for()
        page.get_by_role("menuitem", name="Run", exact=True).click()
        page.get_by_text("Run All Cells", exact=True).click()
        yield page
        browser.close()


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
    page.get_by_role("cell", name=LAST_CELL).wait_for(state="attached")
    page.screenshot(path=ARTIFACTS / "1-no-token.png")


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
    assert (folder / "hf" / "token").read_text() == RIGHT


def test_saved_notebook_holds_no_token(page, folder):
    notebook = folder / "02_login.ipynb"
    page.keyboard.press("Control+s")
    assert wait_for(lambda: f"<td>{LAST_CELL}</td>" in notebook.read_text(encoding="utf-8"), 20)
    saved = notebook.read_text(encoding="utf-8")
    for text in (saved, page.content(), (ARTIFACTS / "jupyterlab.log").read_text()):
        for token in (WRONG, RIGHT):
            assert token not in text
            assert token[3:-4] not in text
