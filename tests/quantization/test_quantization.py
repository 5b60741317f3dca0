"""Notebook 03's helpers, against bitsandbytes' own numbers, hand counts and float64."""

import functools

import bitsandbytes as bnb
import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
import torch
from tiny_models import ARCHITECTURES, load_int8, load_nf4, random_model, tiny_config
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, GPT2Config, LlamaConfig

from llama_sft_helpers import quantization
from llama_sft_helpers.core.llama import load_llama3_config

mpl.use("Agg")

TEXTS = ["Name three colours.\nRed, green and blue.", "What is water made of?\nHydrogen and oxygen."]


@pytest.fixture
def tiny_model_nf4(tiny_model_dir):
    return load_nf4(tiny_model_dir)


@pytest.fixture
def batch(tiny_tokenizer):
    tiny_tokenizer.pad_token = tiny_tokenizer.eos_token
    return tiny_tokenizer(TEXTS, return_tensors="pt", padding=True)


LLAMA3_8B = LlamaConfig(**vars(load_llama3_config()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [1e-6, 0.02, 30.0])
def test_codes_and_scales_equal_bitsandbytes_bit_for_bit(dtype, scale):
    torch.manual_seed(0)
    weight = (torch.randn(96, 320) * scale).to(dtype)
    weight[5, 7] = weight[5].abs().max() * 2  # then half of the absmax is a tie at level 63.5
    weight[5, 8] = weight[5, 7] / 2
    weight[6] = 0
    codes, absmax = quantization.quantize_absmax(weight)
    expected_codes, expected_absmax, _ = bnb.functional.int8_vectorwise_quant(weight.to(torch.float16))
    assert torch.equal(absmax, expected_absmax)
    assert torch.equal(codes, expected_codes)
    assert not codes[6].any()


def test_a_tie_goes_to_the_even_level():
    levels = torch.arange(-254, 255).float() / 2  # every level and every tie of a row whose absmax is 127
    codes, _ = quantization.quantize_absmax(levels[None])
    assert torch.equal(codes, bnb.functional.int8_vectorwise_quant(levels[None].half())[0])
    assert codes[0].tolist() == np.rint(levels.numpy()).astype(int).tolist()


@pytest.mark.parametrize(
    ("weight", "told"),
    [
        (torch.ones(3), "it takes a floating-point matrix"),
        (torch.ones(2, 2, dtype=torch.int8), r"got a tensor of shape \(2, 2\) and type torch.int8"),
        (torch.empty(0, 4), "it takes a floating-point matrix"),
        (torch.tensor([[1.0, float("nan")]]), "beyond float16's 65504"),
        (torch.tensor([[1.0, 1e6]]), "beyond float16's 65504"),
    ],
)
def test_what_is_no_weight_matrix_is_refused(weight, told):
    with pytest.raises(ValueError, match=told):
        quantization.quantize_absmax(weight)


def test_layers_of_the_int8_model(tiny_model_int8, batch):
    tiny_model_int8(**batch)  # moves the scales from the weight to the layer's state
    table = quantization.summarize_layers(tiny_model_int8).set_index(["class", "dtype"])
    int8 = table.loc[("Linear8bitLt", "int8")]
    attention = 64 * 64 + 32 * 64 + 32 * 64 + 64 * 64
    weights = 2 * (attention + 3 * 64 * 128)
    rows = 2 * (64 + 32 + 32 + 64 + 128 + 128 + 64)
    assert (int8["modules"], int8["parameters"], int8["bytes"]) == (14, weights, weights + 4 * rows)
    assert table.loc[("Embedding", "float32"), "bytes"] == 4 * 1024 * 64
    assert table.loc[("Linear", "float32"), "example"] == "lm_head"
    assert "logits" in table.loc[("Linear", "float32"), "why"]
    assert table.loc[("LlamaRMSNorm", "float32"), "modules"] == 5
    assert table["gib"].sum() == pytest.approx(table["bytes"].sum() / 2**30)


@pytest.mark.parametrize(("kind", "dtype"), [("tiny_model", "float32"), ("tiny_model_nf4", "nf4")])
def test_every_parameter_is_counted_once_and_weights_not_bytes(tiny_model, kind, dtype, request):
    table = quantization.summarize_layers(request.getfixturevalue(kind))
    assert table["parameters"].sum() == sum(p.numel() for p in tiny_model.parameters())
    assert dtype in set(table["dtype"])
    assert (set(table["why"]) == {"no quantization_config was given"}) == (kind == "tiny_model")


def test_a_module_without_parameters_is_refused():
    with pytest.raises(ValueError, match="holds no parameters"):
        quantization.summarize_layers(torch.nn.ReLU())


@pytest.mark.parametrize(
    "config",
    [
        LLAMA3_8B,
        tiny_config(head_dim=32, attention_bias=True, mlp_bias=True),
        tiny_config("qwen3", attention_bias=True),
        *(tiny_config(kind, **changes) for kind, changes in ARCHITECTURES.values()),
    ],
    ids=["llama3-8b", "biases-and-head-dim", "Qwen 3 with biases", *ARCHITECTURES],
)
def test_parameters_equal_those_of_a_meta_model(config):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    parameters = sum(p.numel() for p in model.parameters())
    table = quantization.summarize_memory(config)
    assert table.loc["fp32", "total_bytes"] == 4 * parameters
    assert table.loc["bf16", "total_bytes"] == 2 * parameters


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("row", "load"),
    [("int8", load_int8), ("nf4", load_nf4), ("nf4 single", functools.partial(load_nf4, double=False))],
)
def test_bytes_equal_those_that_bitsandbytes_holds(tiny_model_dir, row, load, dtype):
    model = load(tiny_model_dir, dtype)
    expected = quantization.summarize_memory(model.config, dtype=dtype).loc[row, "total_bytes"]
    tensors = {id(t): t for t in [*model.parameters(), *stored_beside(model)]}
    assert sum(t.nbytes for t in tensors.values()) == expected
    assert quantization.summarize_layers(model)["bytes"].sum() == expected


