"""LLM.int8()'s rounding of activations on a CPU: the same bits as bitsandbytes gives, in less time.

bitsandbytes brings no kernel for this on CPUs. Its general code computes in float16, which a CPU does by way
of float32, and looks at every number several times; here the numbers become float32 once. PyTorch has a place
for another device's kernel: https://docs.pytorch.org/docs/stable/library.html.
"""

from __future__ import annotations

import functools

import torch


@functools.cache  # PyTorch takes a kernel once
def use_fast_rounding() -> None:
    """Let int8 layers on a CPU round their inputs faster in ``eval()`` mode, to the same bits.

    It holds for all models of this Python process, and for weights that are quantized on a CPU. Tensors on a
    GPU keep bitsandbytes' own kernel. bitsandbytes 0.50 has none for CPUs; from a version on that brings one,
    this switch is not needed.
    """
    import bitsandbytes  # noqa: F401 (it names the operator)

    torch.library.register_kernel("bitsandbytes::int8_vectorwise_quant", "cpu", round_to_int8)


def round_to_int8(
    x: torch.Tensor, threshold: float = 0.0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """As ``bitsandbytes.functional.int8_vectorwise_quant``: each row in steps of its largest entry / 127.

    Args:
        x: Activations [rows, columns]; they stay as they are.
        threshold: Entries from this size on are outliers. They count as 0 for their row's step, and their
            columns are 0 if there are several rows. 0 for none.

    Returns:
        int8 codes [rows, columns]; each row's largest entry, float32 [rows]; the outliers' columns, int64.
    """
    values, columns = x.to(torch.float32, copy=True), None
    if threshold > 0:
        outliers = x.abs() >= threshold  # compared in the dtype of x, as bitsandbytes does
        columns = outliers.any(dim=0).nonzero().view(-1)
        if columns.numel():
            values[:, columns] = values[:, columns].masked_fill(outliers[:, columns], 0)
    largest = values.abs().amax(dim=1)
    codes = values.mul_((127.0 / largest)[:, None]).round_().to(torch.int8)
    if columns is not None and len(x) > 1:
        codes[:, columns] = 0
    return codes, largest, columns
