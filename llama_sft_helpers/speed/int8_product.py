"""Int8 weights dequantized inside a 16-bit product: the switch ``use_fast_int8`` of notebook 08."""

# ruff: noqa: N803, PLR0917 - a kernel's compile-time constants are in capitals, and an operator's arguments
# are those of its schema

from __future__ import annotations

import functools
import math
import types
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

try:
    import triton  # type: ignore[import-not-found]
    import triton.language as tl  # type: ignore[import-not-found]
except ImportError:  # wheels of torch for the CPU, Windows and macOS come without Triton
    triton = None

_INT8_MAX = 127.0
_ROWS, _COLUMNS = 32, 256  # of one block of the dequantizing kernel; the fastest of 27 sizes on an H100
_HALF_TYPES = (torch.bfloat16, torch.float16)

if triton is not None:

    @triton.jit  # type: ignore[untyped-decorator]
    def _dequantize_kernel(  # type: ignore[no-untyped-def]
        codes, absmax, lora_a, lora_b, out, rows, columns, rank, scaling,
        has_lora: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, RANK: tl.constexpr,
    ):  # fmt: skip
        row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
        column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
        inside = (row < rows)[:, None] & (column < columns)[None, :]
        place = row.to(tl.int64)[:, None] * columns + column[None, :]
        scale = tl.load(absmax + row, mask=row < rows, other=0.0).to(tl.float32) / 127.0
        weight = tl.load(codes + place, mask=inside, other=0).to(tl.float32) * scale[:, None]
        if has_lora:
            r = tl.arange(0, RANK)
            b_inside = (row < rows)[:, None] & (r < rank)[None, :]
            a_inside = (r < rank)[:, None] & (column < columns)[None, :]
            b = tl.load(lora_b + row[:, None] * rank + r[None, :], mask=b_inside, other=0.0)
            a = tl.load(lora_a + r[:, None] * columns + column[None, :], mask=a_inside, other=0.0)
            weight += tl.dot(b.to(out.dtype.element_ty), a.to(out.dtype.element_ty)) * scaling
        tl.store(out + place, weight.to(out.dtype.element_ty), mask=inside)


_launchers: dict[Any, Callable[..., Any]] = {}


def _launch(
    codes: torch.Tensor,
    absmax: torch.Tensor,
    lora_a: torch.Tensor | None,
    lora_b: torch.Tensor | None,
    out: torch.Tensor,
    scaling: float,
) -> None:
    """Start the kernel; after a shape's first call without Triton's own checks, which cost as much again."""
    a, b = (out, out) if lora_a is None or lora_b is None else (lora_a.contiguous(), lora_b.contiguous())
    rows, columns = codes.shape
    rank = 0 if lora_a is None else lora_a.shape[0]
    block = max(16, triton.next_power_of_2(rank)) if rank else 16
    tensors = (codes, absmax, a, b, out)
    args = (*tensors, rows, columns, rank, scaling, rank > 0, _ROWS, _COLUMNS, block)
    key = (rows, columns, rank, codes.device, *(t.dtype for t in tensors))
    aligned = not any(t.data_ptr() % 16 for t in tensors)
    if aligned and key in _launchers:
        _launchers[key](*args)
        return
    grid = (triton.cdiv(rows, _ROWS), triton.cdiv(columns, _COLUMNS), 1)
    kernel = _dequantize_kernel[grid](*args, num_warps=4)
    if aligned:
        _launchers[key] = kernel[grid]


@functools.cache
def _can_launch(device: torch.device) -> bool:
    return device.type == "cuda" and triton is not None and torch.cuda.get_device_capability(device) >= (8, 0)