def stored_beside(model):
    """The scales as bitsandbytes itself saves them, in its state dict, less the weights."""
    for name, tensor in model.state_dict().items():
        if name.endswith((".SCB", ".absmax", ".nested_absmax", ".quant_map", ".nested_quant_map")):
            yield tensor
        elif "bitsandbytes__" in name and any(".nested_absmax" in key for key in model.state_dict()):
            yield torch.zeros(1)  # the offset, which the state dict keeps inside its packed metadata


@pytest.mark.parametrize("config", [GPT2Config(), None, {"hidden_size": 64}])
def test_memory_of_no_llama_config_is_refused(config):
    with pytest.raises(ValueError, match=r"GPT2Config.*supported are llama|expected a LlamaConfig"):
        quantization.summarize_memory(config)


def test_error_equals_a_float64_calculation(tiny_model, tiny_model_int8, tiny_model_dir):
    table = quantization.summarize_quantization_error(str(tiny_model_dir), tiny_model_int8)
    assert len(table) == 14
    row = table[(table["layer"] == 1) & (table["module"] == "down_proj")].iloc[0]
    weight = tiny_model.model.layers[1].mlp.down_proj.weight.detach().double()
    linear = tiny_model_int8.model.layers[1].mlp.down_proj
    difference = weight - linear.weight.data.double() * linear.weight.SCB.double()[:, None] / 127
    by_row = difference.norm(dim=1) / weight.norm(dim=1)
    assert row["format"] == "int8"
    assert row["relative_error"] == pytest.approx((difference.norm() / weight.norm()).item(), rel=1e-4)
    assert row["worst_row"] == int(by_row.argmax())
    assert row["worst_row_error"] == pytest.approx(by_row.max().item(), rel=1e-4)


def test_nf4_error_equals_that_of_its_16_levels(tiny_model, tiny_model_dir):
    model = load_nf4(tiny_model_dir, double=False)
    table = quantization.summarize_quantization_error(tiny_model_dir, model)
    weight = tiny_model.model.layers[0].self_attn.q_proj.weight.detach()
    blocks = weight.double().reshape(-1, 64)
    absmax = blocks.abs().amax(1, keepdim=True)
    levels = bnb.functional.get_4bit_type("nf4", device="cpu").double()
    nearest = levels[(blocks / absmax)[..., None].sub(levels).abs().argmin(-1)] * absmax
    expected = (nearest - blocks).norm() / blocks.norm()
    assert table.iloc[0]["relative_error"] == pytest.approx(expected.item(), rel=1e-4)


