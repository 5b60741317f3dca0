"""Losses, intervals, answers, stops and merge fidelity, each against an independent truth."""

import math
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from torch.nn.utils.rnn import pad_sequence

from llama_sft_helpers.evaluation import (
    EvaluationError,
    check_eos_in_labels,
    check_merge_fidelity,
    encode_rows,
    next_token_log_probs,
    plot_stops,
    render_generations,
    summarize_generations,
    summarize_merge_fidelity,
    summarize_perplexity,
    summarize_row_losses,
    summarize_stops,
)


@pytest.fixture
def encoded(trained):
    return encode_rows(trained.tokenizer, trained.eval_rows, trained.profile.max_length)


def test_encoded_rows_are_those_of_the_trainer(trained, encoded):
    theirs = trained.trainer.eval_dataset
    assert len(encoded) == len(theirs)
    for ours, row in zip(encoded, theirs, strict=True):
        assert ours["input_ids"] == row["input_ids"]
        assert ours["labels"] == row["labels"]


def test_rows_are_cut_like_the_trainers(trained):
    encoded = encode_rows(trained.tokenizer, trained.eval_rows, 40)
    assert {len(row["input_ids"]) for row in encoded} == {40}
    assert all(len(row["labels"]) == 40 for row in encoded)


def test_row_losses_are_those_of_transformers_one_row_at_a_time(trained, encoded, tiny_model):
    """In float32 a row's loss is the same in any batch; an int8 model needs the same batch on both sides."""
    for model, batch_size in ((tiny_model, 3), (trained.model, 1)):
        table = summarize_row_losses(model, encoded, batch_size=batch_size)
        for index in (0, 5, 15):
            ids, labels = (torch.tensor([encoded[index][key]]) for key in ("input_ids", "labels"))
            with torch.no_grad():
                mean = model(input_ids=ids, labels=labels).loss.item()
            scored = int((labels[:, 1:] != -100).sum())
            assert table["tokens"][index] == scored
            assert table["loss_nats"][index] == pytest.approx(mean * scored, rel=1e-4)


