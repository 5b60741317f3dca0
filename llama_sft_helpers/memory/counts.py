"""The counts behind ``plan_memory``: bytes of each component, from the model's shape; sizes in bytes.

They follow what transformers, PEFT, trl and bitsandbytes allocate; where a number is measured and not counted
it says so. The measurements are in ``benchmarks/results``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from llama_sft_helpers.core.llama import Shape, linear_bytes

if TYPE_CHECKING:
    from llama_sft_helpers.profiles import Profile

_WORKSPACE = 2**26  # what cuBLAS asks of PyTorch's allocator
# Tensors of the MLP's width alive at once in its backward pass, measured; LLM.int8 casts and quantizes too.
_GRADIENTS_IN_MLP = {"int8": 3.2, "fast int8": 2.0, "nf4": 2.0, "16-bit": 4.2}
_LOSS_TILE = (4096, 32768)  # tokens x vocabulary entries that trl's chunked loss projects at once

# component, bytes, what they are
_Row = tuple[str, float, str]


def _bytes_per_element(profile: Profile) -> int:
    return 4 if profile.dtype == "float32" else 2


def weight_rows(shape: Shape, profile: Profile, quantization: str) -> list[_Row]:
    """The weights, quantized and not."""
    element = _bytes_per_element(profile)
    count = shape.layers * sum(inputs * outputs for inputs, outputs in shape.linears.values())
    quantized, plain = 0, shape.unquantized
    if quantization == "16-bit":
        plain += count
    else:
        kind = "nf4 single" if quantization == "nf4" else quantization
        quantized = shape.layers * sum(sum(linear_bytes(kind, *linear)) for linear in shape.linears.values())
    return [
        ("quantized weights", quantized, f"{count:,} weights"),
        (f"{8 * element}-bit weights", plain * element, f"{plain:,} weights that are not quantized"),
    ]


def adapter_rows(shape: Shape, profile: Profile, rank: int, target_modules: tuple[str, ...]) -> list[_Row]:
    """The adapters, their gradients and the optimizer's state."""
    count = shape.layers * sum(rank * sum(shape.linears[name]) for name in target_modules)
    copies = 0 if profile.dtype == "float32" or profile.fast_int8 else 2 * count
    weights = 4 * count + copies
    also = ", and autocast's 16-bit copies" if copies else ""
    accumulates = profile.gradient_accumulation_steps > 1
    gradients = 4 * count if accumulates else 4 * count / shape.layers
    when = "4 bytes each" if accumulates else "one layer's: without accumulation they come as activations go"
    return [
        ("LoRA adapters", weights, f"{count:,} trainable weights in float32{also}"),
        ("gradients", gradients, when),
        ("optimizer state", 8 * count, "AdamW's two averages in float32"),
    ]


def activation_rows(shape: Shape, profile: Profile, quantization: str, rank: int) -> list[_Row]:
    """What the micro-batch's tokens need: kept activations, the loss, the layer at work."""
    tokens = profile.per_device_train_batch_size * profile.max_length
    element = _bytes_per_element(profile)
    kept, how = _kept_by_layer(shape, profile, quantization, rank)
    mask = _pairs(profile) * (profile.attn_implementation == "sdpa")  # one byte a pair, shared by all layers
    loss = _loss(shape, element, tokens)
    working = _working(shape, profile, quantization, rank)
    return [
        ("activations", kept * shape.layers + mask, f"{tokens:,} tokens x {shape.layers} layers: {how}"),
        ("loss", loss, "the last hidden states and one tile of logits with its gradient"),
        (
            "one layer at work",
            max(0.0, working - loss),
            "what its backward pass needs beyond the loss's share",
        ),
    ]


def _kept_by_layer(shape: Shape, profile: Profile, quantization: str, rank: int) -> tuple[float, str]:
    """Bytes that one decoder layer keeps from the forward to the backward pass, and what they are."""
    tokens = profile.per_device_train_batch_size * profile.max_length
    element = _bytes_per_element(profile)
    held_by_bitsandbytes = quantization == "int8" and not profile.fast_int8
    if profile.gradient_checkpointing:
        kept, how = element * shape.hidden, "the input of each layer"
        if held_by_bitsandbytes:
            kept += _linear_inputs(shape, element, quantization)
            how += " and, kept by LLM.int8 in spite of checkpointing, of each linear"
        return kept * tokens, how
    if profile.compile_layers:
        return _kept_compiled(shape, profile), f"what a budget of {profile.activation_memory_budget:g} keeps"
    return _saved_by_autograd(shape, profile, quantization, rank), "results kept for the backward pass"


