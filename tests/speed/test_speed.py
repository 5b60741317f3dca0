"""Each switch of speed.py against float64, against what it replaces, and undone again."""

import copy
import functools
from types import SimpleNamespace

import pandas as pd
import pytest
import tiny_training
import torch
from peft import LoraConfig, get_peft_model
from tiny_models import SEVEN
from transformers import LlamaForCausalLM
from trl import SFTTrainer
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from llama_sft_helpers import speed
from llama_sft_helpers.speed import compiled_layers, int8_product, varlen
from llama_sft_helpers.training import check_base_unchanged, checksum_base


def add_lora(model, **changes):
    torch.manual_seed(0)
    settings = {"r": 16, "lora_alpha": 32, "lora_dropout": 0, "bias": "none", "task_type": "CAUSAL_LM"}
    model = get_peft_model(model, LoraConfig(**{**settings, "target_modules": SEVEN, **changes}))
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    return model


@pytest.fixture
def batch():
    torch.manual_seed(1)
    ids = torch.randint(5, 900, (2, 24))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


def pack(*lengths):
    """Documents of these lengths in one row, as trl's padding-free collator gives them."""
    torch.manual_seed(2)
    bounds = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    return {
        "input_ids": torch.randint(5, 900, (1, sum(lengths))),
        "position_ids": torch.cat([torch.arange(n) for n in lengths])[None],
        "cu_seq_lens_q": bounds,
        "cu_seq_lens_k": bounds,
        "max_length_q": max(lengths),
        "max_length_k": max(lengths),
    }


@pytest.fixture
def packed():
    return pack(7, 12, 5)


def quantized(rows=96, columns=64, seed=0):
    torch.manual_seed(seed)
    weight = torch.randn(rows, columns) * 0.05
    absmax = weight.abs().amax(1)
    codes = (weight / absmax[:, None] * 127).round().to(torch.int8)
    return codes, absmax, codes.double() * absmax.double()[:, None] / 127


def relative(measured, expected):
    return ((measured.double() - expected).norm() / expected.norm()).item()


def run(model, batch):
    model.zero_grad()
    out = model(**batch)
    out.loss.backward()
    return out.logits.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def plain_logits(model, batch):
    with torch.no_grad():
        return model(**batch).logits


@pytest.mark.parametrize(
    ("dtype", "limit"), [(torch.bfloat16, 3e-3), (torch.float16, 4e-4), (torch.float32, 1e-6)]
)
def test_product_and_input_gradient_match_float64(dtype, limit):
    codes, absmax, weight = quantized()
    x = torch.randn(5, 33, 64).to(dtype).requires_grad_()
    grad = torch.randn(5, 33, 96).to(dtype)
    y = int8_product.int8_linear(x, codes, absmax)
    y.backward(grad)
    assert y.dtype == dtype
    assert relative(y, x.detach().double() @ weight.t()) < limit
    assert relative(x.grad, grad.double() @ weight) < limit


def test_lora_gradients_match_float64():
    codes, absmax, weight = quantized()
    x = torch.randn(40, 64, requires_grad=True)
    a, b = (torch.randn(s, requires_grad=True) for s in ((8, 64), (96, 8)))
    grad = torch.randn(40, 96)
    int8_product.int8_linear(x, codes, absmax, a, b, 0.5).backward(grad)
    x64, a64, b64 = (t.detach().double().requires_grad_() for t in (x, a, b))
    (x64 @ (weight + 0.5 * b64 @ a64).t()).backward(grad.double())
    for ours, exact in ((x, x64), (a, a64), (b, b64)):
        assert relative(ours.grad, exact.grad) < 1e-5


