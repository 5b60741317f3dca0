"""Products of int8 codes with exact sums, and what makes codes of rows: PyTorch here, Triton on a GPU.

``x @ w.T`` with ``x = codes_x * scale_x[:, None]`` and ``w = codes_w * scale_w[:, None]`` is
``(codes_x @ codes_w.T) * scale_x[:, None] * scale_w[None, :]``: the sums are of whole numbers, and the scales
come in once at the end. A row's codes reach from -127 to 127.
"""

from __future__ import annotations

import functools
from typing import Any

import torch

INT8_MAX = 127.0
SMALLEST = 1e-30  # a row without a larger value gets codes of 0; its reciprocal is still a float32
_EXACT_COLUMNS = 1024  # sums of so many products of codes are whole numbers up to 2**24, which float32 holds


def has_int8_units(device: torch.device) -> bool:
    """Whether these products run on a GPU's int8 units there: sm80 or newer, with Triton."""
    return _kernels(device) is not None


@functools.cache
def _kernels(device: torch.device) -> Any:
    """The module of Triton's kernels, or None where PyTorch computes: Triton has no int8 unit before sm80."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 0):
        return None
    try:
        from llama_sft_helpers.speed import triton_int8
    except ImportError:  # wheels of torch for Windows come without Triton
        return None
    return triton_int8


def quantize_rows(
    x: torch.Tensor, column_scale: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Int8 codes of each row of ``x * column_scale``, with one scale a row: its largest magnitude over 127.

    Args:
        x: Shape ``(M, K)``, of a floating type.
        column_scale: Shape ``(K,)``; 0 leaves a column out, of the codes and of the scale. None for ones.

    Returns:
        Codes of shape ``(M, K)`` and float32 scales of shape ``(M,)``. A row of zeros has scale 0, one with a
        NaN has scale NaN.
    """
    if kernels := _kernels(x.device):
        return kernels.quantize_rows(x, column_scale)
    values = x.float() if column_scale is None else x.float() * column_scale.float()
    absmax = values.abs().amax(1)
    codes = values * (INT8_MAX / absmax.clamp(min=SMALLEST))[:, None]
    return codes.round_().to(torch.int8), absmax / INT8_MAX


def int8_matmul(  # noqa: PLR0917 - in the order of the formula
    a: torch.Tensor,
    b: torch.Tensor,
    row_scale: torch.Tensor,
    column_scale: torch.Tensor | None = None,
    add: torch.Tensor | None = None,
    dtype: torch.dtype = torch.bfloat16,
    thin: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> torch.Tensor:
    """``(a @ b.T) * row_scale[:, None] * column_scale[None, :] + add + left @ right.T``, rounded once.

    Args:
        a: Int8 codes of shape ``(M, K)``.
        b: Int8 codes of shape ``(N, K)``: the int8 unit of a GPU wants both along the summed dimension.
        row_scale: Float32, shape ``(M,)``.
        column_scale: Float32, shape ``(N,)``, or None for ones.
        add: Shape ``(M, N)``, or None.
        dtype: Type of the result.
        thin: ``(left, right)`` of shapes ``(M, R)`` and ``(N, R)`` in one 16-bit type, or None: LoRA's update
            and outlier columns, multiplied where the result is written instead of read as ``add``.

    Returns:
        Shape ``(M, N)``. The sums over int8 are exact, the rest is computed in float32.
    """
    if kernels := _kernels(a.device):
        return kernels.int8_matmul(a, b, row_scale, column_scale, add, dtype, thin)
    out = _exact_sums(a, b).float() * row_scale[:, None]
    if column_scale is not None:
        out *= column_scale
    if add is not None:
        out += add
    if thin is not None:
        out.addmm_(thin[0].float(), thin[1].float().T)  # in place: autocast would round it to 16 bits
    return out.to(dtype)


def _exact_sums(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """``a @ b.T`` as int32: a CPU's product of int32 is slow, so float32 multiplies what it holds exactly."""
    sums = torch.zeros(a.shape[0], b.shape[0], dtype=torch.int32, device=a.device)
    part = torch.empty_like(sums, dtype=torch.float32)  # written into, as autocast leaves such products alone
    for left, right in zip(a.split(_EXACT_COLUMNS, 1), b.split(_EXACT_COLUMNS, 1), strict=True):
        sums += torch.mm(left.float(), right.float().T, out=part).to(torch.int32)
    return sums


def transpose_codes(codes: torch.Tensor) -> torch.Tensor:
    """Codes of shape ``(N, K)`` as contiguous ``(K, N)``, for the product that gives the input's gradient."""
    if kernels := _kernels(codes.device):
        return kernels.transpose_codes(codes)
    return codes.T.contiguous()
