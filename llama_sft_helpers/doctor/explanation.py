"""What broke, why, and what to do next: a sentence under the traceback instead of the traceback alone.

``explain`` reads the exception (``cases``), goes through the table from top to bottom (``table``), and fills
in what the surroundings tell (``looks``).
"""

from __future__ import annotations

import dataclasses
import html
import itertools
import re
from collections.abc import Mapping, Sequence

from llama_sft_helpers.core.language import translate
from llama_sft_helpers.doctor.cases import Case, read_chain
from llama_sft_helpers.doctor.looks import LOOKS, surroundings
from llama_sft_helpers.doctor.table import TABLE, Failure, Sign

_TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{4,}")
_UNKNOWN = {
    "place": "", "wanted": "some memory", "plan": "", "change": "Take a smaller profile.",
    "repo": "the model", "page": "the model's page on huggingface.co", "near": "", "rows": "too few",
}  # fmt: skip


@dataclasses.dataclass(frozen=True, repr=False)
class Explanation:
    """A known failure: its key in the doctor's table, why it happened, what to do, and a library's page.

    The texts are in the reader's language (``core.language``).
    """

    key: str
    title: str
    cause: str
    fix: str
    link: str

    def __repr__(self) -> str:
        names = f"{translate('Cause')}:", f"{translate('Fix')}:", f"{translate('See')}:"
        lines = zip(names, (self.cause, self.fix, self.link), strict=True)
        return "\n  ".join([self.title, *(f"{name:<6} {text}" for name, text in lines)])

    def _repr_html_(self) -> str:
        _, title, cause, fix, link = map(html.escape, dataclasses.astuple(self))
        fix = re.sub(r"`([^`]+)`", r"<code>\1</code>", fix)
        return (
            '<div style="border-left:4px solid #0072B2;padding:0.3em 0.8em;max-width:48em">'
            f"<b>{title}</b><br>{translate('Cause')}: {cause}<br>{translate('Fix')}: {fix}<br>"
            f'<a href="{link}" rel="noopener" target="_blank">{link}</a></div>'
        )


def explain(exception: object) -> Explanation | None:
    """Explain a failure, if it is a known one, else None; never raises.

    The exception's causes are read too, and so are warnings (``peft`` only warns of a merge into 8-bit
    weights) and ``nbclient``'s report of a failed cell.
    """
    try:
        own, handled = read_chain(exception)
        found = _first_match(own, TABLE)
        if not found:
            return _explanation(*known) if (known := _first_match(handled, TABLE)) else None
        before = TABLE[: TABLE.index(found[0])]
        more_telling = [failure for failure in before if failure.section == found[0].section]
        return _explanation(*(_first_match(handled, more_telling) or found))
    except Exception:  # the doctor must not add a failure to the one it is asked about
        return None


def _first_match(cases: list[Case], failures: Sequence[Failure]) -> tuple[Failure, dict[str, str]] | None:
    for failure, case in itertools.product(failures, cases):
        for sign in failure.signs:
            if (values := _match(sign, case)) is not None:
                return failure, values
    return None


def _match(sign: Sign, case: Case) -> dict[str, str] | None:
    if not case.names & set(sign.raised.split("|")) or not re.search(sign.where, case.where):
        return None
    if not (found := re.search(sign.message, case.message, re.DOTALL)):
        return None
    values = {name: text for name, text in found.groupdict().items() if text}
    seen = LOOKS[sign.look](case, values) if sign.look else {}
    return None if seen is None else surroundings(case) | values | seen


def _explanation(failure: Failure, values: Mapping[str, str]) -> Explanation:
    known = {name: translate(text) for name, text in _UNKNOWN.items()} | dict(values)

    def filled(text: str) -> str:
        text = re.sub(r"\{(\w+)\}", lambda found: known.get(found[1], "?"), translate(text))
        return " ".join(_TOKEN.sub("hf_…", text).split())

    title = translate(failure.title)
    return Explanation(failure.key, title, filled(failure.cause), filled(failure.fix), failure.link)
