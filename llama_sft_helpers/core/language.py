"""The reader's language, and what the package's texts are in it.

``locales/ko.toml`` holds the Korean of each text under the English text itself, as gettext does it. A text
that is not there stays English, so an English text that is changed is never shown with an old translation.
"""

from __future__ import annotations

import functools
import os
import re
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import jinja2

_VARIABLES = ("SFT_LANG", "LC_ALL", "LC_MESSAGES", "LANG")  # the first that is set decides


def reader_language() -> str:
    """``"ko"`` where ``$SFT_LANG``, or else the system's locale, asks for Korean; ``"en"`` elsewhere."""
    asked = next((value for name in _VARIABLES if (value := os.environ.get(name))), "")
    return "ko" if re.split(r"[-_.@]", asked.lower())[0] == "ko" else "en"


def translate(text: str, language: str | None = None, **values: object) -> str:
    """A text in ``language``, or in the reader's if None, with ``values`` put into its ``{...}``."""
    if (language or reader_language()) == "ko":
        text = korean().get(text, text)
    return text.format(**values) if values else text


@functools.cache
def korean(room: str | None = None) -> dict[str, str]:
    """English text -> Korean text, each on one line; of one table of the file, or of all."""
    path = Path(__file__).parent.parent / "locales" / "ko.toml"
    rooms = tomllib.loads(path.read_text(encoding="utf-8"))
    texts = [rooms[room]] if room else rooms.values()
    return {english: " ".join(text.split()) for found in texts for english, text in found.items()}


def page_template(name: str, language: str) -> jinja2.Template:
    """A template of ``templates/``, whose ``{{ t("English text") }}`` is translated and may hold HTML."""
    import jinja2
    from markupsafe import Markup

    def t(text: str, **values: object) -> Markup:
        marked = Markup(translate(text, language))  # noqa: S704  (values are escaped)
        return marked.format(**values) if values else marked

    loader = jinja2.FileSystemLoader(Path(__file__).parent.parent / "templates")
    environment = jinja2.Environment(loader=loader, autoescape=True)
    environment.globals |= {"t": t, "language": language}
    return environment.get_template(name)
