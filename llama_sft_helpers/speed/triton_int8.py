"""The Triton kernels of ``int8_kernels``; imported only where there is Triton and a GPU for it."""

# ruff: noqa: D103, N803, PLR0917 - a kernel's compile-time constants are in capitals, its arguments positional
# mypy: ignore-errors

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl


@triton.jit
def _larger(a, b):
    """The larger of two numbers, or a NaN if one is: the trainer must see it."""
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _store_codes(values, across, codes, scales, row, place, inside, HAS_SCALE: tl.constexpr):
    """Write one row's codes and scale; adding 1.5 * 2**23 rounds to a whole number, half to even."""
    if HAS_SCALE:
        values *= across
    absmax = tl.reduce(tl.abs(values), 0, _larger)
    tl.store(scales + row, absmax / 127.0)
    values = values * (127.0 / tl.maximum(absmax, 1e-30))
    whole = (values + 12582912.0) - 12582912.0
    tl.store(codes + place, whole.to(tl.int8), mask=inside)


# A program goes from row to row: what is the same for all, twice as many bytes as a row, is read once, and
# the next row while one is worked on.
@triton.jit(do_not_specialize=["M"])
def quantize_kernel(
    x, column_scale, codes, scales, M, K, HAS_SCALE: tl.constexpr, BLOCK: tl.constexpr, AHEAD: tl.constexpr
):
    column = tl.arange(0, BLOCK)
    inside = column < K
    across = tl.load(column_scale + column, mask=inside & HAS_SCALE, other=0.0).to(tl.float32)
    for row in tl.range(tl.program_id(0), M, tl.num_programs(0), num_stages=AHEAD):
        place = tl.cast(row, tl.int64) * K + column
        values = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
        _store_codes(values, across, codes, scales, row, place, inside, HAS_SCALE)


@triton.jit
def transpose_kernel(codes, turned, N, K, BLOCK: tl.constexpr):
    """Transpose codes in words of four: single bytes would go through shared memory one by one.

    ``codes`` is ``(4 N, K)`` and ``turned`` ``(4 K, N)`` in words. Four rows of words hold blocks of 4 x 4
    codes; each block is turned in registers, then the words are.
    """
    i, j = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = (i < N)[:, None] & (j < K)[None, :]
    place = codes + 4 * i.to(tl.int64)[:, None] * K + j[None, :]
    first, second = tl.load(place, mask=inside, other=0), tl.load(place + K, mask=inside, other=0)
    third, fourth = tl.load(place + 2 * K, mask=inside, other=0), tl.load(place + 3 * K, mask=inside, other=0)
    for byte in tl.static_range(4):
        low = ((first >> 8 * byte) & 255) | (((second >> 8 * byte) & 255) << 8)
        high = (((third >> 8 * byte) & 255) << 16) | (((fourth >> 8 * byte) & 255) << 24)
        target = turned + (4 * j.to(tl.int64) + byte)[:, None] * N + i[None, :]
        tl.store(target, tl.trans(low | high), mask=tl.trans(inside))


@triton.jit
def _tile_of(tile, M, N, BM: tl.constexpr, BN: tl.constexpr, GROUP: tl.constexpr):
    """Row and column of a tile: GROUP rows of tiles at a time, so that tiles running together share codes."""
    across = tl.cdiv(N, BN)
    first = tile // (GROUP * across) * GROUP
    height = tl.minimum(tl.cdiv(M, BM) - first, GROUP)
    inner = tile % (GROUP * across)
    return (first + inner % height) * BM, inner // height * BN


