"""What a start page takes from its language's README: its template in ``docs/`` calls these functions."""

from __future__ import annotations

import re

from docs_markdown import BADGE, LINK, ROOT
from docs_results import rungs

_CARD = re.compile(
    r"(?m)^\| \*\*\[(?P<title>.*?)\]\((?P<page>.*?)\)\*\* (?P<badge>.*?)<br>(?P<seen>.*?)"
    r"<br><sub>(?P<facts>.*?)</sub> \|$"
)


def readme(title: str, name: str = "README.md") -> str:
    """A section of a README without its heading; "" is what stands before the first one."""
    text = (ROOT / name).read_text(encoding="utf-8")
    text = LINK.sub(lambda link: f"{link[1]}../{link[2]}", text)  # as seen from docs/
    opening, *sections = re.split(r"(?m)^## ", text)
    if not title:
        return opening
    (found,) = (text for text in sections if text.startswith(f"{title}\n"))
    return found.removeprefix(title)


def cards(section: str) -> str:
    """The notebooks of a README's table as cards of the theme, and below them what follows the table."""
    text = BADGE.sub(r"[Open in Colab](\1\2)", section)  # a link each, as nine buttons would shout
    card = "-   **[{title}]({page})**\n\n    {seen}\n\n    {facts}\n\n    {badge}"
    listed = "\n\n".join(card.format(**row.groupdict()) for row in _CARD.finditer(text))
    return f'<div class="grid cards" markdown="1">\n\n{listed}\n\n</div>\n\n' + section.rpartition(" |\n")[2]


def times_plain(rung: str) -> float:
    """How many times as fast as the plain recipe a rung of the measured ladder is."""
    speed = dict(rungs("speed_h200_40gib"))
    return speed[rung] / speed["plain"]
