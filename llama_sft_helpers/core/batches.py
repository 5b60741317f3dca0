"""What several steps know of a batch: the label that is not scored, documents, ends, what a model takes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

IGNORED = -100  # the label that PyTorch's cross-entropy leaves out


def document_bounds(position_ids: torch.Tensor) -> tuple[torch.Tensor, int]:
    """Where documents begin in rows read one after the other: at each 0 of ``(batch, tokens)`` positions.

    Returns:
        int32 bounds of shape ``(documents + 1,)`` that begin with 0 and end with ``batch * tokens``; the
        length in tokens of the longest document.
    """
    import torch

    flat = position_ids.reshape(-1)
    starts = (flat == 0).nonzero().reshape(-1)
    bounds = torch.cat([starts, starts.new_tensor([flat.numel()])]).to(torch.int32)
    return bounds, int(bounds.diff().max())


def rows_without_eos(labels: Iterable[Sequence[int]], eos_token_id: int) -> list[int]:
    """Numbers of the rows, unpadded, that do not end in a scored EOS: none teaches the model to stop."""
    return [index for index, row in enumerate(labels) if not len(row) or int(row[-1]) != eos_token_id]


def checked_inputs(model: Any, batch: Mapping[str, Any], least_tokens: int = 1) -> dict[str, torch.Tensor]:
    """The parts of a batch that a forward pass takes, after telling what is wrong with them.

    Args:
        model: A causal language model.
        batch: ``input_ids`` of shape (rows, tokens), integers, on the model's device; perhaps
            ``attention_mask``.
        least_tokens: Shortest row that can be looked at.

    Raises:
        ValueError: No batch, an empty one, one of padding only, or one that the model cannot take.
    """
    keys = ("input_ids", "attention_mask")
    inputs = {key: batch[key] for key in keys if key in batch} if isinstance(batch, Mapping) else {}
    _require_ids(batch, inputs.get("input_ids"), least_tokens)
    ids = inputs["input_ids"]
    device = next((p.device for p in model.parameters() if not p.is_meta), ids.device)
    for name, tensor in inputs.items():
        if tensor.device != device:
            raise ValueError(
                f"The batch's {name} is on {tensor.device}, the model on {device}. "
                "Pass batch.to(model.device)."
            )
    vocabulary = model.get_input_embeddings().num_embeddings
    if not 0 <= int(ids.min()) <= int(ids.max()) < vocabulary:
        raise ValueError(
            f"input_ids run from {int(ids.min())} to {int(ids.max())}, the model knows 0 to "
            f"{vocabulary - 1}; use the model's own tokenizer."
        )
    mask = inputs.get("attention_mask")
    if mask is not None and not mask[:, least_tokens - 1 :].any():
        raise ValueError("The batch holds only padding (attention_mask is 0). Pass at least one text.")
    return inputs


def _require_ids(batch: object, ids: object, least_tokens: int) -> None:
    import torch

    if not isinstance(ids, torch.Tensor) or ids.ndim != 2 or ids.is_floating_point():
        got = type(batch).__name__ if ids is None else f"input_ids of {_describe(ids)}"
        raise ValueError(
            f"The batch is {got}; expected a mapping with integer input_ids of shape (rows, tokens). "
            'Pass tokenizer(texts, return_tensors="pt", padding=True).'
        )
    if not len(ids) or ids.shape[1] < least_tokens:
        raise ValueError(
            f"The batch is empty: input_ids of shape {tuple(ids.shape)}. "
            f"Pass at least one text of {least_tokens} or more tokens."
        )


def _describe(value: object) -> str:
    import torch

    if isinstance(value, torch.Tensor):
        return f"shape {tuple(value.shape)} and {value.dtype}"
    return f"type {type(value).__name__}"
