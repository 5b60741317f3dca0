"""Notebook 01: what this machine has, and what of it must be mended."""

from __future__ import annotations


def device_map() -> dict[str, int | str]:
    """``{"": 0}``, the whole model on the first GPU, or ``{"": "cpu"}`` where there is none.

    See https://huggingface.co/docs/accelerate/concept_guides/big_model_inference#designing-a-device-map.
    """
    import torch

    return {"": 0} if torch.cuda.is_available() else {"": "cpu"}