def _saved_by_autograd(shape: Shape, profile: Profile, quantization: str, rank: int) -> float:
    element = _bytes_per_element(profile)
    tokens = profile.per_device_train_batch_size * profile.max_length
    norms = 2 * 4 * shape.hidden  # RMSNorm computes in float32 and keeps that copy
    mlp = 3 * element * shape.mlp  # gate, silu(gate), up
    inputs = _linear_inputs(shape, element, quantization)
    lora = 0 if profile.fast_int8 else 7 * element * rank
    per_token = norms + mlp + inputs + lora + _attention(shape, profile, quantization)
    return per_token * tokens + element * _pairs(profile) * (profile.attn_implementation == "sdpa")


def _kept_compiled(shape: Shape, profile: Profile) -> float:
    """What a compiled layer keeps, in bytes: at budget 1 the inputs and results of every product.

    Below 1, PyTorch's partitioner first recomputes what costs no product (norms, silu, gate times up), then
    the cheapest products, until no more than the budget's share of all intermediate results is kept:
    https://pytorch.org/blog/activation-checkpointing-techniques/.
    """
    element = _bytes_per_element(profile)
    tokens = profile.per_device_train_batch_size * profile.max_length
    attention = 2 * shape.query + 2 * shape.key_value
    results = element * (2 * shape.hidden + attention + 2 * shape.mlp) + 4 * shape.heads
    budget = profile.activation_memory_budget
    if budget == 1:
        return tokens * (results + element * (2 * shape.hidden + shape.mlp))
    return tokens * min(results, budget * (results + 2 * element * shape.mlp))


def _linear_inputs(shape: Shape, element: int, quantization: str) -> int:
    """Bytes a token of the inputs of q/k/v, o, gate/up and down.

    On quantized weights one tensor serves every linear that reads it. On plain ones PEFT casts the input to
    the adapter's float32 first, and autocast makes each adapter a 16-bit copy of its own.
    """
    if quantization == "16-bit" and element == 2:
        return element * (3 * shape.hidden + shape.query + 2 * shape.hidden + shape.mlp)
    return element * (shape.hidden + shape.query + shape.hidden + shape.mlp)


def _attention(shape: Shape, profile: Profile, quantization: str) -> int:
    """Bytes a token of query, key, value and the softmax's log-sum; the output too where o_proj does not."""
    element = _bytes_per_element(profile)
    # Under a mask sdpa repeats the KV heads.
    repeated = profile.attn_implementation == "sdpa" and _pairs(profile) > 0
    key_value = 2 * (shape.query if repeated else shape.key_value)
    output = shape.query if quantization == "16-bit" and element == 2 else 0
    return element * (shape.query + key_value + output) + 4 * shape.heads


def _pairs(profile: Profile) -> int:
    """Entries of sdpa's mask: all pairs of tokens of a packed micro-batch, or of each padded row.

    A single row needs none, as nothing is padded.
    """
    rows, length = profile.per_device_train_batch_size, profile.max_length
    if profile.packing:
        return (rows * length) ** 2
    return rows * length**2 if rows > 1 else 0


def _loss(shape: Shape, element: int, tokens: int) -> float:
    """What scoring holds: trl takes a tile of logits at a time; every token is taken as scored."""
    tile = element * min(tokens, _LOSS_TILE[0]) * min(shape.vocab, _LOSS_TILE[1])
    last_norm = tokens * shape.hidden * (4 + element)
    return tile + last_norm + tokens * shape.hidden * (4 + element)  # the gradient, and the scored rows


def _working(shape: Shape, profile: Profile, quantization: str, rank: int) -> float:
    """The layer whose backward pass runs: activations if computed anew, gradients, one 16-bit weight."""
    element = _bytes_per_element(profile)
    tokens = profile.per_device_train_batch_size * profile.max_length
    again = 0.0
    if profile.gradient_checkpointing and profile.compile_layers:
        again = _kept_compiled(shape, profile)
    elif profile.gradient_checkpointing:
        again = _saved_by_autograd(shape, profile, quantization, rank)
    alive = _GRADIENTS_IN_MLP["fast int8" if profile.fast_int8 else quantization]
    gradients = alive * element * tokens * shape.mlp
    weight = 0 if quantization == "16-bit" else element * shape.hidden * shape.mlp
    return again + max(gradients, weight) + _WORKSPACE * (profile.gpu_gib > 0)
