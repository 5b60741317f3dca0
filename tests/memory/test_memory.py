"""The memory plan, held against an H100's measurements, PyTorch's own counts and counts by hand."""

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace

import matplotlib
import pandas as pd
import pytest
import tiny_training
import torch
from peft import LoraConfig, get_peft_model
from tiny_models import SEVEN
from typer.testing import CliRunner

from llama_sft_helpers.cli import app
from llama_sft_helpers.core.llama import load_llama3_config
from llama_sft_helpers.memory import (
    explain_oom,
    plan_fit,
    plan_memory,
    plan_smaller_batch,
    planned_peak_gib,
    plot_fit,
    plot_memory,
    reconcile_memory,
    smaller_profiles,
)
from llama_sft_helpers.profiles import read_profile

matplotlib.use("agg")
ROOT = Path(__file__).parents[2]
LLAMA3 = load_llama3_config()
PRESETS = ["colab-a100", "colab-l4", "colab-t4"]
MEASURED = [
    result
    for path in sorted((ROOT / "benchmarks/results").glob("memory_*.json"))
    for result in json.loads(path.read_text(encoding="utf-8"))["results"]
]


def gib_of(plan, component):
    return plan.set_index("component")["gib"][component]


def peak(profile, quantization="int8"):
    return planned_peak_gib(plan_memory(LLAMA3, profile, quantization=quantization))


# --- Against an H100 ---


def test_the_presets_ran_20_steps_on_cards_of_their_size_with_10_percent_to_spare():
    ran = {result["preset"]: result for result in MEASURED if "preset" in result}
    assert set(ran) == set(PRESETS)
    for name, result in ran.items():
        profile = read_profile(name)
        # measured under the size that the card is sold with, judged by what of it can be used
        assert profile.gpu_gib <= result["card_gib"] <= profile.gpu_gib * 1.1
        assert result["share_of_card"] * result["card_gib"] <= 0.9 * profile.gpu_gib
        assert len(result["losses"]) == 20
        setting = {key: value for key, value in result["setting"].items() if hasattr(profile, key)}
        shortened = setting.pop("gradient_accumulation_steps")
        assert 2 <= shortened <= profile.gradient_accumulation_steps
        if setting["per_device_train_batch_size"] == 1:  # one row or one block of as many tokens: see below
            setting.pop("packing")
        assert setting == {key: getattr(profile, key) for key in setting}


def plain_a100(**changes):
    """The preset for an A100 without what notebook 08 switches on."""
    plain = {"attn_implementation": "sdpa", "fast_int8": False, "compile_layers": False}
    plain |= {"gradient_checkpointing": True, "activation_memory_budget": 1.0}
    return read_profile("colab-a100", **{**plain, **changes})


@pytest.mark.parametrize("result", MEASURED, ids=lambda result: str(result["setting"]))
def test_the_plan_is_within_8_percent_of_the_measured_peak(result):
    settings = {"gradient_accumulation_steps": 1, **result["setting"]}
    quantization = settings.pop("quantization")
    plan = plan_memory(LLAMA3, plain_a100(**settings), quantization=quantization)
    assert planned_peak_gib(plan) == pytest.approx(result["measured_gib"], rel=0.08)
    # ... and all of it, slack and context too, is not below what the process held
    assert plan["gib"].sum() > 0.99 * result["reserved_gib"]


# --- Against PyTorch and PEFT ---


@pytest.mark.parametrize("quantization", ["int8", "16-bit"])
def test_weights_and_adapters_equal_the_models_own_numbers(quantization, tiny_model):
    profile = read_profile("ci-tiny")
    model = tiny_training.build_model() if quantization == "int8" else tiny_model
    plan = plan_memory(model.config, profile, quantization=quantization)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    planned = gib_of(plan, "quantized weights") + gib_of(plan, "32-bit weights")
    if quantization == "16-bit":
        measured = model.get_memory_footprint(return_buffers=False)
    else:
        base = [p for p in model.parameters() if not p.requires_grad]
        scales = [p.SCB for p in base if getattr(p, "SCB", None) is not None]
        measured = sum(t.numel() * t.element_size() for t in [*base, *scales])
        assert gib_of(plan, "LoRA adapters") * 2**30 == 4 * trainable
        assert gib_of(plan, "optimizer state") * 2**30 == 8 * trainable
    assert planned * 2**30 == pytest.approx(measured)


