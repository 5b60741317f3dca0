"""What a text and its translation have in common: links, code, numbers and so on; the glossary's terms."""

from __future__ import annotations

import re
import tomllib
from collections import Counter
from collections.abc import Iterator

CODE = re.compile(r"(?:(?ms:^ *```.*?^ *```)|(?s:(?<!`)`[^`]+`(?!`)))")
_FENCE = re.compile(r"(?ms)^ *```.*?^ *```")
_SPAN = re.compile(r"(?<!`)`[^`]+`(?!`)")
_FORMULA = re.compile(r"(?s)\$\$.+?\$\$|(?<![\\\w$])\$[^$\n]+?\$(?![0-9A-Za-z_$])")
_LINK = re.compile(r"(?s)\]\([^)]*\)")
_TAG = re.compile(r"</?[a-zA-Z][^>]*>")
_ALT = re.compile(r'(?<=alt=")[^"]*')  # what a picture shows is text, and translated
# A digit that is part of a name, as in int8 or H100, does not count: a name may stand more often than once.
_NUMBER = re.compile(r"(?<![A-Za-z_\d.,])\d+(?:,\d{3})*(?:\.\d+)*")


def parts(text: str) -> dict[str, list[str]]:
    """Kind -> what a text has of it, in order."""
    found = {}
    for kind, pattern in {
        "fenced code": _FENCE, "code": _SPAN, "formulas": _FORMULA, "link targets": _LINK, "tags": _TAG,
    }.items():  # fmt: skip
        found[kind] = [_ALT.sub("", part) for part in pattern.findall(text)]
        text = pattern.sub(" \u2060" if kind != "link targets" else "]", text)
    found["pictures"] = re.findall(r"!\[", text)
    found["headings"] = re.findall(r"(?m)^(#+) ", text)
    found["list items"] = re.findall(r"(?m)^( *(?:[-*]|\d+\.)) ", text)
    rows = re.findall(r"(?m)^\|.*", text.replace(r"\|", ""))
    found["table rows"] = [f"{row.count('|') - 1} columns" for row in rows]
    found["numbers"] = _NUMBER.findall(text)
    return found


def prose(text: str) -> str:
    """A text without code, formulas, addresses and tags."""
    for pattern in (_FENCE, _SPAN, _FORMULA, _LINK, _TAG):
        text = pattern.sub(" ", text)
    return text


def part_findings(english: str, korean: str) -> Iterator[str]:
    """What one text has and the other has not; sentences may change places, headings and rows may not."""
    theirs = parts(korean)
    for kind, wanted in parts(english).items():
        lost, new = Counter(wanted) - Counter(theirs[kind]), Counter(theirs[kind]) - Counter(wanted)
        if lost or new:
            yield f"{kind} differ; only in English: {_listed(lost)}; only in Korean: {_listed(new)}"
        elif kind in ("fenced code", "headings", "list items", "table rows") and wanted != theirs[kind]:
            yield f"{kind} stand in another order: {theirs[kind]}; expected {wanted}"


def _listed(counted: Counter[str]) -> str:
    return ", ".join(repr(item) for item in sorted(counted.elements())) or "nothing"


def glossary_findings(glossary: str, english: str, korean: str) -> Iterator[str]:
    """Terms that are translated otherwise than the glossary (TOML) says, and spellings that it forbids."""
    english, korean = prose(english), prose(korean)
    for term in tomllib.loads(glossary).get("term", []):
        for spelling in term.get("forbidden", []):
            if spelling in korean:
                yield f"{spelling!r} stands for {term['english']}; write {term['korean']!r}"
        used = re.search(rf"(?i)\b{re.escape(term['english'])}s?\b", english)
        if used and used[0][0].isupper() and used[0] in korean:
            continue  # a title that stays English
        if used and term.get("required", True) and term["korean"] not in korean:
            yield f"{used[0]!r} stands in English, {term['korean']!r} not in Korean"
