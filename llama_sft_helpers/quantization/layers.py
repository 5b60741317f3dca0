"""A layer's quantization: codes and scales, the bytes they take, and the checkpoint to compare them with."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import nn

from llama_sft_helpers.core.bnb import is_quantized
from llama_sft_helpers.core.llama import Shape, linear_bytes

_GIB = 2**30
LOAD_INT8 = "from_pretrained(..., quantization_config=BitsAndBytesConfig(load_in_8bit=True))"


def quantize_absmax(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize a matrix row by row: a row's largest magnitude becomes level 127 (symmetric, no zero point).

    ``codes = round(weight * (127 / absmax))``: one step of a row is ``absmax / 127``. This is what
    ``bitsandbytes.functional.int8_vectorwise_quant`` computes on the CPU, bit for bit: weights are cast to
    float16 first (whatever the checkpoint's type), the scales are float32, a tie goes to the even level, and
    a row of zeros keeps zeros.

    bitsandbytes' CUDA kernel differs in one place: it takes ``127 / absmax`` from a fast division that may
    be off by two units in the last place. Scales are equal there too; a weight on a tie (exactly half of its
    row's absmax is level 63.5) can land one level away.

    Args:
        weight: Floating-point matrix, shape (d_out, d_in).

    Returns:
        The codes, int8, shape (d_out, d_in), in [-127, 127]; the absmax of each row, float32, shape (d_out,).

    Raises:
        ValueError: Not a floating-point matrix, an empty one, or one with values that float16 cannot hold.

    Paper: https://huggingface.co/papers/2208.07339, section 2.1.
    """
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
    scaled = half * (127.0 / absmax)[:, None]  # float16 * float32 is computed in float32
    codes = torch.where(absmax[:, None] > 0, scaled.round(), 0.0).to(torch.int8)
    return codes, absmax


def summarize_memory(config: Any, dtype: torch.dtype = torch.bfloat16) -> pd.DataFrame:
    """Predict a Llama model's bytes from its config alone, in five formats.

    bitsandbytes quantizes the seven projections of each decoder layer, and keeps scales beside their codes.
    Embeddings, the output layer (``lm_head``) and the norms stay in ``dtype``.

    Args:
        config: A ``LlamaConfig``.
        dtype: Type of what is not quantized, in the int8 and nf4 rows.

    Returns:
        Index format (``fp32``, ``bf16``, ``int8``, ``nf4``, ``nf4 single``); ``bf16`` stands for float16 too,
        ``nf4`` is with double quantization. Columns in GiB: projections_gib (codes), scales_gib, rest_gib,
        total_gib; total_bytes; bits_per_weight of a projection, scales included.

    Raises:
        ValueError: The config is not that of a Llama-shaped model.
    """
    shape = Shape.of(config)
    weights = shape.layers * sum(d_in * d_out for d_in, d_out in shape.linears.values())
    rows = {}
    for name in ("fp32", "bf16", "int8", "nf4", "nf4 single"):
        sizes = [linear_bytes(name, *linear) for linear in shape.linears.values()]
        codes, scales = (shape.layers * sum(size) for size in zip(*sizes, strict=True))
        rest = shape.unquantized * {"fp32": 4, "bf16": 2}.get(name, dtype.itemsize)
        total = codes + scales + rest
        rows[name] = {
            "projections_gib": codes / _GIB,
            "scales_gib": scales / _GIB,
            "rest_gib": rest / _GIB,
            "total_gib": total / _GIB,
            "total_bytes": total,
            "bits_per_weight": 8 * (codes + scales) / weights,
        }
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("format")


def quantized_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Name -> quantized layer.

    Raises:
        ValueError: The model has none.
    """
    modules = {name: module for name, module in model.named_modules() if is_quantized(module)}
    if not modules:
        raise ValueError(
            f"{type(model).__name__} has no bitsandbytes layer. Pass a model loaded with {LOAD_INT8}, or "
            "with load_in_4bit=True."
        )
    return modules


def checkpoint_name(name: str) -> str:
    """A module's name in the checkpoint: PEFT puts a prefix before it and wraps the layer."""
    return name.removeprefix("base_model.model.").removesuffix(".base_layer")


def find_place(name: str) -> tuple[int, str]:
    """A module's decoder layer (-1 outside of one) and its own short name."""
    name = checkpoint_name(name)
    match = re.search(r"\.layers\.(\d+)\.", name)
    return (int(match.group(1)) if match else -1), name.rpartition(".")[2]


@contextmanager
def open_reference(reference: nn.Module | str | Path) -> Iterator[Any]:
    """A function that gives one reference weight by its name in the checkpoint."""
    if isinstance(reference, nn.Module):
        if any(is_quantized(module) for module in reference.modules()):
            raise ValueError(
                "reference_model is quantized itself. Pass the model before quantization, or the folder of "
                "its safetensors checkpoint."
            )
        weights = dict(reference.named_parameters(remove_duplicate=False))
        yield lambda name: _found(name, weights.get(name))
        return
    files = _index_checkpoint(Path(reference))
    from safetensors import safe_open

    def read(name: str) -> torch.Tensor:
        if name not in files:
            return _found(name, None)
        with safe_open(files[name], framework="pt") as shard:
            return _found(name, shard.get_tensor(name))

    yield read


def _index_checkpoint(folder: Path) -> dict[str, Path]:
    """Weight name -> the safetensors file that holds it."""
    from safetensors import safe_open

    shards = sorted(folder.glob("*.safetensors")) if folder.is_dir() else []
    if not shards:
        raise ValueError(
            f"{folder} is not a folder with .safetensors files. Pass the checkpoint's folder, such as "
            "huggingface_hub.snapshot_download(model_id) returns."
        )
    files = {}
    for shard in shards:
        with safe_open(shard, framework="pt") as opened:
            files.update(dict.fromkeys(opened.keys(), shard))
    return files


def _found(name: str, weight: torch.Tensor | None) -> torch.Tensor:
    if weight is None or weight.is_meta:
        state = "holds no" if weight is None else "keeps on disk (offloaded), not in memory, its"
        raise ValueError(
            f"The reference {state} {name}. Pass the checkpoint that the quantized model was loaded from."
        )
    return weight.detach()
