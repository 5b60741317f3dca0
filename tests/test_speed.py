"""Each switch of speed.py against float64, against what it replaces, and undone again."""

import copy
import json
import warnings
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model

from llama_sft_helpers import int8_product, speed, varlen
from llama_sft_helpers.profiles import checkpointing_name

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def add_lora(model, **changes):
    torch.manual_seed(0)
    settings = {"r": 16, "lora_alpha": 32, "lora_dropout": 0, "bias": "none", "task_type": "CAUSAL_LM"}
    model = get_peft_model(model, LoraConfig(**{**settings, "target_modules": TARGETS, **changes}))
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


@pytest.fixture
def packed():
    """Three documents of 7, 12 and 5 tokens in one row, as trl's padding-free collator gives them."""
    torch.manual_seed(2)
    lengths = [7, 12, 5]
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    bounds = torch.tensor([0, 7, 19, 24], dtype=torch.int32)
    return {
        "input_ids": torch.randint(5, 900, (1, 24)),
        "position_ids": positions,
        "cu_seq_lens_q": bounds,
        "cu_seq_lens_k": bounds,
        "max_length_q": 12,
        "max_length_k": 12,
    }


def quantized(rows=96, columns=64, seed=0):
    torch.manual_seed(seed)
    weight = torch.randn(rows, columns) * 0.05
    absmax = weight.abs().amax(1)
    codes = (weight / absmax[:, None] * 127).round().to(torch.int8)
    return codes, absmax, codes.double() * absmax.double()[:, None] / 127


def relative(measured, expected):
    return ((measured.double() - expected).norm() / expected.norm()).item()


def gradients(model):
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def run(model, batch):
    model.zero_grad()
    out = model(**batch)
    out.loss.backward()
    return out.logits.detach(), gradients(model)


@pytest.mark.parametrize(
    ("dtype", "limit"), [(torch.bfloat16, 3e-3), (torch.float16, 4e-4), (torch.float32, 1e-6)]
)
def test_product_and_input_gradient_match_float64(dtype, limit):
    codes, absmax, weight = quantized()
    x = torch.randn(5, 33, 64).to(dtype).requires_grad_()
    grad = torch.randn(5, 33, 96).to(dtype)
    y = speed.int8_linear(x, codes, absmax)
    y.backward(grad)
    assert y.dtype == dtype
    assert relative(y, x.detach().double() @ weight.t()) < limit
    assert relative(x.grad, grad.double() @ weight) < limit


def test_lora_gradients_match_float64():
    codes, absmax, weight = quantized()
    x = torch.randn(40, 64, requires_grad=True)
    a, b = (torch.randn(s, requires_grad=True) for s in ((8, 64), (96, 8)))
    grad = torch.randn(40, 96)
    speed.int8_linear(x, codes, absmax, a, b, 0.5).backward(grad)
    x64, a64, b64 = (t.detach().double().requires_grad_() for t in (x, a, b))
    (x64 @ (weight + 0.5 * b64 @ a64).t()).backward(grad.double())
    for ours, exact in ((x, x64), (a, a64), (b, b64)):
        assert relative(ours.grad, exact.grad) < 1e-5


def test_no_worse_than_llm_int8_with_outlier_features():
    import bitsandbytes as bnb

    torch.manual_seed(3)
    linear = bnb.nn.Linear8bitLt(64, 96, bias=False, has_fp16_weights=False, threshold=6.0).to("cpu").eval()
    x = torch.randn(128, 64)
    x[:, [3, 17]] *= 30
    x = x.bfloat16()
    exact = x.double() @ (linear.weight.CB.double() * linear.weight.SCB.double()[:, None] / 127).t()
    theirs = linear(x)
    speed.use_fast_int8(torch.nn.Sequential(linear))
    assert relative(linear(x), exact) < min(3e-3, relative(theirs, exact))


