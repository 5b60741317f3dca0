"""Frozen int8 layers multiplied on the GPU's int8 units, forward and back: the switch ``use_int8_units``."""

# ruff: noqa: PLR0917 - an operator's arguments are those of its schema

from __future__ import annotations

import contextlib
import functools
import math
import warnings
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

from llama_sft_helpers.core.modes import evaluation_mode
from llama_sft_helpers.speed import int8_kernels
from llama_sft_helpers.speed.int8_product import (
    dequantize,
    frozen_linears,
    in_autocast,
    lora_layers,
    use_fast_int8,
)

_INT8_MAX = 127.0

# Operators below autograd, registered as those of int8_product are. What is small and pointwise stays
# outside: a compiler joins it into few kernels.
_LIBRARY = torch.library.Library("llama_sft", "FRAGMENT")
_LIBRARY.define(
    "int8_units_linear(Tensor x, Tensor codes, Tensor scales, Tensor? lora_a, Tensor? lora_b, float scaling, "
    "Tensor? thin_in, Tensor? thin_out, Tensor? kept, bool int8_forward, bool int8_backward) -> Tensor"
)
_LIBRARY.define(
    "int8_units_grad(Tensor grad, Tensor codes, Tensor scales, Tensor? thin_in, Tensor? thin_out) -> Tensor"
)


def _units_linear(  # type: ignore[no-untyped-def]
    x, codes, scales, lora_a, lora_b, scaling, thin_in, thin_out, kept, int8_forward, int8_backward
):
    if not int8_forward:
        weight = dequantize(codes, scales * _INT8_MAX, lora_a, lora_b, scaling, x.dtype)
        return torch.nn.functional.linear(x, weight)
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    thin = None if thin_in is None else (rows @ thin_in.t(), thin_out)
    x_codes, x_scales = int8_kernels.quantize_rows(rows, kept)
    out = int8_kernels.int8_matmul(x_codes, codes, x_scales, scales, dtype=x.dtype, thin=thin)
    return out.view(*x.shape[:-1], codes.shape[0])


def _units_grad(grad, codes, scales, thin_in, thin_out):  # type: ignore[no-untyped-def]
    rows = grad.reshape(-1, grad.shape[-1]).contiguous()
    thin = None if thin_in is None else (rows @ thin_in, thin_out)
    # the codes' scales belong to the dimension that is summed here, so they go into the gradient first
    grad_codes, grad_scales = int8_kernels.quantize_rows(rows, scales)
    columns = int8_kernels.transpose_codes(codes)
    out = int8_kernels.int8_matmul(grad_codes, columns, grad_scales, dtype=grad.dtype, thin=thin)
    return out.view(*grad.shape[:-1], codes.shape[1])


_LIBRARY.impl("int8_units_linear", _units_linear, "CompositeExplicitAutograd")
_LIBRARY.impl("int8_units_grad", _units_grad, "CompositeExplicitAutograd")


@torch.library.register_fake("llama_sft::int8_units_linear")
def _(x, codes, *_):  # type: ignore[no-untyped-def]
    return x.new_empty((*x.shape[:-1], codes.shape[0]))


@torch.library.register_fake("llama_sft::int8_units_grad")
def _(grad, codes, *_):  # type: ignore[no-untyped-def]
    return grad.new_empty((*grad.shape[:-1], codes.shape[1]))


@register_flop_formula([torch.ops.llama_sft.int8_units_linear, torch.ops.llama_sft.int8_units_grad])
def _units_flop(x_shape, codes_shape, *args, **kwargs) -> int:  # type: ignore[no-untyped-def]
    return 2 * math.prod(x_shape[:-1]) * codes_shape[0] * codes_shape[1]


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    x, codes, scales, lora_a, lora_b, ctx.scaling, *_, ctx.int8_backward = inputs
    ctx.save_for_backward(x if lora_a is not None else None, codes, scales, lora_a, lora_b)


def _backward(ctx, grad):  # type: ignore[no-untyped-def]
    x, codes, scales, lora_a, lora_b = ctx.saved_tensors
    grad_x = grad_a = grad_b = None
    if ctx.needs_input_grad[0]:
        grad_x = _grad_of_input(grad, codes, scales, lora_a, lora_b, ctx)
    if lora_a is not None and any(ctx.needs_input_grad[3:5]):
        grad_a, grad_b = torch.ops.llama_sft.lora_grads(grad, x, lora_a, lora_b, ctx.scaling)
    return (grad_x, None, None, grad_a, grad_b, *6 * [None])


