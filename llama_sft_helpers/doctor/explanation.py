"""What broke, why, and what to do next: a sentence under the traceback instead of the traceback alone.

``explain`` reads the exception (``cases``), goes through the table from top to bottom (``table``), and fills
in what the surroundings tell (``looks``).
"""

from __future__ import annotations

import dataclasses
import html
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from llama_sft_helpers.doctor.cases import Case, read_chain
from llama_sft_helpers.doctor.looks import LOOKS, Settings, surroundings
from llama_sft_helpers.doctor.table import TABLE, Failure, Sign

if TYPE_CHECKING:
    from llama_sft_helpers.profiles import Profile

_TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{4,}")
_UNKNOWN = {
    "place": "", "wanted": "some memory", "plan": "", "change": "Take a smaller profile.",
    "repo": "the model", "page": "the model's page on huggingface.co", "near": "", "rows": "too few",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Explanation:
    """A known failure's cause and the next action.

    Attributes:
        key: The entry in the doctor's table.
        title: The failure in one line.
        cause: Why it happened.
        fix: What to do next.
        link: The library's own page or thread.
    """

    key: str
    title: str
    cause: str
    fix: str
    link: str

    def __str__(self) -> str:
        return f"{self.title}\n  Cause: {self.cause}\n  Fix:   {self.fix}\n  See:   {self.link}"

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        printer.text(str(self))

    def _repr_html_(self) -> str:
        title, cause, fix, link = (
            html.escape(text) for text in (self.title, self.cause, self.fix, self.link)
        )
        fix = re.sub(r"`([^`]+)`", r"<code>\1</code>", fix)
        return (
            '<div style="border-left:4px solid #0072B2;padding:0.3em 0.8em;max-width:48em">'
            f"<b>{title}</b><br>Cause: {cause}<br>Fix: {fix}<br>"
            f'<a href="{link}" rel="noopener" target="_blank">{link}</a></div>'
        )


def explain(exception: object, *, config: Any = None, profile: Profile | None = None) -> Explanation | None:
    """Explain a failure, if it is a known one; never raises.

    The exception's causes are read too, and so are warnings (``peft`` only warns of a merge into 8-bit
    weights) and ``nbclient``'s report of a failed cell.

    Args:
        exception: What was raised.
        config: The model's configuration, for the memory plan of a CUDA out-of-memory error; None looks for a
            model in the traceback's frames, then at the profile.
        profile: The profile of the run; None takes the one that ``load_profile`` would.

    Returns:
        Cause, fix and a link, or None if the failure is not known.
    """
    try:
        own, handled = read_chain(exception)
        settings = (config, profile)
        found = _first_match(own, settings, TABLE)
        if not found:
            return _explanation(*known) if (known := _first_match(handled, settings, TABLE)) else None
        before = TABLE[: TABLE.index(found[0])]
        more_telling = [failure for failure in before if failure.section == found[0].section]
        return _explanation(*(_first_match(handled, settings, more_telling) or found))
    except Exception:  # the doctor must not add a failure to the one it is asked about
        return None


def _first_match(
    cases: list[Case], settings: Settings, failures: Sequence[Failure]
) -> tuple[Failure, dict[str, str]] | None:
    for failure in failures:
        for case in cases:
            for sign in failure.signs:
                values = _match(sign, case, settings)
                if values is not None:
                    return failure, values
    return None


def _match(sign: Sign, case: Case, settings: Settings) -> dict[str, str] | None:
    if not case.names & set(sign.raised.split("|")):
        return None
    found = re.search(sign.message, case.message, re.DOTALL)
    if not found or (sign.where and not re.search(sign.where, case.where)):
        return None
    values = {name: text for name, text in found.groupdict().items() if text}
    seen = LOOKS[sign.look](case, values, settings) if sign.look else {}
    return None if seen is None else surroundings(case) | values | seen


def _explanation(failure: Failure, values: Mapping[str, str]) -> Explanation:
    def filled(text: str) -> str:
        known = _UNKNOWN | dict(values)
        text = re.sub(r"\{(\w+)\}", lambda found: known.get(found[1], "?"), text)
        return re.sub(r"\s+", " ", _TOKEN.sub("hf_…", text)).strip()

    return Explanation(failure.key, failure.title, filled(failure.cause), filled(failure.fix), failure.link)
