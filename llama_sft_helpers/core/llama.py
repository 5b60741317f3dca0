"""Llama: a model's shape as numbers, which names mean Llama 3, and the configuration of its 8B model."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

_SIZES = (
    "num_attention_heads",
    "num_hidden_layers",
    "hidden_size",
    "num_key_value_heads",
    "intermediate_size",
    "vocab_size",
    "tie_word_embeddings",
)
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
    text = (Path(__file__).parent.parent / "configs" / "llama3_8b.json").read_text(encoding="utf-8")
    return SimpleNamespace(**json.loads(text))


@dataclasses.dataclass(frozen=True)
class Shape:
    """What the plan reads from a Llama configuration; widths are in elements."""

    layers: int
    hidden: int
    heads: int
    query: int
    key_value: int
    mlp: int
    vocab: int
    tied: bool

    @classmethod
    def of(cls, config: Any) -> Shape:
        """Read a configuration.

        Raises:
            ValueError: It is none, or lacks a size.
        """
        if missing := [name for name in _SIZES if not hasattr(config, name)]:
            known = len(missing) < len(_SIZES)
            got = f"without {', '.join(missing)}" if known else f"{config!r}, a {type(config).__name__}"
            raise ValueError(
                f"config is {got}; expected a LlamaConfig: pass model.config, or "
                "AutoConfig.from_pretrained(model_id), which loads no weights."
            )
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return cls(
            layers=config.num_hidden_layers,
            hidden=config.hidden_size,
            heads=config.num_attention_heads,
            query=config.num_attention_heads * head_dim,
            key_value=config.num_key_value_heads * head_dim,
            mlp=config.intermediate_size,
            vocab=config.vocab_size,
            tied=bool(config.tie_word_embeddings),
        )

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """Name -> (in_features, out_features) of a decoder layer's linears."""
        return {
            "q_proj": (self.hidden, self.query),
            "k_proj": (self.hidden, self.key_value),
            "v_proj": (self.hidden, self.key_value),
            "o_proj": (self.query, self.hidden),
            "gate_proj": (self.hidden, self.mlp),
            "up_proj": (self.hidden, self.mlp),
            "down_proj": (self.mlp, self.hidden),
        }