def test_fast_int8_keeps_state_dict_and_is_undone(tiny_model_int8, batch):
    import bitsandbytes as bnb

    model = tiny_model_int8.train()
    before = model.state_dict()
    kept = {key: value.clone() for key, value in before.items()}
    reference = model(**batch).logits
    assert speed.use_fast_int8(model) == 14
    assert torch.allclose(model(**batch).logits, reference, atol=1e-4)
    assert set(model.state_dict()) == set(kept)
    assert all(torch.equal(value, kept[key]) for key, value in model.state_dict().items())
    assert speed.use_fast_int8(model, enabled=False) == 14
    assert {type(m) for m in model.modules() if isinstance(m, bnb.nn.Linear8bitLt)} == {bnb.nn.Linear8bitLt}
    assert torch.equal(model(**batch).logits, reference)


def test_saved_adapter_and_base_files_unchanged(tiny_model_int8, tmp_path):
    model = add_lora(tiny_model_int8)
    for folder in ("before", "after"):
        model.save_pretrained(tmp_path / folder)
        model.get_base_model().save_pretrained(tmp_path / folder / "base")
        speed.use_fast_int8(model)
    before, after = tmp_path / "before", tmp_path / "after"
    files = sorted(path.relative_to(before) for path in before.rglob("*.safetensors"))
    assert len(files) == 2
    for path in files:
        assert (before / path).read_bytes() == (after / path).read_bytes()


@pytest.mark.parametrize("checkpointing", [False, True])
def test_fused_lora_computes_what_peft_computes(tiny_model_int8, batch, checkpointing):
    model = add_lora(tiny_model_int8).train()
    expected, expected_grads = run(model, batch)
    speed.use_fast_int8(model)
    if checkpointing:
        model.enable_input_require_grads()
        getattr(model, f"{checkpointing_name()}_enable")({"use_reentrant": False})
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