def dequantize(
    codes: torch.Tensor,
    absmax: torch.Tensor,
    lora_a: torch.Tensor | None,
    lora_b: torch.Tensor | None,
    scaling: float,
    dtype: torch.dtype,
) -> torch.Tensor:
    """The weight that int8 codes stand for, with a LoRA update added before the one rounding.

    ``codes * absmax / 127 + scaling * lora_b @ lora_a``, summed in float32 and rounded once to ``dtype``. On
    a GPU with Triton that is one pass over memory: a byte read and two written for each weight.

    Args:
        codes: int8 codes, shape ``(out_features, in_features)``.
        absmax: Largest magnitude of each row of the weight, shape ``(out_features,)``.
        lora_a: ``(rank, in_features)``, or None for no update.
        lora_b: ``(out_features, rank)``, or None.
        scaling: ``lora_alpha / rank``.
        dtype: Type of the result.

    Returns:
        Shape ``(out_features, in_features)``; meant to live for one product.
    """
    if dtype in _HALF_TYPES and _can_launch(codes.device):
        out = torch.empty(codes.shape, dtype=dtype, device=codes.device)
        _launch(codes, absmax, lora_a, lora_b, out, scaling)
        return out
    weight = codes * (absmax.float() / _INT8_MAX)[:, None]
    if lora_a is not None and lora_b is not None:
        weight = weight.addmm_(lora_b.float(), lora_a.float(), alpha=scaling)
    return weight.to(dtype)


# Operators below autograd: plain registrations, since torch.library.custom_op costs 60 microseconds more a
# call.
_WEIGHT = "Tensor codes, Tensor absmax, Tensor? lora_a, Tensor? lora_b, float scaling"
_LIBRARY = torch.library.Library("llama_sft", "DEF")
_LIBRARY.define(f"int8_linear(Tensor x, {_WEIGHT}) -> Tensor")
_LIBRARY.define(f"int8_linear_grad(Tensor grad, {_WEIGHT}) -> Tensor")
_LIBRARY.define(
    "lora_grads(Tensor grad, Tensor x, Tensor lora_a, Tensor lora_b, float scaling) -> (Tensor, Tensor)"
)


def _int8_linear(x, codes, absmax, lora_a, lora_b, scaling):  # type: ignore[no-untyped-def]
    return torch.nn.functional.linear(x, dequantize(codes, absmax, lora_a, lora_b, scaling, x.dtype))


def _int8_linear_grad(grad, codes, absmax, lora_a, lora_b, scaling):  # type: ignore[no-untyped-def]
    return torch.matmul(grad, dequantize(codes, absmax, lora_a, lora_b, scaling, grad.dtype))


def _lora_grads(grad, x, lora_a, lora_b, scaling):  # type: ignore[no-untyped-def]
    # y = x (W + s B A)^T, so dA = s (g B)^T x and dB = s g^T (x A^T): neither needs the weight
    g, x = grad.reshape(-1, grad.shape[-1]), x.reshape(-1, x.shape[-1])
    a, b = lora_a.to(x.dtype), lora_b.to(x.dtype)
    grad_a = _product((g @ b).mul_(scaling).t(), x, lora_a.dtype)
    grad_b = _product(g.t(), (x @ a.t()).mul_(scaling), lora_b.dtype)
    return grad_a, grad_b


