"""A JupyterLab on a folder, and a notebook opened in headless Chromium with all its cells started."""

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

ARTIFACTS = Path(__file__).parent.parent.parent / "test-artifacts" / "browser"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
QUIET = ["--LabApp.news_url=None", "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate"]
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"]


@contextlib.contextmanager
def jupyter_lab(folder, environment):
    """The address of a JupyterLab that serves a folder; its kernels get the environment."""
    pytest.importorskip("jupyterlab", reason="pip install jupyterlab playwright")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    options = {"port": port, "root_dir": folder, "token": "", "open_browser": False, "allow_root": True}
    # JupyterLab draws only the cells in view, unless it is told to draw them all
    tracker = folder / "settings" / "@jupyterlab" / "notebook-extension" / "tracker.jupyterlab-settings"
    tracker.parent.mkdir(parents=True, exist_ok=True)
    tracker.write_text('{"windowingMode": "none"}', encoding="utf-8")
    folders = {
        "JUPYTERLAB_SETTINGS_DIR": "settings",
        "JUPYTER_CONFIG_DIR": "config",
        "JUPYTER_RUNTIME_DIR": "runtime",
    }
    environment = os.environ | environment | {key: str(folder / name) for key, name in folders.items()}
    environment["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), environment["PATH"]])
    ARTIFACTS.mkdir(parents=True, exist_ok=True)
    with (ARTIFACTS / "jupyterlab.log").open("w") as log:
        command = [sys.executable, "-m", "jupyterlab", *QUIET]
        command += [f"--ServerApp.{name}={value}" for name, value in options.items()]
        server = subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=log)
        try:
            address = f"http://127.0.0.1:{port}"
            assert wait_for(lambda: _answers(f"{address}/api"), 60), "JupyterLab did not start; see its log"
            yield address
        finally:
            server.terminate()
            server.wait(60)


def wait_for(condition, seconds):
    """Wait until a condition holds; whether it did in time."""
    end = time.monotonic() + seconds
    while not (held := condition()) and time.monotonic() < end:
        time.sleep(0.1)
    return held


def picture_of_widget(field, name):
    """A picture of the output that holds a field, as ``docs/widgets`` keeps it for the site."""
    output = field.locator("xpath=ancestor::div[contains(@class, 'jp-OutputArea-output')][1]")
    output.screenshot(path=ARTIFACTS / f"{name}.png")


def _answers(address):
    with contextlib.suppress(OSError), urllib.request.urlopen(address, timeout=2) as page:
        return page.status == 200
    return False


@contextlib.contextmanager
def open_and_run_all(address):
    """The page of a notebook, all of whose cells have been started."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="pip install jupyterlab playwright")
    if not CHROMIUM:
        pytest.skip("no chromium: apt-get install chromium")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        page = browser.new_page(viewport={"width": 1100, "height": 900})
        page.set_default_timeout(60_000)
        page.goto(address)
        page.get_by_text("Python 3 (ipykernel) | Idle").wait_for()
        page.get_by_role("menuitem", name="Run", exact=True).click()
        page.get_by_text("Run All Cells", exact=True).click()
        yield page
        browser.close()
