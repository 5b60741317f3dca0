"""An executed notebook as a page that needs no network: what ``llama-sft run`` writes beside the .ipynb."""

from __future__ import annotations

import copy
import html
import re
from pathlib import Path
from typing import Any

_NO_DESCRIPTION = "No description has been provided for this image"  # nbconvert's words
# code is left alone: a fenced block, or a span in backticks; then $$ formula $$ or $ formula $, which a
# Korean particle may follow without a space
_MATH = re.compile(r"(```.*?```|`[^`\n]*`)|\$\$(.+?)\$\$|(?<![\\\w$])\$([^$\n]+?)\$(?!(?a:[\w$]))", re.DOTALL)
_BADGE = re.compile(
    r"\[!\[([^\]]*)\]\(https?://[^)]*\)\]"
)  # a remote picture that is a link: its words remain
_SIBLING = re.compile(r"\]\((\d\d_\w+)\.ipynb(#[^)]*)?\)")  # a link to another notebook: to its page


def notebook_page(notebook: Any, name: str) -> str:
    """The page of a notebook: nbconvert's, with formulas as MathML, a list of headings and copy buttons.

    It fetches nothing: a badge becomes its words. Links to other notebooks lead to their pages.

    Args:
        notebook: As ``nbformat`` reads it; it stays as it is.
        name: The page's title.
    """
    import jinja2
    from nbconvert import HTMLExporter

    notebook = copy.deepcopy(notebook)
    formulas: list[str] = []
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            text = _BADGE.sub(r"[\1]", _SIBLING.sub(r"](\1.html\2)", cell.source))
            cell.source = set_formulas_aside(text, formulas)
    templates = jinja2.FileSystemLoader(Path(__file__).parent / "templates")
    title = next((cell.source for cell in notebook.cells if cell.cell_type == "markdown"), "")
    exporter = HTMLExporter(
        extra_loaders=[templates],
        template_file="notebook_page.html.j2",
        language_code="ko" if re.search("[가-힣]", title) else "en",
    )
    page, _ = exporter.from_notebook_node(notebook, resources={"metadata": {"name": name}})
    return describe_figures(put_back(page, formulas), notebook)


def set_formulas_aside(text: str, pieces: list[str]) -> str:
    """Markdown with a placeholder for each formula, which it leaves alone; MathML is added to ``pieces``."""
    return _MATH.sub(lambda found: _set_aside(found, pieces), text)


def put_back(page: str, pieces: list[str]) -> str:
    """The page with the pieces in the place of their placeholders, ``set-aside-0-`` and so on."""
    return re.sub(r"set-aside-(\d+)-", lambda found: pieces[int(found[1])], page)


def _set_aside(found: re.Match[str], pieces: list[str]) -> str:
    from latex2mathml.converter import convert

    code, block, inline = found.groups()
    if code:
        return code
    pieces.append(convert(block or inline, display="block" if block else "inline"))
    return f"set-aside-{len(pieces) - 1}-"


def describe_figures(page: str, notebook: Any) -> str:
    """Give a page's figures the text alternatives that their cells carry as ``alt`` in their metadata.

    nbconvert's own template says of every figure that it has no description.
    """
    texts = iter(
        cell.metadata.get("alt", _NO_DESCRIPTION)
        for cell in notebook.cells
        for output in cell.get("outputs", [])
        if "image/png" in output.get("data", {})
    )
    pattern = f'alt="{_NO_DESCRIPTION}"'
    return re.sub(pattern, lambda _: f'alt="{html.escape(next(texts, _NO_DESCRIPTION))}"', page)
