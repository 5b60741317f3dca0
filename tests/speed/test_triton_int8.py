"""The Triton kernels without a GPU: results in Triton's interpreter, and compilation for cards.

Needs Triton, which torch for the CPU comes without: ``pip install triton``, then once with
``TRITON_INTERPRET=1`` for the results and once without for the compilers.
"""

import os

import pytest
import torch

from llama_sft_helpers.speed import int8_kernels

triton = pytest.importorskip("triton", reason="pip install triton; torch for the CPU comes without it")

from llama_sft_helpers.speed import triton_int8  # noqa: E402
from llama_sft_helpers.speed.triton_int8 import Tiles  # noqa: E402

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
interpreted = pytest.mark.skipif(not INTERPRETED, reason="needs TRITON_INTERPRET=1")
compiled = pytest.mark.skipif(INTERPRETED, reason="an interpreted kernel is not compiled")

# the interpreter cuts what it writes as bfloat16 instead of rounding it, so these are float16
HALF = torch.float16
PARTS = ("column_scale", "add", "thin")


def codes_of(*shape):
    return torch.randint(-128, 128, shape, dtype=torch.int8)


@interpreted
@pytest.mark.parametrize("scaled", [False, True])
def test_rows_equal_those_of_pytorch(scaled):
    torch.manual_seed(0)
    x = torch.randn(7, 200).to(HALF)
    x[3] = 0
    args = x, torch.rand(200) if scaled else None
    for ours, theirs in zip(triton_int8.quantize_rows(*args), int8_kernels.quantize_rows(*args), strict=True):
        torch.testing.assert_close(ours, theirs)


@interpreted
def test_a_nan_shows_in_its_row_only():
    x = torch.randn(3, 64)
    x[1, 3] = float("nan")
    assert triton_int8.quantize_rows(x)[1].isnan().tolist() == [False, True, False]


@interpreted
@pytest.mark.parametrize("shape", [(200, 72), (4, 4), (6, 8)])
def test_transposed_codes(shape):
    codes = codes_of(*shape)
    assert triton_int8.transpose_codes(codes).equal(codes.T)


@interpreted
@pytest.mark.parametrize("dtype", [HALF, torch.float32])
@pytest.mark.parametrize("rank", [4, 64, 80])
def test_thin_products_of_any_rank(rank, dtype):
    torch.manual_seed(0)
    thin = tuple(torch.randn(n, rank).to(dtype) for n in (40, 24))
    args = codes_of(40, 64), codes_of(24, 64), torch.ones(40), None, torch.randn(40, 24), torch.float32, thin
    torch.testing.assert_close(triton_int8.int8_matmul(*args), int8_kernels.int8_matmul(*args))


@interpreted
def test_strided_inputs():
    args = torch.randn(48, 64).to(HALF).T, torch.rand(48, 2)[:, 0]
    for ours, theirs in zip(triton_int8.quantize_rows(*args), int8_kernels.quantize_rows(*args), strict=True):
        torch.testing.assert_close(ours, theirs)
    codes = codes_of(64, 48)
    thin = torch.randn(4, 48).to(HALF).T, torch.randn(4, 40).to(HALF).T
    args = codes.T, codes_of(64, 40).T, torch.ones(48), None, None, torch.float32, thin
    torch.testing.assert_close(triton_int8.int8_matmul(*args), int8_kernels.int8_matmul(*args))


@interpreted
@pytest.mark.parametrize("parts", [(), ("column_scale",), ("add",), ("thin",), PARTS])
@pytest.mark.parametrize("shape", [(1, 64, 96), (70, 96, 160), (33, 40, 64)])
def test_product_equals_that_of_pytorch(shape, parts):
    torch.manual_seed(0)
    rows, columns, summed = shape
    a, b, row_scale = codes_of(rows, summed), codes_of(columns, summed), torch.rand(rows)
    thin = tuple(torch.randn(n, 24).to(HALF) for n in (rows, columns))
    options = {"column_scale": torch.rand(columns), "add": torch.randn(rows, columns).to(HALF), "thin": thin}
    options = {name: value if name in parts else None for name, value in options.items()}
    options["dtype"] = torch.float32
    expected = int8_kernels.int8_matmul(a, b, row_scale, **options)
    got = triton_int8.plain_matmul(a, b, row_scale, **options, tiles=Tiles(32, 32, 64))
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-2)


