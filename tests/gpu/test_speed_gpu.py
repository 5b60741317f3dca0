"""The switches of speed.py on a GPU: run with ``pytest -m gpu`` where there is one.

The kernel is tested here only: Triton's interpreter needs Triton, and torch for the CPU comes without it.
"""

import copy

import pytest
import torch
from tiny_models import SEVEN, random_model

from llama_sft_helpers import speed
from llama_sft_helpers.speed import int8_product, varlen
from llama_sft_helpers.speed.int8_units import Int8Units

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU"),
]


def relative(measured, expected):
    return ((measured.double() - expected.double()).norm() / expected.double().norm()).item()


def quantized(rows, columns):
    weight = torch.randn(rows, columns, device="cuda") * 0.02
    absmax = weight.abs().amax(1)
    codes = (weight / absmax[:, None] * 127).round().to(torch.int8)
    return codes, absmax, codes.double() * absmax.double()[:, None] / 127


@pytest.mark.parametrize("shape", [(4096, 4096), (1024, 4096), (14336, 4096), (4096, 14336), (300, 200)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rank", [0, 8, 16, 24])
def test_dequantized_weight_is_rounded_once(shape, dtype, rank):
    torch.manual_seed(0)
    codes, absmax, exact = quantized(*shape)
    a = b = None
    if rank:
        a, b = (torch.randn(s, device="cuda") * 0.05 for s in ((rank, shape[1]), (shape[0], rank)))
        exact = exact + 2.0 * b.double() @ a.double()
    for _ in range(2):  # the second call takes the short way to the kernel
        weight = int8_product.dequantize(codes, absmax, a, b, 2.0, dtype)
        assert relative(weight, exact) < (3e-3 if dtype == torch.bfloat16 else 4e-4)


def test_product_and_gradients_match_float64_with_outliers():
    torch.manual_seed(0)
    codes, absmax, exact = quantized(1024, 4096)
    x = torch.randn(3, 500, 4096, device="cuda")
    x[..., [7, 900, 4000]] *= 40
    x = x.bfloat16().requires_grad_()
    a, b = (torch.randn(s, device="cuda", requires_grad=True) for s in ((16, 4096), (1024, 16)))
    grad = torch.randn(3, 500, 1024, device="cuda").bfloat16()
    y = int8_product.int8_linear(x, codes, absmax, a, b, 0.01)
    y.backward(grad)
    x64, a64, b64 = (t.detach().double().requires_grad_() for t in (x, a, b))
    y64 = x64 @ (exact + 0.01 * b64 @ a64).t()
    y64.backward(grad.double())
    # bf16 rounds the weight, the LoRA factors and the result, each by 1.7e-3 in the root mean square at most
    assert max(relative(y, y64), relative(x.grad, x64.grad)) < 4e-3
    assert max(relative(a.grad, a64.grad), relative(b.grad, b64.grad)) < 6e-3
    plain = x.detach().requires_grad_()
    out = int8_product.int8_linear(plain, codes, absmax)
    out.backward(grad)
    assert relative(out, plain.detach().double() @ exact.t()) < 3e-3
    assert relative(plain.grad, grad.double() @ exact) < 3e-3


@pytest.mark.parametrize("columns", [None, [7, 900, 4000]])
def test_int8_units_compute_on_a_gpu_what_they_do_on_a_cpu(columns):
    torch.manual_seed(0)
    codes, absmax, _ = quantized(1024, 4096)
    x = torch.randn(3, 500, 4096, device="cuda")
    x[..., [7, 900, 4000]] *= 40
    x[0, 3] = 0
    inputs = [x.bfloat16(), codes, absmax, torch.randn(16, 4096).cuda(), torch.randn(1024, 16).cuda()]
    grad = torch.randn(3, 500, 1024, device="cuda").bfloat16()
    results = []
    for device in ("cuda", "cpu"):
        x, codes, absmax, a, b = (t.detach().to(device) for t in inputs)
        units = Int8Units(4096, columns and torch.tensor(columns, device=device), int8_backward=True)
        for leaf in (x, a, b):
            leaf.requires_grad_()
        y = units(x, codes, absmax, a, b, 0.01)
        y.backward(grad.to(device))
        results.append([t.cpu() for t in (y, x.grad, a.grad, b.grad)])
    assert max(relative(*pair) for pair in zip(*results, strict=True)) < 6e-3
    broken = torch.zeros(2, 4096, device="cuda", dtype=torch.bfloat16)
    broken[1, 5] = float("nan")
    broken = Int8Units(4096, None, int8_backward=True)(broken, codes.cuda(), absmax.cuda())
    assert broken[:, 0].isnan().tolist() == [False, True]


def test_no_worse_than_llm_int8_with_outliers():
    import bitsandbytes as bnb

    torch.manual_seed(0)
    linear = bnb.nn.Linear8bitLt(4096, 1024, bias=False, has_fp16_weights=False, threshold=6.0).cuda()
    x = torch.randn(512, 4096, device="cuda")
    x[:, [7, 900]] *= 40
    x = x.bfloat16()
    exact = x.double() @ (linear.weight.CB.double() * linear.weight.SCB.double()[:, None] / 127).t()
    theirs = relative(linear(x.half()), exact)
    speed.use_fast_int8(torch.nn.Sequential(linear))
    assert relative(linear(x), exact) < min(theirs, 3e-3)


@pytest.fixture
def use_varlen():
    if torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("compute capability 8.0 or later is needed")
    assert speed.register_varlen_attention() == "varlen"
    torch.manual_seed(0)


def attend(lengths, dtype, **known):
    """Query, key and value of packed documents, and what attention gives."""
    positions = torch.cat([torch.arange(n) for n in lengths])[None].cuda()
    shapes = [(1, heads, sum(lengths), 128) for heads in (8, 2, 2)]
    inputs = [torch.randn(shape, device="cuda").to(dtype).requires_grad_() for shape in shapes]
    known |= {"scaling": 128**-0.5, "position_ids": positions}
    return inputs, varlen._varlen_attention(torch.nn.Module(), *inputs, None, **known)[0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_varlen_equals_sdpa_on_each_document_alone(dtype, use_varlen):
    lengths = [1, 190, 63, 512, 7, 251]
    inputs, out = attend(lengths, dtype)
    grad = torch.randn_like(out)
    ours = torch.autograd.grad(out, inputs, grad)
    exact_inputs = [t.detach().double().requires_grad_() for t in inputs]
    documents = zip(*(t.split(lengths, 2) for t in exact_inputs), strict=True)
    alone = torch.nn.functional.scaled_dot_product_attention
    exact = torch.cat([alone(*qkv, is_causal=True, enable_gqa=True) for qkv in documents], 2).transpose(1, 2)
    limit = 1e-2 if dtype == torch.bfloat16 else 2e-3
    assert relative(out, exact) < limit
    for mine, truth in zip(ours, torch.autograd.grad(exact, exact_inputs, grad.double()), strict=True):
        assert relative(mine, truth) < limit


def test_a_bound_above_the_longest_document_changes_nothing(use_varlen):
    """What compiled layers pass: a bound that hardly changes, instead of each batch's longest document."""
    bounds = torch.tensor([0, 190, 253, 765, 1024], device="cuda", dtype=torch.int32)
    results = []
    for longest in (512, 1024, 4096):
        torch.manual_seed(0)
        known = {"cu_seq_lens_q": bounds, "max_length_q": longest}
        inputs, out = attend(bounds.diff().tolist(), torch.bfloat16, **known)
        results.append((out, *torch.autograd.grad(out.float().square().sum(), inputs)))
    for other in results[1:]:
        assert all(relative(mine, truth) < 1e-2 for mine, truth in zip(other, results[0], strict=True))


def test_longer_documents_than_before_compile_at_most_once_more():
    model = tiny_llama()
    if speed.register_varlen_attention() == "varlen":
        model.set_attn_implementation("varlen")
    speed.use_fast_int8(model)
    torch._dynamo.reset()
    compiled = speed.compile_decoder_layers(model)
    graphs = []
    for i, lengths in enumerate(([100, 60], [700, 90], [1500, 40], [2100, 30], [3000, 20], [50, 90])):
        run(model, packed_batch(lengths, i))
        graphs.append(compiled.graphs)
    assert graphs[1] == 1
    assert graphs[-1] <= 2
    speed.check_graphs(compiled)


def tiny_llama():
    from bitsandbytes.nn import Linear8bitLt
    from peft import LoraConfig, get_peft_model

    sizes = {"hidden_size": 256, "intermediate_size": 512, "vocab_size": 512, "num_hidden_layers": 4}
    model = random_model(**sizes, head_dim=64).to(torch.bfloat16)
    for name, linear in list(model.named_modules()):
        if isinstance(linear, torch.nn.Linear) and name != "lm_head":
            int8 = Linear8bitLt(linear.in_features, linear.out_features, bias=False, has_fp16_weights=False)
            int8.load_state_dict(linear.state_dict())
            model.set_submodule(name, int8)
    model = model.cuda()
    model.is_loaded_in_8bit = True
    model = get_peft_model(model, LoraConfig(r=16, target_modules=SEVEN, task_type="CAUSAL_LM"))
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    return model.train()


def packed_batch(lengths, seed):
    torch.manual_seed(seed)
    ids = torch.randint(0, 512, (1, sum(lengths)), device="cuda")
    positions = torch.cat([torch.arange(n) for n in lengths])[None].cuda()
    bounds = torch.tensor([0, *lengths], device="cuda").cumsum(0).to(torch.int32)
    longest = max(lengths)
    return {
        "input_ids": ids, "labels": ids, "position_ids": positions, "use_cache": False,
        "cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": longest, "max_length_k": longest,
    }  # fmt: skip


def run(model, batch):
    model.zero_grad()
    with torch.autocast("cuda", dtype=torch.bfloat16):
        out = model(**copy.copy(batch))
    out.loss.backward()
    return out.loss.item(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(("budget", "units"), [(1.0, False), (0.5, False), (0.9, True)])
def test_everything_on_equals_everything_off(budget, units):
    model = tiny_llama()
    batches = [packed_batch(n, i) for i, n in enumerate(([100, 60, 40], [90, 30, 70, 9], [150, 33]))]
    expected = [run(model, batch) for batch in batches]
    if speed.register_varlen_attention() == "varlen":
        model.set_attn_implementation("varlen")
    speed.use_fast_int8(model)
    if units:
        speed.use_int8_units(model, {"input_ids": batches[0]["input_ids"]}, leave_out=["down_proj"])
    torch._dynamo.reset()
    compiled = speed.compile_decoder_layers(model, budget)
    for batch, (loss, grads) in zip(batches, expected, strict=True):
        ours, our_grads = run(model, batch)
        assert abs(ours - loss) < 0.01 * loss
        measured = torch.cat([our_grads[n].flatten() for n in grads])
        assert relative(measured, torch.cat([g.flatten() for g in grads.values()])) < 0.15
    speed.check_graphs(compiled)


def test_no_sixteen_bit_weight_is_kept():
    """What lives after a forward pass, beyond inputs and outputs, is far less than one 16-bit weight."""
    codes, absmax, _ = quantized(8192, 8192)
    x = torch.randn(16, 8192, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    before = torch.cuda.memory_allocated()
    y = int8_product.int8_linear(x, codes, absmax)
    assert torch.cuda.memory_allocated() - before < 2 * y.nbytes + 2**20
    y.sum().backward()
    assert torch.cuda.memory_allocated() - before < 8 * y.nbytes + 2**20
