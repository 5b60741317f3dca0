"""The READMEs as GitHub shows them: only its tags and attributes, on a phone and on a desk.

Run with ``make test-browser``. Screenshots: ``test-artifacts/browser``.
"""

import re
from pathlib import Path

import bleach
import pytest
from browser_lab import ARTIFACTS
from markdown_it import MarkdownIt

pytestmark = pytest.mark.browser

ROOT = Path(__file__).parent.parent.parent
# What https://github.com/gjtorikian/html-pipeline lets through, as far as a README may want it.
TAGS = """
a b blockquote br code dd del details div dl dt em figcaption figure h1 h2 h3 h4 h5 h6 hr i img ins kbd li
ol p picture pre q s samp source strong sub summary sup table tbody td tfoot th thead tr tt ul
"""
ATTRIBUTES = {
    "*": ["align", "alt", "dir", "height", "lang", "title", "valign", "width"],
    "a": ["href"],
    "img": ["src"],
    "source": ["media", "srcset"],
}
STYLE = """
body { margin: 0 auto; padding: 16px; max-width: 838px; font: 16px/1.5 sans-serif; }
img { max-width: 100%; } pre { padding: 16px; overflow: auto; } pre, code { font-size: 13.6px; }
table { display: block; width: max-content; max-width: 100%; overflow: auto; border-collapse: collapse; }
td, th { padding: 6px 13px; border: 1px solid; }
"""
BADGE = '<svg xmlns="http://www.w3.org/2000/svg" width="117" height="20"/>'


def rendered(name):
    """A file's HTML, as GitHub's column shows it."""
    text = (ROOT / name).read_text(encoding="utf-8")
    body = bleach.clean(MarkdownIt().enable("table").render(text), TAGS.split(), ATTRIBUTES, strip=True)
    return f"<!doctype html><meta charset=utf-8><style>{STYLE}</style>{body}"


@pytest.fixture(
    params=[(name, width) for name in ("README.md", "README.ko.md") for width in (390, 1280)], ids=str
)
def page(request, chromium):
    """A README in a window of a width, its pictures from the repository and a badge from nowhere."""
    name, width = request.param
    page = chromium.new_page(viewport={"width": width, "height": 900})
    page.route("**/colab-badge.svg", lambda asked: asked.fulfill(body=BADGE, content_type="image/svg+xml"))
    page.route("https://github.test/**", lambda asked: asked.fulfill(path=ROOT / asked.request.url[20:]))
    page.route(
        "https://github.test/", lambda asked: asked.fulfill(body=rendered(name), content_type="text/html")
    )
    page.goto("https://github.test/")
    ARTIFACTS.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=ARTIFACTS / f"{name}-{width}.png", full_page=True)
    yield page
    page.close()


def test_nothing_but_code_scrolls_sideways(page):
    wide = "node => node.scrollWidth > node.clientWidth"
    found = page.evaluate(
        f"[...document.querySelectorAll('html, table')].filter({wide}).map(node => node.outerHTML)"
    )
    assert found == []


def test_each_picture_is_there_and_has_words(page):
    pictures = page.evaluate("[...document.images].map(image => [image.src, image.alt, image.naturalWidth])")
    assert len(pictures) > 10  # nine badges, and the figures of the first screen
    assert [picture for picture in pictures if not all(picture)] == []


def test_each_local_link_leads_somewhere(page):
    links = page.evaluate("[...document.links].map(link => link.getAttribute('href'))")
    for path, _, anchor in [link.partition("#") for link in links if ":" not in link]:
        assert (ROOT / path).exists(), path
        headings = re.findall(r"(?m)^#+ (.*)", (ROOT / path).read_text(encoding="utf-8")) if anchor else ()
        anchors = [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings]
        assert not anchor or anchor in anchors, f"{path}#{anchor}"