def compile_for(card, kernel, pointers, constants, **options):
    """Compile for a card that is not there; sizes are taken to be multiples of 16, as a model's are."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature = {name: f"*{kind}" for name, kind in pointers.items()}
    names = kernel.arg_names
    signature = {n: "constexpr" if n in constants else signature.get(n, "i32") for n in names}
    sized = [i for i, n in enumerate(names) if signature[n].startswith("*") or n in {"N", "K"}]
    source = ASTSource(kernel, signature, constants, {(i,): [["tt.divisibility", 16]] for i in sized})
    return triton.compile(source, target=GPUTarget("cuda", card, 32), options=options).asm["ptx"]


ROWS = {"codes": "i8", "scales": "fp32", "column_scale": "fp32"}
PRODUCT = {
    "a": "i8", "b": "i8", "out": "bf16", "row_scale": "fp32", "column_scale": "fp32", "add": "bf16",
    "left": "bf16", "right": "bf16",
}  # fmt: skip
BESIDE = {"HAS_SCALE": True, "HAS_ADD": False, "RANK": 32, "GROUP": 8}


@compiled
@pytest.mark.parametrize("card", [75, 80, 89, 90])
def test_rows_compile(card):
    pointers = ROWS | {"x": "bf16" if card >= 80 else "fp16"}
    constants = {"HAS_SCALE": True, "BLOCK": 4096, "AHEAD": 2}
    assert compile_for(card, triton_int8.quantize_kernel, pointers, constants, num_warps=4)


@compiled
@pytest.mark.parametrize("card", [75, 80, 89, 90])
def test_transposing_compiles(card):
    pointers = {"codes": "i32", "turned": "i32"}
    assert "st.global.v4" in compile_for(card, triton_int8.transpose_kernel, pointers, {"BLOCK": 32})


@compiled
@pytest.mark.parametrize(
    ("card", "depth", "unit"), [(80, 64, "mma.sync"), (89, 64, "mma.sync"), (90, 128, "wgmma")]
)
def test_product_compiles_to_the_int8_unit(card, depth, unit):
    constants = BESIDE | {"BM": 128, "BN": 128, "BK": depth, "EVEN": True}
    code = compile_for(card, triton_int8.product_kernel, PRODUCT, constants, num_warps=4, num_stages=3)
    assert any(unit in line and ".s32.s8.s8" in line for line in code.splitlines())


@compiled
def test_triton_has_no_int8_unit_for_a_t4():
    """When this fails, int8_kernels may give the T4 (sm75) its Triton path."""
    constants = BESIDE | {"BM": 64, "BN": 64, "BK": 64, "EVEN": True}
    pointers = {name: kind.replace("bf16", "fp16") for name, kind in PRODUCT.items()}
    with pytest.raises(RuntimeError):
        compile_for(75, triton_int8.product_kernel, pointers, constants, num_warps=4, num_stages=2)


@compiled
@pytest.mark.parametrize("thin", [False, True])
@pytest.mark.parametrize(("columns", "stages"), [(256, 4), (128, 6)])
def test_specialized_product_fits_hopper(columns, stages, thin):
    from triton.backends.compiler import GPUTarget
    from triton.experimental.gluon._runtime import GluonASTSource

    from llama_sft_helpers.speed import gluon_int8

    kernel = gluon_int8.specialized_product_kernel
    out = torch.empty(200, 512, dtype=torch.bfloat16)
    tiles = Tiles(columns=columns, stages=stages)
    factors = (torch.empty(200, 32, dtype=out.dtype), torch.empty(512, 32, dtype=out.dtype)) if thin else None
    args = gluon_int8.arguments(
        codes_of(200, 256), codes_of(512, 256), out, torch.ones(200), torch.ones(512), factors, tiles
    )
    signature, constants, short = {}, {}, {torch.int8: "i8", torch.bfloat16: "bf16", torch.float32: "fp32"}
    for name, arg in zip(kernel.arg_names, args, strict=True):
        if hasattr(arg, "block_shape"):
            signature[name] = f"tensordesc<{short[arg.base.dtype]}{arg.block_shape},{arg.layout!r}>"
        elif isinstance(arg, torch.Tensor):
            signature[name] = f"*{short[arg.dtype]}"
        else:
            signature[name] = "i32" if name in {"M", "N", "K", "R"} else "constexpr"
            constants |= {name: arg} if signature[name] == "constexpr" else {}
    made = triton.compile(
        GluonASTSource(kernel, signature, constants),
        target=GPUTarget("cuda", 90, 32), options={"num_warps": 4, "maxnreg": 168},
    )  # fmt: skip
    assert made.metadata.shared <= 227 * 1024
    assert any("wgmma" in line and ".s32.s8.s8" in line for line in made.asm["ptx"].splitlines())
    assert "setmaxnreg" in made.asm["ptx"]
