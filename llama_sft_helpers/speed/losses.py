"""Losses row by row, padded or padding-free, and how far rounding alone may move them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping

import torch

from llama_sft_helpers.core.batches import document_bounds
from llama_sft_helpers.core.modes import evaluation_mode

_OF_A_ROUNDING = 0.21  # root mean square error of one rounding in units of eps: 0.17 % in bf16
_LOGIT_SPREAD = 3.0  # nats by which the logits of one position spread, in language models about 2 to 3
_SAFETY = 3.0  # standard errors, as for any estimate of chance
_LEAST = 1e-4  # nats; float32 sums of some hundred losses and of exponentials differ by up to 1e-5


def row_losses(model: torch.nn.Module, batch: Mapping[str, torch.Tensor]) -> list[float]:
    """Mean loss of each row's scored tokens in nats, in evaluation mode and without gradients.

    In evaluation mode an int8 model runs LLM.int8 on a CPU as on a GPU; in training mode bitsandbytes
    dequantizes on a CPU.

    Args:
        model: A causal language model.
        batch: ``input_ids`` and ``labels`` (rows, tokens) on the model's device, with ``attention_mask``; or
            one padding-free row with ``position_ids``, in which a 0 begins a document.

    Returns:
        One loss for each row or document; NaN where it scores no token.
    """
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask", "position_ids") if key in batch}
    with evaluation_mode(model), torch.no_grad():
        logits = model(**inputs, use_cache=False).logits
    labels = batch["labels"].to(logits.device)
    places = [(row, 0, labels.shape[1]) for row in range(len(labels))]
    if "position_ids" in batch and len(labels) == 1:
        bounds = document_bounds(batch["position_ids"])[0].tolist()
        places = [(0, start, end) for start, end in itertools.pairwise(bounds)]
    return [
        torch.nn.functional.cross_entropy(logits[row, a : b - 1].float(), labels[row, a + 1 : b]).item()
        for row, a, b in places
    ]


def rounding_bound(dtype: torch.dtype, layers: int, tokens: int) -> float:
    """How far two computations of one mean loss may lie apart if they differ in rounding only, in nats.

    Estimated from the type, not from any run: a decoder layer rounds the hidden state twice, so ``layers``
    of them leave a relative error of ``0.21 eps sqrt(2 layers)`` (a random walk). A token's loss is a
    difference of logits that spread by about 3, of two computations: times ``3 sqrt(2)``. A mean over
    ``tokens`` of them divides by ``sqrt(tokens)``. The bound is three times that standard error, and at
    least 1e-4. On an H100 SmolLM2 padded and padding-free lay 2.5e-4 (bfloat16) and 5.3e-4 (float16) apart.

    Raises:
        ValueError: ``layers`` or ``tokens`` is not positive.
    """
    if layers < 1 or tokens < 1:
        raise ValueError(f"layers={layers} and tokens={tokens}; expected at least 1 of each.")
    hidden = _OF_A_ROUNDING * torch.finfo(dtype).eps * math.sqrt(2 * layers)
    return max(_LEAST, _SAFETY * hidden * _LOGIT_SPREAD * math.sqrt(2) / math.sqrt(tokens))
