"""Products of int8 codes, and what makes the codes, against int64 and float64."""

import pytest
import torch

from llama_sft_helpers.speed import int8_kernels


def codes_of(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-128, 128, shape, generator=generator, dtype=torch.int8)


def values(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator)


def relative(measured, expected):
    return ((measured.double() - expected.double()).norm() / expected.double().norm()).item()


def check_codes(codes, scales, exact):
    """Each code is the nearest one, its scale the row's largest magnitude over 127."""
    exact = exact.double()
    assert codes.dtype == torch.int8
    assert scales.dtype == torch.float32
    torch.testing.assert_close(scales.double(), exact.abs().amax(1) / 127, rtol=1e-6, atol=0)
    off = (codes.double() * scales.double()[:, None] - exact).abs()
    assert (off <= scales.double()[:, None] * 0.50001).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scaled", [False, True])
def test_codes_are_the_nearest_and_zero_columns_stay_out(dtype, scaled):
    x = values(33, 200).to(dtype)
    x[:, 7] *= 50
    x[5] = 0
    scale = (values(200, seed=1).abs() + 0.1).index_fill_(0, torch.tensor([7]), 0) if scaled else None
    codes, scales = int8_kernels.quantize_rows(x, scale)
    check_codes(codes, scales, x.double() * scale.double() if scaled else x)
    assert scales[5] == 0
    assert not codes[5].any()
    assert codes[:, 7].any() != scaled


def test_a_nan_shows_in_its_row_only():
    x = values(3, 64)
    x[1, 3] = float("nan")
    _, scales = int8_kernels.quantize_rows(x)
    assert scales.isnan().tolist() == [False, True, False]


@pytest.mark.parametrize("shape", [(1, 16, 32), (5, 300, 1024), (130, 64, 5000)])
def test_sums_are_exact(shape):
    rows, out, summed = shape
    a, b = codes_of(rows, summed), codes_of(out, summed, seed=1)
    a[0], b[0] = -128, -128  # the largest sum there is
    ones = torch.ones(rows)
    got = int8_kernels.int8_matmul(a, b, ones, dtype=torch.float64)
    # a float32 holds whole numbers up to 2**24 exactly, and others to one part in 2**24
    torch.testing.assert_close(got, a.double() @ b.double().T, rtol=2**-24, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("parts", [(), ("scale",), ("add",), ("thin",), ("scale", "add", "thin")])
def test_product_with_scales_and_what_is_added(dtype, parts):
    a, b = codes_of(20, 96), codes_of(48, 96, seed=1)
    row, column = values(20).abs() / 100, values(48, seed=1).abs() / 100
    add, left, right = (values(*s).to(torch.bfloat16) for s in ((20, 48), (20, 6), (48, 6)))
    exact = (a.double() @ b.double().T) * row.double()[:, None]
    exact = exact * column.double() if "scale" in parts else exact
    exact = exact + add.double() if "add" in parts else exact
    exact = exact + left.double() @ right.double().T if "thin" in parts else exact
    got = int8_kernels.int8_matmul(
        a, b, row, column if "scale" in parts else None, add if "add" in parts else None, dtype,
        (left, right) if "thin" in parts else None,
    )  # fmt: skip
    assert got.dtype == dtype
    assert relative(got, exact) < (1e-6 if dtype == torch.float32 else 3e-3)


def test_codes_and_scales_stand_for_the_product():
    x, w = values(40, 256), values(64, 256, seed=1)
    got = int8_kernels.int8_matmul(*interleave(int8_kernels.quantize_rows(x), int8_kernels.quantize_rows(w)))
    assert relative(got, x.double() @ w.double().T) < 0.02


def interleave(left, right):
    return left[0], right[0], left[1], right[1]


def test_transposed_codes_are_contiguous():
    codes = codes_of(40, 24)
    turned = int8_kernels.transpose_codes(codes)
    assert turned.is_contiguous()
    assert turned.equal(codes.T)
