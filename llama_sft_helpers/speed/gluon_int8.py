"""The product of int8 codes on Hopper's own terms: one warp copies, two groups of warps multiply.

Triton's language leaves it to the compiler how copies and products overlap; Gluon, its lower level, does not.
"""

# ruff: noqa: N803, PLR0917 - a kernel's compile-time constants are in capitals, its arguments positional
# mypy: ignore-errors

from __future__ import annotations

import torch
import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from llama_sft_helpers.speed.triton_int8 import Tiles, multiprocessors, start

_LAYOUTS = {size: gl.NVMMASharedLayout(128, 8 * size) for size in (1, 2)}  # of blocks of int8 and of 16 bits
TILES = Tiles(columns=256, stages=4, group=16)  # the fastest of those measured
HALF = gl.constexpr(64)  # rows of a tile for each group: those of one instruction
WIDTH = gl.constexpr(128)  # columns of one instruction; Triton 3.6 refuses the one of 256 for int8
WIDE = gl.constexpr(64)  # columns of a block of the thin product: as many bytes as one of codes


@gluon.jit
def _tile_of(tile, M, N, BN: gl.constexpr, GROUP: gl.constexpr):
    """Row and column of a tile: GROUP rows of tiles at a time, so that tiles running together share codes."""
    across = gl.cdiv(N, BN)
    first = tile // (GROUP * across) * GROUP
    height = gl.minimum(gl.cdiv(M, 2 * HALF) - first, GROUP)
    inner = tile % (GROUP * across)
    return (first + inner % height) * 2 * HALF, inner // height * BN


@gluon.jit
def _copy_step(rows, columns, row, column, k, step, buffers, STAGES: gl.constexpr):
    """Fill the next stage, with codes or with 16-bit factors, once both groups are done with what it held."""
    upper, lower, right, full, empty = buffers
    stage, phase = step % STAGES, step // STAGES & 1
    mbarrier.wait(empty.index(stage), phase ^ 1)
    ready = full.index(stage)
    mbarrier.expect(ready, 2 * rows.block_type.nbytes + columns.block_type.nbytes)
    tma.async_copy_global_to_shared(rows, [row, k], ready, _as_blocks_of(rows, upper.index(stage)))
    tma.async_copy_global_to_shared(rows, [row + HALF, k], ready, _as_blocks_of(rows, lower.index(stage)))
    tma.async_copy_global_to_shared(columns, [column, k], ready, _as_blocks_of(columns, right.index(stage)))
    return step + 1


@gluon.jit
def _as_blocks_of(matrix, buffer):
    return buffer._reinterpret(matrix.dtype, matrix.block_type.shape, matrix.layout)


@gluon.jit
def _copy(a, b, left, right, buffers, M, N, K, R, BN: gl.constexpr, BK: gl.constexpr, GROUP: gl.constexpr,
          STAGES: gl.constexpr, THIN: gl.constexpr):  # fmt: skip
    """What the copying warp does: all blocks of all its tiles, in the order in which they are multiplied."""
    step = 0
    tiles = gl.cdiv(M, 2 * HALF) * gl.cdiv(N, BN)
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        row, column = _tile_of(tile, M, N, BN, GROUP)
        for k in range(0, K, BK):
            step = _copy_step(a, b, row, column, k, step, buffers, STAGES)
        if THIN:
            for k in range(0, R, WIDE):
                step = _copy_step(left, right, row, column, k, step, buffers, STAGES)