def test_kept_activations_equal_what_autograd_saves(tiny_model):
    """Bytes of the tensors that a layer's backward pass reads, collected by autograd's own hook."""
    model = get_peft_model(tiny_model.bfloat16(), LoraConfig(r=16, lora_alpha=16, target_modules=SEVEN))
    decoder = model.get_base_model().model
    known = {p.untyped_storage().data_ptr() for p in model.parameters()}
    saved: list[dict[int, torch.Tensor]] = []  # of each layer: address -> tensor, so that none is used twice

    for module in (*decoder.layers, decoder.norm):
        module.register_forward_pre_hook(lambda *args: saved.append({}))
    decoder.rotary_emb.register_forward_hook(
        lambda module, args, out: known.update(t.untyped_storage().data_ptr() for t in out)
    )

    def pack(tensor):
        address = tensor.untyped_storage().data_ptr()
        if saved and address not in known:
            saved[-1][address] = tensor
        return tensor

    ids = torch.randint(0, 1000, (1, 256))
    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        torch.autocast("cpu", dtype=torch.bfloat16),
    ):
        model(input_ids=ids, labels=ids)
    measured = sum(tensor.untyped_storage().nbytes() for tensor in saved[1].values())
    settings = {"dtype": "bfloat16", "per_device_train_batch_size": 1, "max_length": 256}
    profile = read_profile("ci-tiny", gradient_checkpointing=False, **settings)
    plan = plan_memory(model.config, profile, quantization="16-bit")
    assert gib_of(plan, "activations") * 2**30 / 2 == pytest.approx(measured, rel=0.08)


# --- Counts by hand ---


def test_llama3_by_hand():
    plan = plan_memory(LLAMA3, plain_a100())
    weights = 32 * (2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14336)
    rows = 32 * (4096 + 1024 + 1024 + 4096 + 14336 + 14336 + 4096)
    assert weights == 6_979_321_856
    assert gib_of(plan, "quantized weights") == pytest.approx((weights + 4 * rows) / 2**30)
    assert gib_of(plan, "16-bit weights") == pytest.approx(2 * (2 * 128256 * 4096 + 65 * 4096) / 2**30)
    assert gib_of(plan, "LoRA adapters") == pytest.approx(41_943_040 * (4 + 2) / 2**30)
    assert gib_of(plan, "gradients") == pytest.approx(41_943_040 * 4 / 2**30)
    assert gib_of(plan, "optimizer state") == pytest.approx(41_943_040 * 8 / 2**30)
    # layer inputs, and LLM.int8's inputs of q/k/v, o, gate/up and down, of 4096 tokens in 32 layers; the mask
    kept = 2 * (4096 + 4096 + 4096 + 4096 + 14336) * 4096 * 32 + 4096**2
    assert gib_of(plan, "activations") == pytest.approx(kept / 2**30)
    assert list(plan.columns) == ["component", "gib", "how"]


def test_what_saves_memory_saves_it_in_the_plan():
    plain = plain_a100(gradient_checkpointing=False)

    def changed(**changes):
        return peak(dataclasses.replace(plain, **changes))

    checkpointed = {"gradient_checkpointing": True}
    assert changed(**checkpointed, fast_int8=True) < changed(**checkpointed) < peak(plain)
    assert changed(per_device_train_batch_size=1) < peak(plain)
    assert changed(attn_implementation="varlen") < peak(plain)  # no mask of tokens x tokens
    fast = {"fast_int8": True, "attn_implementation": "varlen", "compile_layers": True}
    budgets = [changed(**fast, activation_memory_budget=b) for b in (0.2, 0.5, 1.0)]
    assert budgets == sorted(budgets)
    assert budgets[-1] < peak(plain)
    assert peak(plain, "nf4") < peak(plain, "int8") < peak(plain, "16-bit")


