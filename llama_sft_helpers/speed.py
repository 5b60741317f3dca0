"""Int8 training at 16-bit speed: three switches for a model, and what a ladder of runs measured.

The only module of the package that changes a model. Each switch keeps the weights, the ``state_dict`` and what
the model computes (up to rounding), and each can be undone.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import gc
import importlib.util
import inspect
import json
import math
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch.utils.flop_counter import register_flop_formula

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

try:
    import triton
    import triton.language as tl
except ImportError:  # wheels of torch for the CPU, Windows and macOS come without Triton
    triton = None

_INT8_MAX = 127.0
_ROWS, _COLUMNS = 32, 256  # of one block of the dequantizing kernel; the fastest of 27 sizes on an H100
_HALF_TYPES = (torch.bfloat16, torch.float16)
_ACROSS = {
    "tokens_per_second": "tokens/s",
    "peak_reserved_gib": "GiB reserved",
    "share_of_floor": "share of floor",
}

# ------------------------------------------------------------------------------------------- int8 weights

if triton is not None:

    @triton.jit
    def _dequantize_kernel(  # type: ignore[no-untyped-def]  # noqa: D103
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
    """Start the kernel; after the first call for a shape without Triton's own checks, which cost as much again."""
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


def dequantize(
    codes: torch.Tensor,
    absmax: torch.Tensor,
    lora_a: torch.Tensor | None,
    lora_b: torch.Tensor | None,
    scaling: float,
    dtype: torch.dtype,
) -> torch.Tensor:
    """The weight that int8 codes stand for, with a LoRA update added before the one rounding.

    ``codes * absmax / 127 + scaling * lora_b @ lora_a``, summed in float32 and rounded once to ``dtype``. On a GPU
    with Triton that is one pass over memory: a byte read and two written for each weight.

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
    if codes.is_cuda and triton is not None and dtype in _HALF_TYPES:
        out = torch.empty(codes.shape, dtype=dtype, device=codes.device)
        _launch(codes, absmax, lora_a, lora_b, out, scaling)
        return out
    weight = codes * (absmax.float() / _INT8_MAX)[:, None]
    if lora_a is not None and lora_b is not None:
        weight = weight.addmm_(lora_b.float(), lora_a.float(), alpha=scaling)
    return weight.to(dtype)


# Operators below autograd: plain registrations, since torch.library.custom_op costs 60 microseconds more a call.
_WEIGHT = "Tensor codes, Tensor absmax, Tensor? lora_a, Tensor? lora_b, float scaling"
_LIBRARY = torch.library.Library("llama_sft", "DEF")
_LIBRARY.define(f"int8_linear(Tensor x, {_WEIGHT}) -> Tensor")
_LIBRARY.define(f"int8_linear_grad(Tensor grad, {_WEIGHT}) -> Tensor")
_LIBRARY.define(
    "lora_grads(Tensor grad, Tensor x, Tensor lora_a, Tensor lora_b, float scaling) -> (Tensor, Tensor)"
)


def _int8_linear(x, codes, absmax, lora_a, lora_b, scaling):  # type: ignore[no-untyped-def]
    return F.linear(x, dequantize(codes, absmax, lora_a, lora_b, scaling, x.dtype))


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

    The weight is dequantized inside the product, in the forward and again in the backward pass. Unlike LLM.int8
    (https://arxiv.org/abs/2208.07339) activations are not quantized, so the only error is rounding.

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

    Codes, scales, ``state_dict`` and saved files stay as they are; no 16-bit weight is kept. DoRA, dropout, LoRA
    bias, mixed or merged adapters go PEFT's own way over the fast base layer.

    Args:
        model: A model loaded with ``load_in_8bit=True``, before or after ``get_peft_model``; call it again after
            ``get_peft_model`` to fuse the LoRA products too.
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
                f"{name} holds {linear.weight.dtype} weights with requires_grad={linear.weight.requires_grad}; "
                "expected frozen int8 codes (has_fp16_weights=False, and moved to its device)."
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


# ---------------------------------------------------------------------------------------------- attention

_varlen_kernel: Callable[..., torch.Tensor] | None = None  # set once by register_varlen_attention


def _why_no_varlen() -> str | None:
    if importlib.util.find_spec("torch.nn.attention.varlen") is None:
        return f"torch {torch.__version__} has no torch.nn.attention.varlen (2.10 and later have)"
    if not torch.cuda.is_available():
        return "there is no CUDA GPU"
    if torch.cuda.get_device_capability() < (8, 0):
        return f"{torch.cuda.get_device_name()} is older than compute capability 8.0"
    return None


def register_varlen_attention() -> str:
    """Register ``varlen``: attention within each document of a packed row, by PyTorch's own kernel.

    A padding-free row holds many documents; ``sdpa`` needs a mask of tokens x tokens for it and computes what the
    mask then drops. ``varlen`` hands the document bounds to
    https://docs.pytorch.org/docs/stable/nn.attention.varlen.html instead. Padded batches, generation, and types
    other than bf16 and fp16 run as ``sdpa`` does, mask included.

    Returns:
        The name for ``attn_implementation=``: ``varlen``, or ``sdpa`` with a warning that says why.
    """
    global _varlen_kernel  # noqa: PLW0603 - read inside compiled layers, where a cached call would not trace
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register("varlen", _varlen_attention)
    AttentionMaskInterface.register("varlen", _varlen_mask)
    if reason := _why_no_varlen():
        warnings.warn(f"attention 'varlen' falls back to 'sdpa': {reason}.", stacklevel=2)
        return "sdpa"
    from torch.nn.attention.varlen import varlen_attn

    _varlen_kernel = functools.partial(_call_varlen, varlen_attn, _how_to_share_heads(varlen_attn))
    with contextlib.suppress(Exception):  # a second registration, or a torch whose operator has another name
        register_flop_formula(torch.ops.torch_attn._varlen_attn)(_varlen_flop)
    return "varlen"


def _varlen_flop(query_shape, *args, **kwargs) -> int:  # type: ignore[no-untyped-def]
    # an upper bound for the compiler's choice of what to recompute: documents of 512 tokens, half masked
    return int(2 * 512 * math.prod(query_shape))


def _how_to_share_heads(varlen_attn: Callable[..., Any]) -> str:
    """``argument`` or ``native`` where the kernel shares KV heads by itself, ``repeat`` where they must be repeated."""
    if "enable_gqa" in inspect.signature(varlen_attn).parameters:
        return "argument"
    q, kv = (torch.randn(8, h, 64, device="cuda", dtype=torch.float16, requires_grad=True) for h in (4, 2))
    bounds = torch.tensor([0, 3, 8], device="cuda", dtype=torch.int32)
    try:
        outs = [_call_varlen(varlen_attn, how, q, kv, kv, bounds, 5, 0.125) for how in ("native", "repeat")]
        grads = [torch.autograd.grad(out.float().square().sum(), (q, kv)) for out in outs]
    except Exception:  # the kernel refuses heads of unequal number
        return "repeat"
    pairs = zip((outs[0], *grads[0]), (outs[1], *grads[1]), strict=True)
    return "native" if all(torch.allclose(x, y, atol=2e-2, rtol=2e-2) for x, y in pairs) else "repeat"


def _call_varlen(  # type: ignore[no-untyped-def]
    varlen_attn, how: str, query, key, value, bounds, longest, scale
) -> torch.Tensor:
    extra = {"enable_gqa": True} if how == "argument" else {}
    if how == "repeat":
        groups = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    out: torch.Tensor = varlen_attn(
        query, key, value, bounds, bounds, longest, longest, scale=scale, window_size=(-1, 0), **extra
    )
    return out


def _varlen_mask(*args: Any, **kwargs: Any) -> torch.Tensor | None:
    """No mask where the kernel isolates the documents itself, otherwise that of ``sdpa``."""
    from transformers.masking_utils import sdpa_mask

    plain = kwargs.get("attention_mask") is None and kwargs.get("q_length") == kwargs.get("kv_length")
    if _varlen_kernel is not None and plain and _runs(kwargs.get("device"), kwargs.get("dtype")):
        return None
    mask: torch.Tensor | None = sdpa_mask(*args, **kwargs)
    return mask


def _runs(device: Any, dtype: Any) -> bool:
    autocast = torch.is_autocast_enabled("cuda") and torch.get_autocast_dtype("cuda") in _HALF_TYPES
    return torch.device(device).type == "cuda" and (dtype in _HALF_TYPES or autocast)


def document_bounds(position_ids: torch.Tensor) -> tuple[torch.Tensor, int]:
    """Where documents begin in rows that are read one after the other, and the longest document's length.

    Args:
        position_ids: Shape ``(batch, tokens)``; a 0 begins a document.

    Returns:
        int32 bounds of shape ``(documents + 1,)`` that begin with 0 and end with ``batch * tokens``; the length in
        tokens of the longest document.
    """
    flat = position_ids.reshape(-1)
    starts = (flat == 0).nonzero().reshape(-1)
    bounds = torch.cat([starts, starts.new_tensor([flat.numel()])]).to(torch.int32)
    return bounds, int(bounds.diff().max())


def _varlen_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Shapes: query ``(batch, heads, tokens, head_dim)``; result ``(batch, tokens, heads, head_dim)``."""
    positions = kwargs.get("position_ids")
    same = query.shape[2] == key.shape[2] and positions is not None
    if (
        _varlen_kernel is None
        or attention_mask is not None
        or dropout
        or not same
        or not _runs(query.device, query.dtype)
    ):
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        out: tuple[torch.Tensor, torch.Tensor | None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
        return out
    bounds, longest = kwargs.get("cu_seq_lens_q"), kwargs.get("max_length_q")
    if "longest_document" in kwargs:
        longest = kwargs["longest_document"].shape[0]
    if bounds is None or longest is None:
        bounds, longest = _cached_bounds(positions.expand(query.shape[0], -1))
    batch, _, tokens, _ = query.shape
    dtype = query.dtype if query.dtype in _HALF_TYPES else torch.get_autocast_dtype("cuda")
    flat = [
        t.transpose(1, 2).reshape(batch * tokens, t.shape[1], t.shape[3]).to(dtype)
        for t in (query, key, value)
    ]
    return _varlen_kernel(*flat, bounds, longest, scaling).view(batch, tokens, *flat[0].shape[1:]), None


_last_bounds: list[Any] = [None, None]


@torch.compiler.disable
def _cached_bounds(position_ids: torch.Tensor) -> tuple[torch.Tensor, int]:
    """``document_bounds``, computed once for all layers of a forward pass (each costs a GPU wait)."""
    key = (position_ids.data_ptr(), position_ids._version, tuple(position_ids.shape))
    if _last_bounds[0] != key or _last_bounds[1][2] is not position_ids.untyped_storage():
        _last_bounds[:] = [key, (*document_bounds(position_ids), position_ids.untyped_storage())]
    bounds, longest, _ = _last_bounds[1]
    return bounds, longest


# -------------------------------------------------------------------------------------------- compilation


# Python must launch a layer's backward pass faster than the GPU runs it: leave out its checks of sizes
_INDUCTOR = {"size_asserts": False, "alignment_asserts": False}


@dataclasses.dataclass
class CompiledLayers:
    """What ``compile_decoder_layers`` did, kept up to date while the model runs.

    Attributes:
        layers: Decoder layers that share the compiled code.
        activation_memory_budget: Share of activations kept.
        graphs: Graphs compiled so far.
        seconds: Time spent in compiling so far.
        fallback: Why some graph runs uncompiled; empty if none does.
    """

    layers: int
    activation_memory_budget: float
    most_graphs: int = 3
    graphs: int = 0
    seconds: float = 0.0
    fallback: str = ""
    _undo: list[Callable[[], Any]] = dataclasses.field(default_factory=list, repr=False)

    def remove(self) -> None:
        """Run the layers uncompiled again."""
        while self._undo:
            self._undo.pop()()

    def _compile(self, graph: torch.fx.GraphModule, inputs: Any) -> Callable[..., Any]:
        """Backend of ``torch.compile``: inductor with this budget, or the graph itself if that fails."""
        import torch._functorch.config as functorch_config
        from torch._inductor.compile_fx import compile_fx

        if self.graphs >= self.most_graphs:
            self._fall_back(f"{self.most_graphs} graphs are compiled and another shape or mode came")
            return graph.forward
        self.graphs += 1
        try:
            settings: dict[str, Any] = {"activation_memory_budget": self.activation_memory_budget}
            if hasattr(functorch_config, "is_non_builtin_to_include"):
                settings["is_non_builtin_to_include"] = True  # our products cost as much as torch's own
            with functorch_config.patch(settings):
                compiled: Callable[..., Any] = compile_fx(graph, inputs, config_patches=_INDUCTOR)
            gc.collect()
            gc.freeze()  # a compiler leaves a million objects, which the collector need not look at again
            return compiled
        except Exception as error:  # any failure of a compiler: the uncompiled graph computes the same
            self._fall_back(f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")
            return graph.forward

    def _fall_back(self, reason: str) -> None:
        self.fallback = reason
        warnings.warn(f"a decoder layer's graph runs uncompiled: {reason}", stacklevel=2)

    def _watch_time(self) -> None:
        from torch._dynamo.callback import callback_handler

        started: list[float] = []

        def begin(*_: Any) -> None:
            started.append(time.perf_counter())

        def end(*_: Any) -> None:
            if started:
                self.seconds += time.perf_counter() - started.pop()

        callback_handler.register_start_callback(begin)
        callback_handler.register_end_callback(end)
        self._undo.append(lambda: callback_handler.remove_start_callback(begin))
        self._undo.append(lambda: callback_handler.remove_end_callback(end))


def _decoder(model: torch.nn.Module) -> torch.nn.Module:
    for module in model.modules():
        if all(hasattr(module, part) for part in ("layers", "embed_tokens", "rotary_emb")):
            return module
    raise ValueError(
        f"{type(model).__name__} has no decoder with layers, embed_tokens and rotary_emb; expected a Llama model, "
        "wrapped by PEFT or not."
    )


def compile_decoder_layers(model: torch.nn.Module, activation_memory_budget: float = 0.5) -> CompiledLayers:
    """Compile each decoder layer with ``torch.compile``; all layers share one graph for each mode.

    The graph's length is marked as changing from the first call, so that rows of another length do not compile
    again. Call it last: after ``get_peft_model``, after building the trainer, after ``use_fast_int8``.

    Args:
        model: A Llama model, wrapped by PEFT or not.
        activation_memory_budget: Share of the activations to keep for the backward pass, in (0, 1]; below 1 the
            compiler recomputes the cheapest products, see
            https://pytorch.org/blog/activation-checkpointing-techniques/.

    Returns:
        A report: graphs and seconds of compilation so far, ``remove()`` to undo.

    Raises:
        ValueError: The budget is outside (0, 1], or the model has no decoder layers.
    """
    if not 0 < activation_memory_budget <= 1:
        raise ValueError(
            f"activation_memory_budget={activation_memory_budget!r} is outside (0, 1]; 1 keeps all activations, "
            "0.5 about half."
        )
    decoder: Any = _decoder(model)
    report = CompiledLayers(len(decoder.layers), activation_memory_budget)
    report._watch_time()
    report._undo.append(remember_modules(model))
    for layer in decoder.layers:
        layer.compile(backend=report._compile)
        layer._compiled_call_impl = functools.partial(_call_layer, layer._compiled_call_impl, layer)
        report._undo.append(functools.partial(setattr, layer, "_compiled_call_impl", None))
    return report


class _Walks:
    """Answers for one root module what a walk over its modules would, until one registers a module or parameter."""

    def __init__(self, root: Any) -> None:
        self.root = root
        self.forget()

    def registered(self, parent: torch.nn.Module, name: str, module: Any) -> None:
        if id(parent) in self.known:  # and not, say, the list of layers that every forward pass slices anew
            self.forget()

    def forget(self) -> None:
        self.names: list[tuple[str, torch.nn.Module]] = []
        self.parameters: list[tuple[str, torch.nn.Parameter]] = []
        self.known: set[int] = set()
        self.numbers: dict[Any, int] = {}
        self.mode: bool | None = None

    def named_modules(self, memo: Any = None, prefix: str = "", remove_duplicate: bool = True) -> Any:
        if memo is not None or prefix or not remove_duplicate:
            return type(self.root).named_modules(self.root, memo, prefix, remove_duplicate)
        if not self.names:
            self.names = list(type(self.root).named_modules(self.root))
            self.known = {id(module) for _, module in self.names}
        return iter(self.names)

    def named_parameters(self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True) -> Any:
        if prefix or not (recurse and remove_duplicate):
            return type(self.root).named_parameters(self.root, prefix, recurse, remove_duplicate)
        self.parameters = self.parameters or list(type(self.root).named_parameters(self.root))
        return iter(self.parameters)

    def train(self, mode: bool = True) -> Any:
        if self.mode != mode or self.root.training != mode:
            self.named_modules()  # to know whose new modules count
            type(self.root).train(self.root, mode)
            self.mode = mode
        return self.root

    def num_parameters(self, *args: Any, **kwargs: Any) -> int:
        key = (args, tuple(kwargs.items()))
        if key not in self.numbers:
            self.named_modules()
            self.numbers[key] = type(self.root).num_parameters(self.root, *args, **kwargs)
        return self.numbers[key]


def remember_modules(model: torch.nn.Module) -> Callable[[], None]:
    """Walk the model's modules once instead of four times a step.

    ``Trainer`` sets the training mode, counts parameters, clips and zeroes gradients in every step, each time by a
    walk over all modules: 2,665 for a 32-layer Llama with LoRA, in Python, while the GPU waits. Registering a module or
    parameter in it makes the model walk again; call ``.train()`` and ``.eval()`` on the whole model, not on parts of it.

    Returns:
        A function that undoes it.
    """
    hooks = torch.nn.modules.module
    roots: list[Any] = [model]
    if hasattr(model, "get_base_model"):
        roots.append(model.get_base_model())
    undo: list[Callable[[], Any]] = []
    for root in roots:
        walks = _Walks(root)
        for name in ("named_modules", "named_parameters", "train", "num_parameters"):
            if hasattr(type(root), name):
                setattr(root, name, getattr(walks, name))
                undo.append(functools.partial(delattr, root, name))
        undo.append(hooks.register_module_module_registration_hook(walks.registered).remove)
        undo.append(hooks.register_module_parameter_registration_hook(walks.registered).remove)
    return lambda: [step() for step in undo] and None


def _call_layer(compiled: Callable[..., Any], layer: Any, hidden: torch.Tensor, **kwargs: Any) -> Any:
    """Run one layer compiled, with everything that changes between batches marked as a changing shape."""
    if kwargs.get("past_key_values") is not None:  # generation: the cache grows with every token
        return layer._call_impl(hidden, **kwargs)
    if torch.is_grad_enabled() and layer.training and not hidden.requires_grad:
        hidden = (
            hidden.detach().requires_grad_()
        )  # as every later layer's input, so that the first shares their graph
    longest, bounds = kwargs.pop("max_length_q", None), kwargs.get("cu_seq_lens_q")
    for name in ("max_length_k", "cu_seq_lens_k", "seq_idx"):
        kwargs.pop(name, None)
    if bounds is not None and longest is not None:  # a number would be compiled in; a shape may change
        kwargs["longest_document"] = torch.empty((), device=bounds.device).expand(int(longest))
        _mark(kwargs["longest_document"], 0)
        _mark(bounds, 0)
    for tensor in (hidden, kwargs.get("position_ids"), *(kwargs.get("position_embeddings") or ())):
        _mark(tensor, 1)
    for dim in (2, 3):
        _mark(kwargs.get("attention_mask"), dim)
    return compiled(hidden, **kwargs)


def _mark(tensor: Any, dim: int) -> None:
    if isinstance(tensor, torch.Tensor) and tensor.dim() > dim and tensor.shape[dim] > 1:
        torch._dynamo.maybe_mark_dynamic(tensor, dim)


def check_graphs(compiled: CompiledLayers, most: int = 3) -> None:
    """Raise if compilation did not settle within ``most`` graphs, or some graph runs uncompiled.

    Raises:
        AssertionError: With the number of graphs, the limit, and what to do.
    """
    if compiled.graphs > most or compiled.fallback:
        raise AssertionError(
            f"{compiled.graphs} graphs were compiled, expected at most {most}; uncompiled: "
            f"{compiled.fallback or 'none'}. Keep batch sizes equal, and switch everything on before the first step."
        )


# ----------------------------------------------------------------------------------------------- results


def summarize_ladder(
    results: Mapping[str, Any] | str | Path, epoch_tokens: int, price_per_hour: float
) -> pd.DataFrame:
    """One row for each rung: speed, memory, distance to the floor, hours and price of an epoch.

    Args:
        results: What ``benchmarks/speed_ladder.py`` wrote, or the path of that file.
        epoch_tokens: Real tokens in an epoch.
        price_per_hour: Price of an hour of the card, in any currency.

    Raises:
        ValueError: The results have no rungs.
    """
    import pandas as pd

    if isinstance(results, (str, Path)):
        results = json.loads(Path(results).read_text(encoding="utf-8"))
    rungs = [rung for rung in results.get("rungs", []) if "tokens_per_second" in rung]
    if not rungs:
        raise ValueError("the results hold no finished rung; run benchmarks/speed_ladder.py first.")
    table = pd.DataFrame(rungs).set_index("rung")
    table["times_plain"] = table["tokens_per_second"] / table["tokens_per_second"].iloc[0]
    table["epoch_hours"] = epoch_tokens / table["tokens_per_second"] / 3600
    table["epoch_price"] = table["epoch_hours"] * price_per_hour
    columns = ["tokens_per_second", "times_plain", "peak_reserved_gib", "share_of_floor", "compile_seconds"]
    return table[[c for c in columns if c in table] + ["epoch_hours", "epoch_price"]]


def plot_ladder(table: pd.DataFrame, column: str, ax: Axes | None = None) -> Axes:
    """Horizontal bars of one column of ``summarize_ladder``, the first rung on top, each with its value.

    Raises:
        ValueError: The table has no such column; the message lists those it has.
    """
    import matplotlib.pyplot as plt

    if column not in table:
        raise ValueError(f"there is no column {column!r}; expected one of {', '.join(table.columns)}.")
    ax = ax or plt.subplots(figsize=(7, 0.45 * len(table) + 1.2))[1]
    values = table[column]
    bars = ax.barh(range(len(values)), values, color="#0072B2")
    pattern = "{:.0%}" if column == "share_of_floor" else "{:,.0f}" if values.max() > 100 else "{:.1f}"
    ax.bar_label(bars, labels=[pattern.format(v) for v in values], padding=3, fontsize=9)
    ax.set_yticks(range(len(values)), [str(name) for name in values.index])
    ax.invert_yaxis()
    ax.set_xlim(0, float(values.max()) * 1.18)
    ax.set_xlabel(_ACROSS.get(column, column.replace("_", " ")))
    ax.set_title(f"{column.replace('_', ' ')} by rung")
    return ax
