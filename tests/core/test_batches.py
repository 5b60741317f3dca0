"""What steps share about batches, against loops of our own."""

import ast
from pathlib import Path

import pytest
import torch

from llama_sft_helpers.core import batches
from llama_sft_helpers.data import packing, tokens
from llama_sft_helpers.evaluation import losses

PACKAGE = Path(batches.__file__).parents[1]


def test_the_label_that_is_not_scored_is_torchs_and_has_one_home():
    loss = torch.nn.CrossEntropyLoss()
    assert loss.ignore_index == batches.IGNORED
    homes = []
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.UnaryOp) and ast.unparse(node) == "-100":
                homes.append(path.name)
    assert homes == ["batches.py"]
    assert tokens.IGNORED is losses.IGNORED is packing.IGNORED is batches.IGNORED


def test_document_bounds_by_hand():
    positions = torch.tensor([[0, 1, 2, 0, 0, 1]])
    bounds, longest = batches.document_bounds(positions)
    assert (bounds.tolist(), longest) == ([0, 3, 4, 6], 3)


def test_rows_without_a_scored_eos():
    labels = [[-100, 5, 9], [-100, 5, -100], [9, 5], [], torch.tensor([1, 9]), [9]]
    assert batches.rows_without_eos(labels, eos_token_id=9) == [1, 2, 3]
    assert batches.rows_without_eos([], eos_token_id=9) == []


def test_inputs_are_the_batchs_own_tensors(tiny_model):
    ids = torch.arange(6).view(2, 3)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    found = batches.checked_inputs(tiny_model, batch)
    assert set(found) == {"input_ids", "attention_mask"}
    assert found["input_ids"] is ids


@pytest.mark.parametrize("least", [1, 2, 4])
def test_rows_that_are_too_short_are_refused(tiny_model, least):
    ids = torch.arange(6).view(2, 3)
    if least <= 3:
        batches.checked_inputs(tiny_model, {"input_ids": ids}, least)
        return
    with pytest.raises(ValueError, match=r"shape \(2, 3\)\. Pass at least one text of 4 or more"):
        batches.checked_inputs(tiny_model, {"input_ids": ids}, least)


def test_padding_only_is_refused(tiny_model):
    ids = torch.arange(6).view(2, 3)
    with pytest.raises(ValueError, match="only padding"):
        batches.checked_inputs(tiny_model, {"input_ids": ids, "attention_mask": torch.zeros_like(ids)})
