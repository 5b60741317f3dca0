"""The switch ``use_fast_rounding``: the same bits as bitsandbytes' own code."""

import subprocess
import sys
from pathlib import Path

import bitsandbytes
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
@pytest.mark.parametrize("threshold", [0.0, 0.1, 2.7, 6.0])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
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
    x[1], x[2], x[3, :2] = 50, 0, torch.tensor([2.7, -2.7])
    for threshold in (2.7, 6.0):
        assert same(round_to_int8(x, threshold), int8_vectorwise_quant(x, threshold))
        turned = x.T.contiguous().T
        assert same(round_to_int8(turned, threshold), int8_vectorwise_quant(x, threshold))


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


def test_bitsandbytes_brings_no_kernel_of_its_own_for_cpus():
    """When this turns red, the switch can go."""
    source = Path(bitsandbytes.__file__).parent / "backends" / "cpu" / "ops.py"
    assert "int8_vectorwise_quant" not in source.read_text(encoding="utf-8")


REGISTERED = """
import torch
from bitsandbytes.functional import int8_vectorwise_quant
from llama_sft_helpers import speed
from llama_sft_helpers.speed import cpu_rounding
x = torch.linspace(-9, 9, 96).view(4, 24).half()
before = int8_vectorwise_quant(x, 6.0)
calls = []
rounded = cpu_rounding.round_to_int8
cpu_rounding.round_to_int8 = lambda *args: calls.append(args) or rounded(*args)
speed.use_fast_rounding()
after = int8_vectorwise_quant(x, 6.0)
print(len(calls), all(torch.equal(a, b) for a, b in zip(before, after, strict=True)))
"""


def test_after_the_switch_bitsandbytes_operator_runs_the_kernel():
    done = subprocess.run([sys.executable, "-c", REGISTERED], capture_output=True, text=True, check=True)
    assert done.stdout == "1 True\n"
