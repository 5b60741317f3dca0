"""The built site in headless Chromium: it asks no other machine, fits its window, and is accessible.

Run ``make docs``, then ``make test-browser``. Screenshots: ``test-artifacts/browser``. axe is a file that
``npm install axe-core`` brings; the environment's ``AXE_JS`` names it.
"""

import functools
import http.server
import os
import threading
from pathlib import Path

import pytest
from browser_lab import ARTIFACTS, wait_for

pytestmark = pytest.mark.browser

SITE = Path(os.environ.get("SITE_DIR", Path(__file__).parent.parent.parent / "site"))
AXE = os.environ.get("AXE_JS")
SHOWN = (
    "index.html",
    "notebooks/03_quantization/index.html",
    "api/training/index.html",
    "benchmarks/index.html",
    "ko/index.html",
    "ko/notebooks/03_quantization/index.html",
)
TRANSLATED = Path(__file__).parent.parent.parent / "notebooks" / "ko"


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *words):
        """Say nothing."""


@pytest.fixture(scope="module")
def address():
    """The address of a server that serves the site."""
    if not (SITE / "index.html").is_file():
        pytest.skip("no site: make docs")
    with http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(Quiet, directory=SITE)
    ) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


@pytest.fixture(params=[(1280, "light"), (1280, "dark"), (390, "light"), (390, "dark")], ids=str)
def visit(request, address, chromium):
    """Opens a page in a window of a width and a colour scheme; and the addresses that it asked elsewhere."""
    width, scheme = request.param
    context = chromium.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
    page, elsewhere = context.new_page(), []
    page.on("request", lambda asked: asked.url.startswith((address, "data:")) or elsewhere.append(asked.url))

    def visit(name):
        page.goto(address + name)
        if name in SHOWN:
            ARTIFACTS.mkdir(parents=True, exist_ok=True)
            page.screenshot(path=ARTIFACTS / f"site-{name.replace('/', '-')}-{width}-{scheme}.png")
        return page, elsewhere

    yield visit
    context.close()


def names():
    """Every page of the site but the one for a wrong address, which knows only its place on GitHub."""
    return sorted(str(path.relative_to(SITE)) for path in SITE.rglob("*.html") if path.name != "404.html")


def test_pages_fit_their_window_and_ask_no_other_machine(visit):
    for name in names():
        page, elsewhere = visit(name)
        too_wide = page.evaluate("document.documentElement.scrollWidth - innerWidth")
        assert (name, too_wide, elsewhere) == (name, 0, [])


def test_axe_finds_nothing_serious(visit):
    if not AXE:
        pytest.skip("no axe: npm install axe-core, then AXE_JS=node_modules/axe-core/axe.min.js")
    for name in names():
        page, _ = visit(name)
        page.evaluate(Path(AXE).read_text(encoding="utf-8") + "; 0")
        found = page.evaluate("axe.run().then(result => result.violations)")
        grave = [finding for finding in found if finding["impact"] in ("serious", "critical")]
        serious = [(finding["id"], finding["nodes"][0]["html"]) for finding in grave]
        assert (name, serious) == (name, [])


@pytest.mark.parametrize(
    ("start", "word", "place"),
    [
        ("index.html", "absmax", "/notebooks/03_quantization"),
        ("ko/index.html", "양자화", "/ko/notebooks/03_quantization"),
    ],
)
def test_search_finds_what_a_notebook_says(visit, start, word, place):
    page, _ = visit(start)

    def field_opens():  # the key does nothing until the page's script runs
        page.keyboard.press("/")
        return page.locator(".md-search__input:focus").count()

    assert wait_for(field_opens, 30)
    page.keyboard.type(word)
    found = page.locator(f".md-search-result__link[href*='{place}']")
    found.first.wait_for()


def test_each_page_in_korean_says_so_and_leads_to_its_sibling_and_back(visit, address):
    korean = [name for name in names() if name.startswith("ko/") and name != "ko/play.html"]  # its own page
    assert len(korean) == 1 + len(list(TRANSLATED.glob("*.ipynb")))
    for name in korean:
        page, _ = visit(name)
        assert page.locator("html").get_attribute("lang") == "ko"
        for language, sibling in (("en", name.removeprefix("ko/")), ("ko", name)):
            page.locator(f".md-select__link[hreflang={language}]").dispatch_event("click")
            page.wait_for_url(address + sibling.removesuffix("index.html"))
            assert page.locator("html").get_attribute("lang") == language
