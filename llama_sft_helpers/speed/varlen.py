"""Attention over packed documents by PyTorch's own kernel: ``register_varlen_attention`` of notebook 08."""

from __future__ import annotations

import functools
import importlib.util
import inspect
import math
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch.utils.flop_counter import flop_registry, register_flop_formula

from llama_sft_helpers.core.batches import document_bounds

_HALF_TYPES = (torch.bfloat16, torch.float16)
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

    A padding-free row holds many documents; ``sdpa`` needs a mask of tokens x tokens for it and computes
    what the mask then drops. ``varlen`` hands the document bounds to
    https://docs.pytorch.org/docs/stable/nn.attention.varlen.html instead. Padded batches, generation, and
    types other than bf16 and fp16 run as ``sdpa`` does, mask included.

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
    _count_operations()
    return "varlen"


def _count_operations() -> None:
    """Tell the compiler what attention costs, unless torch does; else it would take it to be free."""
    try:
        operator = torch.ops.torch_attn._varlen_attn
    except AttributeError as error:
        warnings.warn(
            f"torch {torch.__version__} names its attention operator differently ({error}): the compiler "
            "takes attention to be free, and may compute it again where it should be kept.",
            stacklevel=3,
        )
        return
    if operator not in flop_registry:
        register_flop_formula(operator)(_varlen_flop)


def _varlen_flop(query_shape, *args, **kwargs) -> int:  # type: ignore[no-untyped-def]
    # an upper bound for the compiler's choice of what to recompute: documents of 512 tokens, half masked
    return int(2 * 512 * math.prod(query_shape))


def _how_to_share_heads(varlen_attn: Callable[..., Any]) -> str:
    """How KV heads reach the kernel: ``argument`` or ``native`` if it shares them, ``repeat`` if not."""
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


def _call_varlen(  # type: ignore[no-untyped-def]  # noqa: PLR0917
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


def _runs(device: Any, dtype: torch.dtype | None) -> bool:
    autocast = torch.is_autocast_enabled("cuda") and torch.get_autocast_dtype("cuda") in _HALF_TYPES
    return torch.device(device).type == "cuda" and (dtype in _HALF_TYPES or autocast)


def _varlen_attention(  # noqa: PLR0917
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
    positions: Any = kwargs.get("position_ids")
    unmasked = attention_mask is None and positions is not None and query.shape[2] == key.shape[2]
    if dropout and unmasked:
        _refuse_packed(positions, dropout)
    if _varlen_kernel is None or dropout or not unmasked or not _runs(query.device, query.dtype):
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        out: tuple[torch.Tensor, torch.Tensor | None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
        return out
    bounds, longest = _bounds(positions.expand(query.shape[0], -1), kwargs)
    flat = [_flatten(tensor) for tensor in (query, key, value)]
    attended = _varlen_kernel(*flat, bounds, longest, scaling)
    return attended.view(query.shape[0], query.shape[2], *flat[0].shape[1:]), None


def _refuse_packed(position_ids: torch.Tensor, dropout: float) -> None:
    if bool((position_ids == 0).sum() > position_ids.shape[0]):
        raise ValueError(
            f"attention 'varlen' has no dropout (attention_dropout={dropout}), and packed documents would "
            "see each other without a mask; expected 0. Set config.attention_dropout = 0, or use 'sdpa'."
        )


def _bounds(position_ids: torch.Tensor, kwargs: dict[str, Any]) -> tuple[torch.Tensor, int]:
    """What the collator found (trl's does where it packs), or found again in every layer, which waits."""
    bounds, longest = kwargs.get("cu_seq_lens_q"), kwargs.get("max_length_q")
    if bounds is None:
        return _find_bounds(position_ids)
    if longest is None:
        return bounds, position_ids.numel()  # no document is longer than all of them
    return bounds, int(longest) if isinstance(longest, torch.Tensor) else longest


_find_bounds = torch.compiler.disable(document_bounds)  # their number is data, which no graph may depend on


def _flatten(tensor: torch.Tensor) -> torch.Tensor:
    """``(batch, heads, tokens, head_dim)`` as one row of tokens, in a type that the kernel takes."""
    batch, heads, tokens, head_dim = tensor.shape
    dtype = tensor.dtype if tensor.dtype in _HALF_TYPES else torch.get_autocast_dtype("cuda")
    return tensor.transpose(1, 2).reshape(batch * tokens, heads, head_dim).to(dtype)
