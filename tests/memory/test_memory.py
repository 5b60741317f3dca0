"""The memory plan, held against an H100's measurements, PyTorch's own counts and counts by hand."""

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace

import matplotlib
import pytest
import tiny_training
import torch
from tiny_models import SEVEN
from typer.testing import CliRunner

from llama_sft_helpers.cli import app
from llama_sft_helpers.memory import (
    explain_oom,
    plan_fit,
    plan_memory,
    plan_smaller_batch,
    planned_peak_gib,
    plot_memory,
    reconcile_memory,
    smaller_profiles,
)
from llama_sft_helpers.profiles import read_profile

matplotlib.use("agg")
ROOT = Path(__file__).parents[2]
LLAMA3 = SimpleNamespace(**json.loads((ROOT / "llama_sft_helpers/configs/llama3_8b.json").read_text()))
MEASURED = [
    result
    for path in sorted((ROOT / "benchmarks/results").glob("memory_*.json"))
    for result in json.loads(path.read_text())["results"]
]


def gib_of(plan, component):
    return plan.set_index("component")["gib"][component]


def name_of(result):
    return "-".join(str(value) for value in result["setting"].values())


# --- Against an H100 ---


def test_the_presets_ran_20_steps_on_cards_of_their_size_with_10_percent_to_spare():
    ran = {result["preset"]: result for result in MEASURED if "preset" in result}
    assert set(ran) == {"colab-a100", "colab-l4", "colab-t4"}
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


@pytest.mark.parametrize("result", MEASURED, ids=name_of)
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
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(tiny_model.bfloat16(), LoraConfig(r=16, lora_alpha=16, target_modules=SEVEN))
    frozen = {p.untyped_storage().data_ptr() for p in model.parameters()}
    shared = set()
    saved: list[dict[int, int]] = []

    def enter(*args):
        saved.append({})

    for layer in model.get_base_model().model.layers:
        layer.register_forward_pre_hook(enter)
    model.get_base_model().model.norm.register_forward_pre_hook(enter)
    model.get_base_model().model.rotary_emb.register_forward_hook(
        lambda module, args, out: shared.update(t.untyped_storage().data_ptr() for t in out)
    )

    def pack(tensor):
        storage = tensor.untyped_storage()
        if saved and storage.data_ptr() not in frozen | shared:
            saved[-1][storage.data_ptr()] = storage.nbytes()
            kept.append(tensor)  # so that no address is used twice
        return tensor

    kept: list[torch.Tensor] = []
    ids = torch.randint(0, 1000, (1, 256))
    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        torch.autocast("cpu", dtype=torch.bfloat16),
    ):
        model(input_ids=ids, labels=ids)
    measured = sum(saved[1].values())
    profile = read_profile(
        "ci-tiny",
        dtype="bfloat16",
        per_device_train_batch_size=1,
        max_length=256,
        gradient_checkpointing=False,
    )
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


def test_fewer_target_modules_and_a_smaller_rank_take_less():
    profile = plain_a100()
    plan = plan_memory(LLAMA3, profile, lora_rank=8, target_modules=("q_proj", "v_proj"))
    trainable = 32 * 8 * (4096 + 4096 + 4096 + 1024)
    assert gib_of(plan, "optimizer state") == pytest.approx(8 * trainable / 2**30)


def test_what_saves_memory_saves_it_in_the_plan():
    plain = plain_a100(gradient_checkpointing=False)

    def peak(quantization="int8", **changes):
        profile = dataclasses.replace(plain, **changes)
        return planned_peak_gib(plan_memory(LLAMA3, profile, quantization=quantization))

    assert peak(gradient_checkpointing=True) < peak()
    assert peak(gradient_checkpointing=True, fast_int8=True) < peak(gradient_checkpointing=True)
    assert peak(per_device_train_batch_size=1) < peak()
    assert peak(attn_implementation="varlen") < peak()  # no mask of tokens x tokens
    fast = {"fast_int8": True, "attn_implementation": "varlen", "compile_layers": True}
    budgets = [peak(**fast, activation_memory_budget=b) for b in (0.2, 0.5, 1.0)]
    assert budgets == sorted(budgets)
    assert budgets[-1] < peak()
    assert peak("nf4") < peak("int8") < peak("16-bit")


def test_a_cpu_has_no_cuda_context(tiny_model):
    plan = plan_memory(tiny_model.config, read_profile("ci-tiny"))
    assert gib_of(plan, "CUDA context") == 0
    assert gib_of(plan, "allocator slack") == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"quantization": "int4"}, "quantization='int4' is not one of int8, nf4, 16-bit"),
        ({"lora_rank": 0}, "lora_rank=0 is too small, expected at least 1"),
        ({"target_modules": ("c_attn",)}, r"Unknown target modules \['c_attn'\]; a Llama layer has q_proj"),
    ],
)
def test_wrong_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        plan_memory(LLAMA3, plain_a100(), **arguments)


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ("meta-llama/Meta-Llama-3-8B", r"'meta-llama/Meta-Llama-3-8B', a str"),
        (None, "None, a NoneType"),
        (SimpleNamespace(hidden_size=8), "without num_attention_heads, num_hidden_layers"),
    ],
)
def test_what_is_no_configuration_is_named(config, named):
    for plan in (plan_memory, plan_fit):
        with pytest.raises(ValueError, match=rf"config is .*{named}.*AutoConfig\.from_pretrained"):
            plan(config, plain_a100())


def test_what_is_no_profile_is_named():
    with pytest.raises(ValueError, match=r"profile is 'colab-a100', a str.*load_profile\('colab-a100'\)"):
        plan_memory(LLAMA3, "colab-a100")


# --- What fits ---


