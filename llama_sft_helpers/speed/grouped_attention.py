"""Generation on a CPU without copies of keys and values: ``use_grouped_attention`` of 07 and 09."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel


def use_grouped_attention(model: PreTrainedModel | PeftModel) -> bool:
    """Let a model on a CPU generate faster: query heads share keys and values instead of copies of them.

    In grouped-query attention (https://arxiv.org/abs/2305.13245) several query heads look at the same keys
    and values. With a mask, as padded prompts need one, transformers' ``sdpa`` copies these for each head, at
    every token that is generated. Here the heads of a group stand in place of so many queries, so nothing is
    copied. Training and the forward pass of prompts stay as they are, to the same bits.

    Args:
        model: On a GPU, or with another attention than ``sdpa``, it stays as it is.

    Returns:
        Whether the model was switched; ``model.set_attn_implementation("sdpa")`` switches it back.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    if model.device.type != "cpu" or model.config._attn_implementation != "sdpa":
        return False
    AttentionInterface.register("grouped", grouped_attention)
    AttentionMaskInterface.register("grouped", sdpa_mask)
    model.set_attn_implementation("grouped")
    return True


def grouped_attention(  # noqa: PLR0917 - as transformers calls it
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    **settings: Any,
) -> tuple[torch.Tensor, None]:
    """Attention as transformers' ``AttentionInterface`` asks for it.

    Args:
        module: The attention layer, which knows how many query heads share a key.
        query: [rows, query heads, new tokens, head size].
        key: [rows, key heads, all tokens, head size].
        value: As ``key``.
        attention_mask: True where a token may be looked at, or what to add to the scores; [rows, 1, new
            tokens, all tokens], or None where there is no padding.
        scaling: What the products are multiplied by; None for 1 / sqrt(head size).
        settings: What else ``sdpa`` takes.

    Returns:
        [rows, new tokens, query heads, head size], and None in place of the shares.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    rows, heads, new, size = query.shape
    sharing = heads // key.shape[1]
    if new > 1 or sharing == 1 or settings.get("dropout"):
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **settings)
    queries = query.reshape(rows, heads // sharing, sharing, size)  # the one token's heads, a group together
    found = torch.nn.functional.scaled_dot_product_attention(
        queries, key, value, attn_mask=attention_mask, scale=scaling
    )
    return found.reshape(rows, new, heads, size), None
