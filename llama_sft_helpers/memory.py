"""Notebooks 01 and 06: what a training step needs of the card's memory, planned before it is spent.

Every component is counted from the model's shape, as the libraries of ``requirements-tested.txt`` allocate
it; the measurements it is held against are in ``benchmarks/results``. Background: Korthikanti et al. 2022,
https://arxiv.org/abs/2205.05198, and Hugging Face's model memory anatomy,
https://huggingface.co/docs/transformers/model_memory_anatomy.
"""

from __future__ import annotations

import dataclasses
import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

    import pandas as pd
    from matplotlib.axes import Axes

    from llama_sft_helpers.profiles import Profile

GIB = 2**30
CARDS_GIB = (16, 24, 40, 80)
QUANTIZATIONS = ("int8", "nf4", "16-bit")
TARGET_MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

_TIGHT = 0.9  # above this share of the card the verdict is "tight"
_OUTSIDE_ALLOCATED = ("allocator slack", "CUDA context")
_CONTEXT_GIB = 0.6  # driver, kernels and cuBLAS handles: what nvidia-smi shows before the first tensor
_SLACK = 0.06  # share of the peak that the caching allocator holds but does not use (measured: 2 to 9 %)
_WORKSPACE = 2**26  # what cuBLAS asks of PyTorch's allocator
# Tensors of the MLP's width alive at once in its backward pass, measured; LLM.int8 casts and quantizes too.
_GRADIENTS_IN_MLP = {"int8": 3.2, "fast int8": 2.0, "nf4": 2.0, "16-bit": 4.2}
_LOSS_TILE = (4096, 32768)  # tokens x vocabulary entries that trl's chunked loss projects at once


@dataclasses.dataclass(frozen=True)
class _Shape:
    """What the plan reads from a Llama configuration; widths are in elements."""

    layers: int
    hidden: int
    heads: int
    query: int
    key_value: int
    mlp: int
    vocab: int
    tied: bool

    @classmethod
    def of(cls, config: Any) -> _Shape:
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return cls(
            layers=config.num_hidden_layers,
            hidden=config.hidden_size,
            heads=config.num_attention_heads,
            query=config.num_attention_heads * head_dim,
            key_value=config.num_key_value_heads * head_dim,
            mlp=config.intermediate_size,
            vocab=config.vocab_size,
            tied=bool(config.tie_word_embeddings),
        )

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """Name -> (in_features, out_features) of a decoder layer's linears."""
        return {
            "q_proj": (self.hidden, self.query),
            "k_proj": (self.hidden, self.key_value),
            "v_proj": (self.hidden, self.key_value),
            "o_proj": (self.query, self.hidden),
            "gate_proj": (self.hidden, self.mlp),
            "up_proj": (self.hidden, self.mlp),
            "down_proj": (self.mlp, self.hidden),
        }


def plan_memory(
    config: Any,
    profile: Profile,
    *,
    quantization: str = "int8",
    lora_rank: int = 16,
    target_modules: tuple[str, ...] = TARGET_MODULES,
) -> pd.DataFrame:
    """Predict the memory of a LoRA training step, component by component.

    A micro-batch is taken as full: ``per_device_train_batch_size * max_length`` tokens.

    Args:
        config: A ``LlamaConfig`` (``AutoConfig.from_pretrained`` loads no weights).
        profile: Gives batch, length, packing, checkpointing, precision, attention and speed switches.
        quantization: ``int8`` (LLM.int8), ``nf4`` (QLoRA) or ``16-bit`` (none).
        lora_rank: LoRA's ``r``.
        target_modules: The linears that get an adapter.

    Returns:
        Columns ``component``, ``gib`` and ``how`` (what the figure is made of). The sum is what the card has
        to hold; ``planned_peak_gib`` leaves out what PyTorch does not count as allocated.

    Raises:
        ValueError: Unknown quantization or target module, or a rank below 1.
    """
    import pandas as pd

    _check_arguments(quantization, lora_rank, target_modules)
    shape = _Shape.of(config)
    rows = [
        *_weight_rows(shape, profile, quantization),
        *_adapter_rows(shape, profile, lora_rank, target_modules),
        *_activation_rows(shape, profile, quantization, lora_rank),
    ]
    allocated = sum(size for _, size, _ in rows)
    on_gpu = profile.gpu_gib > 0
    rows.append(("allocator slack", allocated * _SLACK * on_gpu, "blocks PyTorch holds between two uses"))
    rows.append(("CUDA context", _CONTEXT_GIB * GIB * on_gpu, "driver, kernels and cuBLAS handles"))
    table = [(component, size / GIB, how) for component, size, how in rows]
    return pd.DataFrame(table, columns=["component", "gib", "how"])


