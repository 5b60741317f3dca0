"""One proof that a base model is unchanged: a checksum of every frozen weight, computed where it lies."""

from __future__ import annotations

from collections.abc import Mapping

import torch


def checksum_base(model: torch.nn.Module) -> dict[str, int]:
    """A checksum of every frozen weight's bytes, int8 scales included, computed where they lie.

    The number of bytes and two sums modulo 2^64 over words of eight bytes, one weighted by position, side by
    side in one integer: a single changed word always changes it.
    """
    sums = {name: checksum(p.data) for name, p in model.named_parameters() if not p.requires_grad}
    for name, module in model.named_modules():
        scales = _int8_scales(module)
        if scales is not None:
            sums[f"{name}.SCB"] = checksum(scales)
    return sums


def check_base_unchanged(model: torch.nn.Module, before: Mapping[str, int]) -> None:
    """Check that the frozen weights are bit for bit those that ``checksum_base`` saw.

    Raises:
        AssertionError: A weight changed, appeared or went; the message counts them and names the first.
    """
    after = checksum_base(model)
    changed = sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))
    if changed:
        raise AssertionError(
            f"Measured: {len(changed)} of {len(before)} base weights changed (first: {changed[0]}). "
            "Expected: 0. Only the adapter may train: check requires_grad, and that it was not merged."
        )


@torch.no_grad()
def checksum(tensor: torch.Tensor) -> int:
    """Of one tensor's bytes, on its own device: nothing but two sums is copied to the CPU."""
    data = tensor.detach().contiguous().view(-1).view(torch.uint8)
    tail = -data.numel() % 8
    words = torch.nn.functional.pad(data, (0, tail)).view(torch.int64)
    weights = torch.arange(1, 2 * words.numel() + 1, 2, device=words.device)  # odd: no bit of a word is lost
    total, weighted = (int(found) % 2**64 for found in (words.sum(), (words * weights).sum()))
    return data.numel() << 128 | total << 64 | weighted  # no hash(): Python's of -1 and of -2 are the same


def _int8_scales(module: torch.nn.Module) -> torch.Tensor | None:
    """The row scales of a ``Linear8bitLt``: bitsandbytes moves them from the weight at the first forward."""
    if not isinstance(module, torch.nn.Linear):  # PEFT's wrapper shows its base layer's weight as its own
        return None
    at_weight = getattr(module.weight, "SCB", None)
    at_state = getattr(getattr(module, "state", None), "SCB", None)
    scales = at_state if at_weight is None else at_weight
    return scales if isinstance(scales, torch.Tensor) else None
