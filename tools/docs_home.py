"""What a start page takes from its language's README: its template in ``docs/`` calls these functions."""

from __future__ import annotations

import re

import nbformat
from docs_markdown import BADGE, LINK, ROOT
from docs_results import rungs

# Two pictures in a table of the README: headings, rule, pictures, captions.
_PICTURES = re.compile(
    r"(?m)^\| (.*) \| (.*) \|\n\|---\|---\|\n\| (!\[.*) \| (!\[.*) \|\n\| (.*) \| (.*) \|$"
)
_ROW = re.compile(
    r"(?m)^\| \[`(?P<stem>\d\d_\w+)`\]\((?P<page>[^)]*)\) \| (?P<badge>.*?) \| (?P<cpu>.*?) \| (?P<gpu>.*?)"
    r" \| (?P<card>.*?) \| (?P<seen>.*?) \|"
)


def readme(title: str, name: str = "README.md") -> str:
    """A section of a README without its heading; "" is what stands before the first one."""
    text = (ROOT / name).read_text(encoding="utf-8")
    text = LINK.sub(lambda link: f"{link[1]}../{link[2]}", text)  # as seen from docs/
    opening, *sections = re.split(r"(?m)^## ", text)
    if not title:
        return _PICTURES.sub(_figures, opening)
    (found,) = (text for text in sections if text.startswith(f"{title}\n"))
    return found.removeprefix(title)


def _figures(table: re.Match[str]) -> str:
    """Two figures side by side, or one above the other on a phone."""
    cells = table.groups()  # two headings, two pictures, two captions
    figures = [
        f'<figure markdown="1">\n\n{picture}\n\n'
        f'<figcaption markdown="span">{heading}: {caption}</figcaption>\n\n</figure>'
        for heading, picture, caption in zip(cells[:2], cells[2:4], cells[4:], strict=True)
    ]
    return '<div class="grid" markdown="1">\n\n{}\n\n</div>'.format("\n\n".join(figures))


def cards(section: str, times: str) -> str:
    """A README's table of notebooks as cards, whose ``times`` names the columns cpu, gpu and card."""
    text = BADGE.sub(r"[Open in Colab](\1)", section)  # a link each, as nine buttons would shout
    rows = [row.groupdict() | {"title": _title(row["page"])} for row in _ROW.finditer(text)]
    card = f"-   **[{{title}}]({{page}})**: {{seen}}\n\n    {times}\n\n    {{badge}}"
    listed = "\n\n".join(card.format(**row) for row in rows)
    return f'<div class="grid cards" markdown="1">\n\n{listed}\n\n</div>'


def _title(page: str) -> str:
    """The title of the notebook that a link, as seen from ``docs/``, leads to."""
    notebook = nbformat.read(ROOT / "docs" / page, as_version=4)
    return re.search(r"(?m)^# (.*)", notebook.cells[0].source)[1]


def times_plain(rung: str) -> float:
    """How many times as fast as the plain recipe a rung of the measured ladder is."""
    speed = dict(rungs("speed_h200_40gib"))
    return speed[rung] / speed["plain"]
