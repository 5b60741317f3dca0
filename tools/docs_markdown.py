"""The repository's files as Markdown of the site: links that lead to its pages, and recorded notebooks.

A notebook becomes Markdown, so that the site's theme draws its code and headings and finds its words. Its
formulas and outputs are set aside as HTML, which Markdown must not touch, and put back into the page.
"""

from __future__ import annotations

import base64
import html
import posixpath
import re
from pathlib import Path
from typing import Any

from check_package import STEPS
from record import NO_WIDGET

from llama_sft_helpers.notebook_page import set_formulas_aside

ROOT = Path(__file__).parent.parent
API = {  # module or package -> its group among the pages of the API
    **dict.fromkeys(STEPS, "By notebook"),
    **dict.fromkeys(
        ("memory", "profiles", "settings", "tables", "sliders", "demo_model", "doctor"), "Shared by several"
    ),
    **dict.fromkeys(
        ("cli", "cli_options", "run", "execution", "notebook_page", "result_page", "play"),
        "Behind the commands",
    ),
}
LINK = re.compile(r'(\]\(|src=")([\w./-]+)(?=[)"#])')
# The picture of a badge would come from the network; in its link the notebook's place on GitHub is a group.
BADGE = re.compile(r"\[!\[Open In Colab\]\([^)]*\)\]\((https://colab[\w.]*/github/)([^)]*)\)")
# Pictures that the tests in a browser took, and what they show.
WIDGETS = {
    "login": "A field for a token, a button to log in, and below them: no token found.",
    "chat": "A field for an instruction, a button to send it, and a switch between tuned and base model.",
}
_TITLE = re.compile(r"# @title (.*)\n")  # of a cell that Colab and Jupyter show folded


def site_links(text: str, folder: str, page: str, blob: str) -> str:
    """Text of a file in ``folder`` of the repository as the text of a page of the site.

    A link to a file that has a page leads there, one to another file leads to ``blob``, the repository.
    """

    def leads_to(link: re.Match[str]) -> str:
        path = posixpath.normpath(posixpath.join(folder, link[2]))
        if not (ROOT / path).exists():
            return link[0]
        uri = _page_uri(path)
        return link[1] + (posixpath.relpath(uri, posixpath.dirname(page)) if uri else blob + path)

    return LINK.sub(leads_to, text)


def _page_uri(path: str) -> str:
    """Where a file of the repository is on the site; empty where it is not."""
    name = Path(path).stem
    if path.startswith("notebooks/"):
        return f"{'ko/' if 'notebooks/ko/' in path else ''}notebooks/{name}.md"
    if path == f"llama_sft_helpers/{Path(path).name}" and name in API:
        return f"api/{name}.md"
    if path.startswith("docs/") or path in ("CONTRIBUTING.md", "CHANGELOG.md"):
        return path.removeprefix("docs/")
    return {"README.md": "index.md", "README.ko.md": "ko/index.md"}.get(path, "")


def page_of(notebook: Any, pieces: list[str], files: dict[str, bytes]) -> str:
    """The page's Markdown; ``pieces`` gets what is set aside, ``files`` the pictures by name."""
    cells = [
        _text(cell.source, pieces) if cell.cell_type == "markdown" else _code(cell, pieces, files)
        for cell in notebook.cells
    ]
    return "\n\n".join(cells)


def button(markdown: str) -> str:
    """Text whose Colab badges are buttons of the theme, each beside one to the notebook on GitHub."""
    colab = r"[Open in Colab](\1\2){ .md-button .md-button--primary }"
    return BADGE.sub(rf"{colab} [GitHub](https://github.com/\2){{ .md-button }}", markdown)


def _text(source: str, pieces: list[str]) -> str:
    """A cell of text; a list may follow a paragraph without a gap, as in Jupyter."""
    text = re.sub(r"(?m)^\[(?:previous|next|이전|다음): .*\n?", "", source)  # the theme has its own
    text = re.sub(r"(?s)^(\[!\[Open In Colab.*?)\n\n(# .*?\n)", r"\2\n\1\n", text)  # the title comes first
    text = re.sub(r"(?m)^GPU: .* · .*$", _facts, text)
    text = re.sub(r"(?m)^(?![-*] |\d+\. | |\|)(.+)\n(?=[-*] |\d+\. )", r"\1\n\n", text)
    return button(set_formulas_aside(text.replace("<details>", '<details markdown="1">'), pieces))


def _facts(line: re.Match[str]) -> str:
    """GPU, time, memory and helpers, each on a line of its own."""
    facts = "\n".join(f"- {fact}" for fact in line[0].split(" · "))
    return f'<div class="facts" markdown="1">\n\n{facts}\n\n</div>'


def _code(cell: Any, pieces: list[str], files: dict[str, bytes]) -> str:
    """A cell of code, folded where the notebook folds it, and what it printed, drew and returned."""
    code = f"````python\n{cell.source}\n````"
    if title := _TITLE.match(cell.source):
        code = f'<details markdown="1"><summary>{title[1]}</summary>\n\n{code}\n\n</details>'
    drawn = [_output(output, cell, files) for output in cell.outputs]
    if not drawn:
        return code
    pieces.append("".join(drawn))
    return f'{code}\n\n<div class="output">set-aside-{len(pieces) - 1}-</div>'


def _output(output: Any, cell: Any, files: dict[str, bytes]) -> str:
    if output.output_type == "stream":
        return _printed(output.text)
    data = output.get("data", {})
    if "image/png" in data:
        return _picture(data["image/png"], output.metadata.get("image/png", {}), files)
    if "text/html" in data:
        return _table(data["text/html"])
    if data["text/plain"] == NO_WIDGET:
        name = "login" if "login" in cell.source else "chat"
        alt = html.escape(WIDGETS[name])
        return f'<p>{NO_WIDGET}</p><img src="../../widgets/{name}.png" alt="{alt}" loading="lazy">'
    return _printed(data["text/plain"])


def _printed(text: str) -> str:
    return f"<pre>{html.escape(text.rstrip())}</pre>"


def _picture(png: str, metadata: Any, files: dict[str, bytes]) -> str:
    """A figure in the size that the notebook shows it, with the text alternative that was recorded."""
    name = f"figure-{len(files) + 1}.png"
    files[name] = base64.b64decode(png)
    size = "".join(f' {key}="{html.escape(str(value))}"' for key, value in metadata.items())
    return f'<img src="{name}"{size} loading="lazy">'


def _table(text: str) -> str:
    """A table without pandas' own style, which knows no dark mode; the theme has one."""
    plain = re.sub(r"(?s)<style.*?</style>", "", text)
    return re.sub(r"(<table)[^>]*>", r"\1>", plain)
