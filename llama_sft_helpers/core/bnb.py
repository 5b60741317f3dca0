"""How bitsandbytes stores a layer, and one proof that nothing of a base model changed.

The one reader of quantized layers: their format, scales, number of weights and the matrix they stand for. The
checksums cover every frozen weight, computed where it lies. Nothing here changes a layer.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn


def storage_format(module: nn.Module) -> str | None:
    """``int8``, ``nf4`` or ``fp4`` for a bitsandbytes layer, None for any other."""
    weight = module._parameters.get("weight")  # not getattr: PEFT's wrapper shows its base layer's weight
    kind = type(weight).__name__
    if kind == "Int8Params" and weight is not None and weight.dtype == torch.int8:
        return "int8"
    if kind == "Params4bit" and getattr(weight, "quant_state", None) is not None:
        return str(getattr(weight, "quant_type", "nf4"))
    return None


def is_quantized(module: nn.Module) -> bool:
    """Whether bitsandbytes holds this layer's weight in 8 or 4 bits."""
    return storage_format(module) is not None


def row_absmax(module: Any) -> torch.Tensor:
    """An int8 layer's scales: the first forward pass moves them from the weight to the state."""
    return module.weight.SCB if module.weight.SCB is not None else module.state.SCB


def scale_tensors(module: Any) -> Iterator[torch.Tensor]:
    """Tensors that a quantized layer keeps beside its codes."""
    if storage_format(module) == "int8":
        yield row_absmax(module)
    elif is_quantized(module):
        state = module.weight.quant_state
        nested = getattr(state, "state2", None)
        tables = (state.absmax, state.code, *((state.offset, nested.absmax, nested.code) if nested else ()))
        yield from tables


def count_weights(parameter: torch.Tensor) -> int:
    """Weights that a parameter stands for: nf4 packs two into a byte."""
    state = getattr(parameter, "quant_state", None)
    return math.prod(state.shape) if state is not None else parameter.numel()


def dequantize(name: str, module: Any) -> torch.Tensor:
    """The matrix that a quantized layer stands for, float32, on its device."""
    import bitsandbytes.functional as bnb

    weight = module.weight
    if storage_format(module) == "int8":
        return bnb.int8_vectorwise_dequant(weight.data, row_absmax(module))
    if getattr(weight.quant_state, "packing_format_for_cpu", False):
        raise ValueError(
            f"{name}: a forward pass on this CPU has repacked the 4-bit codes (bitsandbytes does so where "
            "the CPU has AVX512-BF16). Load the model again and compare it before the first forward pass."
        )
    return bnb.dequantize_4bit(weight.data, weight.quant_state).float()


# --- Checksums ---


def checksum_base(model: torch.nn.Module) -> dict[str, int]:
    """A checksum of every frozen weight's bytes, int8 scales included, computed where they lie.

    The number of bytes and two sums modulo 2^64 over words of eight bytes, one weighted by position, side by
    side in one integer: a single changed word always changes it.
    """
    return {name: checksum(tensor) for name, tensor in frozen_tensors(model).items()}


def frozen_tensors(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """What does not train, int8 scales included; a table that two layers share (tied weights) comes once."""
    tensors = {name: p.data for name, p in model.named_parameters() if not p.requires_grad}
    int8 = {name: module for name, module in model.named_modules() if storage_format(module) == "int8"}
    return tensors | {f"{name}.SCB": row_absmax(module) for name, module in int8.items()}


def check_base_unchanged(model: torch.nn.Module, before: Mapping[str, int]) -> None:
    """Check that the frozen weights are bit for bit those that ``checksum_base`` saw.

    Raises:
        AssertionError: A weight changed, appeared or went; the message counts them and names the first.
    """
    after = checksum_base(model)
    changed = sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))
    if changed:
        raise AssertionError(
            f"Measured: {len(changed)} of {len(before)} base weights changed (first: {changed[0]}). "
            "Expected: 0. Only the adapter may train: check requires_grad, and that it was not merged."
        )


@torch.no_grad()
def checksum(tensor: torch.Tensor) -> int:
    """Of one tensor's bytes, on its own device: nothing but two sums is copied to the CPU."""
    data = tensor.detach().contiguous().view(-1).view(torch.uint8)
    tail = -data.numel() % 8
    words = torch.nn.functional.pad(data, (0, tail)).view(torch.int64)
    weights = torch.arange(1, 2 * words.numel() + 1, 2, device=words.device)  # odd: no bit of a word is lost
    total, weighted = (int(found) % 2**64 for found in (words.sum(), (words * weights).sum()))
    return data.numel() << 128 | total << 64 | weighted  # no hash(): Python's of -1 and of -2 are the same