def planned_peak_gib(plan: pd.DataFrame) -> float:
    """The plan's counterpart of ``torch.cuda.max_memory_allocated()``, in GiB: no context, no slack."""
    return float(plan.loc[~plan["component"].isin(_OUTSIDE_ALLOCATED), "gib"].sum())


def plan_fit(
    config: Any, profile: Profile, *, quantization: str = "int8", cards_gib: tuple[float, ...] = CARDS_GIB
) -> pd.DataFrame:
    """Hold the plan against cards: does it fit, and if not, the first change that would make it fit.

    Returns:
        Columns ``card_gib``, ``planned_gib``, ``share``, ``verdict`` (fits, tight, does not fit), ``change``.
    """
    import pandas as pd

    planned = float(plan_memory(config, profile, quantization=quantization)["gib"].sum())
    rows = [
        (
            card,
            planned,
            planned / card,
            _verdict(planned, card),
            "" if planned <= card * _TIGHT else _change_that_fits(config, profile, quantization, card),
        )
        for card in cards_gib
    ]
    return pd.DataFrame(rows, columns=["card_gib", "planned_gib", "share", "verdict", "change"])


def print_plan(
    config: Any,
    profile: Profile,
    *,
    quantization: str = "int8",
    gpu_gib: float | None = None,
    as_json: bool = False,
) -> bool:
    """Print the plan and its verdict on cards: what ``llama-sft plan`` does.

    Returns:
        Whether the plan fits every card asked about.
    """
    import sys

    from rich.console import Console
    from rich.table import Table

    plan = plan_memory(config, profile, quantization=quantization)
    cards = (gpu_gib,) if gpu_gib else CARDS_GIB
    fit = plan_fit(config, profile, quantization=quantization, cards_gib=cards)
    if as_json:
        tables = {"plan": plan.to_dict("records"), "fit": fit.to_dict("records")}
        content = {"profile": profile.name, "quantization": quantization, **tables}
        sys.stdout.write(json.dumps(content, indent=1) + "\n")
    else:
        total = f"{plan['gib'].sum():.2f} GiB"
        for frame, title in ((plan, f"{profile.name}, {quantization}: {total} in all"), (fit, "On a card")):
            table = Table(*map(str, frame.columns), title=title)
            for row in frame.itertuples(index=False):
                table.add_row(*(f"{cell:.2f}" if isinstance(cell, float) else str(cell) for cell in row))
            Console().print(table)
    return bool((fit["verdict"] != "does not fit").all())


def reconcile_memory(plan: pd.DataFrame, measured_gib: float) -> pd.DataFrame:
    """Set the measured peak beside the predicted one.

    Args:
        plan: From ``plan_memory``.
        measured_gib: ``torch.cuda.max_memory_allocated() / 2**30`` after training.

    Returns:
        One row: ``predicted_gib``, ``measured_gib``, ``difference_gib``, ``difference_percent``.

    Raises:
        ValueError: The measured peak is not a positive number.
    """
    import pandas as pd

    if not measured_gib > 0:
        raise ValueError(
            f"The measured peak is {measured_gib!r} GiB, expected a positive number: "
            "read torch.cuda.max_memory_allocated() / 2**30 after training."
        )
    predicted = planned_peak_gib(plan)
    difference = measured_gib - predicted
    row = (predicted, measured_gib, difference, 100 * difference / measured_gib)
    columns = ["predicted_gib", "measured_gib", "difference_gib", "difference_percent"]
    return pd.DataFrame([row], columns=columns)


def plot_memory(plan: pd.DataFrame, card_gib: float | None = None, ax: Axes | None = None) -> Axes:
    """Draw the plan as horizontal bars, one a component, with the card's size in the title if given."""
    import matplotlib.pyplot as plt

    ax = ax or plt.subplots(figsize=(7, 3.4), layout="constrained")[1]
    shown = plan[plan["gib"] > 0].iloc[::-1]
    bars = ax.barh(shown["component"], shown["gib"], color="#0072B2")
    unit = 1024 if plan["gib"].sum() < 1 else 1
    name = "MiB" if unit > 1 else "GiB"
    ax.bar_label(bars, [f"{size * unit:.2f}" for size in shown["gib"]], padding=3, fontsize=8)
    total = plan["gib"].sum()
    of_card = f" of {card_gib:g} GiB" if card_gib else ""
    ax.set_title(f"Planned memory of a training step: {total * unit:.2f} {name}{of_card}")
    ax.set_xlabel("GiB (labels in MiB)" if unit > 1 else "GiB")
    ax.margins(x=0.12)
    ax.spines[["top", "right"]].set_visible(False)
    return ax