def _grad_of_input(grad, codes, scales, lora_a, lora_b, ctx):  # type: ignore[no-untyped-def]
    if not ctx.int8_backward:
        absmax = scales * _INT8_MAX
        return torch.ops.llama_sft.int8_linear_grad(grad, codes, absmax, lora_a, lora_b, ctx.scaling)
    thin_in = thin_out = None
    if lora_a is not None:
        thin_in = (lora_b * ctx.scaling).to(grad.dtype)
        thin_out = lora_a.to(grad.dtype).t().contiguous()
    return torch.ops.llama_sft.int8_units_grad(grad, codes, scales, thin_in, thin_out)


torch.library.register_autograd("llama_sft::int8_units_linear", _backward, setup_context=_setup_context)


class Int8Units(torch.nn.Module):
    """A layer's product on the int8 units, called by the forward pass that ``use_fast_int8`` put there.

    Args:
        in_features: Columns of the layer's input.
        columns: Indices of the input's columns to multiply in 16 bits, int64, on the layer's device; or None.
        int8_backward: False computes the input's gradient in 16 bits.
        int8_forward: False computes the output in 16 bits.
    """

    def __init__(
        self, in_features: int, columns: torch.Tensor | None, int8_backward: bool, int8_forward: bool = True
    ) -> None:
        super().__init__()
        kept = None if columns is None else torch.ones(in_features, device=columns.device)
        if kept is not None:
            kept[columns] = 0
        # buffers move and are copied with the model; not persistent, so that no checkpoint holds them
        self.columns: torch.Tensor | None
        self.register_buffer("columns", columns, persistent=False)
        self.register_buffer("kept", kept, persistent=False)
        self.int8_backward, self.int8_forward = int8_backward, int8_forward

    def forward(
        self,
        x: torch.Tensor,
        codes: torch.Tensor,
        absmax: torch.Tensor,
        lora_a: torch.Tensor | None = None,
        lora_b: torch.Tensor | None = None,
        scaling: float = 1.0,
    ) -> torch.Tensor:
        """What ``int8_linear`` computes, its input rounded to int8 row by row; the same arguments."""
        x, scales = in_autocast(x), absmax.float() / _INT8_MAX
        thin: Any = None, None
        if self.int8_forward:
            thin = self._thin_factors(codes, scales, lora_a, lora_b, scaling, x.dtype)
        kinds = self.int8_forward, self.int8_backward
        out: torch.Tensor = torch.ops.llama_sft.int8_units_linear(
            x, codes, scales, lora_a, lora_b, scaling, *thin, self.kept, *kinds
        )
        return out

    def _thin_factors(self, codes, scales, lora_a, lora_b, scaling, dtype):  # type: ignore[no-untyped-def]
        """LoRA's update and the outlier columns as one product in 16 bits, with few columns in between."""
        left, right = [], []
        if lora_a is not None:
            left.append(lora_a.detach())
            right.append(lora_b.detach() * scaling)
        if (
            self.columns is not None
        ):  # 1 where the column is; the weight from the codes of now: merges change them
            left.append(torch.arange(codes.shape[1], device=codes.device) == self.columns[:, None])
            right.append(codes.index_select(1, self.columns) * scales[:, None])
        if not left:
            return None, None
        return torch.cat([part.to(dtype) for part in left]), torch.cat([part.to(dtype) for part in right], 1)


