"""A layer's quantization: codes and scales, the bytes they take, and the checkpoint to compare them with."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
import torch
from torch import nn

from llama_sft_helpers.core.bnb import storage_format
from llama_sft_helpers.core.llama import Shape, linear_bytes

if TYPE_CHECKING:
    from llama_sft_helpers.core.llama import ModelConfig

_GIB = 2**30


def quantize_absmax(weight: torch.Tensor, bits: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize a matrix row by row: a row's largest magnitude becomes level 127 (symmetric, no zero point).

    ``codes = round(weight * (127 / absmax))``: one step of a row is ``absmax / 127``; with fewer bits,
    ``2 ** (bits - 1) - 1`` stands in the place of 127. With 8 bits this is what
    ``bitsandbytes.functional.int8_vectorwise_quant`` computes on the CPU, bit for bit: weights are cast to
    float16 first (whatever the checkpoint's type), the scales are float32, a tie goes to the even level, and
    a row of zeros keeps zeros. Its CUDA kernel takes ``127 / absmax`` from a fast division, so that a weight
    on a tie (exactly half of its row's absmax is level 63.5) can land one level away; the scales are equal.
    Paper: https://huggingface.co/papers/2208.07339, section 2.1.

    Args:
        weight: Floating-point matrix, shape (d_out, d_in).
        bits: Of a code, 2 to 8.

    Returns:
        The codes, int8, shape (d_out, d_in), in [-127, 127]; the absmax of each row, float32, shape (d_out,).

    Raises:
        ValueError: Not a floating-point matrix, an empty one, or one with values that float16 cannot hold;
            another number of bits.
    """
    if bits not in range(2, 9):
        raise ValueError(f"bits is {bits!r}; expected a whole number from 2 to 8.")
    if weight.ndim != 2 or not weight.is_floating_point() or not weight.numel():
        raise ValueError(
            f"quantize_absmax got a tensor of shape {tuple(weight.shape)} and type {weight.dtype}; "
            "it takes a floating-point matrix (d_out, d_in), such as a Linear's weight before quantization."
        )
    half = weight.detach().to(torch.float16)
    if not half.isfinite().all():
        raise ValueError(
            f"The weight holds NaN, infinity or values beyond float16's 65504 (largest magnitude "
            f"{weight.detach().abs().max().item():g}): bitsandbytes cannot quantize it. Check the checkpoint."
        )
    absmax = half.abs().amax(dim=1).float()
    top = 2 ** (bits - 1) - 1
    scaled = half * (top / absmax)[:, None]  # float16 * float32 is computed in float32
    codes = torch.where(absmax[:, None] > 0, scaled.round(), 0.0).to(torch.int8)
    return codes, absmax


def summarize_memory(config: ModelConfig, dtype: torch.dtype = torch.bfloat16) -> pd.DataFrame:
    """Predict a Llama model's bytes from its ``LlamaConfig`` alone, in five formats.

    bitsandbytes quantizes the seven projections of each decoder layer, and keeps scales beside their codes.
    Embeddings, the output layer (``lm_head``) and the norms stay in ``dtype``.

    Returns:
        Index format (``fp32``, ``bf16``, ``int8``, ``nf4``, ``nf4 single``); ``bf16`` stands for float16 too,
        ``nf4`` is with double quantization. Columns in GiB: projections_gib (codes), scales_gib, rest_gib,
        total_gib; total_bytes; bits_per_weight of a projection, scales included.
    """
    shape = Shape.of(config)
    weights = shape.layers * sum(d_in * d_out for d_in, d_out in shape.linears.values())
    rows = {}
    for name in ("fp32", "bf16", "int8", "nf4", "nf4 single"):
        sizes = [linear_bytes(name, *linear) for linear in shape.linears.values()]
        codes, scales = (shape.layers * sum(size) for size in zip(*sizes, strict=True))
        rest = shape.unquantized * {"fp32": 4, "bf16": 2}.get(name, dtype.itemsize)
        parts = {"projections": codes, "scales": scales, "rest": rest, "total": codes + scales + rest}
        rows[name] = {f"{part}_gib": size / _GIB for part, size in parts.items()} | {
            "total_bytes": parts["total"],
            "bits_per_weight": 8 * (codes + scales) / weights,
        }
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("format")


def quantized_modules(model: nn.Module, *formats: str) -> dict[str, nn.Module]:
    """Name -> layer that bitsandbytes holds in one of these formats; at least one, or else ``ValueError``."""
    modules = {name: module for name, module in model.named_modules() if storage_format(module) in formats}
    if not modules:
        raise ValueError(
            f"{type(model).__name__} has no bitsandbytes layer in {' or '.join(formats)}. Pass a model that "
            "from_pretrained(..., quantization_config=BitsAndBytesConfig(load_in_8bit=True)) returned."
        )
    return modules


def weight_name(name: str) -> str:
    """A layer's weight in the checkpoint: PEFT puts a prefix before its name and wraps the layer."""
    return name.removeprefix("base_model.model.").removesuffix(".base_layer") + ".weight"


def find_place(name: str) -> dict[str, Any]:
    """A module's decoder ``layer`` (-1 outside of one) and its own short name, ``module``."""
    match = re.search(r"\.layers\.(\d+)\.", name)
    return {"layer": int(match[1]) if match else -1, "module": weight_name(name).split(".")[-2]}


def read_weight(folder: str | Path, name: str) -> torch.Tensor:
    """One weight from the safetensors files of a folder, or ``ValueError`` if none holds it."""
    from safetensors import safe_open

    for path in sorted(Path(folder).glob("*.safetensors")):
        with safe_open(path, framework="pt") as shard:
            if name in set(shard.keys()):
                return shard.get_tensor(name)
    raise ValueError(
        f"{folder} has no .safetensors file that holds {name}. Pass the folder of the checkpoint that the "
        "quantized model was loaded from, such as huggingface_hub.snapshot_download(model_id) returns."
    )