def smaller_profiles(profile: Profile) -> list[tuple[str, Profile]]:
    """Changes that need less memory, the mildest first: (what to change, the changed profile).

    Checkpointing comes first, then half the micro-batch with twice the accumulation (the same effective
    batch), and shorter rows last, as those cut text off.
    """
    changes: list[tuple[str, Profile]] = []
    current = profile
    for changed in _shrink(profile):
        current = dataclasses.replace(current, **changed)
        settings = _differences(profile, current).items()
        changes.append((", ".join(f"{key}={value}" for key, value in settings), current))
    return changes


def explain_oom(config: Any, profile: Profile, *, quantization: str = "int8") -> str:
    """Say what filled the card, by the plan's largest item, and what the next try changes.

    Raises:
        ValueError: As ``plan_smaller_batch``.
    """
    plan = plan_memory(config, profile, quantization=quantization)
    largest = plan.loc[plan["gib"].idxmax()]
    smaller = plan_smaller_batch(profile)
    planned = planned_peak_gib(plan_memory(config, smaller, quantization=quantization))
    return (
        f"Out of GPU memory. Planned peak {planned_peak_gib(plan):.1f} GiB, its largest item: "
        f"{largest['component']}, {largest['gib']:.1f} GiB ({largest['how']}). Next try, with the same "
        f"effective batch: per_device_train_batch_size={smaller.per_device_train_batch_size}, "
        f"gradient_accumulation_steps={smaller.gradient_accumulation_steps}, planned peak {planned:.1f} GiB."
    )


def plan_smaller_batch(profile: Profile) -> Profile:
    """The profile with half the micro-batch and twice the accumulation: the same effective batch.

    Raises:
        ValueError: The micro-batch cannot be halved; the message names what is left to change.
    """
    batch = profile.per_device_train_batch_size
    if batch % 2:
        rest = [change for change, _ in smaller_profiles(profile) if "batch_size" not in change]
        raise ValueError(
            f"per_device_train_batch_size={batch} cannot be halved, expected an even number. What is left to "
            f"change: {rest[0] if rest else 'a smaller model'}, or 4-bit weights."
        )
    return dataclasses.replace(
        profile,
        per_device_train_batch_size=batch // 2,
        gradient_accumulation_steps=profile.gradient_accumulation_steps * 2,
    )


def _shrink(profile: Profile) -> Iterator[dict[str, Any]]:
    if not profile.gradient_checkpointing:
        yield {"gradient_checkpointing": True}
    batch, accumulation = profile.per_device_train_batch_size, profile.gradient_accumulation_steps
    while batch > 1:
        batch, accumulation = batch // 2, accumulation * batch // (batch // 2)
        yield {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation}
    length = profile.max_length
    while length > 256:
        length //= 2
        yield {"max_length": length}


def _differences(before: Profile, after: Profile) -> dict[str, Any]:
    names = [field.name for field in dataclasses.fields(before) if field.compare]
    return {name: getattr(after, name) for name in names if getattr(after, name) != getattr(before, name)}


# --- The counts; sizes in bytes ---

_Row = tuple[str, float, str]


def _check_arguments(quantization: str, lora_rank: int, target_modules: tuple[str, ...]) -> None:
    if quantization not in QUANTIZATIONS:
        raise ValueError(f"quantization={quantization!r} is not one of {', '.join(QUANTIZATIONS)}.")
    if lora_rank < 1:
        raise ValueError(f"lora_rank={lora_rank} is too small, expected at least 1.")
    if unknown := sorted(set(target_modules) - set(TARGET_MODULES)):
        raise ValueError(f"Unknown target modules {unknown}; a Llama layer has {', '.join(TARGET_MODULES)}.")


def _bytes_per_element(profile: Profile) -> int:
    return 4 if profile.dtype == "float32" else 2