def test_fast_int8_changes_no_module_and_no_weight_and_is_undone(tiny_model_int8, batch):
    model = add_lora(tiny_model_int8).train()
    reference, sums = plain_logits(model, batch), checksum_base(model)
    modules = {name: (module, type(module)) for name, module in model.named_modules()}
    kept = {key: value.clone() for key, value in model.state_dict().items()}
    assert speed.use_fast_int8(model) == 14
    run(model, batch)
    assert torch.allclose(plain_logits(model, batch), reference, atol=1e-4)
    assert {name: (module, type(module)) for name, module in model.named_modules()} == modules
    assert list(model.state_dict()) == list(kept)
    assert all(torch.equal(value, kept[key]) for key, value in model.state_dict().items())
    check_base_unchanged(model, sums)
    assert speed.use_fast_int8(model, enabled=False) == 14
    assert not any("forward" in vars(module) for module in model.modules())
    assert torch.equal(plain_logits(model, batch), reference)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_fused_lora_computes_what_peft_computes(tiny_model_int8, batch, checkpointing):
    model = add_lora(tiny_model_int8).train()
    expected, expected_grads = run(model, batch)
    speed.use_fast_int8(model)
    if checkpointing:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": False})
    logits, grads = run(model, batch)
    assert torch.allclose(logits, expected, atol=1e-4)
    assert set(grads) >= set(expected_grads)
    assert max(relative(grads[name], g.double()) for name, g in expected_grads.items()) < 1e-4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_fast_int8_under_autocast(tiny_model_int8, batch, dtype):
    model = add_lora(tiny_model_int8).train()
    expected, exact = run(model, batch)
    speed.use_fast_int8(model)
    with torch.autocast("cpu", dtype=dtype):
        logits, grads = run(model, batch)
    assert relative(logits, expected.double()) < 3e-2
    name = next(n for n in exact if "layers.1.mlp.down_proj.lora_B" in n)
    assert grads[name].dtype == torch.float32
    assert relative(grads[name], exact[name].double()) < 5e-2


@pytest.mark.parametrize(
    "changes", [{"use_dora": True}, {"lora_dropout": 0.5}, {"lora_bias": True}, {"bias": "none"}]
)
def test_other_lora_kinds_go_pefts_way(tiny_model_int8, batch, changes, monkeypatch):
    model = add_lora(tiny_model_int8, **changes).train()
    speed.use_fast_int8(model)
    fused = []
    real = int8_product._run_fast
    monkeypatch.setattr(
        int8_product,
        "_run_fast",
        lambda linear, x, a=None, b=None, s=1.0: fused.append(a is not None) or real(linear, x, a, b, s),
    )
    run(model, batch)
    assert any(fused) is (changes == {"bias": "none"})


def test_a_copy_of_a_fast_model_computes_with_its_own_weights(tiny_model_int8, batch):
    model = add_lora(tiny_model_int8).train()
    speed.use_fast_int8(model)
    expected = plain_logits(model, batch)
    copied = copy.deepcopy(model)
    assert torch.equal(plain_logits(copied, batch), expected)
    for name, parameter in copied.named_parameters():
        if "lora_B" in name:
            torch.nn.init.zeros_(parameter)
    first = copied.get_base_model().model.layers[0].mlp.up_proj.base_layer
    first.state.SCB.mul_(2)
    assert not torch.allclose(plain_logits(copied, batch), expected, atol=1e-2)
    assert torch.equal(plain_logits(model, batch), expected)
    speed.use_fast_int8(copied, enabled=False)
    assert "forward" in vars(model.get_base_model().model.layers[0].mlp.up_proj)


def test_adapters_of_a_fast_model_can_be_disabled_switched_and_unloaded(tiny_model_int8, batch):
    base = tiny_model_int8.train()
    linears = {n: m for n, m in base.named_modules() if type(m).__name__ == "Linear8bitLt"}
    plain = plain_logits(base, batch)
    model = add_lora(base)
    speed.use_fast_int8(model)
    expected = plain_logits(model, batch)
    assert not torch.allclose(expected, plain, atol=1e-2)
    with model.disable_adapter():
        assert torch.allclose(plain_logits(model, batch), plain, atol=1e-4)
    model.add_adapter("second", LoraConfig(r=4, target_modules=SEVEN, task_type="CAUSAL_LM"))
    model.set_adapter("second")  # its B is 0: the base alone
    assert torch.allclose(plain_logits(model, batch), plain, atol=1e-4)
    model.set_adapter("default")
    model.delete_adapter("second")
    assert torch.equal(plain_logits(model, batch), expected)
    unloaded = model.unload()
    assert {n: m for n, m in unloaded.named_modules() if type(m).__name__ == "Linear8bitLt"} == linears
    speed.use_fast_int8(unloaded, enabled=False)
    assert torch.equal(plain_logits(unloaded, batch), plain)


@pytest.mark.filterwarnings("ignore:Merge lora module")
def test_merging_a_fast_model_equals_merging_a_plain_one(tiny_model_int8, batch):
    model = add_lora(tiny_model_int8).train()
    plain, fast = copy.deepcopy(model).merge_and_unload(), model
    speed.use_fast_int8(fast)
    run(fast, batch)
    fast = fast.merge_and_unload()
    before, after = plain.state_dict(), fast.state_dict()
    assert list(before) == list(after)
    assert all(torch.equal(after[key], value) for key, value in before.items())
    assert torch.allclose(plain_logits(fast, batch), plain_logits(plain, batch), atol=1e-4)


