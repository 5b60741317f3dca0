"""``play.html`` from a file in headless Chromium, without a network: its arithmetic and its controls.

Run with ``make test-browser``; it needs Debian's ``chromium``. Screenshots: ``test-artifacts/browser``.
"""

import json

import pytest
from browser_lab import ARTIFACTS
from play_settings import assert_equal, settings

from llama_sft_helpers.play import play_data, play_page

pytestmark = pytest.mark.browser

VIEWS = [(width, scheme) for width in (1280, 390) for scheme in ("light", "dark")]


@pytest.fixture(params=VIEWS, ids=lambda view: f"{view[0]}-{view[1]}")
def page(chromium, tmp_path, request):
    """The page in a window; what it complains about, or asks a network for, fails the test."""
    (tmp_path / "play.html").write_text(play_page(), encoding="utf-8")
    width, scheme = request.param
    page = chromium.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme, offline=True)
    complaints = []
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("request", lambda asked: complaints.extend([asked.url] * (not asked.url.startswith("file:"))))
    page.goto((tmp_path / "play.html").as_uri())
    yield page
    ARTIFACTS.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=ARTIFACTS / f"play-{width}-{scheme}.png", full_page=True)
    page.close()
    assert complaints == []


def said(page, section):
    return page.locator(f"#{section} [role=status]").inner_text()


def test_chromium_and_python_agree_on_200_settings(page):
    expected = settings(json.loads(json.dumps(play_data())))
    calls = [[name, args] for name, args, _ in expected]
    script = "calls => calls.map(([name, args]) => window[name](DATA, ...args))"
    assert_equal(expected, page.evaluate(script, calls))


def test_each_section_follows_its_controls(page):
    assert "41,943,040 trainable parameters, 0.52%" in said(page, "lora")
    page.get_by_label("Rank r", exact=True).fill("8")
    page.get_by_label("down_proj", exact=True).uncheck()
    assert "16,252,928 trainable parameters" in said(page, "lora")
    page.get_by_label("Bits of a weight", exact=True).fill("8")
    assert "255 levels" in said(page, "grid")
    page.get_by_label("max_length", exact=True).fill("146")
    assert "EOS is lost, and with it 14 tokens" in said(page, "tokens")
    page.get_by_label("Answer", exact=True).fill("1.2.0")
    assert "Kept whole" in said(page, "tokens")
    page.get_by_label("Card", exact=True).select_option("16 GB")
    assert "It fits: 11.6 of 14.6 GiB" in said(page, "memory")
    page.get_by_label("Rows in a micro-batch", exact=True).fill("5")
    assert "does not fit" in said(page, "memory")
    page.get_by_label("Rung", exact=True).select_option("plain")
    assert "“plain” takes 2.35 h and costs 5.88" in said(page, "cost")


def test_all_is_in_the_window_and_each_figure_has_words(page):
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    figures = page.get_by_role("img").all()
    assert len(figures) == 4
    assert all(len(figure.get_attribute("aria-label")) > 40 for figure in figures)