def _weight_rows(shape: _Shape, profile: Profile, quantization: str) -> list[_Row]:
    element = _bytes_per_element(profile)
    quantized = 0.0
    for inputs, outputs in shape.linears.values():
        codes = inputs * outputs
        quantized += {"int8": float(codes) + 4 * outputs, "nf4": codes * (0.5 + 4 / 64), "16-bit": 0}[
            quantization
        ]
    plain = shape.vocab * shape.hidden * (1 if shape.tied else 2) + shape.hidden * (2 * shape.layers + 1)
    linears = sum(inputs * outputs for inputs, outputs in shape.linears.values())
    if quantization == "16-bit":
        plain += shape.layers * linears
    bits = 8 * element
    return [
        ("quantized weights", quantized * shape.layers, f"{shape.layers * linears:,} weights"),
        (f"{bits}-bit weights", plain * element, f"{plain:,} weights that are not quantized"),
    ]


def _adapter_rows(shape: _Shape, profile: Profile, rank: int, target_modules: tuple[str, ...]) -> list[_Row]:
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


def _activation_rows(shape: _Shape, profile: Profile, quantization: str, rank: int) -> list[_Row]:
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


def _kept_by_layer(shape: _Shape, profile: Profile, quantization: str, rank: int) -> tuple[float, str]:
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
    return _saved_by_autograd(shape, profile, quantization, rank), "what the backward pass reads again"


def _saved_by_autograd(shape: _Shape, profile: Profile, quantization: str, rank: int) -> float:
    element = _bytes_per_element(profile)
    tokens = profile.per_device_train_batch_size * profile.max_length
    norms = 2 * 4 * shape.hidden  # RMSNorm computes in float32 and keeps that copy
    mlp = 3 * element * shape.mlp  # gate, silu(gate), up
    inputs = _linear_inputs(shape, element, quantization)
    lora = 0 if profile.fast_int8 else 7 * element * rank
    per_token = norms + mlp + inputs + lora + _attention(shape, profile, quantization)
    return per_token * tokens + element * _pairs(profile) * (profile.attn_implementation == "sdpa")


def _kept_compiled(shape: _Shape, profile: Profile) -> float:
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


def _linear_inputs(shape: _Shape, element: int, quantization: str) -> int:
    """Bytes a token of the inputs of q/k/v, o, gate/up and down.

    On quantized weights one tensor serves every linear that reads it. On plain ones PEFT casts the input to
    the adapter's float32 first, and autocast makes each adapter a 16-bit copy of its own.
    """
    if quantization == "16-bit" and element == 2:
        return element * (3 * shape.hidden + shape.query + 2 * shape.hidden + shape.mlp)
    return element * (shape.hidden + shape.query + shape.hidden + shape.mlp)


def _attention(shape: _Shape, profile: Profile, quantization: str) -> int:
    """Bytes a token of query, key, value and the softmax's log-sum; the output too where o_proj does not."""
    element = _bytes_per_element(profile)
    repeated = (
        profile.attn_implementation == "sdpa" and _pairs(profile) > 0
    )  # with a mask, keys and values are
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


def _loss(shape: _Shape, element: int, tokens: int) -> float:
    """What scoring holds: trl takes a tile of logits at a time; every token is taken as scored."""
    tile = element * min(tokens, _LOSS_TILE[0]) * min(shape.vocab, _LOSS_TILE[1])
    last_norm = tokens * shape.hidden * (4 + element)
    return tile + last_norm + tokens * shape.hidden * (4 + element)  # the gradient, and the scored rows


def _working(shape: _Shape, profile: Profile, quantization: str, rank: int) -> float:
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


def _verdict(planned_gib: float, card_gib: float) -> str:
    if planned_gib > card_gib:
        return "does not fit"
    return "tight" if planned_gib > card_gib * _TIGHT else "fits"


def _change_that_fits(config: Any, profile: Profile, quantization: str, card_gib: float) -> str:
    for change, smaller in smaller_profiles(profile):
        if plan_memory(config, smaller, quantization=quantization)["gib"].sum() <= card_gib * _TIGHT:
            return change
    if quantization != "nf4":
        for change, smaller in [("", profile), *smaller_profiles(profile)]:
            if plan_memory(config, smaller, quantization="nf4")["gib"].sum() <= card_gib * _TIGHT:
                return ", ".join(part for part in ("4-bit weights (nf4)", change) if part)
    return "a smaller model"
