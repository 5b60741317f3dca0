"""What a legitimate run may give: findings with advice, shown once the results are saved, never raised."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

FEW_ROWS = 30  # held-out rows below which a difference may well be luck
LEVEL = 0.01  # a held-out loss that rose by less than this share of itself is taken for level


def finding(name: str, hoped_for: str, measured: str, holds: bool, advice: Sequence[str]) -> pd.DataFrame:
    """A table of one row: what was hoped for, what was measured, whether it is so, and what to do."""
    verdict = "as hoped" if holds else "not as hoped"
    row = (name, hoped_for, measured, verdict, " ".join(advice) or "nothing to do")
    columns = ["finding", "hoped for", "measured", "verdict", "advice"]
    return pd.DataFrame([row], columns=columns).set_index("finding")
