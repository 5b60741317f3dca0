"""Failures that only an NVIDIA GPU can produce; each destroys a process's CUDA state, so each has its own."""

import pytest
from provocations import in_another_process, provokes

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def _needs_a_gpu(tmp_path, monkeypatch):
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA GPU: run `make test-gpu` on a machine that has one")
    monkeypatch.chdir(tmp_path)


_MODEL = """
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
from trl import SFTConfig, SFTTrainer
from llama_sft_helpers.demo_model import ensure_model

folder = ensure_model("tiny-llama")

def load(dtype, eight_bit=False):
    quantization = BitsAndBytesConfig(load_in_8bit=True) if eight_bit else None
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, quantization_config=quantization, device_map={"": 0})

def adapted(model):
    config = LoraConfig(r=8, task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"])
    return get_peft_model(model, config, autocast_adapter_dtype=False)

def trainer(model, **arguments):
    rows = Dataset.from_list([{"prompt": "Say hi. ", "completion": "hi there"}] * 8)
    config = SFTConfig(output_dir="unused", max_steps=2, report_to="none", save_strategy="no", bf16=False,
        logging_steps=1, **arguments)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return SFTTrainer(model=model, args=config, train_dataset=rows, processing_class=tokenizer)
"""


@provokes("cuda-out-of-memory")
def test_more_memory_than_the_card_may_give():
    code = """
torch.cuda.set_per_process_memory_fraction(0.02)  # a card of 1 to 2 GiB
model = load(torch.float32)
def step(rows):
    ids = torch.ones(rows, 2048, dtype=torch.long, device="cuda")
    model(input_ids=ids, labels=ids).loss.backward()
provoke(lambda: step(64))
"""
    (found,) = in_another_process(_MODEL + code)
    assert found["raised"] == "OutOfMemoryError"
    assert "its largest item is" in found["cause"]
    return [found]


@provokes("device-side-assert")
def test_ids_out_of_range_on_the_card():
    ids = "provoke(lambda: load(torch.float32)(input_ids=torch.tensor([[5000]]).cuda()).logits.cpu())"
    labels = """
ids = torch.tensor([[1, 2, 3]]).cuda()
provoke(lambda: load(torch.float32)(input_ids=ids, labels=ids + 5000).loss.item())
"""
    return [*in_another_process(_MODEL + ids), *in_another_process(_MODEL + labels)]


@provokes("grad-scaler-bf16")
def test_bfloat16_adapters_under_the_fp16_scaler():
    return in_another_process(
        _MODEL + "provoke(lambda: trainer(adapted(load(torch.float16, True)), fp16=True).train())"
    )


@provokes("fp16-unscale")
def test_fp16_adapters_under_the_fp16_scaler():
    return in_another_process(
        _MODEL + "provoke(lambda: trainer(adapted(load(torch.float16)), fp16=True).train())"
    )


def test_the_fix_for_both_lets_the_training_run():
    """The line that the doctor gives is run as it stands."""
    from llama_sft_helpers.doctor import TABLE

    fix = next(failure.fix for failure in TABLE if failure.key == "fp16-unscale")
    line = fix.split("`")[1]
    code = f"""
for eight_bit in (False, True):
    model = adapted(load(torch.float16, eight_bit))
    run = trainer(model, fp16=True)
    {line}
    provoke(run.train)
"""
    assert [found["key"] for found in in_another_process(_MODEL + code)] == ["nothing was raised"] * 2
