"""Notebook 07: the adapter alone as a GGUF file, which llama.cpp adds to a base model's GGUF file.

A program that needs the package ``gguf``: ``python -m llama_sft_helpers.evaluation.lora_gguf ADAPTER BASE
OUT``, where BASE is the folder of the base model. A and B are stored as they are, nothing is merged, and the
base may be stored in any of llama.cpp's forms, 4-bit ones too.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

from llama_sft_helpers.evaluation.adapter import AdapterError, read_lora


def write_lora_gguf(path: str | Path, *, adapter_folder: str | Path, base_folder: str | Path) -> None:
    """Write A and B of every adapted layer, in float32, with the scale llama.cpp applies.

    The file appears when it is complete; of the base model only ``config.json`` is read.

    Raises:
        AdapterError: The adapter is missing, damaged, or more than A and B; or a layer or the architecture is
            one that llama.cpp's Llama has not.
    """
    import gguf

    path, config = Path(path), _read_config(Path(base_folder) / "config.json")
    lora, scale = read_lora(adapter_folder)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config["num_hidden_layers"])
    scratch = path.with_name(f".{path.name}.part")
    writer = gguf.GGUFWriter(scratch, "llama")
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    rank = len(next(iter(lora.values()))[0])
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, scale * rank)  # llama.cpp divides it by the rank
    for weight, (a, b) in lora.items():
        name = names.get_name(weight, try_suffixes=[".weight"])
        if name is None:
            raise AdapterError(f"llama.cpp's Llama has no place for {weight}. Merge the adapter instead.")
        writer.add_tensor(f"{name}.lora_a", a.numpy())
        writer.add_tensor(f"{name}.lora_b", _in_llama_cpps_order(weight, b, config).numpy())
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        scratch.replace(path)
    finally:
        scratch.unlink(missing_ok=True)


def _read_config(path: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    if config.get("model_type") != "llama":
        raise AdapterError(
            f"{path} is of the type {config.get('model_type')!r}, expected 'llama': llama.cpp orders the "
            "rows of q_proj and k_proj by architecture. Merge the adapter, and convert the merged model."
        )
    return config


def _in_llama_cpps_order(weight: str, b: torch.Tensor, config: dict[str, Any]) -> torch.Tensor:
    """B with its rows in llama.cpp's order, which matters where positions rotate them: q_proj and k_proj.

    transformers rotates row i of a head together with row i + d/2, llama.cpp row 2i with row 2i + 1; so the
    two halves of each head are interleaved.
    """
    queries = config["num_attention_heads"]
    rotated = {"q_proj": queries, "k_proj": config.get("num_key_value_heads") or queries}
    heads = rotated.get(weight.split(".")[-2])
    return b.unflatten(0, (heads, 2, -1)).transpose(1, 2).reshape(b.shape).contiguous() if heads else b


if __name__ == "__main__":
    write_lora_gguf(sys.argv[3], adapter_folder=sys.argv[1], base_folder=sys.argv[2])
