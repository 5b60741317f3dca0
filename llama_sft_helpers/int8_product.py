"""Int8 weights dequantized inside a 16-bit product: the switch ``use_fast_int8`` of notebook 08.

``speed`` offers the public functions beside its own.
"""

# ruff: noqa: N803, PLR0917 - a kernel's compile-time constants are in capitals, and operators take what they
# take

from __future__ import annotations

import functools
import importlib.util
import math
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

    Args:
        x: Shape ``(..., in_features)``; under autocast it is cast to autocast's type first.
        codes: int8, shape ``(out_features, in_features)``.
        absmax: float32, shape ``(out_features,)``.
        lora_a: ``(rank, in_features)``, or None.
        lora_b: ``(out_features, rank)``, or None.
        scaling: ``lora_alpha / rank``.

    Returns:
        Shape ``(..., out_features)``; gradients flow to ``x``, ``lora_a`` and ``lora_b``.
    """
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    out: torch.Tensor = torch.ops.llama_sft.int8_linear(x, codes, absmax, lora_a, lora_b, scaling)
    return out


def _run_fast(
    linear: Any, x: torch.Tensor, lora_a: Any = None, lora_b: Any = None, scaling: float = 1.0
) -> Any:
    if linear.state.CB is None:  # after a merge PEFT puts new codes on the weight
        linear.init_8bit_state()
    out = int8_linear(x, linear.state.CB, linear.state.SCB, lora_a, lora_b, scaling)
    return out if linear.bias is None else out + linear.bias.to(out.dtype)


@functools.cache
def _fast_linear() -> type[torch.nn.Module]:
    import bitsandbytes as bnb

    class FastLinear8bitLt(bnb.nn.Linear8bitLt):
        """``Linear8bitLt`` that dequantizes its codes inside a 16-bit product."""

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return _run_fast(self, x)

    return FastLinear8bitLt


@functools.cache
def _fast_lora() -> type[torch.nn.Module]:
    from peft.tuners.lora.bnb import Linear8bitLt

    class FastLoraLinear8bitLt(Linear8bitLt):
        """LoRA over a ``FastLinear8bitLt``: the update joins the weight inside the product."""

        def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            name = self.active_adapters[0] if len(self.active_adapters) == 1 else None
            if args or kwargs or self.disable_adapters or self.merged_adapters or name not in self.lora_A:
                return super().forward(x, *args, **kwargs)
            dropout = self.lora_dropout[name]
            if (
                name in self.lora_variant
                or self.lora_bias[name]
                or (self.training and getattr(dropout, "p", 0))
            ):
                return super().forward(x)
            a, b = self.lora_A[name].weight, self.lora_B[name].weight
            return _run_fast(self.base_layer, x, a, b, self.scaling[name])

    return FastLoraLinear8bitLt


def use_fast_int8(model: torch.nn.Module, enabled: bool = True) -> int:
    """Let every frozen ``Linear8bitLt``, and plain LoRA over one, compute through ``int8_linear``.

    Codes, scales, ``state_dict`` and saved files stay as they are; no 16-bit weight is kept. DoRA, dropout,
    LoRA bias, mixed or merged adapters go PEFT's own way over the fast base layer.

    Args:
        model: A model loaded with ``load_in_8bit=True``, before or after ``get_peft_model``; call it again
            after ``get_peft_model`` to fuse the LoRA products too.
        enabled: False puts the original classes back.

    Returns:
        How many ``Linear8bitLt`` compute the asked way now.

    Raises:
        ValueError: The model has no ``Linear8bitLt``, or one that is not frozen int8.
    """
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
    for linear in linears.values():
        if linear.state.CB is None:
            linear.init_8bit_state()
        linear.__class__ = _fast_linear() if enabled else bnb.nn.Linear8bitLt
    if importlib.util.find_spec("peft"):
        from peft.tuners.lora.bnb import Linear8bitLt

        for module in model.modules():
            if isinstance(module, Linear8bitLt) and isinstance(module.base_layer, bnb.nn.Linear8bitLt):
                module.__class__ = _fast_lora() if enabled else Linear8bitLt
    return len(linears)
