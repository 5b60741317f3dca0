"""What steps share about batches, against loops of our own."""

import ast
from pathlib import Path

import pytest
import torch

from llama_sft_helpers.core import batches

PACKAGE = Path(batches.__file__).parents[1]


def test_the_label_that_is_not_scored_is_torchs_and_has_one_home():
    assert torch.nn.CrossEntropyLoss().ignore_index == batches.IGNORED
    trees = {path: ast.parse(path.read_text(encoding="utf-8")) for path in PACKAGE.rglob("*.py")}
    homes = [path.name for path, tree in trees.items() for node in ast.walk(tree) if is_ignored(node)]
    assert homes == ["batches.py"]


def is_ignored(node):
    return isinstance(node, ast.UnaryOp) and ast.unparse(node) == "-100"


def test_document_bounds_by_hand():
    with torch.inference_mode():
        bounds, longest = batches.document_bounds(torch.tensor([[0, 1, 0, 1, 2], [0, 1, 2, 3, 0]]))
    assert (bounds.tolist(), bounds.dtype, longest) == ([0, 2, 5, 9, 10], torch.int32, 4)


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


IDS = torch.arange(6).view(2, 3)
MASK = torch.ones_like(IDS)


@pytest.mark.parametrize(
    ("batch", "told"),
    [
        ({}, "The batch is dict; expected a mapping with integer input_ids.*Pass tokenizer"),
        ({"tokens": IDS}, "The batch is dict"),
        (IDS, "The batch is Tensor"),
        ({"input_ids": IDS[0]}, r"input_ids of shape \(3,\) and torch.int64"),
        ({"input_ids": IDS.float()}, "float32"),
        ({"input_ids": IDS.tolist()}, "input_ids of type list"),
        ({"input_ids": IDS[:0]}, r"empty: input_ids of shape \(0, 3\).*Pass at least one text of 2 or more"),
        ({"input_ids": IDS[:, :1]}, r"empty: input_ids of shape \(2, 1\)"),
        ({"input_ids": IDS, "attention_mask": 0 * MASK}, "only padding"),
        ({"input_ids": IDS.to("meta")}, r"input_ids is on meta, the model on cpu\. Pass batch\.to\(model"),
        ({"input_ids": IDS, "attention_mask": MASK.to("meta")}, "attention_mask is on meta"),
        ({"input_ids": IDS + 1023}, "run from 1023 to 1028, the model knows 0 to 1023"),
        ({"input_ids": IDS - 1}, "from -1 to 4"),
    ],
)
def test_a_batch_that_the_model_cannot_take_is_named(tiny_model, batch, told):
    with pytest.raises(ValueError, match=told):
        batches.checked_inputs(tiny_model, batch, least_tokens=2)
