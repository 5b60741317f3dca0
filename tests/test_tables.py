"""Tables in words."""

import numpy as np
import pandas as pd

from llama_sft_helpers.tables import in_words


def test_names_become_words_and_numbers_readable():
    cells = {"held_out_loss": 0.5, "total_gib": 8.456, "rows_share": 0.125}
    cells |= {"rows": np.int64(12345), "fits": np.True_}
    table = pd.DataFrame([cells | {"A": (16, 576), "first_rows": [1, 2], "why": None}], dtype=object)
    shown = in_words(table.set_index("why"), held_out_loss="{:.3f}")
    assert shown.iloc[0].to_dict() == {
        "held-out loss": "0.500",
        "total (GiB)": "8.46",
        "rows share": "12.5%",
        "rows": "12,345",
        "fits": "yes",
        "A": "16 × 576",
        "first rows": "1, 2",
    }
    assert "held_out_loss" in table


def test_rows_that_only_have_numbers_get_names():
    table = pd.DataFrame({"card_name": ["T4", "L4"], "gib": [14.6, float("nan")]})
    shown = in_words(table[::-1], decimals=1)
    assert (shown.index.name, list(shown.index)) == ("card name", ["L4", "T4"])
    assert shown["GiB"].tolist() == ["", "14.6"]
    by_length = pd.DataFrame({"rows_cut": [3]}, index=pd.Index([128], name="max_length"))
    assert (in_words(by_length).index.name, in_words(by_length).index[0]) == ("max length", 128)