def test_disabled_and_merged_adapters(tiny_model_int8, batch):
    base = tiny_model_int8.train()
    plain = base(**batch).logits.detach()
    model = add_lora(base)
    speed.use_fast_int8(model)
    with model.disable_adapter():
        assert torch.allclose(model(**batch).logits, plain, atol=1e-4)
    adapted = model(**batch).logits.detach()
    assert not torch.allclose(adapted, plain, atol=1e-2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.merge_adapter()
    # merging quantizes once more (see notebook 07), so only closer to the adapted model than to the plain one
    merged = model(**batch).logits
    assert (merged - adapted).norm() < 0.2 * (merged - plain).norm()


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
        speed.int8_linear(x, codes, absmax).sum().backward()
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


def test_document_bounds_over_two_rows():
    bounds, longest = speed.document_bounds(torch.tensor([[0, 1, 0, 1, 2], [0, 1, 2, 3, 0]]))
    assert bounds.tolist() == [0, 2, 5, 9, 10]
    assert bounds.dtype == torch.int32
    assert longest == 4


def test_cached_bounds_follow_the_rows():
    first = torch.tensor([[0, 1, 2, 0, 1]])
    assert varlen._cached_bounds(first)[0].tolist() == [0, 3, 5]
    first[0, 1] = 0
    assert varlen._cached_bounds(first)[0].tolist() == [0, 1, 3, 5]


# compilation


def test_compiled_layers_share_few_graphs(tiny_model_int8, packed):
    model = add_lora(tiny_model_int8).train()
    speed.use_fast_int8(model)
    lengths = (24, 23, 20, 17)
    batches = []
    for n in lengths:
        keep = {key: packed[key][:, :n] for key in ("input_ids", "position_ids")}
        bounds = torch.tensor([0, 7, n] if n % 2 else [0, 7, 9, n], dtype=torch.int32)
        longest = int(bounds.diff().max())
        batches.append(
            {
                **keep,
                "labels": keep["input_ids"],
                "use_cache": False,
                "cu_seq_lens_q": bounds,
                "max_length_q": longest,
            }
        )
    expected = [run(model, copy.copy(b)) for b in batches]
    state = set(model.state_dict())
    torch._dynamo.reset()
    compiled = speed.compile_decoder_layers(model, activation_memory_budget=0.7)
    for one, (logits, grads) in zip(batches, expected, strict=True):
        ours, our_grads = run(model, copy.copy(one))
        assert torch.allclose(ours, logits, atol=2e-4)
        assert max(relative(our_grads[name], g.double()) for name, g in grads.items()) < 1e-3
    model.eval()
    with torch.no_grad():
        model(**batches[0])
        model(**batches[1])
        graphs = compiled.graphs
        model.generate(batches[0]["input_ids"], max_new_tokens=3, pad_token_id=0)
    assert compiled.layers == 2
    assert 1 <= compiled.graphs == graphs <= 3
    assert compiled.seconds > 0
    assert set(model.state_dict()) == state
    speed.check_graphs(compiled)
    compiled.remove()
    assert all(layer._compiled_call_impl is None for layer in model.get_base_model().model.layers)


def test_remembered_modules_answer_as_a_walk_does(tiny_model_int8):
    model = add_lora(tiny_model_int8)
    names = [name for name, _ in model.named_modules()]
    parameters = [id(p) for p in model.parameters()]
    count = model.get_base_model().num_parameters(exclude_embeddings=True)
    undo = speed.remember_modules(model)
    for _ in range(2):
        assert [name for name, _ in model.named_modules()] == names
        assert [id(p) for p in model.parameters()] == parameters
        assert model.get_base_model().num_parameters(exclude_embeddings=True) == count
        model.train()
        assert all(m.training for m in model.modules())
        model.eval()
        assert not any(m.training for m in model.modules())
    # a new module, and a parameter that takes another's place, are seen
    layer = model.get_base_model().model.layers[0]
    layer.extra = torch.nn.Linear(2, 2)
    assert [name for name, _ in model.named_modules() if name.endswith("extra")]
    layer.extra.weight = replaced = torch.nn.Parameter(torch.ones(2, 2))
    assert any(p is replaced for p in model.parameters())
    model.eval()
    assert not layer.extra.training
    undo()
    assert not {"train", "named_modules", "named_parameters"} & set(vars(model))


def test_slicing_the_layers_does_not_make_it_walk_again(tiny_model, monkeypatch):
    undo = speed.remember_modules(tiny_model)
    list(tiny_model.named_modules())
    walked = []
    real = torch.nn.Module.named_modules
    monkeypatch.setattr(
        torch.nn.Module, "named_modules", lambda self, *a, **k: walked.append(1) or real(self, *a, **k)
    )
    tiny_model.model.layers[:2]  # what every forward pass of Llama does
    tiny_model.zero_grad()
    list(tiny_model.named_modules())
    assert not walked
    undo()


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


def test_check_graphs_raises_on_a_recompilation_storm():
    with pytest.raises(AssertionError, match="9 graphs were compiled, expected at most 3"):
        speed.check_graphs(speed.CompiledLayers(2, 0.5, graphs=9))


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
        {"rung": "plain", "tokens_per_second": 800.0, "peak_reserved_gib": 24.0, "share_of_floor": 0.03},
        {"rung": "fast", "tokens_per_second": 16000.0, "peak_reserved_gib": 28.0, "share_of_floor": 0.6},
        {"rung": "broken", "error": "out of memory"},
    ]
    return {"card": "H100", "rungs": rungs}


def test_ladder_table_by_hand(results, tmp_path):
    (tmp_path / "r.json").write_text(json.dumps(results))
    for source in (results, tmp_path / "r.json", str(tmp_path / "r.json")):
        table = speed.summarize_ladder(source, epoch_tokens=28_800_000, price_per_hour=2.0)
        assert table["epoch_hours"].tolist() == [10.0, 0.5]
        assert table["epoch_price"].tolist() == [20.0, 1.0]
        assert table["times_plain"].tolist() == [1.0, 20.0]