def test_shards_and_a_peft_wrapper_change_nothing(tiny_model_dir, tiny_model, tiny_model_int8, tmp_path):
    from peft import LoraConfig, get_peft_model

    tiny_model.save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    before = quantization.summarize_quantization_error(tiny_model_dir, tiny_model_int8)
    model = get_peft_model(tiny_model_int8, LoraConfig(r=4, target_modules=["q_proj"]))
    after = quantization.summarize_quantization_error(tmp_path, model)
    pd.testing.assert_frame_equal(before.drop(columns="name"), after.drop(columns="name"))
    layers = quantization.summarize_layers(model)
    lora = layers[layers["example"].str.contains("lora_")].iloc[0]
    assert (lora["parameters"], lora["why"]) == (2 * 4 * (64 + 64), "LoRA factor: it is trained")


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"intermediate_size": 64}, "the reference has shape"),
        ({"num_hidden_layers": 1}, r"no \.safetensors file that holds model\.layers\.1"),
        (None, r"no \.safetensors file that holds model\.layers\.0"),
    ],
)
def test_a_checkpoint_of_another_model_or_of_none_is_refused(tiny_model_int8, tmp_path, change, told):
    if change:
        random_model(**change).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=told):
        quantization.summarize_quantization_error(tmp_path, tiny_model_int8)


@pytest.mark.parametrize(
    ("look", "formats"),
    [("summarize_quantization_error", "int8 or nf4 or fp4"), ("summarize_outliers", "int8")],
)
def test_a_model_that_is_not_quantized_is_refused(tiny_model, tiny_model_dir, batch, look, formats):
    arguments = (tiny_model_dir, tiny_model) if "error" in look else (tiny_model, batch)
    with pytest.raises(ValueError, match=rf"no bitsandbytes layer in {formats}\. .*load_in_8bit"):
        getattr(quantization, look)(*arguments)


@pytest.mark.parametrize("threshold", [1.5, 2.5])
def test_outlier_channels_equal_those_of_bitsandbytes(tiny_model_int8, batch, threshold):
    for module in tiny_model_int8.modules():
        if isinstance(module, bnb.nn.Linear8bitLt):
            module.state.threshold = threshold
    table = quantization.summarize_outliers(tiny_model_int8, batch, threshold=threshold)
    assert table["outlier_channels"].sum() > 0
    for row in table.itertuples():
        block = tiny_model_int8.model.layers[row.layer]
        part = block.self_attn if row.module in ("q_proj", "k_proj", "v_proj", "o_proj") else block.mlp
        linear = getattr(part, row.module)
        assert row.channels == tuple(linear.state.idx.tolist())
        assert row.channels_share == pytest.approx(row.outlier_channels / linear.in_features)


def test_outlier_values_are_counted(tiny_model_int8, batch):
    seen = {}
    linear = tiny_model_int8.model.layers[0].mlp.down_proj
    handle = linear.register_forward_pre_hook(lambda _, args: seen.update(x=args[0].detach().numpy()))
    table = quantization.summarize_outliers(tiny_model_int8, batch, threshold=0.5)
    handle.remove()
    row = table[(table["layer"] == 0) & (table["module"] == "down_proj")].iloc[0]
    beyond = np.abs(seen["x"].astype(np.float16)) >= 0.5
    assert row["outlier_values"] == beyond.sum() > 0
    assert row["values_share"] == pytest.approx(beyond.mean())
    assert row["largest_activation"] == pytest.approx(np.abs(seen["x"]).max(), rel=1e-3)


def test_outliers_leave_hooks_and_modes_as_they_were(tiny_model_int8, batch, monkeypatch):
    def fail(*_, **__):
        raise IndexError("a layer fails")

    tiny_model_int8.train()
    tiny_model_int8.lm_head.eval()
    quantization.summarize_outliers(tiny_model_int8, batch)
    monkeypatch.setattr(tiny_model_int8.model.layers[1], "forward", fail)
    with pytest.raises(IndexError, match="a layer fails"):
        quantization.summarize_outliers(tiny_model_int8, batch)
    assert tiny_model_int8.model.training
    assert not tiny_model_int8.lm_head.training
    assert not any(module._forward_pre_hooks for module in tiny_model_int8.modules())


@pytest.mark.parametrize("threshold", [0, -1.0])
def test_a_threshold_that_is_not_positive_is_refused(tiny_model_int8, batch, threshold):
    with pytest.raises(ValueError, match="must be positive"):
        quantization.summarize_outliers(tiny_model_int8, batch, threshold)


