"""Llama: which models are of its shape, that shape in numbers and bytes, and which names mean Llama 3."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    ModelConfig = PretrainedConfig | SimpleNamespace  # the second is what load_llama3_config gives

# Their decoder layers have Llama's seven linears: Llama 3 and its successors, Mistral, and Qwen.
SUPPORTED = ("llama", "mistral", "qwen2", "qwen3")
_BITS = {"fp32": 32, "bf16": 16, "int8": 8, "nf4": 4, "nf4 single": 4}
_NF4_BLOCK = 64  # weights that share one scale
_NESTED_BLOCK = 256  # scales that share one scale of the second quantization
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")  # of a decoder layer
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


class UnsupportedModelError(ValueError):
    """A model whose architecture is not Llama's; the message names it and what is supported."""


def check_supported(config: ModelConfig) -> None:
    """Check that a configuration is of a model that the series can quantize, adapt, plan and merge.

    Raises:
        UnsupportedModelError: It is of another architecture.
    """
    kind = getattr(config, "model_type", None)
    if kind not in SUPPORTED:
        raise UnsupportedModelError(
            f"The model is a {(getattr(config, 'architectures', None) or [type(config).__name__])[0]} "
            f"(model_type {kind!r}); supported are {', '.join(SUPPORTED)}. Choose a model_id of one of these."
        )


def is_llama3(model_id: str, size: str = "") -> bool:
    """Whether a hub id (Meta's or anybody's) or a folder names Llama 3, which 3.1 and later are not.

    With ``size="8B"`` whether it has the shape of ``load_llama3_config`` too.
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
    beside: int  # A layer's parameters beside its linears' weights and two norms: biases, q_norm, k_norm.

    @classmethod
    def of(cls, config: ModelConfig) -> Shape:
        """Read a configuration.

        Raises:
            UnsupportedModelError: It is of another architecture than Llama's.
            ValueError: It is none, or lacks a size.
        """
        if hasattr(config, "model_type"):
            check_supported(config)
        if missing := [name for name in _SIZES if not hasattr(config, name)]:
            known = len(missing) < len(_SIZES)
            got = f"without {', '.join(missing)}" if known else f"{config!r}, a {type(config).__name__}"
            raise ValueError(
                f"config is {got}; expected a LlamaConfig: pass model.config, or "
                "AutoConfig.from_pretrained(model_id), which loads no weights."
            )
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        query, key_value = config.num_attention_heads * head_dim, config.num_key_value_heads * head_dim
        return cls(
            layers=config.num_hidden_layers,
            hidden=config.hidden_size,
            heads=config.num_attention_heads,
            query=query,
            key_value=key_value,
            mlp=config.intermediate_size,
            vocab=config.vocab_size,
            tied=bool(config.tie_word_embeddings),
            beside=_beside(config, query + 2 * key_value, head_dim),
        )

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """Name -> (in_features, out_features) of a decoder layer's linears."""
        up = (self.hidden, self.mlp)
        key, query = (self.hidden, self.key_value), (self.hidden, self.query)
        sizes = (query, key, key, query[::-1], up, up, up[::-1])
        return dict(zip(LINEARS, sizes, strict=True))

    @property
    def linear_weights(self) -> int:
        """Weights of all decoder layers' linears, which are those that get quantized."""
        return self.layers * sum(inputs * outputs for inputs, outputs in self.linears.values())

    @property
    def unquantized(self) -> int:
        """Parameters that stay in 16 bits: embeddings, output layer unless tied, norms, biases."""
        tables = self.vocab * self.hidden * (1 if self.tied else 2)
        return tables + self.hidden * (2 * self.layers + 1) + self.layers * self.beside


def _beside(config: ModelConfig, q_k_v: int, head_dim: int) -> int:
    """Biases of a layer's linears, and Qwen 3's norms of query and key."""
    kind = getattr(config, "model_type", "llama")
    q_k_v_o = (q_k_v + config.hidden_size) * bool(getattr(config, "attention_bias", False))
    biases = q_k_v if kind == "qwen2" else q_k_v_o
    if getattr(config, "mlp_bias", False):
        biases += 2 * config.intermediate_size + config.hidden_size
    return int(biases + 2 * head_dim * (kind == "qwen3"))


def linear_bytes(kind: str, d_in: int, d_out: int) -> tuple[int, int]:
    """Bytes of one linear's codes, and of what bitsandbytes keeps beside them.

    Beside int8 codes lies a float32 scale a row. nf4 has a float32 scale a block of 64 weights, and the table
    of its 16 levels; double quantization (``nf4``) keeps those scales as uint8, in blocks of 256 with a
    float32 scale each, with their float32 offset and a table of 256 levels; ``nf4 single`` does not. The
    other kinds are ``fp32`` and ``bf16``.
    """
    weights = d_in * d_out
    blocks = math.ceil(weights / _NF4_BLOCK)
    scales = {
        "int8": 4 * d_out,
        "nf4": blocks + 4 * math.ceil(blocks / _NESTED_BLOCK) + 4 + 4 * 256 + 4 * 16,
        "nf4 single": 4 * blocks + 4 * 16,
    }
    return math.ceil(weights * _BITS[kind] / 8), scales.get(kind, 0)
