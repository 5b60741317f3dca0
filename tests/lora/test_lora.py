"""LoRA's helpers against independent truths: hand counts, PEFT's count, NumPy's SVD in float64."""

import logging

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from tiny_models import SEVEN, load_nf4, tiny_config
from transformers import AutoModelForCausalLM

from llama_sft_helpers import lora, training

mpl.use("Agg")
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
IDS = torch.arange(24).view(2, 12)


def adapt(model, **changes):
    settings = {"r": 16, "lora_alpha": 16, "lora_dropout": 0, "bias": "none", "target_modules": SEVEN}
    torch.manual_seed(0)
    return get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **{**settings, **changes}))


def steps(model, count=2):
    """Train a few steps; gradients stay in place."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    model.train()
    for _ in range(count):
        optimizer.zero_grad()
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
    return optimizer


def lora_layer(model, name):
    return model.get_submodule(f"base_model.model.model.layers.{name}")


@pytest.fixture
def adapted(tiny_model_int8):
    return adapt(tiny_model_int8)


@pytest.fixture
def trained(adapted):
    steps(adapted)
    return adapted


def dense_update(layer):
    a, b = (m["default"].weight.detach().double().numpy() for m in (layer.lora_A, layer.lora_B))
    return b @ a


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], SEVEN[:4], SEVEN])
@pytest.mark.parametrize("r", [4, 64])
def test_plan_agrees_with_peft_on_the_meta_device(r, targets):
    config = tiny_config(hidden_size=96, num_attention_heads=6, head_dim=20)  # 6 heads of 20 are not 96 wide
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    model = adapt(model, r=r, target_modules=targets)
    plan = lora.plan_adapters(config, r, targets)
    assert plan["parameters"].sum() == model.get_nb_trainable_parameters()[0]
    found = lora.summarize_adapters(model)
    assert found[["layers", "A", "B", "parameters"]].equals(plan[["layers", "A", "B", "parameters"]])
    assert found["largest_entry_of_b"].isna().all()


@pytest.mark.parametrize(
    ("r", "targets", "told"),
    [
        (0, SEVEN, "r is 0"),
        (2.5, SEVEN, "r is 2.5"),
        (4, ["q_proj", "qkv"], r"\['qkv'\].*q_proj, k_proj"),
        (4, [], "nothing"),
    ],
)
def test_plan_refuses(r, targets, told):
    with pytest.raises(ValueError, match=told):
        lora.plan_adapters(tiny_config(), r, targets)


def test_adapters_are_summarized_with_scaling_and_type(tiny_model_int8):
    table = lora.summarize_adapters(adapt(tiny_model_int8, r=8, lora_alpha=32, target_modules=SEVEN[-1:]))
    expected = {
        "layers": 2,
        "A": (8, 128),
        "B": (64, 8),
        "scaling": 4.0,
        "dtype": "float32",
        "largest_entry_of_b": 0,
    }
    assert table.loc["down_proj", list(expected)].to_dict() == expected


def test_ranks_that_differ_by_layer_get_a_row_each(tiny_model):
    model = adapt(tiny_model, target_modules=["q_proj"], rank_pattern={"layers.1.self_attn.q_proj": 4})
    assert sorted(lora.summarize_adapters(model)["r"]) == [4, 16]


def check_noop(model):
    lora.check_adapter_is_noop(model, {"input_ids": IDS})


NEED_VALUES = [lora.summarize_update, lora.plot_update_spectrum, check_noop]


@pytest.mark.parametrize("look", [lora.summarize_adapters, lora.summarize_gradients, *NEED_VALUES])
def test_a_missing_adapter_is_named(tiny_model, look):
    with pytest.raises(ValueError, match="no LoRA adapter; pass what get_peft_model"):
        look(tiny_model)


@pytest.mark.parametrize("look", [lora.summarize_frozen, *NEED_VALUES])
def test_meta_models_have_no_values(look):
    with torch.device("meta"):
        model = adapt(AutoModelForCausalLM.from_config(tiny_config()))
    with pytest.raises(ValueError, match="meta device"):
        look(model)


def test_two_active_adapters_are_refused(tiny_model):
    model = adapt(tiny_model)
    model.add_adapter("second", LoraConfig(r=4, target_modules=SEVEN, task_type="CAUSAL_LM"))
    model.base_model.set_adapter(["default", "second"])
    with pytest.raises(ValueError, match="2 active adapters"):
        lora.summarize_adapters(model)


@pytest.mark.parametrize("kind", ["tiny_model", "tiny_model_int8"])
def test_new_adapter_is_a_noop_and_modes_are_kept(kind, request):
    model = adapt(request.getfixturevalue(kind))
    model.train()
    model.base_model.model.model.norm.eval()
    before = [module.training for module in model.modules()]
    lora.check_adapter_is_noop(model, {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)})
    assert [module.training for module in model.modules()] == before


def test_one_moved_entry_fails_the_noop_check(adapted):
    with torch.no_grad():
        lora_layer(adapted, "1.mlp.up_proj").lora_B["default"].weight[3, 5] = 0.1
    with pytest.raises(lora.AdapterNotNoopError, match=r"in 1 of 14 modules \(layers\.1\.mlp\.up_proj\)"):
        check_noop(adapted)
    assert not any(m.disable_adapters for m in adapted.modules() if isinstance(m, LoraLayer))  # on again


def test_the_noop_check_refuses_other_batches_and_adapters(tiny_model):
    model = adapt(tiny_model)
    with pytest.raises(ValueError, match="The batch is dict"):
        lora.check_adapter_is_noop(model, {})
    with pytest.raises(ValueError, match="cannot switch its adapter off; pass a PeftModel"):
        check_noop(tiny_model)
    with model.disable_adapter(), pytest.raises(ValueError, match="switched off"):
        check_noop(model)
    model.merge_adapter()
    with pytest.raises(ValueError, match="merged"):
        check_noop(model)


def test_first_step_reaches_b_only_and_second_both(adapted):
    assert lora.summarize_gradients(adapted)["gradient_tensors"].tolist() == [0, 0]
    steps(adapted, 1)
    first = lora.summarize_gradients(adapted)
    assert first["matrices"].tolist() == [14, 14]
    assert first["nonzero_gradients"].to_dict() == {"A": 0, "B": 14}
    grads = [p.grad.abs().max().item() for name, p in adapted.named_parameters() if "lora_B" in name]
    assert first.loc["B", "largest_gradient"] == max(grads)
    steps(adapted, 1)
    assert lora.summarize_gradients(adapted)["nonzero_gradients"].tolist() == [14, 14]
    assert (lora.summarize_adapters(adapted)["largest_entry_of_b"] > 0).all()


def test_an_unreached_adapter_and_a_nan_show_in_the_gradients(adapted):
    steps(adapted, 2)
    layer = lora_layer(adapted, "0.mlp.up_proj")
    layer.lora_A["default"].weight.grad = None
    layer.lora_B["default"].weight.grad.zero_()
    table = lora.summarize_gradients(adapted)
    assert table.loc["A", ["matrices", "gradient_tensors", "nonzero_gradients"]].tolist() == [14, 13, 13]
    assert table.loc["B", ["matrices", "gradient_tensors", "nonzero_gradients"]].tolist() == [14, 14, 13]
    layer.lora_B["default"].weight.grad[0, 0] = float("nan")
    assert lora.summarize_gradients(adapted)["largest_gradient"].isna().tolist() == [False, True]


def test_frozen_table_is_unmoved_by_training_and_by_nothing_else(adapted):
    before = lora.summarize_frozen(adapted)
    assert not any("lora_" in name for name in before.index)
    assert sum("SCB" in name for name in before.index) == 14
    steps(adapted)
    assert lora.summarize_frozen(adapted).equals(before)
    base = lora_layer(adapted, "1.self_attn.v_proj").base_layer
    base.weight.data[2, 3] += 1
    base.state.SCB[0] *= 1.001
    after = lora.summarize_frozen(adapted)
    changed = after.index[after["checksum"] != before["checksum"]]
    assert [name.rpartition("1.self_attn.v_proj.")[2] for name in changed] == [
        "base_layer.weight",
        "base_layer.SCB",
    ]


def test_a_table_that_two_layers_share_is_one_frozen_tensor():
    model = adapt(AutoModelForCausalLM.from_config(tiny_config(tie_word_embeddings=True)))
    frozen = lora.summarize_frozen(model)
    assert sum("embed_tokens" in name or "lm_head" in name for name in frozen.index) == 1
    assert frozen["checksum"].to_dict() == training.checksum_base(model)


def test_nothing_frozen_is_told(tiny_model):
    with pytest.raises(ValueError, match="Every parameter"):
        lora.summarize_frozen(tiny_model)


def test_training_state_is_16_bytes_a_parameter(adapted):
    with pytest.raises(ValueError, match="0 of 28 trainable tensors"):
        lora.summarize_training_state(adapted, torch.optim.AdamW(adapted.parameters()))
    table = lora.summarize_training_state(adapted, steps(adapted))
    assert table["bytes"].sum() == 16 * adapted.get_nb_trainable_parameters()[0]
    assert table["bytes_per_parameter"].tolist() == [4, 4, 4, 4]


def test_update_agrees_with_a_dense_svd_in_numpy(trained):
    update = lora.summarize_update(trained)
    assert len(update) == 14
    for name in ("0.self_attn.k_proj", "1.mlp.down_proj"):
        layer, row = lora_layer(trained, name), update.loc[f"layers.{name}"]
        values = np.linalg.svd(dense_update(layer), compute_uv=False)
        base = layer.base_layer
        weight = base.weight.data.double().numpy() * (base.state.SCB.double().numpy() / 127)[:, None]
        assert row["projection"] == name.rpartition(".")[2]
        assert row["rank"] == np.linalg.matrix_rank(dense_update(layer)) == 16
        assert row["largest_singular_value"] == pytest.approx(values[0], rel=1e-9)
        assert row["update_norm"] == pytest.approx(np.sqrt((values**2).sum()), rel=1e-9)
        assert row["stable_rank"] == pytest.approx((values**2).sum() / values[0] ** 2, rel=1e-9)
        assert row["weight_norm"] == pytest.approx(np.linalg.norm(weight), rel=1e-6)
        assert row["relative_size"] == pytest.approx(row["update_norm"] / row["weight_norm"])


def test_looking_leaves_an_int8_model_as_it_was_and_a_pass_leaves_the_norms(adapted):
    norms = lora.summarize_update(adapted)["weight_norm"]
    adapted.eval()
    with torch.no_grad():
        before = adapted(input_ids=IDS).logits
        assert lora.summarize_update(adapted)["weight_norm"].equals(norms)
        assert torch.equal(adapted(input_ids=IDS).logits, before)


def test_untrained_and_low_rank_updates_and_alpha(tiny_model):
    model = adapt(tiny_model)
    assert lora.summarize_update(model)[["rank", "stable_rank", "update_norm"]].to_numpy().max() == 0
    layer = lora_layer(model, "0.self_attn.q_proj")
    with torch.no_grad():
        layer.lora_B["default"].weight[:, :3] = torch.randn(64, 3)
    single = lora.summarize_update(model).loc["layers.0.self_attn.q_proj"]
    assert single["rank"] == 3
    layer.set_scale("default", 2)
    double = lora.summarize_update(model).loc["layers.0.self_attn.q_proj"]
    assert double["update_norm"] == pytest.approx(2 * single["update_norm"], rel=1e-12)


def test_rank_is_bounded_by_the_weight_too(tiny_model):
    model = adapt(tiny_model, r=64, init_lora_weights=False)
    with pytest.raises(lora.AdapterNotNoopError, match="in 14 of 14 modules"):  # B is random
        check_noop(model)
    assert lora.summarize_update(model).loc["layers.0.self_attn.k_proj", "rank"] == 32  # k_proj is 32 x 64
    assert lora.plot_update_spectrum(model).get_title()


def test_nf4_weight_norm_is_near_the_reference(tiny_model_dir, tiny_model):
    nf4 = load_nf4(tiny_model_dir)
    norms = lora.summarize_update(adapt(nf4))["weight_norm"]
    reference = lora.summarize_update(adapt(tiny_model))["weight_norm"]
    assert np.allclose(norms, reference, rtol=0.02)
    weight = tiny_model.model.layers[0].self_attn.q_proj.base_layer.weight.detach().numpy()
    assert reference["layers.0.self_attn.q_proj"] == pytest.approx(np.linalg.norm(weight), rel=1e-5)
    layer = nf4.model.layers[0].self_attn.q_proj.base_layer
    layer.weight.quant_state.packing_format_for_cpu = True  # as after a pass on some CPUs
    with pytest.raises(ValueError, match=r"layers\.0\.self_attn\.q_proj.*repacked"):
        lora.summarize_update(nf4)


def test_spectrum_is_drawn_from_the_singular_values(trained):
    axes = lora.plot_update_spectrum(trained)
    layers = [lora_layer(trained, f"{number}.mlp.up_proj") for number in (0, 1)]
    values = [np.linalg.svd(dense_update(layer), compute_uv=False)[:16] for layer in layers]
    drawn = {line.get_label(): line.get_ydata() for line in axes.get_lines()}
    assert np.allclose(drawn["up_proj"], np.mean(values, axis=0), rtol=1e-5)  # the median of two
    assert axes.get_xlabel()
    assert "update" in axes.get_ylabel()


def make_sweep(losses):
    per_r = {"q and v": 10, "attention": 20, "all seven": 60}
    rows = [(t, r, r * per_r[t], loss) for t, by_r in losses.items() for r, loss in by_r.items()]
    return pd.DataFrame(rows, columns=["targets", "r", "parameters", "held_out_loss"])


SEEN = {"q and v": {4: 3.3, 64: 3.29}, "attention": {4: 3.2, 64: 3.2}, "all seven": {4: 3.0, 64: 2.98}}


TURNED = {"q and v": SEEN["all seven"], "attention": SEEN["attention"], "all seven": SEEN["q and v"]}
RANK_MATTERS = {"q and v": {4: 3.3, 64: 2.9}, "all seven": {4: 3.2, 64: 2.8}}


@pytest.mark.parametrize(
    ("losses", "noise", "verdicts"),
    [
        (SEEN, 0.02, ["seen"] * 4),
        (SEEN, 0.5, ["not"] * 4),
        (TURNED, 0.02, ["opposite", "opposite", "opposite", "seen"]),
        ({**SEEN, "attention": {4: 2.9, 64: 3.2}}, 0.02, ["seen", "not", "seen", "seen"]),
        (RANK_MATTERS, 0.02, ["seen", "opposite", "opposite"]),
    ],
    ids=["seen", "within the noise", "turned round", "mixed", "rank matters"],
)
def test_claims_are_judged(losses, noise, verdicts):
    words = {"seen": "seen here", "not": "not decided here", "opposite": "the opposite is seen here"}
    claims = lora.summarize_claims(make_sweep(losses), noise)
    assert claims["verdict"].tolist() == [words[verdict] for verdict in verdicts]


def test_what_is_measured_is_told():
    measured = lora.summarize_claims(make_sweep(SEEN), noise=0.02)["measured"]
    assert measured["all seven beats q and v at the same r"] == "-0.310 to -0.300"
    assert measured["all seven at r=4 (240 parameters) beats q and v at r=64 (640)"] == "-0.290"
    near = make_sweep({"q and v": {4: 3.3, 8: 3.3}, "all seven": {4: 3.0, 8: 3.0}})
    row = lora.summarize_claims(near, noise=0.1).loc["all seven beats q and v with no more parameters"]
    assert row.tolist() == ["no such pair", "not decided here"]


@pytest.mark.parametrize(
    ("sweep", "noise", "told"),
    [
        (make_sweep(SEEN).drop(columns="r"), 0.1, "lacks r"),
        (make_sweep(SEEN).iloc[:0], 0.1, "no rows"),
        (pd.concat([make_sweep(SEEN)] * 2), 0.1, "twice"),
        (make_sweep(SEEN).iloc[1:], 0.1, "5 losses for 2 ranks and 3 target sets"),
        (make_sweep({"all seven": {4: 3.0, 8: 3.0}}), 0.1, "1 target sets"),
        (make_sweep(SEEN), -0.1, "noise is -0.1"),
        (make_sweep(SEEN), float("nan"), "noise is nan"),
    ],
)
def test_bad_sweeps_are_told(sweep, noise, told):
    with pytest.raises(ValueError, match=told):
        lora.summarize_claims(sweep, noise)


def test_sweep_is_drawn_with_ranks_and_base_line():
    axes = lora.plot_sweep(make_sweep(SEEN), base_loss=3.5)
    lines = {line.get_label(): line for line in axes.get_lines()}
    assert lines["all seven"].get_ydata().tolist() == [3.0, 2.98]
    assert lines["all seven"].get_xdata().tolist() == [240, 3840]
    assert set(lines["base model, no adapter"].get_ydata()) == {3.5}
    assert [text.get_text() for text in axes.texts] == ["4", "64"] * 3
    assert "nats" in axes.get_ylabel()
    assert axes.get_title() == "Lowest held-out loss at every r: all seven"
    mixed = lora.plot_sweep(make_sweep({**SEEN, "attention": {4: 2.9, 64: 3.2}}), base_loss=3.5)
    assert mixed.get_title() == "Lowest held-out loss at every r: no set"
    with pytest.raises(ValueError, match="lacks parameters"):
        lora.plot_sweep(make_sweep(SEEN).drop(columns="parameters"), 3.5)


SETS = ["all seven", "q and v", "attention"]
RATES = [8e-3, 2e-3, 5e-4, 3.2e-2]
RANKS = [16, 4, 64, 8]


@pytest.mark.parametrize(
    ("seconds", "adapters", "left_out"),
    [
        (10.0, 24, "nothing"),  # 3 sets x (4 rates + 3 other ranks + 1 other seed)
        (10.1, 21, "r=8"),
        (12.0, 18, "learning rate 0.032, r=8"),
        (16.0, 15, "learning rate 0.0005, learning rate 0.032, r=8"),
        (20.0, 10, "attention, learning rate 0.0005, learning rate 0.032, r=8"),
        (30.0, 8, "attention, learning rate 0.0005, learning rate 0.032, r=64, r=8"),
        (100.0, 6, "attention, learning rate 0.002, learning rate 0.0005, learning rate 0.032, r=64, r=8"),
    ],
)
def test_a_sweep_is_cut_to_its_budget_and_can_be_judged_and_drawn(seconds, adapters, left_out):
    plan = lora.plan_sweep(SETS, RATES, RANKS, seconds_per_adapter=seconds, budget_seconds=240)
    assert plan.adapters == adapters == len(plan.targets) * (len(plan.learning_rates) + len(plan.ranks))
    over = ", more than that: it is the least that the claims need" if seconds == 100 else ""
    told = f"{adapters} adapters, about {adapters * seconds:.0f} s of the 240 s that the profile allows{over}"
    assert str(plan) == f"{told}; left out: {left_out}"
    sweep = make_sweep({name: {r: 3.0 + r / 1000 for r in plan.ranks} for name in plan.targets})
    # the widest against each other set, one budget, r against sets
    assert len(lora.summarize_claims(sweep, noise=0.02)) == len(plan.targets) + 1
    assert len(lora.plot_sweep(sweep, 3.5).get_lines()) == len(plan.targets) + 1


@pytest.mark.parametrize(
    ("sets", "rates", "ranks", "seconds", "told"),
    [
        (SETS[:1], RATES, RANKS, 1, r"Got \(1, 4, 4\).*at least \(2, 1, 2\)"),
        (SETS, [], [16], 1, r"Got \(3, 0, 1\)"),
        (SETS, RATES, RANKS, 0, "takes 0 s of 240 s"),
        (SETS, RATES, RANKS, float("nan"), "takes nan s"),
    ],
)
def test_sweeps_that_cannot_be_planned_are_told(sets, rates, ranks, seconds, told):
    with pytest.raises(ValueError, match=told):
        lora.plan_sweep(sets, rates, ranks, seconds_per_adapter=seconds, budget_seconds=240)