def test_layers_that_another_library_runs_are_left_alone_and_said(tiny_model_int8, batch):
    expected = plain_logits(tiny_model_int8, batch)
    layer = tiny_model_int8.model.layers[0]
    for module in (layer, layer.mlp.up_proj):
        module.forward = functools.partial(type(module).forward, module)  # as accelerate's hooks do
    theirs = vars(layer.mlp.up_proj)["forward"]
    with pytest.warns(UserWarning, match="1 of 14 int8 layers are run by another library"):
        assert speed.use_fast_int8(tiny_model_int8) == 13
    with pytest.warns(UserWarning, match="another library runs LlamaDecoderLayer"):
        compiled = speed.compile_decoder_layers(tiny_model_int8)
    with pytest.raises(AssertionError, match="another library runs"):
        speed.check_graphs(compiled)
    compiled.remove()
    with pytest.warns(UserWarning, match="1 of 14"):
        assert speed.use_fast_int8(tiny_model_int8, enabled=False) == 13
    assert vars(layer.mlp.up_proj)["forward"] is theirs
    assert torch.equal(plain_logits(tiny_model_int8, batch), expected)


def test_fast_int8_refuses_what_it_cannot_do(tiny_model):
    import bitsandbytes as bnb

    with pytest.raises(ValueError, match="load_in_8bit=True"):
        speed.use_fast_int8(tiny_model)
    trainable = torch.nn.Sequential(bnb.nn.Linear8bitLt(8, 8, has_fp16_weights=True))
    with pytest.raises(ValueError, match="expected frozen int8 codes"):
        speed.use_fast_int8(trainable)


def test_product_counts_its_operations():
    from torch.utils.flop_counter import FlopCounterMode

    codes, absmax, _ = quantized()
    x = torch.randn(10, 64, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        int8_product.int8_linear(x, codes, absmax).sum().backward()
    assert counter.get_total_flops() == 2 * (2 * 10 * 64 * 96)


def test_operators_keep_torchs_rules():
    codes, absmax, _ = quantized(16, 8)
    a, b = torch.randn(4, 8, requires_grad=True), torch.randn(16, 4, requires_grad=True)
    x = torch.randn(3, 8, requires_grad=True)
    torch.library.opcheck(torch.ops.llama_sft.int8_linear.default, (x, codes, absmax, a, b, 0.5))


# attention


def per_document(query, key, value, bounds, longest, scale):  # noqa: PLR0917
    """A slow stand-in for the GPU kernel: sdpa on each document alone."""
    outputs = []
    for start, stop in zip(bounds.tolist(), bounds.tolist()[1:], strict=False):
        q, k, v = (t[start:stop].transpose(0, 1)[None] for t in (query, key, value))
        assert stop - start <= longest
        out = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=scale, enable_gqa=True
        )
        outputs.append(out[0].transpose(0, 1))
    return torch.cat(outputs)


@pytest.fixture
def varlen_on_cpu(monkeypatch):
    with pytest.warns(UserWarning, match="falls back to 'sdpa'"):
        assert speed.register_varlen_attention() == "sdpa"
    monkeypatch.setattr(varlen, "_varlen_kernel", per_document)
    monkeypatch.setattr(varlen, "_runs", lambda device, dtype: True)
    monkeypatch.setattr(varlen, "_HALF_TYPES", (torch.float32,))


def test_varlen_says_why_it_falls_back_and_computes_as_sdpa(tiny_model, batch, packed):
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.warns(UserWarning, match="no CUDA GPU|torch.nn.attention.varlen"):
        assert speed.register_varlen_attention() == "sdpa"
    batch["attention_mask"][1, 10:] = 0
    expected = [tiny_model(**b).logits for b in (batch, packed)]
    tiny_model.set_attn_implementation("varlen")
    assert all(torch.equal(tiny_model(**b).logits, e) for b, e in zip((batch, packed), expected, strict=True))


def test_documents_do_not_see_each_other(tiny_model, packed, varlen_on_cpu):
    tiny_model.set_attn_implementation("varlen")
    ids = packed["input_ids"]
    logits = tiny_model(**packed).logits
    for start, stop in ((0, 7), (7, 19), (19, 24)):
        alone = tiny_model(input_ids=ids[:, start:stop]).logits
        assert torch.allclose(logits[:, start:stop], alone, atol=1e-4)
    without_bounds = {key: packed[key] for key in ("input_ids", "position_ids")}
    assert torch.allclose(tiny_model(**without_bounds).logits, logits, atol=1e-5)