def test_a_cpu_has_no_cuda_context(tiny_model):
    plan = plan_memory(tiny_model.config, read_profile("ci-tiny"))
    assert gib_of(plan, "CUDA context") == gib_of(plan, "allocator slack") == 0


@pytest.mark.parametrize(
    ("config", "profile", "quantization", "told"),
    [
        (LLAMA3, None, "int4", "quantization='int4' is not one of int8, nf4, 16-bit"),
        (LLAMA3, "colab-a100", "int8", r"profile is 'colab-a100', a str.*load_profile\('colab-a100'\)"),
        ("a/Llama-8B", None, "int8", r"config is 'a/Llama-8B', a str.*AutoConfig\.from_pretrained"),
        (SimpleNamespace(hidden_size=8), None, "int8", "without num_attention_heads, num_hidden_layers"),
    ],
)
def test_wrong_arguments_are_named(config, profile, quantization, told):
    for plan in (plan_memory, plan_fit):
        with pytest.raises(ValueError, match=told):
            plan(config, profile or plain_a100(), quantization=quantization)


# --- What fits ---


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_fits_its_own_card_with_10_percent_to_spare(name):
    profile = read_profile(name)
    fit = plan_fit(LLAMA3, profile, cards_gib={name: profile.gpu_gib})
    assert fit["verdict"].item() == "fits"
    assert fit["share"].item() <= 0.9


def test_verdicts_and_a_change_that_does_fit():
    profile = plain_a100(gradient_checkpointing=False, per_device_train_batch_size=4)
    planned = plan_memory(LLAMA3, profile)["gib"].sum()
    fit = plan_fit(LLAMA3, profile, cards_gib={"a": planned / 2, "b": planned * 1.05, "c": planned * 1.2})
    assert fit["verdict"].tolist() == ["does not fit", "tight", "fits"]
    assert fit["change"].iloc[-1] == ""
    smaller = dict(smaller_profiles(profile))[fit["change"].iloc[0]]
    assert plan_memory(LLAMA3, smaller)["gib"].sum() <= 0.9 * planned / 2
    assert fit["change"].iloc[0].startswith("gradient_checkpointing=True")


def test_the_advice_ends_with_4_bits_and_a_smaller_model():
    profile = read_profile("colab-t4")
    fit = plan_fit(LLAMA3, profile, cards_gib={"a": 9.0, "b": 4.0})
    assert fit["change"].tolist()[0].startswith("4-bit weights (nf4)")
    assert fit["change"].tolist()[1] == "a smaller model"


def test_the_exercise_of_06_says_what_the_plan_says():
    """Without checkpointing the plain path does not fit 24 GB, and its activations grow about threefold."""
    profile = read_profile("colab-a100", fast=False)
    plain = dataclasses.replace(profile, gradient_checkpointing=False)
    assert plan_fit(LLAMA3, plain).set_index("card").loc["24 GB", "verdict"] == "does not fit"

    def growth(quantization):
        plans = [plan_memory(LLAMA3, one, quantization=quantization) for one in (plain, profile)]
        return gib_of(plans[0], "activations") / gib_of(plans[1], "activations")

    assert 2.5 < growth("int8") < 3.5
    assert growth("nf4") > 10


# --- Measured against planned, out of memory, figure, command ---


def test_reconcile_leaves_out_slack_and_context():
    plan = plan_memory(LLAMA3, plain_a100())
    predicted = planned_peak_gib(plan)
    row = reconcile_memory(plan, 20.0).iloc[0]
    assert predicted == pytest.approx(
        plan["gib"].sum() - gib_of(plan, "allocator slack") - gib_of(plan, "CUDA context")
    )
    assert row["difference_gib"] == pytest.approx(20.0 - predicted)
    assert row["measured_over_predicted"] == pytest.approx(20.0 / predicted)
    for wrong in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="expected a positive number"):
            reconcile_memory(plan, wrong)