def test_averaged_over_batches_the_loss_is_the_trainers(trained, encoded):
    sums = summarize_row_losses(trained.model, encoded).groupby(lambda row: row // 4).sum()
    assert (sums["loss_nats"] / sums["tokens"]).mean() == pytest.approx(
        trained.summary["eval_loss_after"], 1e-5
    )
    with trained.model.disable_adapter():
        sums = summarize_row_losses(trained.model, encoded).groupby(lambda row: row // 4).sum()
    assert (sums["loss_nats"] / sums["tokens"]).mean() == pytest.approx(
        trained.summary["eval_loss_before"], 1e-5
    )


@torch.no_grad()
def logits_of(model, rows, pad_token_id):
    """Logits [rows, tokens, vocabulary] of one batch, padded to its longest row as the trainer's are."""
    ids = [torch.tensor(row["input_ids"]) for row in rows]
    padded = pad_sequence(ids, batch_first=True, padding_value=pad_token_id)
    mask = pad_sequence([torch.ones_like(row) for row in ids], batch_first=True)
    return model(input_ids=padded, attention_mask=mask).logits


def test_the_probability_of_eos_is_the_softmax_at_the_answers_end(trained, encoded):
    """Batch for batch: LLM.int8() takes its outlier columns from the whole batch, padding included."""
    batch_size = 4
    table = summarize_row_losses(trained.model, encoded, batch_size)
    eos = trained.tokenizer.eos_token_id
    for start in range(0, len(encoded), batch_size):
        rows = encoded[start : start + batch_size]
        for index, (row, logits) in enumerate(zip(rows, logits_of(trained.model, rows, eos), strict=True)):
            found = table["eos_probability"][start + index]
            if row["labels"][-1] != eos:
                assert math.isnan(found)
                continue
            expected = torch.softmax(logits[len(row["input_ids"]) - 2].double(), dim=0)[eos].item()
            assert found == pytest.approx(expected, rel=1e-4)
    assert table["eos_probability"].isna().any(), "no row is cut: this test lacks that case"


def test_measuring_leaves_the_mode_as_it_was(trained, encoded):
    trained.model.train()
    summarize_row_losses(trained.model, encoded[:2])
    assert trained.model.training
    trained.model.eval()


# --- Perplexity and its interval ---


def frame(tokens, losses):
    return pd.DataFrame({"tokens": tokens, "loss_nats": losses})


def test_perplexity_weights_tokens_not_rows():
    table = summarize_perplexity({"base": frame([1, 3], [4.0, 4.0]), "tuned": frame([1, 3], [2.0, 2.0])})
    assert table["loss_nats"].tolist() == [2.0, 1.0, -1.0]
    assert table["perplexity"].tolist() == pytest.approx([math.e**2, math.e, math.exp(-1)])
    assert table["tokens"].tolist() == [4, 4, 4]


def test_the_interval_is_that_of_the_normal_theory_on_equal_rows():
    rng = np.random.default_rng(1)
    rows = frame([10] * 400, 10 * rng.normal(2.0, 0.5, 400))
    low, high = summarize_perplexity({"base": rows}).loc["base", ["low", "high"]]
    half = 1.96 * (rows["loss_nats"] / 10).std() / math.sqrt(400)
    middle = rows["loss_nats"].mean() / 10
    assert low == pytest.approx(middle - half, abs=half * 0.15)
    assert high == pytest.approx(middle + half, abs=half * 0.15)


def test_the_interval_of_the_difference_is_paired():
    rng = np.random.default_rng(2)
    hard = rng.normal(20.0, 8.0, 100)
    table = summarize_perplexity({"base": frame([10] * 100, hard), "tuned": frame([10] * 100, hard - 1.0)})
    width = table["high"] - table["low"]
    assert width["tuned - base"] == pytest.approx(0.0, abs=1e-9)
    assert width["base"] > 0.1


def test_models_measured_on_other_rows_or_on_nothing_are_refused():
    with pytest.raises(ValueError, match="same rows"):
        summarize_perplexity({"base": frame([1], [1.0]), "tuned": frame([2], [1.0])})
    with pytest.raises(ValueError, match="at least one scored token"):
        summarize_perplexity({"base": frame([0], [0.0])})


@pytest.mark.parametrize("rows", [{}, None, [], {"base": 3}, pd.DataFrame({"tokens": [1]})])
def test_what_are_no_tables_of_losses_is_refused(rows):
    with pytest.raises(ValueError, match=rf"a {type(rows).__name__}; expected .* summarize_row_losses"):
        summarize_perplexity(rows)


def test_rows_of_another_layout_are_named():
    alpaca = {"instruction": "a", "input": "", "output": "b"}
    with pytest.raises(ValueError, match=r"Row 1 .*'instruction', 'input', 'output'.*to_prompt_completion"):
        encode_rows(Words(), [{"prompt": "a", "completion": "b"}, alpaca], 8)


class Words:
    """A tokenizer with an id for each character."""

    eos_token = "$"

    def __call__(self, text):
        return SimpleNamespace(input_ids=[ord(character) for character in text])


# --- EOS ---


def test_eos_in_the_labels(trained, encoded):
    eos = trained.tokenizer.eos_token_id
    whole = [row for row in encoded if row["labels"][-1] == eos]
    assert 0 < len(whole) < len(encoded)
    check_eos_in_labels(whole, eos)
    masked = [
        {**row, "labels": [-100 if label == eos else label for label in row["labels"]]} for row in whole
    ]
    for wrong in (masked, encoded):  # a collator that masks EOS; a row that was cut
        with pytest.raises(EvaluationError, match="expected EOS"):
            check_eos_in_labels(wrong, eos)


EOS = 9
TOKENS = {"base": torch.tensor([[1, 2, 3], [1, EOS, EOS]]), "tuned": torch.tensor([[EOS, 4, 4], [1, 2, EOS]])}


class Letters:
    """A tokenizer of ten letters; the tenth is EOS."""

    eos_token_id = EOS

    def decode(self, ids, skip_special_tokens):
        assert skip_special_tokens
        return "".join("abcdefghi<"[int(i)] for i in ids if int(i) != EOS)


def test_generations_end_at_their_first_eos():
    table = summarize_generations(Letters(), ["p", "q"], TOKENS)
    assert table["base"].tolist() == ["bcd", "b"]
    assert table["base_tokens"].tolist() == [3, 2]
    assert table["base_stopped"].tolist() == [False, True]
    assert table["tuned"].tolist() == ["", "bc"]
    assert table["tuned_tokens"].tolist() == [1, 3]
    with pytest.raises(ValueError, match="2 answers for 1 prompts"):
        summarize_generations(Letters(), ["p"], TOKENS)


def test_rendered_answers_are_escaped_and_say_how_they_ended():
    table = summarize_generations(Letters(), ["<b>p</b>", "q"], TOKENS)
    table.loc[0, "tuned"] = "<script>alert(1)</script>"
    page = render_generations(table).data
    assert "<script>" not in page
    assert "<b>p" not in page
    assert "&lt;script&gt;" in page
    assert "cut after 3 tokens" in page
    assert "stopped after 2 tokens" in page


def test_stops_are_counted():
    rows = {name: pd.DataFrame({"eos_probability": [0.2, 0.4, float("nan")]}) for name in TOKENS}
    table = summarize_stops(rows, TOKENS, EOS)
    assert table.loc["base", ["stopped", "prompts"]].tolist() == [1, 2]
    assert table["stopped_share"].tolist() == [0.5, 1.0]
    assert table["median_tokens"].tolist() == [2.5, 2.0]
    assert table["eos_probability"].tolist() == pytest.approx([0.3, 0.3])


def test_the_figure_has_a_dot_a_row_and_the_counts():
    rows = {name: pd.DataFrame({"eos_probability": [0.2, 0.4, float("nan")]}) for name in TOKENS}
    ax = plot_stops(rows, summarize_stops(rows, TOKENS, EOS))
    assert [len(dots.get_offsets()) for dots in ax.collections] == [2, 2]
    assert [label.get_text() for label in ax.get_yticklabels()] == [
        "base:\n1 of 2\nanswers stop",
        "tuned:\n2 of 2\nanswers stop",
    ]
    assert "base 0.30, tuned 0.30 (median" in ax.get_title()
    assert "probability of EOS" in ax.get_xlabel()


def test_the_figure_takes_as_many_models_as_there_are():
    names = [f"model {n}" for n in range(9)]
    rows = {name: pd.DataFrame({"eos_probability": [0.2, 0.4]}) for name in names}
    ax = plot_stops(rows, summarize_stops(rows, dict.fromkeys(names, TOKENS["base"]), EOS))
    assert [label.get_text().partition(":")[0] for label in ax.get_yticklabels()] == names
    assert len(ax.collections) == 9
    colours = [tuple(dots.get_facecolor()[0]) for dots in ax.collections]
    assert len(set(colours[:5])) == 5


# --- Merging ---


def test_kl_and_top1_by_hand():
    reference = torch.log(torch.tensor([[0.5, 0.5 - 1e-9, 1e-9], [0.9, 0.05, 0.05]]))
    merged = torch.log(torch.tensor([[0.25, 0.75 - 1e-9, 1e-9], [0.9, 0.05, 0.05]]))
    found = summarize_merge_fidelity(reference, merged)
    kl = 0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75)
    assert found["kl_nats"] == pytest.approx(kl / 2, rel=1e-4)
    assert found["worst_kl_nats"] == pytest.approx(kl, rel=1e-4)
    assert found["top1_agreement"] == 0.5
    with pytest.raises(EvaluationError, match="fresh 16-bit"):
        check_merge_fidelity(reference, merged, layers=32)
    check_merge_fidelity(reference, reference.clone(), layers=32)
    with pytest.raises(EvaluationError):
        check_merge_fidelity(reference, reference * float("nan"), layers=32)
    with pytest.raises(ValueError, match="differ"):
        summarize_merge_fidelity(reference, merged[:1])


def test_log_probs_are_the_softmax_at_the_scored_tokens(trained, encoded):
    rows = encoded[:3]
    found = next_token_log_probs(trained.model, rows)
    assert len(found) == summarize_row_losses(trained.model, rows)["tokens"].sum()
    picked = torch.cat([torch.tensor([t for t in row["labels"] if t != -100]) for row in rows])
    losses = -found[torch.arange(len(found)), picked]
    assert losses.sum().item() == pytest.approx(
        summarize_row_losses(trained.model, rows, batch_size=2)["loss_nats"].sum(), rel=1e-4
    )


def test_a_16_bit_merge_is_faithful_and_a_lost_adapter_is_not(
    trained,
    encoded,
    tiny_model_dir,
):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.bfloat16)
    model = PeftModel.from_pretrained(base, trained.adapter)
    layers = base.config.num_hidden_layers
    reference = next_token_log_probs(model, encoded[:4])
    with model.disable_adapter():
        without_adapter = next_token_log_probs(model, encoded[:4])
    check_merge_fidelity(reference, next_token_log_probs(model.merge_and_unload(), encoded[:4]), layers)
    with pytest.raises(EvaluationError, match="not onto the quantized one"):
        check_merge_fidelity(reference, without_adapter, layers)


def test_merging_and_saving_again_gives_the_same_bytes(trained, tiny_model_dir, tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from llama_sft_helpers.evaluation import new_folder
    from llama_sft_helpers.training import hash_files

    hashes = []
    for name, scale in (("first", 1.0), ("second", 1.0), ("other", 1.5)):
        base = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.bfloat16)
        model = PeftModel.from_pretrained(base, trained.adapter)
        for parameter_name, parameter in model.named_parameters():
            if "lora_B" in parameter_name:
                parameter.data *= scale
        with new_folder(tmp_path / name) as folder:
            model.merge_and_unload().save_pretrained(folder)
        hashes.append(hash_files(tmp_path / name))
    assert hashes[0] == hashes[1] != hashes[2]
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "first", dtype=torch.bfloat16)
    assert again.config.architectures == ["LlamaForCausalLM"]
