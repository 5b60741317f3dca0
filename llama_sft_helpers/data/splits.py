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
    """Row counts of a split; printed, it says where every row went.

    Attributes:
        train_rows: Rows to train on.
        eval_rows: Rows held out.
        unused: Usable rows beyond the profile's ``train_rows``.
        unusable: Rows that were left out before the split.
        asked: Held-out rows that the profile asks for.
    """

    train_rows: int
    eval_rows: int
    unused: int
    unusable: int
    asked: int

    def __str__(self) -> str:
        total = self.train_rows + self.eval_rows + self.unused + self.unusable
        few = f" (a tenth of the rows, at least one, instead of {self.asked:,})"
        fewer = few if self.eval_rows < self.asked else ""
        return (
            f"{total:,} rows: {self.train_rows:,} to train on, {self.eval_rows:,} held out{fewer}; left out: "
            f"{self.unusable:,} that cannot be used, {self.unused:,} beyond the profile's train_rows"
        )


def plan_split(profile: Profile, usable: int, total: int | None = None) -> SplitPlan:
    """Plan a split: the profile's ``eval_rows`` held out, but at most a tenth of the rows, and at least one.

    Args:
        profile: Its ``train_rows`` (0 takes all) and ``eval_rows`` are read.
        usable: Rows that can be trained on (``summarize_rows(...).attrs["usable"]``).
        total: Rows before unusable ones were left out; None if none was.

    Raises:
        DataError: ``no-rows`` if no row can be used, ``too-few-rows`` if only one can: a row that is trained
            on cannot be held out as well.
    """
    if usable < 2:
        raise DataError(
            "no-rows" if usable == 0 else "too-few-rows",
            f"{usable} of {usable if total is None else total} rows can be used, expected at least 2: one to "
            "train on and one held out. Add rows, or look at what summarize_rows says about those left out "
            f"(too-long: the profile's max_length is {profile.max_length} tokens).",
        )
    held_out = min(profile.eval_rows, max(1, usable // HELD_OUT_SHARE))
    train = min(profile.train_rows or usable, usable - held_out)
    return SplitPlan(
        train_rows=train,
        eval_rows=held_out,
        unused=usable - held_out - train,
        unusable=0 if total is None else total - usable,
        asked=profile.eval_rows,
    )


@dataclasses.dataclass(frozen=True)
class StepPlan:
    """Updates of a run; printed, it says how often each row is seen, and warns where that is often.

    Attributes:
        max_steps: Updates.
        epochs: How often each row is seen.
        steps_per_epoch: Updates in which each row is seen once.
    """

    max_steps: int
    epochs: float
    steps_per_epoch: int

    def __str__(self) -> str:
        told = f"{self.max_steps:,} updates: each row is seen {self.epochs:.3g} times"
        if self.epochs <= MANY_EPOCHS:
            return told
        fewer = MANY_EPOCHS * self.steps_per_epoch
        return (
            f"{told}. That is often: beyond {MANY_EPOCHS} times a model mostly learns its rows by heart. "
            f"Add rows, or take max_steps={fewer} or fewer, and watch the held-out loss"
        )


def plan_steps(profile: Profile, rows: int, tokens: int | None = None) -> StepPlan:
    """Plan the updates of a run: the profile's ``epochs`` over its rows, or else its ``max_steps``.

    Args:
        profile: Batch, accumulation, packing, ``epochs`` and ``max_steps`` are read.
        rows: Rows to train on.
        tokens: Tokens of all of them; with packing the blocks are counted by these.

    Raises:
        ValueError: No row, or packing without tokens.
    """
    if rows < 1 or (profile.packing and not tokens):
        raise ValueError(f"rows={rows}, tokens={tokens}: expected at least one row, and tokens with packing.")
    items = math.ceil((tokens or 0) / profile.max_length) if profile.packing else rows
    per_update = profile.per_device_train_batch_size * profile.gradient_accumulation_steps
    steps_per_epoch = math.ceil(items / per_update)
    steps = math.ceil(profile.epochs * steps_per_epoch) if profile.epochs else profile.max_steps
    return StepPlan(steps, steps / steps_per_epoch, steps_per_epoch)