@pytest.mark.parametrize(
    "function", ["summarize_outliers", "summarize_predictions", "summarize_forward_memory"]
)
def test_every_pass_looks_at_its_batch_first(tiny_model_int8, function):
    with pytest.raises(ValueError, match=r"The batch is empty.*2 or more tokens"):
        getattr(quantization, function)(tiny_model_int8, {"input_ids": torch.ones(1, 1, dtype=torch.long)})


def test_mean_nll_equals_the_loss_of_the_model(tiny_model, batch):
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    with torch.no_grad():
        output = tiny_model(**batch, labels=labels)
    table = quantization.summarize_predictions(tiny_model, batch)
    assert len(table) == int(batch["attention_mask"][:, 1:].sum())
    assert table["nll"].mean() == pytest.approx(output.loss.item(), rel=1e-5)
    first = table.iloc[0]
    assert first["label"] == batch["input_ids"][0, 1]
    assert first["top1"] == output.logits[0, 0].argmax()


def test_predictions_do_not_depend_on_the_mode(tiny_model_int8, batch):
    tiny_model_int8.train()
    in_training = quantization.summarize_predictions(tiny_model_int8, batch)
    assert tiny_model_int8.training
    tiny_model_int8.eval()
    pd.testing.assert_frame_equal(quantization.summarize_predictions(tiny_model_int8, batch), in_training)


def test_forward_memory_holds_weights_and_logits(tiny_model, tiny_model_int8, batch):
    plain, int8 = (
        quantization.summarize_forward_memory(model, batch).iloc[0] for model in (tiny_model, tiny_model_int8)
    )
    logits = batch["input_ids"].numel() * 1024 * 4
    assert plain["weights_gib"] * 2**30 == sum(p.nbytes for p in tiny_model.parameters())
    assert logits <= plain["peak_gib"] * 2**30 < 3 * logits
    assert 0 < plain["peak_without_logits_gib"] <= plain["peak_gib"]
    assert plain["total_gib"] == pytest.approx(plain["weights_gib"] + plain["peak_gib"])
    assert int8["weights_gib"] < plain["weights_gib"]
    assert int8["peak_without_logits_gib"] > plain["peak_without_logits_gib"]


def test_forward_memory_prints_nothing(tiny_model_int8, batch, capfd):
    quantization.summarize_outliers(tiny_model_int8, batch, threshold=1.0)
    capfd.readouterr()
    quantization.summarize_forward_memory(tiny_model_int8, batch)
    assert capfd.readouterr().err == ""


@pytest.fixture(autouse=True)
def _close_figures():
    import matplotlib.pyplot as plt

    yield
    plt.close("all")


def test_weight_grid_draws_each_level():
    torch.manual_seed(0)
    weight = torch.randn(4, 300)
    ax = quantization.plot_weight_grid(weight, row=2)
    codes, absmax = quantization.quantize_absmax(weight)
    heights = [bar.get_height() for bar in ax.patches]
    assert len(heights) == 255
    assert sum(heights) == 300
    assert heights[127] == int((codes[2] == 0).sum())
    assert f"{absmax[2].item() / 127:.3g}" in ax.get_title()


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_rounding_draws_each_weight_at_the_nearest_level(bits):
    weights = torch.tensor([0.3, -0.9, 0.05, 0.61, 1.0])
    ax = quantization.plot_rounding(weights, bits)
    top = 2 ** (bits - 1) - 1
    levels = [level / top for level in range(-top, top + 1)]  # of weights whose largest magnitude is 1
    drawn = [line.get_xdata()[1] for line in ax.lines]
    nearest = [min(levels, key=lambda level: abs(level - weight)) for weight in weights.tolist()]
    assert drawn == pytest.approx(nearest, abs=1e-6)
    assert ax.collections[0].get_positions() == pytest.approx(levels, abs=1e-6)
    error = np.sqrt(np.mean((np.array(nearest) - weights.half().numpy()) ** 2))
    assert f"{len(set(nearest))} of {len(levels)} levels" in ax.get_title()
    assert f"step {1 / top:.3g}, root mean square error {error:.2g}" in ax.get_title()


def test_rounding_to_8_bits_is_bitsandbytes_own():
    weights = torch.randn(64, generator=torch.Generator().manual_seed(0))
    codes, absmax, _ = bnb.functional.int8_vectorwise_quant(weights.half()[None])
    drawn = [line.get_xdata()[1] for line in quantization.plot_rounding(weights, 8).lines]
    assert drawn == pytest.approx((codes[0] * (absmax[0] / 127)).tolist(), abs=1e-6)


