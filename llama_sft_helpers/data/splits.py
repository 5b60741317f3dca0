"""How many rows train, how many are held out, and how often each is seen: decided once."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING

from llama_sft_helpers.data.rows import DataError

if TYPE_CHECKING:
    from llama_sft_helpers.profiles import Profile

HELD_OUT_SHARE = 10  # at most one row in ten is held out
MANY_EPOCHS = 5  # beyond this a small set is mostly learned by heart


@dataclasses.dataclass(frozen=True)
class SplitPlan:
    """Rows to train on and rows held out; printed, it says where every row went."""

    train_rows: int
    eval_rows: int
    told: str

    def __str__(self) -> str:
        return self.told


def plan_split(profile: Profile, usable: int, total: int) -> SplitPlan:
    """Plan a split: the profile's ``eval_rows`` held out, but at most a tenth of the rows, and at least one.

    Of the ``total`` rows the ``usable`` are split; ``train_rows`` of 0 takes all that are not held out.

    Raises:
        DataError: ``no-rows`` if no row can be used, ``too-few-rows`` if only one can: a row that is trained
            on cannot be held out as well.
    """
    if usable < 2:
        raise DataError(
            "no-rows" if usable == 0 else "too-few-rows",
            f"{usable} of {total} rows can be used, expected at least 2: one to train on and one held out. "
            "Add rows, or look at what summarize_rows says about those left out (too-long: the profile's "
            f"max_length is {profile.max_length} tokens).",
        )
    held_out = min(profile.eval_rows, max(1, usable // HELD_OUT_SHARE))
    train = min(profile.train_rows or usable, usable - held_out)
    few = f" (a tenth of the rows, at least one, instead of {profile.eval_rows:,})"
    fewer = few if held_out < profile.eval_rows else ""
    beyond = usable - held_out - train
    told = (
        f"{total:,} rows: {train:,} to train on, {held_out:,} held out{fewer}; left out: {total - usable:,} "
        "that cannot be used" + f", {beyond:,} beyond the profile's train_rows" * bool(beyond)
    )
    return SplitPlan(train, held_out, told)


@dataclasses.dataclass(frozen=True)
class StepPlan:
    """Updates of a run and how often it sees each row; printed, it warns where that is often."""

    max_steps: int
    epochs: float
    told: str

    def __str__(self) -> str:
        return self.told


def plan_steps(profile: Profile, rows: int, tokens: int) -> StepPlan:
    """Plan the updates of a run: the profile's ``epochs`` over its rows, or else its ``max_steps``.

    With packing the blocks are counted by the ``tokens`` of all rows.

    Raises:
        ValueError: No row or no token.
    """
    if rows < 1 or tokens < 1:
        raise ValueError(f"rows={rows}, tokens={tokens}: expected at least one row and one token.")
    items = math.ceil(tokens / profile.max_length) if profile.packing else rows
    per_update = profile.per_device_train_batch_size * profile.gradient_accumulation_steps
    steps_per_epoch = math.ceil(items / per_update)
    steps = math.ceil(profile.epochs * steps_per_epoch) if profile.epochs else profile.max_steps
    epochs = steps / steps_per_epoch
    seen = "each row is seen " + ("once" if epochs == 1 else f"{epochs:.3g} times")
    if epochs < 1:
        seen = f"{epochs:.0%} of the rows are seen once, the others not at all"
    told = f"{steps:,} updates of {per_update} {'blocks' if profile.packing else 'rows'}: {seen}"
    if epochs > MANY_EPOCHS:
        told += (
            f". That is often: beyond {MANY_EPOCHS} times a model mostly learns its rows by heart. Add rows, "
            f"or take max_steps={MANY_EPOCHS * steps_per_epoch} or fewer, and watch the held-out loss"
        )
    return StepPlan(steps, epochs, told)
