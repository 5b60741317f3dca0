"""How many rows train and how many are held out: decided once, for every notebook that splits."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from llama_sft_helpers.data.rows import DataError

if TYPE_CHECKING:
    from llama_sft_helpers.profiles import Profile

HELD_OUT_SHARE = 10  # at most one row in ten is held out


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