@triton.jit
def _finish(
    sums, row_scale, column_scale, add, left, right, row, column, M, N, R,
    HAS_SCALE: tl.constexpr, HAS_ADD: tl.constexpr, RANK: tl.constexpr,
):  # fmt: skip
    """From exact sums to float32 results: scales, what is added, and the thin product."""
    in_row, in_column = row < M, column < N
    result = sums.to(tl.float32) * tl.load(row_scale + row, mask=in_row, other=0.0)[:, None]
    if HAS_SCALE:
        result *= tl.load(column_scale + column, mask=in_column, other=0.0)[None, :]
    if RANK > 0:
        r = tl.arange(0, RANK)
        rows = tl.load(
            left + row[:, None] * R + r[None, :], mask=in_row[:, None] & (r < R)[None, :], other=0.0
        )
        columns = tl.load(
            right + column[None, :] * R + r[:, None], mask=in_column[None, :] & (r < R)[:, None], other=0.0
        )
        result = tl.dot(rows, columns, result)
    if HAS_ADD:
        place = row.to(tl.int64)[:, None] * N + column[None, :]
        result += tl.load(add + place, mask=in_row[:, None] & in_column[None, :], other=0.0).to(tl.float32)
    return result


@triton.jit(do_not_specialize=["M"])
def product_kernel(
    a, b, out, row_scale, column_scale, add, left, right, M, N, K, R,
    HAS_SCALE: tl.constexpr, HAS_ADD: tl.constexpr, RANK: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """One tile of the product for each program, read with plain pointers: any card, any size."""
    first_row, first_column = _tile_of(tl.program_id(0), M, N, BM, BN, GROUP)
    row, column, k = first_row + tl.arange(0, BM), first_column + tl.arange(0, BN), tl.arange(0, BK)
    # a tile over the edge reads the last row again; what comes of it is not stored
    a_place = a + tl.minimum(row, M - 1).to(tl.int64)[:, None] * K + k[None, :]
    b_place = b + tl.minimum(column, N - 1).to(tl.int64)[None, :] * K + k[:, None]
    sums = tl.zeros((BM, BN), tl.int32)
    for start in range(0, K, BK):
        if EVEN:
            rows, columns = tl.load(a_place), tl.load(b_place)
        else:
            rows = tl.load(a_place, mask=(k < K - start)[None, :], other=0)
            columns = tl.load(b_place, mask=(k < K - start)[:, None], other=0)
        sums = tl.dot(rows, columns, sums, out_dtype=tl.int32)
        a_place += BK
        b_place += BK
    result = _finish(
        sums, row_scale, column_scale, add, left, right, row, column, M, N, R, HAS_SCALE, HAS_ADD, RANK
    )
    place = row.to(tl.int64)[:, None] * N + column[None, :]
    tl.store(out + place, result.to(out.dtype.element_ty), mask=(row < M)[:, None] & (column < N)[None, :])


class Tiles(NamedTuple):
    """How a product is cut: the tile of the result, codes summed at a time, and how a GPU runs it."""

    rows: int = 128
    columns: int = 128
    depth: int = 128
    stages: int = 3
    warps: int = 4
    group: int = 8


_HALF_TYPES = torch.bfloat16, torch.float16
_started = {}


def start(kernel, grid, args, kind, **options):
    """Start a kernel; after a kind's first call without Triton's own checks, which cost as much again."""
    tensors = [getattr(arg, "base", arg) for arg in args if not isinstance(arg, int | float)]  # or described
    key = (kernel.fn.__name__, kind, tensors[0].device, *(tensor.dtype for tensor in tensors))
    aligned = not any(tensor.data_ptr() % 16 for tensor in tensors)
    if aligned and key in _started:
        _started[key][grid](*args)
        return
    started = kernel[grid](*args, **options)
    if aligned and started is not None:  # Triton's interpreter gives nothing back
        _started[key] = started


def _contiguous(*tensors):
    """The kernels know no strides."""
    return [tensor if tensor is None else tensor.contiguous() for tensor in tensors]


@functools.cache
def _capability(device):
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)


@functools.cache
def multiprocessors(device):
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


