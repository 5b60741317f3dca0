"""Products of int8 codes on a GPU against float64, which holds their sums exactly: ``pytest -m gpu``."""

import pytest
import torch

from llama_sft_helpers.speed import int8_kernels

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU"),
]


def relative(measured, expected):
    return ((measured.double() - expected.double()).norm() / expected.double().norm()).item()


def codes_of(*shape):
    return torch.randint(-127, 128, shape, device="cuda", dtype=torch.int8)


@pytest.mark.parametrize("shape", [(1, 4096, 4096), (300, 1000, 1040), (77, 30, 50)])
@pytest.mark.parametrize(
    ("dtype", "rank"),
    [
        (torch.bfloat16, 0),
        (torch.bfloat16, 32),
        (torch.bfloat16, 80),
        (torch.float16, 4),
        (torch.float32, 16),
    ],
)
def test_product_of_codes(shape, rank, dtype):
    torch.manual_seed(0)
    rows, columns, summed = shape
    a, b = codes_of(rows, summed), codes_of(columns, summed)
    row, column = torch.rand(rows, device="cuda") / 100, torch.rand(columns, device="cuda") / 100
    thin = tuple(torch.randn(n, rank, device="cuda").to(dtype) for n in (rows, columns)) if rank else None
    exact = (a.double() @ b.double().T) * row.double()[:, None]
    added = thin[0].double() @ thin[1].double().T if rank else 0
    limit = {torch.bfloat16: 3e-3, torch.float16: 4e-4, torch.float32: 1e-6}[dtype]
    for _ in range(2):  # the second call takes the short way to the kernel
        got = int8_kernels.int8_matmul(a, b, row, column, dtype=dtype, thin=thin)
        assert relative(got, exact * column.double() + added) < limit
        assert relative(int8_kernels.int8_matmul(a, b, row, dtype=dtype), exact) < limit
    add = torch.randn(rows, columns, device="cuda").to(dtype)
    got = int8_kernels.int8_matmul(a, b, row, column, add, dtype, thin)
    assert relative(got, exact * column.double() + added + add.double()) < limit


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("columns", [1000, 4096, 14336])
def test_codes_of_rows(columns, dtype, scaled):
    torch.manual_seed(0)
    x = torch.randn(37, columns, device="cuda").to(dtype)
    x[5] = 0
    keep = torch.ones(columns, device="cuda").index_fill_(0, torch.tensor([3, 9], device="cuda"), 0)
    codes, scales = int8_kernels.quantize_rows(x, keep if scaled else None)
    wanted = x.double() * (keep.double() if scaled else 1)
    torch.testing.assert_close(scales.double(), wanted.abs().amax(1) / 127, rtol=1e-6, atol=0)
    assert ((codes * scales.double()[:, None] - wanted).abs() <= scales.double()[:, None] * 0.5001).all()


@pytest.mark.parametrize("shape", [(14336, 4096), (1000, 4), (7, 5)])
def test_transposed_codes(shape):
    codes = codes_of(*shape)
    assert int8_kernels.transpose_codes(codes).equal(codes.T)
