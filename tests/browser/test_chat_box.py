"""Notebook 07's box in JupyterLab and headless Chromium, after the last cell, with the tiny Llama.

Run with ``make test-browser``; it needs Debian's ``chromium``. Screenshots: ``test-artifacts/browser``.
"""

import re
import shutil
from pathlib import Path

import pytest
from adapter_fixture import train_adapter
from browser_lab import ARTIFACTS, jupyter_lab, open_and_run_all, picture_of_widget

from llama_sft_helpers.profiles import load_profile
from llama_sft_helpers.training import hash_files, write_training_summary

pytestmark = pytest.mark.browser

ROOT = Path(__file__).parent.parent.parent
LAST_CELL = "tensors that the adapter changed in the merged files"  # a row of the last table


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Notebook 07, and in ``out`` the adapter that it finds."""
    folder = tmp_path_factory.mktemp("lab")
    summary = train_adapter(load_profile("ci-tiny"), folder / "out").summary
    summary["adapter_sha256"] = hash_files(folder / "out" / "adapter")
    write_training_summary(folder / "out" / "training_summary.json", summary)
    shutil.copy(ROOT / "notebooks" / "07_evaluation.ipynb", folder)
    return folder


@pytest.fixture(scope="module")
def page(folder):
    """Notebook 07 in JupyterLab, all its cells run."""
    with (
        jupyter_lab(folder, {"SFT_OUTPUT_DIR": str(folder / "out"), "SFT_PROFILE": "ci-tiny"}) as address,
        open_and_run_all(f"{address}/lab/tree/07_evaluation.ipynb?reset") as page,
    ):
        page.set_default_timeout(300_000)
        yield page


def field_of(page):
    """The box's field, scrolled into view."""
    field = page.get_by_placeholder("An instruction, then Enter")
    field.wait_for(state="attached")
    field.scroll_into_view_if_needed()
    return field


def test_a_message_typed_while_cells_run_arrives_whole_and_is_answered(page):
    field = field_of(page)
    picture_of_widget(field, "chat")
    field.press_sequentially("Name three fruits.")
    field.press("Enter")
    answered(page, "Name three fruits.")
    page.screenshot(path=ARTIFACTS / "5-chat-while-running.png")


def test_the_box_answers_after_the_last_cell(page):
    page.get_by_role("cell", name=LAST_CELL).wait_for(state="attached")
    field_of(page).press_sequentially("What is 17 + 25?")
    page.get_by_role("button", name="Send", exact=True).click()
    answered(page, "What is 17 + 25?")
    assert "no attribute" not in page.content()
    page.screenshot(path=ARTIFACTS / "6-chat-after-the-last-cell.png")


def answered(page, question):
    """Wait for the question as it was typed, and for an answer that is more than the dots."""
    from playwright.sync_api import expect  # not installed for the other tests

    said = page.locator("p", has_text=f"you: {question}")
    said.wait_for()
    assert said.inner_text() == f"you: {question}"
    answer = said.locator("xpath=following-sibling::p[1]")
    # The box draws all its text anew with every piece of an answer, so no element may be held on to.
    expect(answer).not_to_have_text(re.compile("…$"), timeout=300_000)
    assert answer.inner_text().startswith("tuned: ")
    assert "[" not in answer.inner_text(), answer.inner_text()
