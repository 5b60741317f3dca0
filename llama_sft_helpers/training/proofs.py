"""Prove what a run did: the gradients reached the adapters, and no loss broke down."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch


class LossError(AssertionError):
    """A training's loss shows that it cannot be trusted."""


def check_loss_history(log_history: Iterable[Mapping[str, Any]]) -> None:
    """Check that no logged loss is NaN, infinite or exactly 0.

    The trainer replaces a NaN loss by 0 before it logs it (``logging_nan_inf_filter``), so that a training
    that broke down looks like a perfect one.

    Raises:
        LossError: The first such loss, its step and what to do.
    """
    for entry in log_history:
        for name in ("loss", "eval_loss", "grad_norm"):
            value = entry.get(name)
            if value is None or (math.isfinite(value) and (value != 0 or name == "grad_norm")):
                continue
            raise LossError(
                f"{name} is {value} at step {entry.get('step', '?')}, expected a finite number above 0: a "
                "number overflowed. Lower the learning rate, use bf16 or float32 LoRA weights, and go on "
                "from a checkpoint before this step."
            )


def check_gradients_reach_adapters(model: torch.nn.Module) -> None:
    """Check that every LoRA A and B got a gradient, finite and not zero, in the last backward pass.

    With B = 0 the gradient of A is exactly zero (dL/dA = B^T ...), so look after at least one update.

    Raises:
        AssertionError: A matrix got none; the message counts them and names the first.
    """
    adapters = [(name, p) for name, p in model.named_parameters() if ".lora_" in name and p.requires_grad]
    if not adapters:
        raise AssertionError(
            "Measured: 0 trainable LoRA matrices. Expected: some. Call get_peft_model first."
        )
    bad = [name for name, p in adapters if p.grad is None or not (p.grad.isfinite().all() and p.grad.any())]
    if bad:
        raise AssertionError(
            f"Measured: {len(bad)} of {len(adapters)} LoRA matrices without a finite, non-zero gradient "
            f"(first: {bad[0]}). Expected: 0. Run a backward pass after an update, and check that nothing "
            "detaches the hidden states (gradient checkpointing needs model.enable_input_require_grads())."
        )
