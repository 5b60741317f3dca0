"""The counts behind ``plan_memory``: bytes of each component, from the model's shape; sizes in bytes.

They follow what transformers, PEFT, trl and bitsandbytes allocate; where a number is measured and not counted
it says so. The measurements are in ``benchmarks/results``.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from llama_sft_helpers.core.language import translate
from llama_sft_helpers.core.llama import Shape, linear_bytes

if TYPE_CHECKING:
    from llama_sft_helpers.profiles import Profile

_LORA_RANK = 16  # on all seven linears, as the series sets it
_WORKSPACE = 2**26  # what cuBLAS asks of PyTorch's allocator
# Tensors of the MLP's width alive at once in its backward pass, measured; LLM.int8 casts and quantizes too.
_GRADIENTS_IN_MLP = {"int8": 3.2, "fast int8": 2.0, "nf4": 2.0, "16-bit": 4.2}
_LOSS_TILE = (4096, 32768)  # tokens x vocabulary entries that trl's chunked loss projects at once

_Row = tuple[str, float, str]


@dataclasses.dataclass(frozen=True)
class _Step:
    """A training step to be counted: a model's shape, what a profile sets, and the kind of its weights."""

    shape: Shape
    profile: Profile
    quantization: str
    language: str  # of the words that say what a figure is made of

    @property
    def element(self) -> int:  # bytes
        return 4 if self.profile.dtype == "float32" else 2

    @property
    def tokens(self) -> int:  # of a full micro-batch
        return self.profile.per_device_train_batch_size * self.profile.max_length

    @property
    def masked_pairs(self) -> int:
        """Entries of sdpa's mask: pairs of a packed micro-batch or of padded rows; one row needs none."""
        if self.profile.attn_implementation != "sdpa":
            return 0
        if self.profile.packing:
            return self.tokens**2
        return self.tokens * self.profile.max_length * (self.profile.per_device_train_batch_size > 1)

    @property
    def plain_half(self) -> bool:
        """Whether autocast and PEFT copy what the linears read: their weights are plain, in 16 bits."""
        return self.quantization == "16-bit" and self.element == 2


def plan_rows(shape: Shape, profile: Profile, quantization: str, language: str) -> list[_Row]:
    """Component, bytes and what they are, of a training step."""
    step = _Step(shape, profile, quantization, language)
    return [*_weight_rows(step), *_adapter_rows(step), *_activation_rows(step)]


def _weight_rows(step: _Step) -> list[_Row]:
    """The weights, quantized and not."""
    shape, element, count = step.shape, step.element, step.shape.linear_weights
    quantized, plain = 0, shape.unquantized
    if step.quantization == "16-bit":
        plain += count
    else:
        kind = "nf4 single" if step.quantization == "nf4" else step.quantization
        quantized = shape.layers * sum(sum(linear_bytes(kind, *linear)) for linear in shape.linears.values())
    scaled = translate("{count:,} weights and their scales", step.language, count=count)
    rest = translate("{count:,} weights that are not quantized", step.language, count=plain)
    return [
        ("quantized weights", quantized, scaled),
        (f"{8 * element}-bit weights", plain * element, rest),
    ]


def _adapter_rows(step: _Step) -> list[_Row]:
    """The adapters, their gradients and the optimizer's state."""
    shape, profile, language = step.shape, step.profile, step.language
    count = shape.layers * _LORA_RANK * sum(sum(linear) for linear in shape.linears.values())
    copies = 0 if profile.dtype == "float32" or profile.fast_int8 else 2 * count
    trainable = translate(
        "{count:,} trainable weights in float32, and autocast's 16-bit copies"
        if copies
        else "{count:,} trainable weights in float32",
        language,
        count=count,
    )
    accumulates = profile.gradient_accumulation_steps > 1
    gradients = 4 * count if accumulates else 4 * count / shape.layers
    when = translate(
        "4 bytes each" if accumulates else "one layer's, 4 bytes each: at the peak the others do not exist",
        language,
    )
    return [
        ("LoRA adapters", 4 * count + copies, trainable),
        ("gradients", gradients, when),
        ("optimizer state", 8 * count, translate("AdamW's two averages in float32", language)),
    ]