@pytest.mark.parametrize("name", ["colab-a100", "colab-l4", "colab-t4"])
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
    changes = dict(smaller_profiles(profile))
    smaller = changes[fit["change"].iloc[0]]
    assert plan_memory(LLAMA3, smaller)["gib"].sum() <= 0.9 * planned / 2
    assert fit["change"].iloc[0].startswith("gradient_checkpointing=True")


def test_the_advice_ends_with_4_bits_and_a_smaller_model():
    profile = read_profile("colab-t4")
    fit = plan_fit(LLAMA3, profile, cards_gib={"a": 9.0, "b": 4.0})
    assert fit["change"].tolist()[0].startswith("4-bit weights (nf4)")
    assert fit["change"].tolist()[1] == "a smaller model"


def test_the_exercise_of_06_says_what_the_plan_says():
    """Without checkpointing the plain path does not fit 24 GB, and its activations grow about threefold."""
    plain = read_profile("colab-a100", fast=False, gradient_checkpointing=False)
    fit = plan_fit(LLAMA3, plain).set_index("card")
    assert fit.loc["24 GB", "verdict"] == "does not fit"
    sizes = [
        gib_of(plan_memory(LLAMA3, profile, quantization=kind), "activations")
        for kind in ("int8", "nf4")
        for profile in (plain, read_profile("colab-a100", fast=False))
    ]
    assert 2.5 < sizes[0] / sizes[1] < 3.5, sizes
    assert sizes[2] / sizes[3] > 10, sizes


# --- Measured against planned, out of memory, figure, command ---


def test_reconcile_leaves_out_slack_and_context():
    plan = plan_memory(LLAMA3, plain_a100())
    predicted = planned_peak_gib(plan)
    row = reconcile_memory(plan, 20.0).iloc[0]
    assert predicted == pytest.approx(
        plan["gib"].sum() - gib_of(plan, "allocator slack") - gib_of(plan, "CUDA context")
    )
    assert row["difference_gib"] == pytest.approx(20.0 - predicted)
    assert row["difference_percent"] == pytest.approx(100 * (20.0 - predicted) / 20.0)
    for wrong in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="expected a positive number"):
            reconcile_memory(plan, wrong)


def test_out_of_memory_is_explained_by_the_largest_item():
    profile = plain_a100(gradient_checkpointing=False)
    said = explain_oom(LLAMA3, profile)
    assert "its largest item: activations, " in said
    assert "per_device_train_batch_size=1, gradient_accumulation_steps=8" in said


def test_half_the_batch_twice_the_accumulation_and_then_no_further():
    profile = plan_smaller_batch(plain_a100())
    assert (profile.per_device_train_batch_size, profile.gradient_accumulation_steps) == (1, 8)
    with pytest.raises(
        ValueError, match=r"batch_size=1 is the smallest micro-batch.*max_length=1024, or 4-bit"
    ):
        plan_smaller_batch(profile)
    odd = plan_smaller_batch(plain_a100(per_device_train_batch_size=9, gradient_accumulation_steps=2))
    assert (odd.per_device_train_batch_size, odd.gradient_accumulation_steps) == (3, 6)


@pytest.mark.parametrize("name", ["colab-a100", "colab-l4", "colab-t4"])
def test_out_of_memory_is_explained_for_every_preset_down_to_one_row(name):
    profile = read_profile(name)
    rows = profile.per_device_train_batch_size * profile.gradient_accumulation_steps
    while profile.per_device_train_batch_size > 1:
        assert "Next try, with the same effective batch" in explain_oom(LLAMA3, profile)
        profile = plan_smaller_batch(profile)
        assert profile.per_device_train_batch_size * profile.gradient_accumulation_steps == rows
    assert "One row is the smallest micro-batch. What is left to change: " in explain_oom(LLAMA3, profile)
    with pytest.raises(ValueError, match="gradient_checkpointing=True"):
        plan_smaller_batch(dataclasses.replace(profile, gradient_checkpointing=False))


def test_the_figure_shows_every_component_and_its_size():
    plan = plan_memory(LLAMA3, plain_a100())
    ax = plot_memory(plan, card_gib=40)
    assert [bar.get_width() for bar in ax.patches] == plan["gib"].iloc[::-1].tolist()
    assert f"{plan['gib'].sum():.2f} GiB of 40 GiB" in ax.get_title()
    assert ax.get_xlabel() == "GiB"


def test_the_command_prints_the_same_plan():
    runner = CliRunner()
    done = runner.invoke(app, ["plan", "--profile", "colab-a100", "--json"])
    assert done.exit_code == 0
    told = json.loads(done.stdout)
    plan = plan_memory(LLAMA3, read_profile("colab-a100"))
    assert [row["gib"] for row in told["plan"]] == plan["gib"].tolist()
    assert [row["card"] for row in told["fit"]] == ["16 GB", "24 GB", "40 GB", "80 GB"]
    assert all(row["card_gib"] < float(row["card"].split()[0]) for row in told["fit"])
    table = runner.invoke(app, ["plan", "--profile", "colab-a100"])
    assert f"{plan['gib'].sum():.2f} GiB in all" in table.stdout


def test_the_command_says_when_a_card_is_too_small():
    runner = CliRunner()
    for gib, code in (("12", 1), ("48", 0)):
        done = runner.invoke(app, ["plan", "--profile", "colab-a100", "--gpu-gib", gib])
        assert done.exit_code == code
    wrong = runner.invoke(app, ["plan", "--profile", "colab-a100", "--quantization", "int3"])
    assert wrong.exit_code == 1
    assert "'int3' is not one of" in wrong.stderr
    assert (
        "There is no profile 'colab-b200'" in runner.invoke(app, ["plan", "--profile", "colab-b200"]).stderr
    )
