"""Llama 3: which names mean it, and the shape of its 8B model.

The one home of both for the command line, the doctor, the environment check and the model card.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace

# "llama-3" as words of a name; "llama-3.1", "llama-3-2-1b" and "llama_3b" are other models.
_LLAMA3 = r"(?:.*[-_])?llama[-_]?3(?![.\da-z]|[-_][1-9][-_])"


def is_llama3(model_id: str, size: str = "") -> bool:
    """Whether a hub id (Meta's or anybody's) or a folder names Llama 3, which 3.1 and later are not.

    Args:
        model_id: ``meta-llama/Meta-Llama-3-8B``, ``unsloth/llama-3-8b`` or ``/content/Meta-Llama-3-8B``.
        size: Ask for this size too: ``8B`` means the shape of ``load_llama3_config``.
    """
    rest = rf"[-_](?:.*[-_])?{size}(?![a-z\d])" if size else ""
    return bool(re.match(_LLAMA3 + rest, Path(model_id).name, flags=re.IGNORECASE))


def load_llama3_config() -> SimpleNamespace:
    """The shape of Llama 3 8B, as ``plan_memory`` reads it: no hub, no token, no transformers."""
    text = (Path(__file__).parent / "configs" / "llama3_8b.json").read_text(encoding="utf-8")
    return SimpleNamespace(**json.loads(text))