@gluon.jit
def _multiply(out, left, right, row_scale, column_scale, buffers, result_buffer, M, N, K, R,
              LOWER: gl.constexpr, BN: gl.constexpr, BK: gl.constexpr,
              GROUP: gl.constexpr, STAGES: gl.constexpr, THIN: gl.constexpr,
              SCALED: gl.constexpr):  # fmt: skip
    """What a group does: one half of each tile.

    The other group may be stages behind, so that one's results are written while the other multiplies.
    """
    upper, lower, right_buffer, full, empty = buffers
    rows_buffer = lower if LOWER else upper
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, WIDTH, 32])
    layout_thin: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, WIDTH, 16])
    step = 0
    tiles = gl.cdiv(M, 2 * HALF) * gl.cdiv(N, BN)
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        first_row, first_column = _tile_of(tile, M, N, BN, GROUP)
        first_row += HALF if LOWER else 0
        row = first_row + gl.arange(0, HALF, gl.SliceLayout(1, layout))
        column = first_column + gl.arange(0, BN, gl.SliceLayout(0, layout))
        scale = gl.load(row_scale + row, mask=row < M, other=0.0)  # now, so that no one waits for it below
        if SCALED:
            scale_across = gl.load(column_scale + column, mask=column < N, other=0.0)
        sums = gl.zeros([HALF, BN], gl.int32, layout)
        for k in range(0, K, BK):
            stage = step % STAGES
            mbarrier.wait(full.index(stage), step // STAGES & 1)
            sums = warpgroup_mma(
                rows_buffer.index(stage), right_buffer.index(stage).permute((1, 0)), sums, is_async=True
            )
            # all but this product are done: the stage before may be filled anew
            sums = warpgroup_mma_wait(1, deps=(sums,))
            mbarrier.arrive(empty.index((step + STAGES - 1) % STAGES), pred=k > 0)
            step += 1
        sums = warpgroup_mma_wait(0, deps=(sums,))
        mbarrier.arrive(empty.index((step + STAGES - 1) % STAGES))

        result = sums.to(gl.float32) * scale[:, None]
        if SCALED:
            result = result * scale_across[None, :]
        if THIN:
            result = gl.convert_layout(result, layout_thin)
            for _ in range(0, R, WIDE):
                stage = step % STAGES
                mbarrier.wait(full.index(stage), step // STAGES & 1)
                rows = _as_blocks_of(left, rows_buffer.index(stage))
                columns = _as_blocks_of(right, right_buffer.index(stage))
                result = warpgroup_mma(rows, columns.permute((1, 0)), result)
                mbarrier.arrive(empty.index(stage))
                step += 1
        result = result.to(out.dtype)
        first, second = result.reshape([HALF, 2, BN // 2]).permute(0, 2, 1).split()
        tma.store_wait(0)
        result_buffer.store(first)
        fence_async_shared()
        tma.async_copy_shared_to_global(out, [first_row, first_column], result_buffer)
        tma.store_wait(0)
        result_buffer.store(second)
        fence_async_shared()
        tma.async_copy_shared_to_global(out, [first_row, first_column + BN // 2], result_buffer)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["M"])
def specialized_product_kernel(
    a, b, out, left, right, row_scale, column_scale, M, N, K, R,
    BN: gl.constexpr, BK: gl.constexpr, GROUP: gl.constexpr, STAGES: gl.constexpr,
    THIN: gl.constexpr, SCALED: gl.constexpr,
):  # fmt: skip
    """Persistent programs of a copying warp and two multiplying groups, joined by stages of blocks."""
    upper = gl.allocate_shared_memory(gl.int8, [STAGES, HALF, BK], a.layout)
    lower = gl.allocate_shared_memory(gl.int8, [STAGES, HALF, BK], a.layout)
    columns = gl.allocate_shared_memory(gl.int8, [STAGES, BN, BK], b.layout)
    upper_result = gl.allocate_shared_memory(out.dtype, out.block_type.shape, out.layout)
    lower_result = gl.allocate_shared_memory(out.dtype, out.block_type.shape, out.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=2)
    buffers = upper, lower, columns, full, empty
    gl.warp_specialize(
        [
            (_multiply, (out, left, right, row_scale, column_scale, buffers, upper_result, M, N, K, R,
                         False, BN, BK, GROUP, STAGES, THIN, SCALED)),
            (_multiply, (out, left, right, row_scale, column_scale, buffers, lower_result, M, N, K, R,
                         True, BN, BK, GROUP, STAGES, THIN, SCALED)),
            (_copy, (a, b, left, right, buffers, M, N, K, R, BN, BK, GROUP, STAGES, THIN)),
        ],
        [4, 1], [240, 24],
    )  # fmt: skip


def takes(a, b, dtype, thin):
    """Whether the copy engine can address all of it: rows of whole 16 bytes, from addresses of such."""
    sizes = [a.shape[0] > 0, a.shape[1] % 16 == 0, b.shape[0] % 8 == 0, dtype.itemsize == 2]
    sizes += [part.shape[1] % 8 == 0 and part.dtype == dtype for part in thin or ()]
    return all(sizes) and not any(part.data_ptr() % 16 for part in (a, b, *(thin or ())))


def _describe(tensor, rows, columns):
    """What the copy engine needs to know of a matrix and its blocks."""
    return TensorDescriptor(tensor, tensor.shape, tensor.stride(), [rows, columns], _LAYOUTS[tensor.itemsize])


def arguments(a, b, out, row_scale, column_scale, thin, tiles):
    """Arguments of ``specialized_product_kernel``."""
    left, right = thin or (out, out)  # without a thin product they are not read
    described = (
        _describe(a, 64, tiles.depth), _describe(b, tiles.columns, tiles.depth),
        _describe(out, 64, tiles.columns // 2), _describe(left, 64, 64), _describe(right, tiles.columns, 64),
    )  # fmt: skip
    scales = row_scale, row_scale if column_scale is None else column_scale
    sizes = a.shape[0], b.shape[0], a.shape[1], left.shape[1]
    has = thin is not None, column_scale is not None
    return (*described, *scales, *sizes, tiles.columns, tiles.depth, tiles.group, tiles.stages, *has)


def int8_matmul(a, b, row_scale, column_scale, dtype, thin, tiles=TILES):
    """See ``int8_kernels``; only what ``takes`` allows. Tiles have 128 rows, and 256 or 128 columns."""
    (rows, summed), columns = a.shape, b.shape[0]
    out = torch.empty(rows, columns, dtype=dtype, device=a.device)
    args = arguments(a, b, out, row_scale, column_scale, thin, tiles)
    count = triton.cdiv(rows, 128) * triton.cdiv(columns, tiles.columns)
    kind = columns, summed, args[-2:], tiles, thin and thin[0].shape[1]
    grid = (min(count, multiprocessors(a.device)), 1, 1)
    start(specialized_product_kernel, grid, args, kind, num_warps=4, maxnreg=168)
    return out
