"""The switch ``use_grouped_attention``: the same attention as by hand in float64, without a copy of a key."""

import pytest
import torch
from transformers.integrations import sdpa_attention

from llama_sft_helpers import speed
from llama_sft_helpers.speed.grouped_attention import grouped_attention

ROWS, KEY_HEADS, SHARING, TOKENS, SIZE = 3, 2, 3, 7, 4
PADDED = [0, 2, 5]  # tokens of padding on the left of each row


def by_hand(query, key, value, allowed, scaling):
    """Softmax of the allowed scores, head by head, as the paper writes it."""
    found = torch.zeros(ROWS, 1, KEY_HEADS * SHARING, SIZE, dtype=torch.float64)
    for row in range(ROWS):
        for head in range(KEY_HEADS * SHARING):
            places = [place for place in range(TOKENS) if allowed[row][place]]
            keys, values = (each[row, head // SHARING, places] for each in (key, value))
            shares = (scaling * (keys @ query[row, head, 0])).exp()
            found[row, 0, head] = (shares / shares.sum()) @ values
    return found


@pytest.mark.parametrize("mask", ["boolean", "added", "none"])
@pytest.mark.parametrize("scaling", [None, 0.3])
def test_a_new_token_attends_as_by_hand(mask, scaling):
    generator = torch.Generator().manual_seed(0)
    shapes = (KEY_HEADS * SHARING, 1), (KEY_HEADS, TOKENS), (KEY_HEADS, TOKENS)
    query, key, value = (
        torch.randn(ROWS, heads, length, SIZE, generator=generator, dtype=torch.float64)
        for heads, length in shapes
    )
    padded = PADDED if mask != "none" else [0] * ROWS
    allowed = torch.tensor([[place >= left for place in range(TOKENS)] for left in padded])
    given = {"boolean": allowed, "added": torch.zeros(ROWS, TOKENS).double().masked_fill(~allowed, -1e30)}
    given = given[mask][:, None, None] if mask != "none" else None
    ours, shares = grouped_attention(torch.nn.Module(), query, key, value, given, scaling=scaling)
    torch.testing.assert_close(ours, by_hand(query, key, value, allowed, scaling or SIZE**-0.5))
    assert shares is None


@pytest.fixture
def copies(monkeypatch):
    """How many tokens the queries had at each copy of keys or values for more heads."""
    counted, plain = [], sdpa_attention.repeat_kv
    monkeypatch.setattr(
        sdpa_attention, "repeat_kv", lambda states, n: counted.append(states.shape[2]) or plain(states, n)
    )
    return counted


def test_generation_copies_for_the_prompts_only_and_gives_the_same_tokens(tiny_model, copies):
    assert tiny_model.config.num_attention_heads > tiny_model.config.num_key_value_heads
    ids = torch.randint(3, 200, (2, 9), generator=torch.Generator().manual_seed(1))
    batch = {"input_ids": ids, "attention_mask": torch.tensor([[1] * 9, [0] * 4 + [1] * 5])}
    settings = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    settings |= {"return_dict_in_generate": True, "output_logits": True}
    plain = tiny_model.generate(**batch, **settings)
    layers = tiny_model.config.num_hidden_layers
    assert len(copies) == 2 * layers * 5
    copies.clear()
    assert speed.use_grouped_attention(tiny_model)
    ours = tiny_model.generate(**batch, **settings)
    assert copies == [9] * 2 * layers
    assert torch.equal(ours.sequences, plain.sequences)
    assert torch.equal(ours.logits[0], plain.logits[0])
    torch.testing.assert_close(torch.stack(ours.logits), torch.stack(plain.logits), atol=1e-4, rtol=1e-4)


def test_another_attention_stays_and_the_switch_can_be_undone(tiny_model):
    tiny_model.set_attn_implementation("eager")
    assert not speed.use_grouped_attention(tiny_model)
    assert tiny_model.config._attn_implementation == "eager"
    tiny_model.set_attn_implementation("sdpa")
    assert speed.use_grouped_attention(tiny_model)
    assert not speed.use_grouped_attention(tiny_model)  # it is already
    tiny_model.set_attn_implementation("sdpa")
    assert tiny_model.config._attn_implementation == "sdpa"
