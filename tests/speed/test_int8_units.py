"""The switch ``use_int8_units``: each option against float64, what it leaves alone, and undone again."""

import copy

import pytest
import torch
from test_speed import add_lora, plain_logits, quantized, relative, run

from llama_sft_helpers import speed
from llama_sft_helpers.speed import int8_units
from llama_sft_helpers.speed.int8_units import Int8Units
from llama_sft_helpers.training import check_base_unchanged, checksum_base

COLUMNS = [3, 40]


def as_int8(rows):
    """Each row rounded to 127 levels either way, in float64."""
    scale = rows.abs().amax(1, keepdim=True) / 127
    return torch.where(scale > 0, (rows / scale).round() * scale, 0.0)


def products(dtype, columns, lora, int8_backward=True, int8_forward=True):
    """Ours and the same in float64: result, and gradients of x, A and B."""
    codes, absmax, weight = quantized()
    x = torch.randn(40, 64)
    x[:, COLUMNS] *= 50
    x[7] = 0
    grad, a, b = torch.randn(40, 96).to(dtype), torch.randn(8, 64), torch.randn(96, 8)
    x, a, b = (
        t.to(kind).requires_grad_() for t, kind in ((x, dtype), (a, torch.float32), (b, torch.float32))
    )
    units = Int8Units(64, torch.tensor(columns) if columns else None, int8_backward, int8_forward)
    y = units(x, codes, absmax, *((a, b, 0.05) if lora else ()))
    y.backward(grad)
    g, x64, a64, b64 = (t.detach().double() for t in (grad, x, a, b))
    update = 0.05 * b64 @ a64 if lora else 0 * weight
    quantized_x, kept = x64.clone(), torch.zeros(64, dtype=torch.bool)
    kept[columns if int8_forward else slice(None)] = True
    quantized_x[:, kept] = 0
    exact = as_int8(quantized_x) @ weight.t() + x64[:, kept] @ weight[:, kept].t() + x64 @ update.t()
    scales = absmax.double() / 127
    rounded = as_int8(g * scales) / scales if int8_backward else g
    exact = [exact, rounded @ weight + g @ update, 0.05 * b64.t() @ g.t() @ x64, 0.05 * g.t() @ x64 @ a64.t()]
    ours = [y, x.grad, a.grad, b.grad]
    return list(zip(ours, exact, strict=True))[: 4 if lora else 2], (x64, g, weight + update)


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-6), (torch.bfloat16, 8e-3)])
@pytest.mark.parametrize("columns", [[], COLUMNS])
@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("kinds", [(False, True), (True, True), (True, False)])
def test_products_and_gradients_match_float64(dtype, limit, columns, lora, kinds):
    pairs, _ = products(dtype, columns, lora, *kinds)
    assert all(ours.dtype in {dtype, torch.float32} for ours, _ in pairs)
    assert max(relative(ours, exact) for ours, exact in pairs) < limit


def test_outlier_columns_apart_make_the_product_closer_to_the_unrounded_one():
    errors = []
    for columns in ([], COLUMNS):
        pairs, (x, g, weight) = products(torch.float32, columns, lora=True)
        errors.append(relative(pairs[0][0], x @ weight.t()))
        # a gradient has no columns apart: 8 bits leave it 1 % at most, here as in theory
        assert 1e-3 < relative(pairs[1][0], g @ weight) < 1e-2
    assert errors[1] < 1e-3
    assert errors[0] > 5 * errors[1]


def test_sums_stay_exact_under_autocast():
    codes, absmax, _ = quantized(columns=2000)
    x = torch.randn(5, 2000)
    a, b = torch.randn(4, 2000), torch.randn(96, 4)
    units = Int8Units(2000, torch.tensor(COLUMNS), True)
    expected = units(x.bfloat16(), codes, absmax, a, b, 0.1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(units(x, codes, absmax, a, b, 0.1), expected)


def test_not_a_number_stays_one():
    codes, absmax, _ = quantized()
    x = torch.randn(3, 64)
    x[1, 5] = float("nan")
    assert Int8Units(64, None, True)(x, codes, absmax)[:, 0].isnan().tolist() == [False, True, False]


def test_operators_keep_torchs_rules_and_count_operations():
    from torch.utils.flop_counter import FlopCounterMode

    codes, absmax, _ = quantized(16, 8)
    a, b = torch.randn(4, 8, requires_grad=True), torch.randn(16, 4, requires_grad=True)
    x = torch.randn(3, 8, requires_grad=True)
    for kinds in ((True, True), (True, False), (False, True)):
        thin = torch.randn(5, 8), torch.randn(16, 5)
        arguments = (x, codes, absmax / 127, a, b, 0.5, *thin, torch.ones(8), *kinds)
        torch.library.opcheck(torch.ops.llama_sft.int8_units_linear.default, arguments)
    with FlopCounterMode(display=False) as counter:
        Int8Units(8, None, True)(x, codes, absmax).sum().backward()
    assert counter.get_total_flops() == 2 * (2 * 3 * 8 * 16)


@pytest.fixture
def model(tiny_model_int8):
    return add_lora(tiny_model_int8).train()


@pytest.fixture
def batch():
    torch.manual_seed(1)
    ids = torch.randint(5, 900, (2, 24))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids, "use_cache": False}