@pytest.mark.parametrize("bits", [1, 9, 2.5])
def test_rounding_to_other_bits_is_refused(bits):
    with pytest.raises(ValueError, match=f"bits is {bits}; expected a whole number from 2 to 8"):
        quantization.plot_rounding(torch.ones(3), bits)


@pytest.mark.parametrize(("row", "told"), [(-1, "rows 0 to 3"), (4, "rows 0 to 3"), (0, "only zeros")])
def test_a_row_that_cannot_be_drawn_is_refused(row, told):
    with pytest.raises(ValueError, match=told):
        quantization.plot_weight_grid(torch.zeros(4, 8), row=row)


def test_error_figure_has_a_band_for_each_format():
    rows = {"int8": [0.01, 0.02], "nf4": [0.1, 0.2]}
    tables = [
        pd.DataFrame({"module": ["q_proj", "k_proj"], "format": kind, "relative_error": errors})
        for kind, errors in rows.items()
    ]
    ax = quantization.plot_quantization_error(pd.concat(tables))
    drawn = {line.get_label(): line.get_ydata().tolist() for line in ax.get_lines()}
    assert drawn == {"int8": [1, 2], "nf4": [10, 20]}
    assert "%" in ax.get_ylabel()


def test_outlier_figure_shows_the_largest_counts_or_that_there_are_none(tiny_model_int8, batch):
    table = quantization.summarize_outliers(tiny_model_int8, batch, threshold=0.5)
    ax = quantization.plot_outliers(table)
    largest = table.nlargest(8, "channels_share")
    assert [int(text.get_text()) for text in ax.texts][::-1] == largest["outlier_channels"].tolist()
    names = [label.get_text() for label in ax.get_yticklabels()]
    assert names[-1] == f"layer {largest['layer'].iloc[0]}, {largest['module'].iloc[0]}"
    ax = quantization.plot_outliers(table.assign(outlier_channels=0))
    assert f"{len(table)} of {len(table)} inputs have no outlier" in ax.get_title()
    ax.figure.canvas.draw()


def test_side_by_side_shows_both_layers(tiny_model, tiny_model_int8):
    layers = tiny_model.model.layers[0], tiny_model_int8.model.layers[0]
    page = quantization.render_side_by_side(*layers, ("before", "after")).data
    assert (page.count("): Linear("), page.count("): Linear8bitLt(")) == (7, 7)


@pytest.mark.gpu
def test_cuda_scales_are_equal_and_codes_differ_by_a_level_at_most():
    torch.manual_seed(0)
    weight = (torch.randn(512, 4096) * 0.02).to(torch.bfloat16)
    codes, absmax = quantization.quantize_absmax(weight)
    cuda_codes, cuda_absmax, _ = bnb.functional.int8_vectorwise_quant(weight.cuda().half())
    assert torch.equal(cuda_absmax.cpu(), absmax)
    off = (cuda_codes.cpu().int() - codes.int()).abs()
    assert off.max() <= 1
    assert off.float().mean() < 0.01


@pytest.mark.gpu
def test_forward_memory_on_a_gpu_holds_the_logits(tiny_model, batch):
    model = tiny_model.cuda()
    on_gpu = batch.to("cuda")
    row = quantization.summarize_forward_memory(model, on_gpu).iloc[0]
    assert row["peak_gib"] * 2**30 >= on_gpu["input_ids"].numel() * 1024 * 4


@pytest.mark.gpu
def test_outlier_channels_on_a_gpu_equal_those_of_bitsandbytes(tiny_model_dir, batch):
    model = AutoModelForCausalLM.from_pretrained(
        tiny_model_dir, quantization_config=BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=1.5),
        dtype=torch.float16, device_map={"": 0},
    )  # fmt: skip
    table = quantization.summarize_outliers(model, batch.to("cuda"), threshold=1.5)
    linear = model.model.layers[0].self_attn.q_proj
    assert table.iloc[0]["channels"] == tuple(linear.state.idx.tolist())


def test_left_padding_scores_the_same_tokens_as_none(tiny_model):
    padded = {
        "input_ids": torch.tensor([[4, 4, 4, 5, 6, 7, 8]]),
        "attention_mask": torch.tensor([[0, 0, 0, 1, 1, 1, 1]]),
    }
    assert quantization.summarize_predictions(tiny_model, padded)["label"].tolist() == [6, 7, 8]
