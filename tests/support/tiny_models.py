"""What tests build again and again: tiny models of every supported architecture, a trainer of few steps."""

import torch
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig

SEVEN = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
LLAMA31_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
    "rope_theta": 500000.0,
}
# What users bring -> model_type and what sets it apart.
ARCHITECTURES = {
    "Llama 3.1": ("llama", {"rope_parameters": LLAMA31_ROPE}),
    "Llama 3.2": ("llama", {"rope_parameters": LLAMA31_ROPE, "tie_word_embeddings": True}),
    "Mistral": ("mistral", {"sliding_window": 32}),
    "Qwen 2": ("qwen2", {"tie_word_embeddings": True}),
    "Qwen 3": ("qwen3", {"head_dim": 32}),
}


def tiny_config(model_type="llama", **changes):
    """A configuration of two layers."""
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 1024}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    return AutoConfig.for_model(model_type, **(sizes | heads | changes))


def random_model(model_type="llama", **changes):
    """A model of ``tiny_config`` with random weights, float32."""
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(tiny_config(model_type, **changes))


def _load(folder, dtype, **quantization):
    config = BitsAndBytesConfig(**quantization)
    loading = {"quantization_config": config, "device_map": "cpu", "dtype": dtype}
    return AutoModelForCausalLM.from_pretrained(folder, **loading)


def load_int8(folder, dtype=torch.float32):
    """A saved model with 8-bit weights, on the CPU."""
    return _load(folder, dtype, load_in_8bit=True)


def load_nf4(folder, dtype=torch.float32, *, double=True):
    """A saved model with 4-bit weights, on the CPU; by default their scales are quantized too."""
    nf4 = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": double}
    return _load(folder, dtype, load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32, **nf4)


def build_trainer(model, folder, tokenizer, rows, *, eval_rows=None, callbacks=(), kind=None, **changes):
    """An ``SFTTrainer`` on the CPU whose LoRA weights are float32, as in notebook 06."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    settings = {"max_length": 64, "per_device_train_batch_size": 2, "max_steps": 2, "seed": 42}
    settings |= {"use_cpu": True, "bf16": False, "gradient_checkpointing": False, "save_strategy": "no"}
    settings |= {"logging_steps": 1, "report_to": "none", "disable_tqdm": True}
    trainer = (kind or SFTTrainer)(
        model,
        SFTConfig(output_dir=str(folder), **(settings | changes)),
        train_dataset=Dataset.from_list(rows) if isinstance(rows, list) else rows,
        eval_dataset=eval_rows,
        processing_class=tokenizer,
        callbacks=list(callbacks),
    )
    for parameter in trainer.model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return trainer
