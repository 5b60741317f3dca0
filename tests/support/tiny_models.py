"""Configurations and models of a few thousand random weights, of every supported architecture."""

import torch
from transformers import AutoConfig, AutoModelForCausalLM

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
    sizes = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 1024,
    }
    return AutoConfig.for_model(model_type, **(sizes | changes))


def random_model(model_type="llama", *, seed=0, **changes):
    """A model of ``tiny_config`` with random weights, float32."""
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(tiny_config(model_type, **changes))
