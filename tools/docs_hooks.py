"""MkDocs hook: builds the site's pages from the files that already hold their content.

The start page takes parts of the README, the notebooks are taken as recorded, the API has a page for each
module or package, and the benchmark page is drawn from ``benchmarks/results/*.json``. Nothing is copied.
"""

from __future__ import annotations

import importlib
import inspect
import posixpath
from typing import Any

import docs_home
import docs_results
import jinja2
import nbformat
from docs_markdown import API, ROOT, button, page_of, site_links
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.plugins import event_priority
from mkdocs.structure.files import File, Files
from mkdocs.structure.nav import Navigation
from mkdocs.structure.pages import Page

from llama_sft_helpers.notebook_page import put_back
from llama_sft_helpers.play import play_page

NOTEBOOKS = {  # page -> the notebook on it
    f"{language}notebooks/{path.stem}": path
    for language in ("", "ko/")
    for path in sorted((ROOT / "notebooks" / language).glob("[0-9][0-9]_*.ipynb"))
}
TEMPLATES = {"index.md": docs_home, "ko/index.md": docs_home, "benchmarks.md": docs_results}  # what they call
TITLES = {  # of the site, and what social networks say of it
    "ko": (
        "눈앞에서 미세 조정하는 Llama 3 8B",
        "8비트 양자화, LoRA, 지도 미세 조정을 한 단계씩 펼쳐 보입니다",
    ),
}
TEMPLATING = jinja2.Environment(undefined=jinja2.StrictUndefined)  # noqa: S701 (Markdown: nothing to escape)
PIECES: dict[str, list[str]] = {}  # page -> what is put back into it as HTML


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Say where GitHub will serve the site, and name notebooks and the API's pages in the navigation."""
    owner, name = config.repo_url.split("/")[-2:]
    config.site_url = f"https://{owner}.github.io/{name}/"
    groups = [
        {group: [{name: f"api/{name}.md"} for name in API if API[name] == group]}
        for group in dict.fromkeys(API.values())
    ]
    lists: dict[str, list[Any]] = {
        "Notebooks": [f"{page}.md" for page in NOTEBOOKS if not page.startswith("ko/")],
        "API": ["api/index.md", *groups],
    }
    korean = [f"{page}.md" for page in NOTEBOOKS if page.startswith("ko/")]
    start, play = {"시작": "ko/index.md"}, {"숫자를 직접 바꿔 보기": "ko/play.html"}
    config.nav = [{entry: lists[entry]} if str(entry) in lists else entry for entry in config.nav]
    config.nav.append({"한국어": [start, {"노트북": korean}, play]})
    TITLES["en"] = (config.site_name, config.site_description)
    return config


@event_priority(100)  # before htmlproofer, which looks links up among the files
def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated pages."""
    pages: dict[str, str | bytes] = {
        "CONTRIBUTING.md": (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"),
        "CHANGELOG.md": (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"),
        "play.html": play_page(home="index.html", language="en"),
        "ko/play.html": play_page(home="index.html", language="ko"),
        **_api_pages(),
    }
    for path in (ROOT / "docs" / "widgets").iterdir():  # where pages in Korean look for them
        pages[f"ko/widgets/{path.name}"] = path.read_bytes()
    for page, path in NOTEBOOKS.items():
        figures: dict[str, bytes] = {}
        PIECES[f"{page}.md"] = []
        pages[f"{page}.md"] = page_of(nbformat.read(path, as_version=4), PIECES[f"{page}.md"], figures)
        pages |= {f"{page}/{name}": png for name, png in figures.items()}
    for uri, content in pages.items():
        files.append(File.generated(config, uri, content=content))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Lead links between files of the repository to pages of the site, where there is one."""
    uri = page.file.src_uri
    if uri in TEMPLATES:
        markdown = TEMPLATING.from_string(markdown).render(vars(TEMPLATES[uri]))
    if files.get_file_from_path(picture := uri.replace(".md", "/figure-1.png")):
        page.meta["picture"] = picture  # for the card that social networks show
    folder = "docs" if (ROOT / "docs" / uri).is_file() else posixpath.dirname(uri)
    folder = folder.replace("ko/notebooks", "notebooks/ko")
    return button(site_links(markdown, folder, uri, f"{config.repo_url}/blob/main/"))


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Put formulas and outputs back."""
    pieces = PIECES.get(page.file.src_uri)
    return put_back(html, pieces) if pieces else html


def on_nav(nav: Navigation, config: MkDocsConfig, files: Files) -> Navigation:
    """Let the footer's "next" end with each language."""
    (home,) = (page for page in nav.pages if page.file.src_uri == "ko/index.md")
    home.previous_page.next_page = None
    home.previous_page = None
    return nav


def on_page_context(context: Any, page: Page, config: MkDocsConfig, nav: Navigation) -> Any:
    """Give a page the theme, the titles and the navigation of its language, and a way to the other one."""
    pages = {other.file.src_uri: other for other in nav.pages}
    uri = page.file.src_uri
    config.extra["alternate"] = [
        {"lang": "en", "name": "English", "link": pages[uri.removeprefix("ko/")].url},
        {"lang": "ko", "name": "한국어", "link": pages.get(_korean(uri), pages["ko/index.md"]).url},
    ]
    config.theme["language"] = language = "ko" if uri == _korean(uri) else "en"
    config.site_name, config.site_description = TITLES[language]
    *items, korean = nav.items
    if language == "ko":  # what there is in English only follows the pages in Korean
        items = [*korean.children, *(item for item in items if not _is_translated(item, pages))]
    context["nav"] = Navigation(items, nav.pages)
    context["nav"].homepage = pages["ko/index.md" if language == "ko" else "index.md"]
    return context


def _korean(uri: str) -> str:
    """Where a page's translation is, if it has one."""
    return f"ko/{uri.removeprefix('ko/')}"


def _is_translated(item: Any, pages: dict[str, Page]) -> bool:
    """Whether an entry of the menu, or one below it, has a page in Korean."""
    if item.is_page:
        return _korean(item.file.src_uri) in pages
    return any(_is_translated(child, pages) for child in item.children or [])


def _api_pages() -> dict[str, str]:
    """A page for each module or package, and one that lists their names."""
    pages = {}
    index = ["# API", "What each module or package offers; the first carry the name of their notebook."]
    for name in API:
        module = importlib.import_module(f"llama_sft_helpers.{name}")
        names = _public(module)
        pages[f"api/{name}.md"] = "\n\n".join(
            [f"# {name}", module.__doc__, *(f"::: {path}" for path in names)]
        )
        purpose = module.__doc__.partition("\n")[0]
        listed = "\n".join(f"- [`{path.rpartition('.')[2]}`][{path}]: {what}" for path, what in names.items())
        index += [f"## [`{name}`]({name}.md)", purpose, listed]
    return pages | {"api/index.md": "\n\n".join(index)}


def _public(module: Any) -> dict[str, str]:
    """Dotted path of each public function and class of a module or package -> first line of its docstring."""
    names = getattr(module, "CONTENTS", [name for name in vars(module) if not name.startswith("_")])
    objects = [getattr(module, name) for name in names]
    return {
        f"{item.__module__}.{item.__qualname__}": inspect.getdoc(item).partition("\n")[0]
        for item in objects  # only what has a docstring of its own: no constant, no import
        if inspect.isfunction(item) or inspect.isclass(item)
        if hasattr(module, "CONTENTS") or item.__module__ == module.__name__
    }