def test_varlen_leaves_padding_and_generation_to_sdpa(tiny_model, tiny_tokenizer, batch, varlen_on_cpu):
    batch["attention_mask"][1, 10:] = 0
    prompt = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": tiny_tokenizer.eos_token_id}
    ids = batch["input_ids"][:, :9]
    expected, text = tiny_model(**batch).logits, tiny_model.generate(ids, **prompt)
    tiny_model.set_attn_implementation("varlen")
    seen = batch["attention_mask"].bool()
    assert torch.allclose(tiny_model(**batch).logits[seen], expected[seen], atol=1e-5)
    assert torch.equal(tiny_model.generate(ids, **prompt), text)


def test_the_collators_bounds_are_taken_and_not_found_again(tiny_model, packed, varlen_on_cpu, monkeypatch):
    tiny_model.set_attn_implementation("varlen")
    expected = tiny_model(**packed).logits
    monkeypatch.setattr(varlen, "_find_bounds", lambda positions: pytest.fail("the collator gave bounds"))
    assert torch.equal(tiny_model(**packed).logits, expected)
    packed["max_length_q"] = torch.tensor(12)
    assert torch.equal(tiny_model(**packed).logits, expected)
    del packed["max_length_q"]  # a bound is enough
    assert torch.equal(tiny_model(**packed).logits, expected)


def test_trls_collator_gives_the_bounds_that_attention_takes():
    rows = [{"input_ids": list(range(5, 5 + n))} for n in (7, 12, 5)]
    collated = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)(rows)
    bounds, longest = varlen._bounds(collated["position_ids"], collated)
    assert bounds is collated["cu_seq_lens_q"]
    assert (bounds.tolist(), longest) == ([0, 7, 19, 24], 12)
    found, longest = speed.document_bounds(collated["position_ids"])
    assert (found.tolist(), longest) == ([0, 7, 19, 24], 12)


def test_an_attention_operator_is_counted_once_and_another_name_is_said(monkeypatch):
    operator = torch.ops.llama_sft.lora_grads  # any operator without a count of its own
    registry = {}
    monkeypatch.setattr(varlen, "flop_registry", registry)
    monkeypatch.setattr(
        varlen, "register_flop_formula", lambda target: lambda f: registry.setdefault(target, []).append(f)
    )
    monkeypatch.setattr(
        varlen.torch, "ops", SimpleNamespace(torch_attn=SimpleNamespace(_varlen_attn=operator))
    )
    varlen._count_operations()
    varlen._count_operations()
    assert registry == {operator: [varlen._varlen_flop]}
    monkeypatch.setattr(varlen.torch, "ops", SimpleNamespace(torch_attn=object()))
    with pytest.warns(UserWarning, match="takes attention to be free"):
        varlen._count_operations()


def test_dropout_would_let_packed_documents_see_each_other_and_is_refused(monkeypatch):
    monkeypatch.setattr(varlen, "_varlen_kernel", lambda *a: pytest.fail("the kernel has no dropout"))
    tensors = [torch.randn(1, 2, 6, 4) for _ in range(3)]
    positions = torch.tensor([[0, 1, 2, 0, 1, 2]])
    with pytest.raises(ValueError, match=r"attention_dropout=0.1.*expected 0"):
        varlen._varlen_attention(None, *tensors, None, dropout=0.1, position_ids=positions)


# compilation


def test_compiled_layers_share_few_graphs(tiny_model_int8):
    model = add_lora(tiny_model_int8).train()
    speed.use_fast_int8(model)
    batches = [pack(*lengths) for lengths in ([7, 2, 15], [7, 16], [7, 2, 11], [7, 10])]
    batches = [{**rows, "labels": rows["input_ids"], "use_cache": False} for rows in batches]
    expected = [run(model, copy.copy(rows)) for rows in batches]
    state = set(model.state_dict())
    torch._dynamo.reset()
    compiled = speed.compile_decoder_layers(model, activation_memory_budget=0.7)
    for rows, (logits, grads) in zip(batches, expected, strict=True):
        ours, our_grads = run(model, copy.copy(rows))
        assert torch.allclose(ours, logits, atol=2e-4)
        assert max(relative(our_grads[name], g.double()) for name, g in grads.items()) < 1e-3
    model.eval()
    with torch.no_grad():
        model(**batches[0])
        model(**batches[1])
        graphs = compiled.graphs
        model.generate(batches[0]["input_ids"], max_new_tokens=3, pad_token_id=0)
    assert 1 <= compiled.graphs == graphs <= 3
    assert compiled.seconds > 0
    assert set(model.state_dict()) == state
    speed.check_graphs(compiled)
    compiled.remove()
    assert not any("forward" in vars(layer) for layer in model.get_base_model().model.layers)


