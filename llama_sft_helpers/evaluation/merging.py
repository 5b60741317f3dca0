"""Where a merge has room, what it would lose in int8, and how close the merged model is to the unmerged one.

Nothing here merges: the notebook does.
"""

from __future__ import annotations

from typing import Any

import pandas as pd
import torch

from llama_sft_helpers.core.bnb import row_absmax
from llama_sft_helpers.evaluation.losses import EvaluationError


class MergeError(RuntimeError):
    """There is no room to merge."""


def merge_device_map(weight_bytes: int) -> dict[str, int | str]:
    """Where a merge has room: ``{"": 0}`` for the GPU, else ``{"": "cpu"}``.

    Args:
        weight_bytes: The 16-bit model's weights; a tenth and 1 GiB are added for what passes through it.

    Raises:
        MergeError: Neither the GPU's nor the machine's free memory is enough.
    """
    import psutil

    needed = 1.1 * weight_bytes + 2**30
    on_gpu = torch.cuda.mem_get_info()[0] if torch.cuda.is_available() else 0
    in_ram = psutil.virtual_memory().available
    if on_gpu >= needed:
        return {"": 0}
    if in_ram >= needed:
        return {"": "cpu"}
    raise MergeError(
        f"A merge needs {needed / 2**30:.1f} GiB; free are {on_gpu / 2**30:.1f} GiB of GPU memory and "
        f"{in_ram / 2**30:.1f} GiB of RAM. Choose a larger machine (Colab: Runtime > Change runtime type), "
        "or merge file by file (write_merged_shards). The adapter is complete without the merge."
    )


def summarize_int8_merge(model: torch.nn.Module) -> pd.DataFrame:
    """What merging into the int8 weights would keep of the adapter; the model is left as it is.

    An int8 weight lies on a grid of 127 steps up to its row's maximum (https://arxiv.org/abs/2208.07339): an
    update smaller than half a step rounds back to where it was.

    Returns:
        Index projection (``q_proj`` and so on) and ``all``: ``entries``; ``changed`` (int8 entries that
        differ after the merge) and ``changed_share``; ``over_half_step_share`` (updates larger than half a
        step: the prediction); ``mean_update_steps`` (mean absolute update, in steps); ``update_error`` (root
        mean square of what rounding adds to or takes from the update, relative to the update's: 1 where it is
        lost whole).

    Raises:
        ValueError: No 8-bit layer carries an adapter ``default``.
    """
    parts = []
    for path, layer in model.named_modules():
        weight = getattr(getattr(layer, "base_layer", None), "weight", None)
        if type(weight).__name__ == "Int8Params" and "default" in getattr(layer, "lora_A", {}):
            parts.append({"projection": path.rpartition(".")[2], **_int8_merge(layer)})
    if not parts:
        raise ValueError("No 8-bit layer carries an adapter 'default'. Load the base with load_in_8bit=True.")
    table = pd.DataFrame(parts).groupby("projection", sort=False).sum()
    table.loc["all"] = table.sum()
    shares = table[["changed", "over_half_step", "update_steps"]].div(table["entries"], axis=0)
    shares.columns = pd.Index(["changed_share", "over_half_step_share", "mean_update_steps"])
    shares["update_error"] = (table["error_squares"] / table["update_squares"]) ** 0.5
    return table[["entries", "changed"]].astype(int).join(shares)


@torch.no_grad()
def _int8_merge(layer: Any) -> dict[str, float]:
    """Counts of one layer; the arithmetic is that of PEFT's own ``merge`` for 8-bit layers."""
    from bitsandbytes.functional import int8_vectorwise_quant

    codes = layer.base_layer.weight.data
    step = (row_absmax(layer.base_layer).float() / 127).to(codes.device)[:, None]
    update = layer.get_delta_weight("default").float()
    merged, merged_max, _ = int8_vectorwise_quant((codes * step + update).half())
    kept = merged * (merged_max.float() / 127)[:, None] - codes * step
    return {
        "entries": codes.numel(),
        "changed": int((merged != codes).sum()),
        "over_half_step": int((update.abs() > step / 2).sum()),
        "update_steps": float((update.abs() / step).sum()),
        "update_squares": float(update.square().sum(dtype=torch.float64)),
        "error_squares": float((kept - update).square().sum(dtype=torch.float64)),
    }


def summarize_merge_fidelity(reference: torch.Tensor, merged: torch.Tensor) -> pd.Series[float]:
    """How far the merged model's next-token distributions are from the unmerged model's.

    Args:
        reference: ``next_token_log_probs`` of base plus adapter [tokens, vocabulary].
        merged: The same of the merged model, on the same rows.

    Returns:
        ``kl_nats`` (mean Kullback-Leibler divergence a token), ``worst_kl_nats``, ``top1_agreement`` (share
        of tokens with the same first choice), ``tokens``.

    Raises:
        ValueError: The shapes differ.
    """
    if reference.shape != merged.shape:
        raise ValueError(
            f"Shapes {tuple(reference.shape)} and {tuple(merged.shape)} differ; use the same rows."
        )
    kl = (reference.double().exp() * (reference.double() - merged.double())).sum(dim=-1)
    agree = (reference.argmax(dim=-1) == merged.argmax(dim=-1)).double().mean()
    values = {"kl_nats": kl.mean(), "worst_kl_nats": kl.max(), "top1_agreement": agree}
    return pd.Series({**{name: float(value) for name, value in values.items()}, "tokens": len(reference)})


def check_merge_fidelity(
    reference: torch.Tensor, merged: torch.Tensor, without_adapter: torch.Tensor, layers: int
) -> None:
    """Check that merging in bfloat16 moved the predictions no further than its rounding may.

    A decoder layer rounds its seven merged weights once, and its hidden state twice. Each rounding leaves a
    relative error of 0.21 eps, and the errors add up like a random walk: ``0.21 eps sqrt(9 layers)``. Logits
    spread by about 3 nats, so that is three times as much in a logit, and the divergence of two models whose
    logits differ by d is about d squared; half of it for each of the two that round. Four times that estimate
    is allowed, or a sixteenth of what the adapter itself changes (one at three quarters of its strength is
    off by as much): with random weights a small difference grows from layer to layer.

    Args:
        reference: As ``summarize_merge_fidelity`` takes it.
        merged: The same of the merged model.
        without_adapter: The same of the base model alone.
        layers: The model's decoder layers, ``model.config.num_hidden_layers``.

    Raises:
        EvaluationError: The divergence is over both limits, or not finite.
        ValueError: The shapes differ.
    """
    found = summarize_merge_fidelity(reference, merged)["kl_nats"]
    changed = summarize_merge_fidelity(reference, without_adapter)["kl_nats"]
    rounding = 4 * (3 * 0.21 * torch.finfo(torch.bfloat16).eps) ** 2 * 9 * layers
    if not found <= max(rounding, changed / 16):
        raise EvaluationError(
            f"The merged model differs: KL {found:.2g} nats a token, expected at most {rounding:.2g}, which "
            f"is what rounding to bfloat16 in {layers} layers explains, or {changed / 16:.2g}, a sixteenth "
            "of what the adapter changes. Merge onto a fresh 16-bit or 32-bit base, not onto the quantized "
            "one, and check the adapter's base model."
        )
