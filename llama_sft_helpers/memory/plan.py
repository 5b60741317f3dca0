"""Notebooks 01 and 06: what a training step needs of the card's memory, planned before it is spent.

Every component is counted from the model's shape, as the libraries of ``requirements-tested.txt`` allocate
it; the measurements it is held against are in ``benchmarks/results``. Background: Korthikanti et al. 2022,
https://arxiv.org/abs/2205.05198, and Hugging Face's model memory anatomy,
https://huggingface.co/docs/transformers/model_memory_anatomy.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from llama_sft_helpers.core.language import translate
from llama_sft_helpers.core.llama import Shape
from llama_sft_helpers.core.plots import BLUE, ORANGE, RED, new_axes
from llama_sft_helpers.memory.counts import plan_rows

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    import pandas as pd
    from matplotlib.axes import Axes

    from llama_sft_helpers.core.llama import ModelConfig
    from llama_sft_helpers.profiles import Profile

GIB = 2**30
# What PyTorch can use of the cards sold as 16, 24, 40 and 80 GB: a T4, an L4, the two A100s or an H100.
CARDS_GIB = {"16 GB": 14.6, "24 GB": 22.0, "40 GB": 39.4, "80 GB": 79.1}
QUANTIZATIONS = ("int8", "nf4", "16-bit")

_TIGHT = 0.9  # above this share of the card the verdict is "tight"
_OUTSIDE_ALLOCATED = ("allocator slack", "CUDA context")
_CONTEXT_GIB = 0.6  # driver, kernels and cuBLAS handles: what nvidia-smi shows before the first tensor
_SLACK = 0.06  # share of the peak that the caching allocator holds but does not use (measured: 2 to 9 %)


def plan_memory(
    config: ModelConfig, profile: Profile, *, quantization: str = "int8", language: str = "en"
) -> pd.DataFrame:
    """Predict the memory of a LoRA training step (rank 16, all seven linears), component by component.

    A micro-batch is taken as full: ``per_device_train_batch_size * max_length`` tokens.

    Args:
        config: A ``LlamaConfig`` (``AutoConfig.from_pretrained`` loads no weights).
        profile: Gives batch, length, packing, checkpointing, precision, attention and speed switches.
        quantization: ``int8`` (LLM.int8), ``nf4`` (QLoRA's, not doubly quantized) or ``16-bit`` (none).
        language: Of the column ``how``: ``en``, or ``ko``, in which the doctor quotes it to Korean readers.

    Returns:
        Columns ``component``, ``gib`` and ``how`` (what the figure is made of). The sum is what the card has
        to hold; ``planned_peak_gib`` leaves out what PyTorch does not count as allocated.

    Raises:
        ValueError: No configuration or profile, or an unknown quantization.
    """
    import pandas as pd

    shape = Shape.of(config)
    _check_profile(profile)
    if quantization not in QUANTIZATIONS:
        raise ValueError(f"quantization={quantization!r} is not one of {', '.join(QUANTIZATIONS)}.")
    rows = plan_rows(shape, profile, quantization, language)
    allocated, on_gpu = sum(size for _, size, _ in rows), profile.gpu_gib > 0
    kept = translate("memory that PyTorch keeps for later use", language)
    rows.append(("allocator slack", allocated * _SLACK * on_gpu, kept))
    rows.append(("CUDA context", _CONTEXT_GIB * GIB * on_gpu, translate("what CUDA itself takes", language)))
    table = [(component, size / GIB, how) for component, size, how in rows]
    return pd.DataFrame(table, columns=["component", "gib", "how"])


def planned_peak_gib(plan: pd.DataFrame) -> float:
    """The plan's counterpart of ``torch.cuda.max_memory_allocated()``, in GiB: no context, no slack."""
    return float(plan.loc[~plan["component"].isin(_OUTSIDE_ALLOCATED), "gib"].sum())


def plan_fit(
    config: ModelConfig,
    profile: Profile,
    *,
    quantization: str = "int8",
    cards_gib: Mapping[str, float] = CARDS_GIB,
) -> pd.DataFrame:
    """Hold ``plan_memory`` against cards: does it fit, and if not, the first change that would make it fit.

    ``cards_gib`` holds what PyTorch can use of each card, which is less than the GB it is sold with.

    Returns:
        Columns ``card``, ``card_gib``, ``planned_gib``, ``share``, ``verdict`` (fits, tight, does not fit),
        ``change``.
    """
    import pandas as pd

    fit = pd.DataFrame({"card": list(cards_gib), "card_gib": list(cards_gib.values())})
    fit["planned_gib"] = float(plan_memory(config, profile, quantization=quantization)["gib"].sum())
    fit["share"] = fit["planned_gib"] / fit["card_gib"]
    fit["verdict"] = [_verdict(*sizes) for sizes in zip(fit["planned_gib"], fit["card_gib"], strict=True)]
    fit["change"] = [
        "" if verdict == "fits" else _change_that_fits(config, profile, quantization, card)
        for card, verdict in zip(fit["card_gib"], fit["verdict"], strict=True)
    ]
    return fit


def reconcile_memory(plan: pd.DataFrame, measured_gib: float) -> pd.DataFrame:
    """Set the measured peak (``torch.cuda.max_memory_allocated()``) beside the predicted one, in one row.

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
    row = (predicted, measured_gib, measured_gib - predicted, measured_gib / predicted)
    columns = ["predicted_gib", "measured_gib", "difference_gib", "measured_over_predicted"]
    return pd.DataFrame([row], columns=columns)


def plot_memory(plan: pd.DataFrame, card_gib: float) -> Axes:
    """Draw the plan as horizontal bars, one a component; the card's size, unless 0, goes into the title."""
    ax = new_axes(3.8)
    shown = plan[plan["gib"] > 0].iloc[::-1]
    bars = ax.barh(shown["component"], shown["gib"], color=BLUE)
    total = plan["gib"].sum()
    unit, name = (1024, "MiB") if total < 1 else (1, "GiB")
    ax.bar_label(bars, [f"{size * unit:.3g}" for size in shown["gib"]], padding=3)
    of_card = f" of {card_gib:g} GiB" if card_gib else ""
    largest = plan.loc[plan["gib"].idxmax(), "component"]
    ax.set_title(f"Planned: {total * unit:.2f} {name}{of_card}, the largest part: {largest}")
    ax.set_xlabel("GiB (labels in MiB)" if unit > 1 else "GiB")
    ax.margins(x=0.2)
    ax.spines[["top", "right"]].set_visible(False)
    return ax


def plot_fit(plan: pd.DataFrame, card_gib: float) -> Axes:
    """Draw the plan beside a card: each component's bar begins where the one above it ends.

    Args:
        plan: As from ``plan_memory``.
        card_gib: The card's memory in GiB.
    """
    ax = new_axes(3.8)
    ends, total = plan["gib"].cumsum(), plan["gib"].sum()
    verdict = _verdict(total, card_gib)
    colour = ORANGE if verdict == "does not fit" else BLUE
    ax.barh(plan["component"], plan["gib"], left=ends - plan["gib"], color=colour)
    ax.axvline(card_gib, color=RED, linestyle="--")
    ax.invert_yaxis()
    said = "Fits, tightly" if verdict == "tight" else verdict.capitalize()
    ax.set_title(f"{said}: {total:.1f} of {card_gib:g} GiB (dashed line)")
    ax.set(xlabel="GiB, added up from the top", xlim=(0, 1.1 * max(total, card_gib)))
    return ax


def smaller_profiles(profile: Profile) -> list[tuple[str, Profile]]:
    """Changes that need less memory, the mildest first: (what to change, the changed profile).

    Checkpointing comes first, then half the micro-batch with twice the accumulation (the same effective
    batch), and shorter rows last, as those cut text off.
    """
    names = [field.name for field in dataclasses.fields(profile) if field.compare]
    changes = []
    for smaller in _shrink(profile):
        changed = [name for name in names if getattr(smaller, name) != getattr(profile, name)]
        changes.append((", ".join(f"{name}={getattr(smaller, name)}" for name in changed), smaller))
    return changes


def _shrink(profile: Profile) -> Iterator[Profile]:
    if not profile.gradient_checkpointing:
        yield (profile := dataclasses.replace(profile, gradient_checkpointing=True))
    while profile.per_device_train_batch_size > 1:
        yield (profile := plan_smaller_batch(profile))
    while profile.max_length > 256:
        yield (profile := dataclasses.replace(profile, max_length=profile.max_length // 2))


def explain_oom(config: ModelConfig, profile: Profile) -> str:
    """Say what filled the card, by the plan's largest item, and what the next try changes or is left."""
    plan = plan_memory(config, profile)
    largest = plan.loc[plan["gib"].idxmax()]
    said = (
        f"Out of GPU memory. Planned peak {planned_peak_gib(plan):.1f} GiB, its largest item: "
        f"{largest['component']}, {largest['gib']:.1f} GiB ({largest['how']}). "
    )
    if profile.per_device_train_batch_size == 1:
        return f"{said}One row is the smallest micro-batch. What is left to change: {_what_is_left(profile)}."
    smaller = plan_smaller_batch(profile)
    planned = planned_peak_gib(plan_memory(config, smaller))
    return (
        f"{said}Next try, with the same effective batch: "
        f"per_device_train_batch_size={smaller.per_device_train_batch_size}, "
        f"gradient_accumulation_steps={smaller.gradient_accumulation_steps}, planned peak {planned:.1f} GiB."
    )


def plan_smaller_batch(profile: Profile) -> Profile:
    """The profile with the next smaller micro-batch that keeps the effective batch: half, for even ones.

    Raises:
        ValueError: The micro-batch is one row; the message names what is left to change.
    """
    batch = profile.per_device_train_batch_size
    if batch == 1:
        raise ValueError(
            "per_device_train_batch_size=1 is the smallest micro-batch, expected at least 2. What is left to "
            f"change: {_what_is_left(profile)}."
        )
    smaller = next(size for size in range(batch - 1, 0, -1) if batch % size == 0)
    return dataclasses.replace(
        profile,
        per_device_train_batch_size=smaller,
        gradient_accumulation_steps=profile.gradient_accumulation_steps * (batch // smaller),
    )


def _what_is_left(profile: Profile) -> str:
    rest = [change for change, _ in smaller_profiles(profile) if "batch_size" not in change]
    return f"{rest[0] if rest else 'a smaller model'}, or 4-bit weights"


def _check_profile(profile: object) -> None:
    if not hasattr(profile, "per_device_train_batch_size"):
        hint = f"load_profile({profile!r})" if isinstance(profile, str) else "load_profile()"
        raise ValueError(
            f"profile is {profile!r}, a {type(profile).__name__}; expected a Profile: pass {hint}."
        )


def _verdict(planned_gib: float, card_gib: float) -> str:
    """What ``plan_fit`` and ``plot_fit`` say of a plan on a card."""
    if planned_gib > card_gib:
        return "does not fit"
    return "tight" if planned_gib > _TIGHT * card_gib else "fits"


def _change_that_fits(config: ModelConfig, profile: Profile, quantization: str, card_gib: float) -> str:
    """The mildest change with room to spare, else the mildest that just fits, else another model."""
    changes = [
        (", ".join(filter(None, (bits, change))), smaller, kind)
        for kind, bits in {quantization: "", "nf4": "4-bit weights (nf4)" * (quantization != "nf4")}.items()
        for change, smaller in [("", profile), *smaller_profiles(profile)]
    ]
    planned = [plan_memory(config, smaller, quantization=kind)["gib"].sum() for _, smaller, kind in changes]
    for limit, remark in ((card_gib * _TIGHT, ""), (card_gib, " (tight)")):
        for (change, _, _), gib in zip(changes, planned, strict=True):
            if gib <= limit:
                return change + remark * bool(change)
    return "a smaller model"