def test_results_of_the_project_are_read_by_name_and_an_unknown_name_lists_them():
    assert speed.read_results("speed_h100_40gib")["cap_gib"] == 40
    with pytest.raises(FileNotFoundError, match=r"no results 'nonsense'; expected one of .*speed_h100_40gib"):
        speed.read_results("nonsense")


def test_the_kept_ladder_is_what_the_readme_says():
    results = speed.read_results("speed_h100_40gib")
    rungs = {rung["rung"]: rung for rung in results["rungs"] if "tokens_per_second" in rung}
    text = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    for name, rung in rungs.items():
        assert f"| {name} | {rung['tokens_per_second']:,.0f} | {rung['peak_reserved_gib']:.1f} |" in text
    times = rungs["fast"]["tokens_per_second"] / rungs["plain"]["tokens_per_second"]
    assert f"{times:.1f} times `plain`" in text
    assert results["command"] in text
    for package, version in results["versions"].items():
        assert f"{package} {version}" in text


def test_the_kept_ladder_meets_its_targets():
    rungs = {rung["rung"]: rung for rung in speed.read_results("speed_h100_40gib")["rungs"]}
    fast = rungs["fast"]
    assert fast["tokens_per_second"] >= max(12_500, 15 * rungs["plain"]["tokens_per_second"])
    assert fast["peak_reserved_gib"] <= 30
    compared = [rung for rung in rungs.values() if rung.get("same_data_as") and "losses" in rung]
    assert len(compared) >= 5
    for rung in compared:
        assert rung["compared_steps"] == 20
        pairs = zip(rung["losses"], rungs[rung["same_data_as"]]["losses"], strict=True)
        assert max(abs(ours - theirs) / theirs for ours, theirs in pairs) < 0.01
    small = {rung["rung"]: rung for rung in speed.read_results("speed_h100_15gib")["rungs"]}
    assert small["compiled"]["tokens_per_second"] >= 8_000


def test_ladder_without_rungs_is_refused():
    with pytest.raises(ValueError, match="no finished rung"):
        speed.summarize_ladder({"rungs": [{"rung": "x", "error": "y"}]}, 1, 1.0)


def test_plot_ladder_shows_each_rung(results):
    table = speed.summarize_ladder(results, 28_800_000, 2.0)
    ax = speed.plot_ladder(table, "tokens_per_second")
    assert [bar.get_width() for bar in ax.patches] == [800.0, 16000.0]
    assert ax.get_xlabel() == "tokens/s"
    assert ax.get_title()
    with pytest.raises(ValueError, match="no column 'nonsense'"):
        speed.plot_ladder(table, "nonsense")


def test_without_the_plain_rung_there_is_nothing_to_compare_with(results):
    results["rungs"][0] = {"rung": "plain", "error": "out of memory"}
    assert speed.summarize_ladder(results, 1, 1.0)["times_plain"].isna().all()


def test_dropout_would_let_packed_documents_see_each_other_and_is_refused(monkeypatch):
    monkeypatch.setattr(varlen, "_varlen_kernel", lambda *a: pytest.fail("the kernel has no dropout"))
    tensors = [torch.randn(1, 2, 6, 4) for _ in range(3)]
    positions = torch.tensor([[0, 1, 2, 0, 1, 2]])
    with pytest.raises(ValueError, match=r"attention_dropout=0.1.*expected 0"):
        varlen._varlen_attention(None, *tensors, None, dropout=0.1, position_ids=positions)


def test_document_bounds_in_inference_mode():
    with torch.inference_mode():
        bounds, longest = varlen._cached_bounds(torch.tensor([[0, 1, 0, 1, 2]]))
    assert (bounds.tolist(), longest) == ([0, 2, 5], 3)


def test_remembered_modules_do_not_keep_a_model_alive(tiny_model):
    import gc
    import weakref

    model = torch.nn.Sequential(torch.nn.Linear(2, 2))
    known = weakref.ref(model)
    speed.remember_modules(model)
    speed.remember_modules(model)()  # a second undo finds what the first one left
    model(torch.zeros(1, 2))
    del model
    gc.collect()
    assert known() is None
