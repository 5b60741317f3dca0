"""Where tokens lie: environment, the client's cache, Colab's secrets; in the order of ``huggingface_hub``."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import pandas as pd

TOKEN_VARIABLES = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")  # the order in which huggingface_hub reads them
PLACES = {"env": "the environment", "cache": "the cache", "colab-secret": "Colab's secrets"}
colab_refused = False  # Colab asks at every look; after a no, huggingface_hub does not ask again either


class FoundToken(NamedTuple):
    """A token, and ``env``, ``cache``, ``colab-secret`` or ``none``; its representation hides the token."""

    token: str | None
    source: str

    def __repr__(self) -> str:
        return f"FoundToken({mask(self.token)}, source={self.source!r})"


def find_token() -> FoundToken:
    """The token that ``huggingface_hub`` would use, and its source: env, then cache, then Colab's secret."""
    for source, look in (("env", _env_token), ("cache", _cached_token), ("colab-secret", _colab_token)):
        if token := look():
            return FoundToken(token, source)
    return FoundToken(None, "none")


def summarize_token_sources() -> pd.DataFrame:
    """Where a token may lie, what is there, and which one is used.

    Returns:
        Columns source, place, token (its last four characters at most), used.
    """
    import pandas as pd
    from huggingface_hub import constants

    used = find_token().source
    rows = [
        ("env", "environment variable HF_TOKEN", mask(_env_token())),
        ("cache", str(constants.HF_TOKEN_PATH), mask(_cached_token())),
        ("colab-secret", "key icon in Colab, secret HF_TOKEN", _colab_state(used)),
    ]
    table = [(*row, "yes" if row[0] == used else "") for row in rows]
    return pd.DataFrame(table, columns=["source", "place", "token", "used"])


def mask(token: str | None) -> str:
    """``ends in …abcd``: a token's last four characters, and only if it is long enough to hide the rest."""
    if not token:
        return "none"
    return f"ends in …{token[-4:]}" if len(token) >= 16 else "present"


def _env_token() -> str | None:
    return next((token for name in TOKEN_VARIABLES if (token := _clean(os.environ.get(name)))), None)


def _cached_token() -> str | None:
    from huggingface_hub import constants

    try:
        return _clean(Path(constants.HF_TOKEN_PATH).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError):
        return None


def _colab_token() -> str | None:
    """The Colab secret; None if it is missing, refused, or this is not Colab."""
    global colab_refused  # noqa: PLW0603
    if colab_refused or "google.colab" not in sys.modules:
        return None
    try:
        from google.colab import userdata

        return _clean(userdata.get("HF_TOKEN"))
    except Exception as error:  # refused, missing, or no browser to ask: a token typed below serves as well
        colab_refused = type(error).__name__ == "NotebookAccessError"
        return None


def _colab_state(used: str) -> str:
    if "google.colab" not in sys.modules:
        return "not on Colab"
    if used in ("env", "cache"):
        return "not asked"
    token = _colab_token()
    return "refused: allow it under the key icon, then restart the session" if colab_refused else mask(token)


def _clean(token: str | None) -> str | None:
    return (token or "").replace("\r", "").replace("\n", "").strip() or None
