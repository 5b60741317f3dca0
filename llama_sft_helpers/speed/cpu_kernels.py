"""Less time on a CPU: two parts of LLM.int8(), to the same bits as bitsandbytes gives, and trl's loss.

bitsandbytes brings no kernels for them on CPUs. Its general code rounds the inputs in float16, which a CPU
does by way of float32, and looks at every number several times; and it rescales the products of the codes in
three new tensors. PyTorch has a place for another device's kernel:
https://docs.pytorch.org/docs/stable/library.html.
"""

from __future__ import annotations

import functools

import torch

_BOTH_STEPS = 6.200124e-05  # 1 / 127 of the inputs times 1 / 127 of the weights, in bitsandbytes' digits


@functools.cache  # PyTorch takes a kernel once
def use_cpu_kernels() -> None:
    """Let int8 layers on a CPU round inputs and rescale products faster in ``eval()`` mode, to the same bits.

    It holds for all models of this Python process, and for weights that are quantized on a CPU. Tensors on a
    GPU keep bitsandbytes' own kernels. bitsandbytes 0.50 has none of the two for CPUs; from a version on that
    brings them, this switch is not needed.
    """
    import bitsandbytes  # noqa: F401 (it names the operators)

    torch.library.register_kernel("bitsandbytes::int8_vectorwise_quant", "cpu", round_to_int8)
    torch.library.register_kernel("bitsandbytes::int8_mm_dequant", "cpu", rescale_product)


def score_labels_only() -> None:
    """Let trl's trainers compute logits on a CPU only where there is a label, as they do on a GPU.

    Where Triton is not at work trl 1.16 scores prompts and padding too, and leaves them out of the loss
    afterwards; no setting changes that, one private name of its module decides. The losses are the same, a
    training step of a small model with a large vocabulary takes a fifth less time. With a trl that decides in
    another way nothing changes. It holds for all trainers of this Python process.
    """
    from trl.trainer import utils

    if hasattr(utils, "_use_triton"):
        utils._use_triton = lambda device: True


def round_to_int8(
    x: torch.Tensor, threshold: float = 0.0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """As ``bitsandbytes.functional.int8_vectorwise_quant``: each row in steps of its largest entry / 127.

    Args:
        x: Activations [rows, columns], finite; they stay as they are.
        threshold: Entries from this size on are outliers. They count as 0 for their row's step, and their
            columns are 0 if there are several rows. 0 for none.

    Returns:
        int8 codes [rows, columns]; each row's largest entry, float32 [rows]; the outliers' columns, int64.
    """
    values, columns = x.to(torch.float32, copy=True), None
    sizes = values.abs()
    if threshold > 0:
        limit = torch.tensor(threshold, dtype=x.dtype)  # compared in the dtype of x, as bitsandbytes does
        columns = (sizes.amax(dim=0) >= limit).nonzero().view(-1)
        if columns.numel():
            outliers = sizes[:, columns] >= limit
            for each in (values, sizes):
                each[:, columns] = each[:, columns].masked_fill(outliers, 0)
    largest = sizes.amax(dim=1)
    codes = values.mul_((127.0 / largest)[:, None]).round_().to(torch.int8)
    if columns is not None and len(x) > 1:
        codes[:, columns] = 0
    return codes, largest, columns


def rescale_product(
    product: torch.Tensor,
    row_scales: torch.Tensor,
    column_scales: torch.Tensor,
    dtype: torch.dtype | None = None,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """As ``bitsandbytes.functional.int8_mm_dequant``: the product of two matrices of codes, in real numbers.

    Args:
        product: Of the codes, int32 [rows, columns].
        row_scales: Largest entry of each row of the inputs, float32 [rows].
        column_scales: Largest entry of each row of the weights, float32 [columns].
        dtype: Of the result; None for float16.
        bias: To be added, [columns].

    Returns:
        The product [rows, columns].
    """
    scaled = row_scales.reshape(-1, 1) * column_scales.reshape(1, -1)
    scaled.mul_(product.view(scaled.shape)).mul_(_BOTH_STEPS)
    if bias is not None:
        scaled += bias
    return scaled.to(dtype or torch.float16)