@pytest.fixture
def no_compiler(monkeypatch):
    """Graphs run as they were traced: seconds instead of minutes."""
    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", lambda graph, *_, **__: graph.forward)
    torch._dynamo.reset()


def test_a_copy_of_a_compiled_model_computes_with_its_own_weights(tiny_model_int8, batch, no_compiler):
    model = add_lora(tiny_model_int8).train()
    compiled = speed.compile_decoder_layers(model)
    batch["use_cache"] = False
    expected = plain_logits(model, batch)
    copied = copy.deepcopy(model)
    for name, parameter in copied.named_parameters():
        if "lora_B" in name:
            torch.nn.init.zeros_(parameter)
    assert not torch.allclose(plain_logits(copied, batch), expected, atol=1e-2)
    assert torch.allclose(plain_logits(model, batch), expected, atol=1e-4)
    compiled.remove()


def test_rows_of_other_lengths_reach_one_graph_with_one_bound(
    tiny_model, no_compiler, varlen_on_cpu, monkeypatch
):
    seen, attend = [], varlen._varlen_kernel

    @torch.compiler.disable
    def kernel(*tensors):
        seen.append(tensors[4])
        return attend(*tensors)

    monkeypatch.setattr(varlen, "_varlen_kernel", kernel)
    monkeypatch.setattr(compiled_layers, "_MOST_GRAPHS", 50)
    tiny_model.set_attn_implementation("varlen")
    compiled = speed.compile_decoder_layers(tiny_model)
    for lengths in ([7, 12, 5], [20, 3], [30, 9, 9]):
        rows = pack(*lengths)
        alone = [
            plain_logits(tiny_model, {"input_ids": part}) for part in rows["input_ids"].split(lengths, 1)
        ]
        assert torch.allclose(
            plain_logits(tiny_model, {**rows, "use_cache": False}), torch.cat(alone, 1), atol=1e-4
        )
    assert seen.count(1024) == 2 * 3  # two layers, three batches
    compiled.remove()


def test_more_shapes_than_graphs_run_uncompiled_and_are_said(tiny_model, batch, no_compiler, monkeypatch):
    monkeypatch.setattr(compiled_layers, "_MOST_GRAPHS", 1)
    compiled = speed.compile_decoder_layers(tiny_model.train())
    batch["use_cache"] = False
    run(tiny_model, batch)
    speed.check_graphs(compiled)
    with pytest.warns(UserWarning, match="1 graphs are compiled and another shape or mode came"):
        plain_logits(tiny_model.eval(), batch)
    with pytest.raises(AssertionError, match="A graph runs uncompiled, expected none: 1 graphs"):
        speed.check_graphs(compiled)
    compiled.remove()


def test_a_failing_compiler_leaves_the_layers_running(tiny_model, batch, monkeypatch):
    batch["use_cache"] = False
    expected = tiny_model(**batch).logits

    def fail(*_, **__):
        raise RuntimeError("no C compiler here")

    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", fail)
    torch._dynamo.reset()
    compiled = speed.compile_decoder_layers(tiny_model)
    with pytest.warns(UserWarning, match="no C compiler here"):
        assert torch.allclose(tiny_model(**batch).logits, expected, atol=1e-5)
    with pytest.raises(AssertionError, match="no C compiler here"):
        speed.check_graphs(compiled)
    compiled.remove()


@pytest.mark.parametrize("budget", [0, -0.5, 1.5])
def test_budget_outside_its_range(tiny_model, budget):
    with pytest.raises(ValueError, match=r"outside \(0, 1\]"):
        speed.compile_decoder_layers(tiny_model, budget)


def test_compile_needs_a_decoder():
    with pytest.raises(ValueError, match="expected a Llama model"):
        speed.compile_decoder_layers(torch.nn.Linear(2, 2))


# results


@pytest.fixture
def results():
    rungs = [
        {"rung": "plain", "tokens_per_second": 800.0, "peak_reserved_gib": 24.0, "share_of_ceiling": 0.03},
        {"rung": "fast", "tokens_per_second": 16000.0, "peak_reserved_gib": 28.0, "share_of_ceiling": 0.6},
        {"rung": "broken", "error": "out of memory"},
    ]
    return {"card": "H100", "rungs": rungs}


