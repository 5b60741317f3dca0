"""Notebook 07: the adapter alone as a GGUF file, which llama.cpp adds to a base model's GGUF file.

A program that needs the package ``gguf``: ``python -m llama_sft_helpers.evaluation.lora_gguf ADAPTER BASE
OUT``, where BASE is the folder of the base model or its ``config.json``. A and B are stored as they are,
nothing is merged, and the base may be stored in any of llama.cpp's forms, 4-bit ones too.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import torch

from llama_sft_helpers.evaluation.adapter import AdapterError, read_lora

# llama.cpp's names (https://github.com/ggml-org/llama.cpp, gguf-py's tensor_mapping.py)
_TENSORS = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")


def write_lora_gguf(path: str | Path, *, adapter_folder: str | Path, base_config: str | Path) -> None:
    """Write A and B of every adapted layer, in float32, with the scale llama.cpp applies.

    Args:
        path: The file to write; it appears when it is complete.
        adapter_folder: The adapter folder that notebook 06 wrote.
        base_config: The base model's ``config.json``, or its folder.

    Raises:
        AdapterError: The adapter is missing, damaged, or more than A and B; or a layer or the architecture is
            one that this function does not know.
    """
    import gguf

    path, config = Path(path), _read_config(Path(base_config))
    lora, scale = read_lora(adapter_folder)
    rank = len(next(iter(lora.values()))[0])
    scratch = path.with_name(f".{path.name}.part")
    writer = gguf.GGUFWriter(scratch, "llama")
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, scale * rank)  # llama.cpp divides it by the rank
    for layer, (a, b) in lora.items():
        name = _name(layer)
        writer.add_tensor(f"{name}.weight.lora_a", a.numpy())
        writer.add_tensor(f"{name}.weight.lora_b", _in_llama_cpps_order(layer, b, config).numpy())
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        scratch.replace(path)
    finally:
        scratch.unlink(missing_ok=True)


def _read_config(path: Path) -> dict[str, Any]:
    path = path / "config.json" if path.is_dir() else path
    config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    if config.get("model_type") != "llama":
        raise AdapterError(
            f"{path} is of the type {config.get('model_type')!r}, expected 'llama': llama.cpp orders the "
            "rows of q_proj and k_proj by architecture. Merge the adapter, and convert the merged model."
        )
    return config


def _name(layer: str) -> str:
    found = _LAYER.fullmatch(layer)
    if not found or found[2] not in _TENSORS:
        raise AdapterError(f"There is no place for {layer} in llama.cpp's Llama; known are {list(_TENSORS)}.")
    return f"blk.{found[1]}.{_TENSORS[found[2]]}"


def _in_llama_cpps_order(layer: str, b: torch.Tensor, config: dict[str, Any]) -> torch.Tensor:
    """B with its rows in llama.cpp's order, which matters where positions rotate them: q_proj and k_proj.

    transformers rotates row i of a head together with row i + d/2, llama.cpp row 2i with row 2i + 1; so the
    two halves of each head are interleaved.
    """
    heads = config["num_attention_heads"]
    if layer.endswith(".k_proj"):
        heads = config.get("num_key_value_heads") or heads
    elif not layer.endswith(".q_proj"):
        return b
    return b.unflatten(0, (heads, 2, -1)).transpose(1, 2).reshape(b.shape).contiguous()


if __name__ == "__main__":
    write_lora_gguf(sys.argv[3], adapter_folder=sys.argv[1], base_config=sys.argv[2])
