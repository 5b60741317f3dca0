"""The reader's language, and what the package's texts are in it.

``locales/ko.toml`` holds the Korean of each text under the English text itself, as gettext does it. A text
that is not there stays English, so an English text that is changed is never shown with an old translation.
"""

from __future__ import annotations

import functools
import os
import tomllib
from pathlib import Path

LANGUAGES = ("en", "ko")
_VARIABLES = ("SFT_LANG", "LC_ALL", "LC_MESSAGES", "LANG")  # the first that is set decides


def reader_language() -> str:
    """``"ko"`` where ``$SFT_LANG``, or else the system's locale, asks for Korean; ``"en"`` elsewhere."""
    asked = next((value for name in _VARIABLES if (value := os.environ.get(name))), "")
    return "ko" if asked.lower().startswith("ko") else "en"


def translate(text: str, language: str | None = None, **values: object) -> str:
    """A text in ``language``, or in the reader's if None, with ``values`` put into its ``{...}``."""
    if (language or reader_language()) == "ko":
        text = korean().get(text, text)
    return text.format(**values) if values else text


@functools.cache
def korean() -> dict[str, str]:
    """English text -> Korean text, each on one line."""
    path = Path(__file__).parent.parent / "locales" / "ko.toml"
    rooms = tomllib.loads(path.read_text(encoding="utf-8")).values()
    return {english: " ".join(text.split()) for room in rooms for english, text in room.items()}