def quantize_rows(x, column_scale=None):
    """See ``int8_kernels``, as for all functions below."""
    x, column_scale = _contiguous(x, column_scale)
    (rows, columns), device = x.shape, x.device
    codes = torch.empty(rows, columns, dtype=torch.int8, device=device)
    scales = torch.empty(rows, dtype=torch.float32, device=device)
    block = triton.next_power_of_2(columns)
    warps = min(16, max(1, block // 1024))
    # of 227 KiB of shared memory on Hopper, and 99 on the smallest of the other cards
    room = 2**17 if _capability(device) == (9, 0) else 2**16
    ahead = 1 + min(2, room // (block * x.itemsize))
    scale = scales if column_scale is None else column_scale  # a tensor that is not read
    grid = (min(rows, multiprocessors(device) * max(1, 12 // warps)), 1, 1)
    if rows:
        constants = column_scale is not None, block, ahead
        args = (x, scale, codes, scales, rows, columns, *constants)
        start(quantize_kernel, grid, args, (columns, constants), num_warps=warps)
    return codes, scales


def transpose_codes(codes):
    """Words of four codes where the sizes allow it."""
    rows, columns = codes.shape
    if rows % 4 or columns % 4 or codes.data_ptr() % 4 or not codes.is_contiguous():
        return codes.T.contiguous()
    turned = torch.empty(columns, rows, dtype=torch.int8, device=codes.device)
    args = (codes.view(torch.int32), turned.view(torch.int32), rows // 4, columns // 4, 32)
    grid = (triton.cdiv(rows, 128), triton.cdiv(columns, 128), 1)
    start(transpose_kernel, grid, args, (rows, columns), num_warps=4)
    return turned


@functools.cache
def _for_card(device):
    """The module of Hopper's kernel, or None where it does not run; and the tiles of the plain one."""
    capability = _capability(device)
    # Gluon is experimental, and its calls differ between versions
    if capability == (9, 0) and triton.__version__.startswith("3.6."):
        from llama_sft_helpers.speed import gluon_int8

        return gluon_int8, Tiles()
    return None, Tiles(depth=128 if capability == (9, 0) else 64)  # other cards have less shared memory


def int8_matmul(a, b, row_scale, column_scale=None, add=None, dtype=torch.bfloat16, thin=None):
    """By Hopper's own kernel where there is one for these sizes and types, else by the plain one."""
    a, b, add, *factors = _contiguous(a, b, add, *(thin or ()))
    thin = tuple(factors) or None
    hopper, tiles = _for_card(a.device)
    if hopper and add is None and hopper.takes(a, b, dtype, thin):
        return hopper.int8_matmul(a, b, row_scale, column_scale, dtype, thin)
    return plain_matmul(a, b, row_scale, column_scale, add, dtype, thin, tiles)


def plain_matmul(a, b, row_scale, column_scale, add, dtype, thin, tiles):
    """Any card with int8 units that Triton knows, any size, any floating type."""
    (rows, summed), columns = a.shape, b.shape[0]
    out = torch.empty(rows, columns, dtype=dtype, device=a.device)
    if thin and (thin[0].dtype not in _HALF_TYPES or thin[0].shape[1] > 32):
        # no matrix unit takes it, or the registers have no room
        product = thin[0].float() @ thin[1].float().T
        add, thin = product if add is None else product + add, None
    left, right = thin or (row_scale, row_scale)  # tensors that are not read
    rank = left.shape[1] if thin else 0
    has = column_scale is not None, add is not None, (16 if rank <= 16 else 32) if rank else 0
    beside = row_scale, row_scale if column_scale is None else column_scale, row_scale if add is None else add
    sizes = tiles.rows, tiles.columns, tiles.depth, tiles.group, summed % tiles.depth == 0
    args = (a, b, out, *beside, left, right, rows, columns, summed, rank, *has, *sizes)
    grid = (triton.cdiv(rows, tiles.rows) * triton.cdiv(columns, tiles.columns), 1, 1)
    if rows:
        kind = columns, summed, rank, has, tiles
        start(product_kernel, grid, args, kind, num_stages=tiles.stages, num_warps=tiles.warps)
    return out
