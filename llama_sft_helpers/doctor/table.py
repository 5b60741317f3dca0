"""The doctor's table of known failures; its data, and what each field means, stand in ``table.toml``."""

from __future__ import annotations

import dataclasses
import tomllib
from pathlib import Path


@dataclasses.dataclass(frozen=True)
class Sign:
    """One look of a failure; whatever is given must hold."""

    raised: str = "Exception"
    message: str = ""
    where: str = ""
    look: str = ""


@dataclasses.dataclass(frozen=True)
class Failure:
    """A failure that is known: its signs, and the texts shown for it."""

    key: str
    section: str
    title: str
    signs: tuple[Sign, ...]
    cause: str
    fix: str
    link: str


def _failure(signs: list[dict[str, str]], **texts: str) -> Failure:
    one_line = {name: " ".join(text.split()) for name, text in texts.items()}
    return Failure(signs=tuple(Sign(**sign) for sign in signs), **one_line)


_CONTENT = tomllib.loads(Path(__file__).with_name("table.toml").read_text(encoding="utf-8"))
TABLE: tuple[Failure, ...] = tuple(_failure(**entry) for entry in _CONTENT["failure"])
RENAMED_ARGUMENTS: dict[str, str] = _CONTENT["renamed_arguments"]
