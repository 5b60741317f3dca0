"""Losses row by row in notebook 08: what padding may change, and what only LLM.int8 changes."""

import math

import pytest
import torch
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from llama_sft_helpers import speed

PAD = 7


@pytest.fixture
def rows():
    generator = torch.Generator().manual_seed(3)
    drawn = [torch.randint(10, 900, (n,), generator=generator).tolist() for n in (9, 31, 18)]
    return [{"input_ids": ids, "labels": [-100] * 3 + ids[3:]} for ids in drawn]


def lay_out(rows, padding_free):
    return DataCollatorForLanguageModeling(pad_token_id=PAD, padding_free=padding_free)(rows)


def alone(model, row):
    """The loss of one row as transformers itself works it out."""
    with torch.no_grad():
        return model(**{key: torch.tensor([value]) for key, value in row.items()}).loss.item()


def means(model, rows):
    """Mean loss over all scored tokens, padded and padding-free."""
    tokens = [sum(label != -100 for label in row["labels"]) for row in rows]
    by_layout = [speed.row_losses(model, lay_out(rows, free)) for free in (False, True)]
    totals = [sum(a * b for a, b in zip(losses, tokens, strict=True)) for losses in by_layout]
    return [total / sum(tokens) for total in totals], sum(tokens)


def test_both_layouts_give_each_rows_own_loss(tiny_model, rows):
    model = tiny_model.train()
    expected = [alone(tiny_model, row) for row in rows]
    assert speed.row_losses(model, lay_out(rows, padding_free=False)) == pytest.approx(expected, rel=1e-5)
    assert speed.row_losses(model, lay_out(rows, padding_free=True)) == pytest.approx(expected, rel=1e-5)
    assert model.training


def test_a_row_that_scores_nothing_is_nan(tiny_model, rows):
    rows[1]["labels"] = [-100] * len(rows[1]["labels"])
    losses = speed.row_losses(tiny_model, lay_out(rows, padding_free=True))
    assert [math.isnan(loss) for loss in losses] == [False, True, False]


def test_the_bound_by_hand():
    # a token: 0.21 x 2^-7 x sqrt(2 x 32) x 3 x sqrt(2) nats; the mean of 400: a twentieth; three times that
    assert speed.rounding_bound(torch.bfloat16, 32, 400) == pytest.approx(0.0083526, rel=1e-4)
    assert speed.rounding_bound(torch.float16, 32, 400) == pytest.approx(0.0083526 / 8, rel=1e-4)
    assert speed.rounding_bound(torch.float32, 32, 400) == 1e-4
    with pytest.raises(ValueError, match="tokens=0"):
        speed.rounding_bound(torch.float16, 32, 0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_real_rounding_stays_within_the_bound(tiny_model, rows, dtype):
    exact, tokens = means(tiny_model, rows)
    rounded, _ = means(tiny_model.to(dtype), rows)
    bound = speed.rounding_bound(dtype, tiny_model.config.num_hidden_layers, tokens)
    assert abs(rounded[0] - exact[0]) < bound
    assert abs(rounded[1] - rounded[0]) < bound


def test_rows_that_see_each_other_are_beyond_the_bound(tiny_model, rows):
    bound = speed.rounding_bound(torch.bfloat16, tiny_model.config.num_hidden_layers, 49)
    batch = lay_out(rows, padding_free=True)
    mixed = {"input_ids": batch["input_ids"], "labels": batch["labels"]}  # no position_ids: one long row
    with torch.no_grad():
        loss = tiny_model(**mixed).loss.item()
    (_, free), tokens = means(tiny_model, rows)
    assert tokens == 49
    assert abs(loss - free) > bound


def test_padding_moves_llm_int8_and_not_the_dequantized_product(tiny_model_int8, rows):
    """Padding's outliers choose columns for the real tokens: the loss moves, by LLM.int8's rounding alone."""
    model = tiny_model_int8
    with torch.no_grad():
        for module in model.modules():
            if type(module).__name__ == "LlamaRMSNorm":
                module.weight.mul_(2)
        # four of 64 columns hold the padding's whole vector: 4 after the norm, times 2 is beyond 6
        model.get_input_embeddings().weight[PAD] = 0
        model.get_input_embeddings().weight[PAD, :4] = 1
    bound = speed.rounding_bound(torch.float32, model.config.num_hidden_layers, 49)
    (padded, free), _ = means(model, rows)
    assert abs(padded - free) > bound
    speed.use_fast_int8(model)
    (padded, free), _ = means(model, rows)
    assert abs(padded - free) < bound