def _activation_rows(step: _Step) -> list[_Row]:
    """What the micro-batch's tokens need: kept activations, the loss, the layer at work."""
    layers, language, (kept, how) = step.shape.layers, step.language, _kept_by_layer(step)
    kept = kept * layers + step.masked_pairs  # the mask, one byte a pair, is shared by all layers
    sizes = {"tokens": step.tokens, "layers": layers, "how": how}
    loss = _loss(step)
    scoring = translate(
        "the last layer's results and, piece by piece, the logits with their gradient", language
    )
    rest = max(0.0, _working(step) - loss)
    working = translate("the layer whose backward pass runs, where it needs more than the loss", language)
    return [
        ("activations", kept, translate("{tokens:,} tokens x {layers} layers: {how}", language, **sizes)),
        ("loss", loss, scoring),
        ("one layer at work", rest, working),
    ]


def _kept_by_layer(step: _Step) -> tuple[float, str]:
    """Bytes that one decoder layer keeps from the forward to the backward pass, and what they are."""
    profile, language = step.profile, step.language
    if profile.gradient_checkpointing:
        kept = step.tokens * step.element * step.shape.hidden
        if step.quantization != "int8" or profile.fast_int8:
            return kept, translate("the input of each layer", language)
        how = translate(
            "the input of each layer and, kept by LLM.int8 in spite of checkpointing, of each linear",
            language,
        )
        return kept + step.tokens * _linear_inputs(step), how
    if profile.compile_layers:
        budget = profile.activation_memory_budget
        return _kept_compiled(step), translate("what a budget of {budget:g} keeps", language, budget=budget)
    return _saved_by_autograd(step), translate("results kept for the backward pass", language)


def _saved_by_autograd(step: _Step) -> float:
    norms = 2 * 4 * step.shape.hidden  # RMSNorm computes in float32 and keeps that copy
    mlp = 3 * step.element * step.shape.mlp  # gate, silu(gate), up
    lora = 0 if step.profile.fast_int8 else 7 * step.element * _LORA_RANK
    per_token = norms + mlp + _linear_inputs(step) + lora + _attention(step)
    return per_token * step.tokens + step.element * step.masked_pairs


def _kept_compiled(step: _Step) -> float:
    """What a compiled layer keeps, in bytes: at budget 1 the inputs and results of every product.

    Below 1, PyTorch's partitioner first recomputes what costs no product (norms, silu, gate times up), then
    the cheapest products, until no more than the budget's share of all intermediate results is kept:
    https://pytorch.org/blog/activation-checkpointing-techniques/.
    """
    shape, element, budget = step.shape, step.element, step.profile.activation_memory_budget
    attention = 2 * shape.query + 2 * shape.key_value
    results = element * (2 * shape.hidden + attention + 2 * shape.mlp) + 4 * shape.heads
    if budget == 1:
        return step.tokens * (results + element * (2 * shape.hidden + shape.mlp))
    return step.tokens * min(results, budget * (results + 2 * element * shape.mlp))


def _linear_inputs(step: _Step) -> int:
    """Bytes a token of the inputs of q/k/v, o, gate/up and down.

    On quantized weights one tensor serves every linear that reads it. On plain ones PEFT casts the input to
    the adapter's float32 first, and autocast makes each adapter a 16-bit copy of its own.
    """
    copies = 5 if step.plain_half else 2
    return step.element * (copies * step.shape.hidden + step.shape.query + step.shape.mlp)


def _attention(step: _Step) -> int:
    """Bytes a token of query, key, value and the softmax's log-sum; the output too where o_proj does not."""
    shape = step.shape
    key_value = 2 * (shape.query if step.masked_pairs else shape.key_value)  # a mask makes sdpa repeat heads
    output = shape.query if step.plain_half else 0
    return step.element * (shape.query + key_value + output) + 4 * shape.heads


def _loss(step: _Step) -> float:
    """What scoring holds: trl takes a tile of logits at a time; every token is taken as scored."""
    tile = step.element * min(step.tokens, _LOSS_TILE[0]) * min(step.shape.vocab, _LOSS_TILE[1])
    last_norm = step.tokens * step.shape.hidden * (4 + step.element)
    return tile + 2 * last_norm  # once more for the gradient, and the scored rows


def _working(step: _Step) -> float:
    """The layer whose backward pass runs: activations if computed anew, gradients, one 16-bit weight."""
    shape, profile, again = step.shape, step.profile, 0.0
    if profile.gradient_checkpointing:
        again = _kept_compiled(step) if profile.compile_layers else _saved_by_autograd(step)
    alive = _GRADIENTS_IN_MLP["fast int8" if profile.fast_int8 else step.quantization]
    gradients = alive * step.element * step.tokens * shape.mlp
    weight = 0 if step.quantization == "16-bit" else step.element * shape.hidden * shape.mlp
    return again + max(gradients, weight) + _WORKSPACE * (profile.gpu_gib > 0)