def _product(left: torch.Tensor, right: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    if left.is_cuda and dtype == torch.float32 and left.dtype in _HALF_TYPES and _MM_TAKES_OUT_DTYPE:
        return torch.mm(left, right, out_dtype=dtype)
    return (left @ right).to(dtype)


_MM_TAKES_OUT_DTYPE = tuple(int(part) for part in torch.__version__.split(".")[:2]) >= (2, 8)
for _name, _function in (
    ("int8_linear", _int8_linear),
    ("int8_linear_grad", _int8_linear_grad),
    ("lora_grads", _lora_grads),
):
    _LIBRARY.impl(_name, _function, "CompositeExplicitAutograd")


@torch.library.register_fake("llama_sft::int8_linear")
def _(x, codes, absmax, lora_a, lora_b, scaling):  # type: ignore[no-untyped-def]
    return x.new_empty((*x.shape[:-1], codes.shape[0]))


@torch.library.register_fake("llama_sft::int8_linear_grad")
def _(grad, codes, absmax, lora_a, lora_b, scaling):  # type: ignore[no-untyped-def]
    return grad.new_empty((*grad.shape[:-1], codes.shape[1]))


@torch.library.register_fake("llama_sft::lora_grads")
def _(grad, x, lora_a, lora_b, scaling):  # type: ignore[no-untyped-def]
    return torch.empty_like(lora_a), torch.empty_like(lora_b)


@register_flop_formula([torch.ops.llama_sft.int8_linear, torch.ops.llama_sft.int8_linear_grad])
def _int8_linear_flop(x_shape, codes_shape, *args, **kwargs) -> int:  # type: ignore[no-untyped-def]
    # without this the compiler's choice of what to recompute would take these products to be free
    return 2 * math.prod(x_shape[:-1]) * codes_shape[0] * codes_shape[1]


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    x, codes, absmax, lora_a, lora_b, scaling = inputs
    ctx.scaling = scaling
    ctx.save_for_backward(x if lora_a is not None else None, codes, absmax, lora_a, lora_b)


def _backward(ctx, grad):  # type: ignore[no-untyped-def]
    x, codes, absmax, lora_a, lora_b = ctx.saved_tensors
    weight = codes, absmax, lora_a, lora_b, ctx.scaling
    grad_x = torch.ops.llama_sft.int8_linear_grad(grad, *weight) if ctx.needs_input_grad[0] else None
    grad_a = grad_b = None
    if lora_a is not None and any(ctx.needs_input_grad[3:5]):
        grad_a, grad_b = torch.ops.llama_sft.lora_grads(grad, x, lora_a, lora_b, ctx.scaling)
    return grad_x, None, None, grad_a, grad_b, None


torch.library.register_autograd("llama_sft::int8_linear", _backward, setup_context=_setup_context)


def int8_linear(
    x: torch.Tensor,
    codes: torch.Tensor,
    absmax: torch.Tensor,
    lora_a: torch.Tensor | None = None,
    lora_b: torch.Tensor | None = None,
    scaling: float = 1.0,
) -> torch.Tensor:
    """``x @ (codes * absmax / 127 + scaling * lora_b @ lora_a).T``, keeping no 16-bit weight.

    The weight is dequantized inside the product, in the forward and again in the backward pass. Unlike
    LLM.int8 (https://arxiv.org/abs/2208.07339) activations are not quantized, so the only error is rounding.

    ``x`` of shape ``(..., in_features)`` gives ``(..., out_features)``; under autocast it is cast first. The
    weight's parts are those of ``dequantize``. Gradients flow to ``x``, ``lora_a`` and ``lora_b``.
    """
    out: torch.Tensor = torch.ops.llama_sft.int8_linear(
        in_autocast(x), codes, absmax, lora_a, lora_b, scaling
    )
    return out


def in_autocast(x: torch.Tensor) -> torch.Tensor:
    """In the type that autocast asks for, if it is on."""
    kind = x.device.type
    return x.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else x


def _run_fast(
    linear: Any,
    x: torch.Tensor,
    lora_a: torch.Tensor | None = None,
    lora_b: torch.Tensor | None = None,
    scaling: float = 1.0,
) -> Any:
    if linear.state.CB is None:  # after a merge PEFT puts new codes on the weight
        linear.init_8bit_state()
    product = getattr(linear, "int8_units", int8_linear)  # use_int8_units puts its own there
    out = product(x, linear.state.CB, linear.state.SCB, lora_a, lora_b, scaling)
    return out if linear.bias is None else out + linear.bias.to(out.dtype)


def _run_fast_lora(layer: Any, x: torch.Tensor, *args: object, **kwargs: object) -> Any:
    """Plain LoRA over an int8 layer: the update joins the weight inside the product."""
    name = _plain_adapter(layer)
    if args or kwargs or name is None:
        return type(layer).forward(layer, x, *args, **kwargs)
    a, b = layer.lora_A[name].weight, layer.lora_B[name].weight
    return _run_fast(layer.base_layer, x, a, b, layer.scaling[name])


def _plain_adapter(layer: Any) -> str | None:
    """The one active adapter, if nothing but ``scaling * lora_b @ lora_a`` is to be added; otherwise None."""
    name: str | None = layer.active_adapters[0] if len(layer.active_adapters) == 1 else None
    if layer.disable_adapters or layer.merged_adapters or name not in layer.lora_A:
        return None
    dropout = layer.training and getattr(layer.lora_dropout[name], "p", 0)
    return None if dropout or name in layer.lora_variant or layer.lora_bias[name] else name


def use_fast_int8(model: torch.nn.Module, enabled: bool = True) -> int:
    """Let every frozen ``Linear8bitLt``, and plain LoRA over one, compute through ``int8_linear``.

    The modules stay the libraries' own; only the instances' ``forward`` is put in the place of the class's,
    as accelerate does with its hooks. So codes, scales, ``state_dict``, saved files, merging and unloading
    stay as they are; no 16-bit weight is kept. DoRA, dropout, LoRA bias, mixed or merged adapters go PEFT's
    own way over the fast base layer.

    Args:
        model: A model loaded with ``load_in_8bit=True``, before or after ``get_peft_model``; call it again
            after ``get_peft_model`` to fuse the LoRA products too.
        enabled: False lets the libraries compute again.

    Returns:
        How many ``Linear8bitLt`` compute the asked way now. Layers that another library runs (a model spread
        over several devices) are left alone, with a warning.

    Raises:
        ValueError: The model has no ``Linear8bitLt``, or one that is not frozen int8.
    """
    linears = frozen_linears(model).values()
    for linear in linears:
        if linear.state.CB is None:
            linear.init_8bit_state()
    switched = sum(_switch(linear, _run_fast, enabled) for linear in linears)
    for layer in lora_layers(model):
        _switch(layer, _run_fast_lora, enabled)
    if switched < len(linears):
        warnings.warn(
            f"{len(linears) - switched} of {len(linears)} int8 layers are run by another library's hooks "
            "(a device_map over several devices) and keep computing as they do.",
            stacklevel=2,
        )
    return switched


def frozen_linears(model: torch.nn.Module) -> dict[str, Any]:
    """Name -> ``Linear8bitLt``, frozen and at least one, or else the ``ValueError`` of ``use_fast_int8``."""
    import bitsandbytes as bnb

    linears = {name: m for name, m in model.named_modules() if isinstance(m, bnb.nn.Linear8bitLt)}
    if not linears:
        raise ValueError(
            f"{type(model).__name__} has no Linear8bitLt; load it with "
            "quantization_config=BitsAndBytesConfig(load_in_8bit=True)."
        )
    for name, linear in linears.items():
        if linear.weight.dtype != torch.int8 or linear.weight.requires_grad:
            raise ValueError(
                f"{name} holds {linear.weight.dtype} weights with "
                f"requires_grad={linear.weight.requires_grad}; expected frozen int8 codes "
                "(has_fp16_weights=False, and moved to its device)."
            )
    return linears


def lora_layers(model: torch.nn.Module) -> list[Any]:
    """PEFT's LoRA layers over a ``Linear8bitLt``."""
    import bitsandbytes as bnb
    from peft.tuners.lora.bnb import Linear8bitLt

    layers = [module for module in model.modules() if isinstance(module, Linear8bitLt)]
    return [layer for layer in layers if isinstance(layer.base_layer, bnb.nn.Linear8bitLt)]


def _switch(module: Any, fast: Callable[..., Any], enabled: bool) -> bool:
    """Set or take away the instance's fast ``forward``; False if another library has put its own there."""
    forward = vars(module).get("forward")
    if forward is not None and getattr(forward, "__func__", None) is not fast:
        return False
    if enabled:  # a bound method: a deep copy's is bound to the copy, and compiled layers share a graph
        module.forward = types.MethodType(fast, module)
    elif forward is not None:
        del module.forward
    return True
