"""Settings as they come from outside: the command line and the environment."""

from __future__ import annotations

import json
import os
import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

PATHS = ("model_id", "dataset_id")  # the settings that may name a file or a folder


class SettingsError(ValueError):
    """A setting is not valid."""


def environment_settings() -> dict[str, Any]:
    """The settings in ``$SFT_SETTINGS``, a JSON object such as ``{"dataset_id": "my.csv", "epochs": 3}``.

    Raises:
        SettingsError: It is no JSON object.
    """
    text = os.environ.get("SFT_SETTINGS") or "{}"
    try:
        settings = json.loads(text)
    except ValueError:
        settings = None
    if not isinstance(settings, dict):
        raise SettingsError(f'SFT_SETTINGS={text!r}: expected a JSON object such as {{"max_steps": 200}}.')
    return settings


def parse_settings(pairs: Iterable[str], **named: str | None) -> dict[str, Any]:
    """Settings as a command line has them: ``max_steps=200`` is a number, ``epochs=none`` unsets.

    Args:
        pairs: Texts ``key=value``, the value as in TOML; what is no TOML is text.
        named: Settings that have options of their own; None is left out. Paths become absolute.

    Raises:
        SettingsError: A text is no pair.
    """
    settings: dict[str, Any] = {
        key: absolute_path(value) if key in PATHS else value
        for key, value in named.items()
        if value is not None
    }
    for pair in pairs:
        key, sign, text = pair.partition("=")
        if not sign:
            raise SettingsError(f"--set {pair!r}: expected key=value, max_steps=200 for instance.")
        settings[key.strip()] = None if text.strip().lower() == "none" else _toml_value(text)
    return settings


def _toml_value(text: str) -> Any:
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text
    return value if isinstance(value, str | int | float) else text  # no setting is a date, a list or a table


def absolute_path(name: str, folder: Path | None = None) -> str:
    """A file or folder that is there, as an absolute path: kernels run elsewhere. Other names stay."""
    path = (folder or Path()) / Path(name).expanduser()
    return str(path.absolute()) if name and path.exists() else name
