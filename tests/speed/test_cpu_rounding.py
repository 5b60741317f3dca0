"""The switch ``use_fast_rounding``: the same bits as bitsandbytes' own code."""

import pytest
import torch
from bitsandbytes.functional import int8_vectorwise_quant

from llama_sft_helpers import speed
from llama_sft_helpers.speed.cpu_rounding import round_to_int8


def activations(rows, outliers, dtype=torch.float16):
    x = torch.randn(rows, 96, generator=torch.Generator().manual_seed(rows)).to(dtype)
    x[:, outliers] = 40
    return x


def same(ours, theirs):
    return all(
        a is b is None or (a.dtype == b.dtype and torch.equal(a, b))
        for a, b in zip(ours, theirs, strict=True)
    )


@pytest.mark.parametrize("rows", [1, 2, 50])
@pytest.mark.parametrize("outliers", [[], [3, 40]])
@pytest.mark.parametrize("threshold", [0.0, 6.0])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_codes_and_scales_are_bitsandbytes_own_and_the_input_stays(rows, outliers, threshold, dtype):
    x = activations(rows, outliers, dtype)
    before = x.clone()
    ours = round_to_int8(x, threshold)
    assert torch.equal(x, before)
    assert same(ours, int8_vectorwise_quant(x, threshold))
    if outliers and threshold:
        assert set(outliers) <= set(ours[2].tolist())


def test_a_row_of_outliers_alone_or_of_zeros_is_rounded_as_by_bitsandbytes():
    x = activations(4, [])
    x[1], x[2] = 50, 0
    assert same(round_to_int8(x, 6.0), int8_vectorwise_quant(x, 6.0))


@pytest.fixture
def calls(monkeypatch):
    found = []
    monkeypatch.setattr(torch.library, "register_kernel", lambda *args: found.append(args))
    speed.use_fast_rounding.cache_clear()
    yield found
    speed.use_fast_rounding.cache_clear()


def test_the_switch_gives_pytorch_the_kernel_once(calls):
    speed.use_fast_rounding()
    speed.use_fast_rounding()
    assert calls == [("bitsandbytes::int8_vectorwise_quant", "cpu", round_to_int8)]