def test_ladder_table_by_hand(results):
    table = speed.summarize_ladder(results, epoch_tokens=28_800_000, price_per_hour=2.0)
    assert table["epoch_hours"].tolist() == [10.0, 0.5]
    assert table["epoch_price"].tolist() == [20.0, 1.0]
    assert table["times_plain"].tolist() == [1.0, 20.0]
    assert table["share_of_ceiling"].tolist() == [0.03, 0.6]
    del results["rungs"][0]["tokens_per_second"]
    assert speed.summarize_ladder(results, 1, 1.0)["times_plain"].isna().all()  # nothing to compare with
    with pytest.raises(ValueError, match="no finished rung"):
        speed.summarize_ladder({"rungs": results["rungs"][2:]}, 1, 1.0)


def test_results_of_the_project_are_read_by_name_and_an_unknown_name_lists_them():
    assert speed.read_results("speed_h200_40gib")["cap_gib"] == 40
    with pytest.raises(FileNotFoundError, match=r"no results 'nonsense'; expected one of .*speed_h200_40gib"):
        speed.read_results("nonsense")


@pytest.mark.parametrize(
    ("prices", "labels"),
    [
        ([5.88, 0.58, 0.57, 0.571], ["5.88", "0.58", "0.57", "0.57"]),
        ([5.88, 0.58, float("nan")], ["5.9", "0.6", "did not finish"]),
        ([588.1, 58.31, 57.2], ["588", "58", "57"]),
        ([0.2, 0.0], ["0.2", "0.0"]),
    ],
)
def test_the_labels_of_bars_tell_their_values_apart(prices, labels):
    ax = speed.plot_ladder(pd.DataFrame({"epoch_price": prices}), "epoch_price")
    assert [text.get_text() for text in ax.texts] == labels


def test_plot_ladder_shows_each_rung(results):
    table = speed.summarize_ladder(results, 28_800_000, 2.0)
    gaps = table.reindex(["plain", "broken", "fast"])
    ax = speed.plot_ladder(gaps, "tokens_per_second", missing="out of memory")
    assert ax.get_xlabel() == "tokens per second"
    assert ax.get_title()
    assert [text.get_text() for text in ax.texts] == ["800", "out of memory", "16,000"]
    assert [bar.get_width() for bar in ax.patches] == [800.0, 0.0, 16000.0]
    assert speed.plot_ladder(table, "peak_reserved_gib").texts[0].get_text() == "24.0"
    with pytest.raises(ValueError, match="no column 'nonsense'"):
        speed.plot_ladder(table, "nonsense")


# steps


def test_quick_steps_train_and_count_as_the_trainer_does(tmp_path, monkeypatch):
    class QuickTrainer(speed.QuickSteps, SFTTrainer):
        pass

    def train(kind):
        counted = []
        trainer = tiny_training.build_trainer(tmp_path / kind.__name__, kind=kind, eval_strategy="no")
        with monkeypatch.context() as patch:
            real = LlamaForCausalLM.num_parameters
            patch.setattr(
                LlamaForCausalLM,
                "num_parameters",
                lambda self, *args, **kwargs: counted.append(self) or real(self, *args, **kwargs),
            )
            trainer.train()
        losses = [(row["loss"], row["grad_norm"]) for row in trainer.state.log_history if "loss" in row]
        return losses, trainer.state.total_flos, len(counted)

    (losses, operations, counts), quick = train(SFTTrainer), train(QuickTrainer)
    assert quick[:2] == (losses, operations)
    assert len(losses) == 4
    assert operations > 0
    assert counts - quick[2] >= 3  # in each of four steps, and in the first only


def test_quick_steps_count_anew_in_a_new_run(tiny_model):
    class Base:
        model = tiny_model

        def floating_point_ops(self, inputs):
            return 6 * inputs["input_ids"].numel() * self.model.num_parameters()

    trainer = type("Quick", (speed.QuickSteps, Base), {})()
    trainer.state = object()
    inputs = {"input_ids": torch.arange(5, 12)[None]}
    assert trainer.floating_point_ops(inputs) == 6 * 7 * tiny_model.num_parameters()
    assert trainer.floating_point_ops({}) == 0
    tiny_model.extra = torch.nn.Linear(3, 3)
    trainer.state = object()
    assert trainer.floating_point_ops(inputs) == 6 * 7 * tiny_model.num_parameters()
