"""The switch ``use_cpu_kernels``: the same bits as bitsandbytes' own code."""

import subprocess
import sys
from pathlib import Path

import bitsandbytes
import pytest
import torch
from bitsandbytes.functional import int8_vectorwise_quant
from tiny_models import build_trainer

from llama_sft_helpers import speed
from llama_sft_helpers.speed.cpu_kernels import rescale_product, round_to_int8


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


@pytest.mark.parametrize("dtype", [None, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [None, torch.linspace(-3, 3, 40)])
@pytest.mark.parametrize("rows", [1, 2, 50])
def test_products_are_bitsandbytes_own_and_the_arguments_stay(rows, bias, dtype):
    seed = torch.Generator().manual_seed(rows)
    product = torch.randint(-(2**24), 2**24, (rows, 40), generator=seed, dtype=torch.int32)
    scales = torch.rand(rows, generator=seed), torch.rand(40, generator=seed)
    arguments = (product, *scales) if bias is None else (product, *scales, bias)
    before = [each.clone() for each in arguments]
    ours = rescale_product(product, *scales, dtype, bias)
    theirs = torch.ops.bitsandbytes.int8_mm_dequant(product, *scales, dtype, bias)
    assert ours.dtype == theirs.dtype == (dtype or torch.float16)
    assert torch.equal(ours, theirs)
    assert all(torch.equal(a, b) for a, b in zip(arguments, before, strict=True))


@pytest.fixture
def calls(monkeypatch):
    found = []
    monkeypatch.setattr(torch.library, "register_kernel", lambda *args: found.append(args))
    speed.use_cpu_kernels.cache_clear()
    yield found
    speed.use_cpu_kernels.cache_clear()


def test_the_switch_gives_pytorch_each_kernel_once(calls):
    speed.use_cpu_kernels()
    speed.use_cpu_kernels()
    assert calls == [
        ("bitsandbytes::int8_vectorwise_quant", "cpu", round_to_int8),
        ("bitsandbytes::int8_mm_dequant", "cpu", rescale_product),
    ]


def test_bitsandbytes_brings_no_kernel_of_its_own_for_cpus():
    """When this turns red, the switch can go."""
    source = Path(bitsandbytes.__file__).parent / "backends" / "cpu" / "ops.py"
    text = source.read_text(encoding="utf-8")
    assert "int8_vectorwise_quant" not in text
    assert "int8_mm_dequant" not in text


REGISTERED = """
import torch
from bitsandbytes.functional import int8_vectorwise_quant
from llama_sft_helpers import speed
from llama_sft_helpers.speed import cpu_kernels
calls = []

def noted(function):
    return lambda *args, **kwargs: calls.append(function.__name__) or function(*args, **kwargs)

def layer():
    codes, largest, outliers = int8_vectorwise_quant(x, 6.0)
    weight, scales, _ = int8_vectorwise_quant(x)
    product = torch.ops.bitsandbytes.int8_scaled_mm(codes, weight, largest, scales, dtype=torch.float32)
    return codes, largest, outliers, product

x = torch.linspace(-9, 9, 96).view(4, 24).half()
before = layer()
for each in (cpu_kernels.round_to_int8, cpu_kernels.rescale_product):
    setattr(cpu_kernels, each.__name__, noted(each))
speed.use_cpu_kernels()
after = layer()
print(calls, all(torch.equal(a, b) for a, b in zip(before, after, strict=True)))
"""


def test_after_the_switch_bitsandbytes_operators_run_the_kernels():
    done = subprocess.run([sys.executable, "-c", REGISTERED], capture_output=True, text=True, check=True)
    assert done.stdout == "['round_to_int8', 'round_to_int8', 'rescale_product'] True\n"


def test_trl_scores_the_labels_only_and_finds_the_same_loss_and_gradients(
    monkeypatch, tmp_path, tiny_model, tiny_tokenizer
):
    from trl.kernels import ChunkedLogProbFunction
    from trl.trainer import utils

    monkeypatch.setattr(utils, "_use_triton", utils._use_triton)  # put back after the test
    rows = [{"prompt": "A long question:\n" * 3, "completion": "apples " * (1 + n)} for n in range(4)]
    trainer = build_trainer(tiny_model, tmp_path, tiny_tokenizer, rows)
    batch, apply, scored = next(iter(trainer.get_train_dataloader())), ChunkedLogProbFunction.apply, []
    monkeypatch.setattr(
        ChunkedLogProbFunction,
        "apply",
        lambda hidden, *rest: scored.append(len(hidden)) or apply(hidden, *rest),
    )
    found = []
    for switch in (lambda: None, speed.score_labels_only):
        switch()
        tiny_model.zero_grad()
        loss = trainer.compute_loss(tiny_model, dict(batch))
        loss.backward()
        found.append([loss.detach(), *(weight.grad.clone() for weight in tiny_model.parameters())])
    torch.testing.assert_close(*found)
    assert scored == [batch["labels"][:, 1:].numel(), int((batch["labels"][:, 1:] != -100).sum())]
    assert scored[1] < scored[0] / 2
