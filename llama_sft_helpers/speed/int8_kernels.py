"""The operations of an int8 product in plain PyTorch: quantize rows, multiply and transpose codes."""

from __future__ import annotations

import torch

_INT8_MAX = 127.0


def quantize_rows(
    x: torch.Tensor, column_scale: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes, int8 ``(rows, columns)``, and each row's scale: ``codes * scale`` is ``x * column_scale``.

    A row's float32 scale is its largest magnitude divided by 127; a row of zeros has zeros.
    """
    values = x.float() if column_scale is None else x.float() * column_scale.float()
    scales = values.abs().amax(1) / _INT8_MAX
    codes = torch.where(scales[:, None] > 0, values / scales[:, None], 0.0).round()
    return codes.to(torch.int8), scales


def int8_matmul(  # noqa: PLR0917 - a product and its epilogue
    a: torch.Tensor,
    b: torch.Tensor,
    row_scale: torch.Tensor,
    column_scale: torch.Tensor | None,
    add: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """``(a @ b.T) * row_scale[:, None] * column_scale + add`` for int8 ``(m, k)`` and ``(n, k)``."""
    exact = a.double() @ b.double().t()  # sums of products of codes: whole numbers far below 2**53
    out = exact.float() * row_scale[:, None]
    if column_scale is not None:
        out = out * column_scale
    return (out if add is None else out + add).to(dtype)


def transpose_codes(codes: torch.Tensor) -> torch.Tensor:
    """``(n, k)`` as contiguous ``(k, n)``."""
    return codes.t().contiguous()
