"""Models of Llama's shape that are not Llama 3: random tiny weights from disk through every step."""

import json

import pytest
import torch
from data_forms import write_form
from peft import LoraConfig, PeftModel, get_peft_model
from tiny_models import ARCHITECTURES, SEVEN, load_int8, random_model, tiny_config
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPTNeoXConfig, set_seed
from typer.testing import CliRunner

from llama_sft_helpers import evaluation, lora, memory, quantization, training
from llama_sft_helpers.cli import app
from llama_sft_helpers.profiles import read_profile

IDS = torch.arange(2 * 40).reshape(2, 40) * 7 % 1024


@pytest.fixture(params=ARCHITECTURES)
def base(request, tmp_path):
    """The folder of a saved model."""
    model_type, changes = ARCHITECTURES[request.param]
    random_model(model_type, **changes).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def test_quantize_adapt_plan_train_and_merge(base, tmp_path):
    model = load_int8(base)
    predicted = quantization.summarize_memory(model.config, dtype=torch.float32)
    assert predicted.loc["int8", "total_bytes"] == quantization.summarize_layers(model)["bytes"].sum()
    plan = memory.plan_memory(model.config, read_profile("ci-tiny")).set_index("component")["gib"]
    assert plan[["quantized weights", "32-bit weights"]].sum() == predicted.loc["int8", "total_gib"]

    set_seed(42)
    model = get_peft_model(model, LoraConfig(r=4, lora_alpha=64, task_type="CAUSAL_LM", target_modules=SEVEN))
    planned = lora.plan_adapters(model.config, 4, SEVEN)
    assert planned["parameters"].sum() == model.get_nb_trainable_parameters()[0]
    batch = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}
    lora.check_adapter_is_noop(model, batch)

    before = training.checksum_base(model)
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)
    losses = []
    for _ in range(6):
        optimizer.zero_grad()
        losses.append(model.train()(**batch, labels=IDS).loss)
        losses[-1].backward()
        optimizer.step()
    training.check_gradients_reach_adapters(model)
    training.check_base_unchanged(model, before)
    assert losses[-1] < losses[0] - 0.1
    model.save_pretrained(tmp_path / "adapter")

    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    tuned = PeftModel.from_pretrained(plain, tmp_path / "adapter")
    evaluation.check_adapter(tmp_path / "adapter", plain, str(base))
    with torch.no_grad():
        expected = tuned(IDS).logits
        merged = tuned.merge_and_unload()
        assert torch.allclose(merged(IDS).logits, expected, atol=1e-4)
    merged.save_pretrained(tmp_path / "merged")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    with torch.no_grad():
        assert torch.equal(again(IDS).logits, merged(IDS).logits)


@pytest.mark.parametrize(
    ("in_config", "for_generation", "end"), [(7, 7, True), (None, 7, True), (None, None, False)]
)
def test_a_model_may_name_its_eos_for_generation_only_or_not_at_all(in_config, for_generation, end):
    model = random_model(eos_token_id=in_config)
    model.generation_config.eos_token_id = for_generation
    rows = [{"input_ids": [1, 5, 7], "labels": [-100, 5, 7]}, {"input_ids": [1, 7], "labels": [-100, 7]}]
    table = evaluation.summarize_row_losses(model, rows)
    assert table["loss_nats"].notna().all()
    assert table["eos_probability"].notna().all() == end


@pytest.mark.parametrize("config", [GPT2Config(), GPTNeoXConfig(architectures=["GPTNeoXForCausalLM"])])
@pytest.mark.parametrize(
    "look",
    [
        memory.check_supported,
        lambda config: memory.plan_memory(config, read_profile("ci-tiny")),
        quantization.summarize_memory,
        lambda config: lora.plan_adapters(config, 16, SEVEN),
    ],
)
def test_other_architectures_are_refused_by_name(config, look):
    message = rf"GPT(2|NeoX).*{config.model_type}.*supported are llama, mistral, qwen2, qwen3"
    with pytest.raises(memory.UnsupportedModelError, match=message):
        look(config)
    memory.check_supported(tiny_config("qwen3"))


CHAT = (
    "{% for turn in messages %}{{ turn.role }}: {{ turn.content }}"
    "{{ eos_token if turn.role == 'assistant' }}\n{% endfor %}{{ 'assistant: ' if add_generation_prompt }}"
)


@pytest.mark.slow
def test_06_07_and_09_run_on_a_qwen2_with_chats(tmp_path, tiny_tokenizer):
    source, _, _ = write_form("jsonl", tmp_path / "data")
    model_type, changes = ARCHITECTURES["Qwen 2"]
    ends = {"bos_token_id": tiny_tokenizer.bos_token_id, "eos_token_id": tiny_tokenizer.eos_token_id}
    # Qwen 2's own tokenizer class, which transformers takes for its models, adds a token
    random_model(model_type, **changes, **ends, vocab_size=1088).save_pretrained(tmp_path / "base")
    tiny_tokenizer.chat_template = CHAT
    tiny_tokenizer.save_pretrained(tmp_path / "base")
    out = tmp_path / "out"
    command = ["run", "--profile", "ci-tiny", "--only", "06,07,09", "--out", out, "--data", source]
    command += ["--model", tmp_path / "base", "--set", "max_steps=4", "--set", "max_new_tokens=4"]
    result = CliRunner().invoke(app, [str(word) for word in command])
    assert result.exit_code == 0, result.output
    for folder in (out, out / "your_run"):
        summary = json.loads((folder / "training_summary.json").read_text(encoding="utf-8"))
        assert summary["prompt_format"] == "chat"
        assert AutoTokenizer.from_pretrained(folder / "adapter").chat_template == CHAT