def test_half_the_batch_twice_the_accumulation_and_then_no_further():
    profile = plan_smaller_batch(plain_a100())
    assert (profile.per_device_train_batch_size, profile.gradient_accumulation_steps) == (1, 8)
    with pytest.raises(
        ValueError, match=r"batch_size=1 is the smallest micro-batch.*max_length=1024, or 4-bit"
    ):
        plan_smaller_batch(profile)
    odd = plan_smaller_batch(plain_a100(per_device_train_batch_size=9, gradient_accumulation_steps=2))
    assert (odd.per_device_train_batch_size, odd.gradient_accumulation_steps) == (3, 6)


@pytest.mark.parametrize("name", PRESETS)
def test_out_of_memory_is_explained_for_every_preset_down_to_one_row(name):
    profile = read_profile(name)
    rows = profile.per_device_train_batch_size * profile.gradient_accumulation_steps
    while profile.per_device_train_batch_size > 1:
        told, profile = explain_oom(LLAMA3, profile), plan_smaller_batch(profile)
        batch = profile.per_device_train_batch_size
        assert f"Next try, with the same effective batch: per_device_train_batch_size={batch}, " in told
        assert batch * profile.gradient_accumulation_steps == rows
    assert "One row is the smallest micro-batch. What is left to change: " in explain_oom(LLAMA3, profile)
    assert "largest item: activations" in explain_oom(LLAMA3, plain_a100(gradient_checkpointing=False))


def test_the_figure_shows_every_component_and_its_size():
    plan = plan_memory(LLAMA3, plain_a100())
    ax = plot_memory(plan, card_gib=40)
    assert [bar.get_width() for bar in ax.patches] == plan["gib"].iloc[::-1].tolist()
    assert f"{plan['gib'].sum():.2f} GiB of 40 GiB" in ax.get_title()
    assert ax.get_xlabel() == "GiB"


@pytest.mark.parametrize(("card_gib", "said"), [(40, "Fits"), (6.5, "Fits, tightly"), (6.4, "Does not fit")])
def test_the_bars_beside_a_card_add_up(card_gib, said):
    plan = pd.DataFrame({"component": ["weights", "activations", "loss"], "gib": [4.0, 0.0, 2.5]})
    ax = plot_fit(plan, card_gib)
    assert [(bar.get_x(), bar.get_width()) for bar in ax.patches] == [(0, 4), (4, 0), (4, 2.5)]
    assert ax.get_title().startswith(f"{said}: 6.5 of {card_gib} GiB")
    assert ax.lines[0].get_xdata()[0] == card_gib
    assert ax.get_xlim()[1] > max(card_gib, 6.5)


def test_the_command_prints_the_same_plan():
    runner = CliRunner()
    told = json.loads(runner.invoke(app, ["plan", "--profile", "colab-a100", "--json"]).stdout)
    plan = plan_memory(LLAMA3, read_profile("colab-a100"))
    assert [row["gib"] for row in told["plan"]] == plan["gib"].tolist()
    assert [row["card"] for row in told["fit"]] == ["16 GB", "24 GB", "40 GB", "80 GB"]
    assert all(row["card_gib"] < float(row["card"].split()[0]) for row in told["fit"])
    table = runner.invoke(app, ["plan", "--profile", "colab-a100"])
    assert f"{plan['gib'].sum():.2f} GiB in all" in table.stdout


@pytest.mark.parametrize(
    ("arguments", "code", "told"),
    [
        (["colab-a100", "--gpu-gib", "12"], 1, ""),
        (["colab-a100", "--gpu-gib", "48"], 0, ""),
        (["colab-a100", "--quantization", "int3"], 1, "'int3' is not one of"),
        (["colab-b200"], 1, "There is no profile 'colab-b200'"),
    ],
)
def test_the_command_says_when_a_card_is_too_small_or_a_name_unknown(arguments, code, told):
    done = CliRunner().invoke(app, ["plan", "--profile", *arguments])
    assert done.exit_code == code
    assert told in done.stderr