def test_switch_changes_no_weight_and_is_undone(model, batch):
    reference, sums, keys = plain_logits(model, batch), checksum_base(model), list(model.state_dict())
    names = [name for name, _ in model.named_modules()]
    assert speed.use_int8_units(model, batch, 4) == 14
    run(model, batch)
    logits = plain_logits(model, batch)
    assert 1e-4 < relative(logits, reference.double()) < 5e-2
    assert list(model.state_dict()) == keys
    check_base_unchanged(model, sums)
    assert torch.equal(plain_logits(copy.deepcopy(model), batch), logits)
    assert speed.use_int8_units(model, enabled=False) == 0
    assert [name for name, _ in model.named_modules()] == names
    assert torch.allclose(plain_logits(model, batch), reference, atol=1e-4)  # use_fast_int8
    speed.use_fast_int8(model, enabled=False)
    assert torch.equal(plain_logits(model, batch), reference)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_of_a_model_are_close_to_the_16_bit_products(model, batch, checkpointing):
    speed.use_fast_int8(model)
    _, expected = run(model, batch)
    speed.use_int8_units(model, batch)
    if checkpointing:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": False})
    _, grads = run(model, batch)
    assert set(grads) >= set(expected)
    errors = [relative(grads[name], g.double()) for name, g in expected.items()]
    assert 1e-4 < max(errors) < 5e-2


def test_calibration_finds_the_largest_columns_of_each_layers_input(model, batch):
    norm = model.get_base_model().model.layers[1].input_layernorm
    norm.weight.data[[5, 17]] *= 100
    speed.use_int8_units(model, batch, 2, leave_out=["down_proj"], only_backward=["up_proj"])
    layers = dict(model.named_modules())
    units = {name: layer.int8_units for name, layer in layers.items() if hasattr(layer, "int8_units")}
    assert len(units) == 12
    assert not any("down_proj" in name for name in units)
    for name, unit in units.items():
        assert unit.int8_forward is ("up_proj" not in name)
        assert (None if unit.columns is None else len(unit.columns)) == (2 if unit.int8_forward else None)
        if "layers.1" in name and any(kind in name for kind in ("q_proj", "k_proj", "v_proj")):
            assert unit.columns.tolist() == [5, 17]
    assert not any(layer._forward_pre_hooks for layer in layers.values())


def test_options_of_an_earlier_call_do_not_stay(model, batch):
    speed.use_int8_units(model, batch, 2)
    assert speed.use_int8_units(model, leave_out=["q_proj", "down_proj"], int8_backward=False) == 10
    units = [module for module in model.modules() if isinstance(module, Int8Units)]
    assert [(unit.columns, unit.int8_backward) for unit in units] == [(None, False)] * 10


@pytest.mark.filterwarnings("ignore:Merge lora module")
def test_merging_changes_the_outlier_columns_weight_too(model, batch):
    speed.use_int8_units(model, batch, 4)
    merged = model.merge_and_unload()
    ours = plain_logits(merged, batch)
    speed.use_int8_units(merged, enabled=False)
    assert relative(ours, plain_logits(merged, batch).double()) < 5e-2


def test_compiled_layers_share_one_graph(model, batch, monkeypatch):
    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", lambda graph, *_, **__: graph.forward)
    torch._dynamo.reset()
    speed.use_int8_units(model, batch, 4, leave_out=["down_proj"])
    logits, expected = run(model, batch)
    compiled = speed.compile_decoder_layers(model)
    ours, grads = run(model, batch)
    assert torch.allclose(ours, logits, atol=1e-5)
    assert max(relative(grads[name], g.double()) for name, g in expected.items()) < 1e-5
    assert compiled.graphs == 1
    speed.check_graphs(compiled)
    compiled.remove()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"leave_out": ["lm_head"]}, r"\['lm_head'\] is no list of modules to leave; expected some of down"),
        ({"only_backward": "down_proj"}, r"such as \['down_proj'\]"),
        ({"outlier_columns": 0}, "outlier_columns=0; expected 1 to 64"),
        ({"outlier_columns": 65}, "outlier_columns=65; expected 1 to 64"),
    ],
)
def test_wrong_options_are_said(tiny_model_int8, batch, options, words):
    with pytest.raises(ValueError, match=words):
        speed.use_int8_units(tiny_model_int8, batch, **options)


def test_a_model_without_int8_layers_is_refused(tiny_model):
    with pytest.raises(ValueError, match="load_in_8bit=True"):
        speed.use_int8_units(tiny_model)


def test_a_gpu_without_reachable_int8_units_keeps_the_16_bit_product_and_says_so(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    with pytest.warns(UserWarning, match="changes nothing on Tesla T4.*8.0 or newer"):
        assert not int8_units._reachable(torch.device("cuda", 0))