def use_int8_units(
    model: torch.nn.Module,
    calibration: Mapping[str, torch.Tensor] | None = None,
    outlier_columns: int = 16,
    leave_out: Collection[str] = (),
    only_backward: Collection[str] = (),
    int8_backward: bool = True,
    enabled: bool = True,
) -> int:
    """Let frozen ``Linear8bitLt``, and plain LoRA over one, multiply int8 by int8, forward and back.

    ``use_fast_int8`` rounds nothing but multiplies at the 16-bit rate; a GPU's int8 units are twice as fast.
    With codes ``C`` (out, in), their ``absmax`` (out,), input ``x`` and gradient ``dY``, row by row:

    - ``y = int8(x without outlier columns) C^T * scales + [x A^T, x_outliers] [s B, W_outliers]^T``
    - ``dX = int8(dY * absmax / 127) C + dY (s B) A``
    - ``dA`` and ``dB`` from ``x`` and ``dY`` as they are: what is trained sees 16-bit products only.

    Forward as in LLM.int8 (https://arxiv.org/abs/2208.07339), its outlier columns fixed beforehand; both
    products in 8 bits as in SwitchBack (https://arxiv.org/abs/2304.13013). Rotating the inputs (HALO,
    https://arxiv.org/abs/2501.02625; ConvRot, https://arxiv.org/abs/2512.03673) would spread outliers, but
    needs other codes than the checkpoint's. Call it after ``get_peft_model``, before
    ``compile_decoder_layers``, whose layers share one graph as each has as many outlier columns.

    Args:
        model: As for ``use_fast_int8``, which this switches on for all its int8 layers.
        calibration: ``input_ids`` (rows, tokens), with ``attention_mask`` or not, of a typical batch on the
            model's device: in each layer the columns of the input with the largest magnitudes in it stay in
            16 bits, found as notebook 03 finds them. None keeps no column apart.
        outlier_columns: How many columns that are.
        leave_out: Names of modules, such as ``down_proj``, that keep the 16-bit product.
        only_backward: Names of modules whose output is computed in 16 bits, ``dX`` alone in int8.
        int8_backward: False computes ``dX`` in 16 bits.
        enabled: False goes back to ``use_fast_int8``; switch that off as well for the libraries' own.

    Returns:
        How many ``Linear8bitLt`` multiply on the int8 units now. It is 0 on a GPU whose units Triton does not
        reach, such as a T4: a warning says so, and the 16-bit product stays. A CPU computes the same numbers
        slowly, to look at them.

    Raises:
        ValueError: No frozen int8 layers; ``leave_out`` or ``only_backward`` names what is none of them; or
            more outlier columns than a layer has columns, or less than one.
    """
    linears = frozen_linears(model)
    _remove(linears)
    use_fast_int8(model)
    if not enabled or not _reachable(next(iter(linears.values())).weight.device):
        return 0
    chosen = _leave(linears, leave_out)
    forward = _leave(chosen, only_backward)
    columns = {} if calibration is None else _find_columns(model, forward, calibration, outlier_columns)
    for name, linear in chosen.items():
        kinds = int8_backward, name in forward
        linear.int8_units = Int8Units(linear.in_features, columns.get(name), *kinds)
    return len(chosen)


def _remove(linears: Mapping[str, Any]) -> None:
    for linear in linears.values():
        if hasattr(linear, "int8_units"):
            del linear.int8_units


def _reachable(device: torch.device) -> bool:
    if device.type != "cuda" or int8_kernels.has_int8_units(device):
        return True
    warnings.warn(
        f"use_int8_units changes nothing on {torch.cuda.get_device_name(device)}: its kernels need a GPU of "
        "compute capability 8.0 or newer (A100, L4, H100) and Triton. The 16-bit product stays.",
        stacklevel=3,
    )
    return False


def _leave(linears: Mapping[str, Any], unwanted: Collection[str]) -> dict[str, Any]:
    """The layers without those of these short names."""
    names = {name: name.removesuffix(".base_layer").rpartition(".")[2] for name in linears}
    if isinstance(unwanted, str) or set(unwanted) - set(names.values()):
        raise ValueError(
            f"{unwanted!r} is no list of modules to leave; expected some of "
            f"{', '.join(sorted(set(names.values())))}, such as ['down_proj']."
        )
    return {name: linear for name, linear in linears.items() if names[name] not in unwanted}


@torch.no_grad()
def _find_columns(
    model: torch.nn.Module, linears: Mapping[str, Any], batch: Mapping[str, torch.Tensor], count: int
) -> dict[str, torch.Tensor]:
    """Name of a layer -> its input's ``count`` columns with the largest magnitudes in the batch."""
    narrowest = min(linear.in_features for linear in linears.values())
    if not 1 <= count <= narrowest:
        raise ValueError(
            f"outlier_columns={count!r}; expected 1 to {narrowest}, the narrowest layer's inputs."
        )
    callers = {id(layer.base_layer): layer for layer in lora_layers(model)}  # they call no base
    found: dict[str, torch.Tensor] = {}

    def watch(name: str, _: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        found[name] = args[0].flatten(0, -2).abs().amax(0).topk(count).indices.sort().values

    inputs = {key: batch[key] for key in ("input_ids", "attention_mask", "position_ids") if key in batch}
    with contextlib.ExitStack() as hooks, evaluation_mode(model):
        for name, linear in linears.items():
            caller = callers.get(id(linear), linear)
            hooks.enter_context(caller.register_forward_pre_hook(functools.partial(watch, name)))
        model(**inputs, use_cache=False)
    return found
