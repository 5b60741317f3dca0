"""Losses, intervals, answers, stops and merge fidelity, each against an independent truth."""

import contextlib
import math
from pathlib import Path
from types import SimpleNamespace

import nbformat
import numpy as np
import pandas as pd
import pytest
import torch
from datasets import Dataset
from peft import PeftModel
from tiny_models import build_trainer
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM

from llama_sft_helpers import evaluation
from llama_sft_helpers.evaluation import (
    EvaluationError,
    check_merge_fidelity,
    encode_rows,
    next_token_log_probs,
    summarize_merge_fidelity,
    summarize_perplexity,
    summarize_row_losses,
)
from llama_sft_helpers.profiles import read_profile


@pytest.fixture
def encoded(trained):
    return encode_rows(trained.tokenizer, trained.eval_rows, trained.profile.max_length)


def test_encoded_rows_are_those_of_the_trainer_and_cut_alike(trained, encoded):
    theirs = trained.trainer.eval_dataset
    short = encode_rows(trained.tokenizer, trained.eval_rows, 40)
    for row, ours, cut in zip(theirs, encoded, short, strict=True):
        for key in ("input_ids", "labels"):
            assert ours[key] == row[key]
            assert cut[key] == row[key][:40]
    assert encode_rows(trained.tokenizer, encoded, 40) == short  # what is tokens already is cut only


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


def test_rows_in_another_order_share_the_same_batches(trained, encoded):
    """An int8 model: with other rows beside them the losses would differ."""
    table = summarize_row_losses(trained.model, encoded)
    lengths = [len(row["input_ids"]) for row in encoded]
    assert len(set(lengths)) > len(lengths) // 2
    order = sorted(range(len(encoded)), key=lambda row: (row * 7 % 5, lengths[row], row))
    again = summarize_row_losses(trained.model, [encoded[row] for row in order])
    pd.testing.assert_frame_equal(again, table.loc[order].reset_index(drop=True))


def test_averaged_over_batches_the_loss_is_the_trainers(trained, encoded):
    with trained.model.disable_adapter():
        before = summarize_row_losses(trained.model, encoded)
    for rows, name in ((before, "before"), (summarize_row_losses(trained.model, encoded), "after")):
        sums = rows.groupby(lambda row: row // 4).sum()
        expected = pytest.approx(trained.summary[f"eval_loss_{name}"], 1e-5)
        assert (sums["loss_nats"] / sums["tokens"]).mean() == expected


def test_the_trainer_counts_a_batch_by_its_rows_where_the_table_counts_tokens(
    tmp_path, tiny_model, tiny_tokenizer
):
    rows = [{"prompt": f"Row {n}:\n", "completion": "apples " * (1 + 3 * n)} for n in range(5)]
    settings = {"eval_rows": Dataset.from_list(rows), "per_device_eval_batch_size": 2}
    trainers = build_trainer(tiny_model, tmp_path, tiny_tokenizer, rows, **settings).evaluate()["eval_loss"]
    table = summarize_row_losses(tiny_model, encode_rows(tiny_tokenizer, rows, 64), 2)
    space = {
        "by_model": {"base": table, "tuned": table},
        "held_out": encode_rows(tiny_tokenizer, rows, 64),
        "batch_size": 2,
        "training": {},
        "pd": pd,
    }
    space |= {"profile": read_profile("ci-tiny", packing=False), "in_words": lambda frame, **_: frame}
    path = Path(__file__).parents[2] / "notebooks" / "07_evaluation.ipynb"
    sources = [cell.source for cell in nbformat.read(path, as_version=4).cells]
    exec(next(source for source in sources if "as_trainer = " in source), space)
    assert space["as_trainer"] == pytest.approx({"base": trainers, "tuned": trainers})
    by_token = summarize_perplexity({"base": table}).loc["base", "loss_nats"]
    assert by_token == pytest.approx(table["loss_nats"].sum() / table["tokens"].sum())
    assert by_token < 0.97 * trainers


def test_the_probability_of_eos_is_the_softmax_at_the_answers_end(trained, encoded):
    """Batch for batch: LLM.int8() takes its outlier columns from the whole batch, padding included."""
    table, eos = summarize_row_losses(trained.model, encoded, 4), trained.tokenizer.eos_token_id
    for start in range(0, len(encoded), 4):
        rows = encoded[start : start + 4]
        ids = [torch.tensor(row["input_ids"]) for row in rows]
        padded = pad_sequence(ids, batch_first=True, padding_value=eos)
        mask = pad_sequence([torch.ones_like(row) for row in ids], batch_first=True)
        with torch.no_grad():
            logits = trained.model(input_ids=padded, attention_mask=mask).logits
        ends = [torch.softmax(logits[n, len(row) - 2].double(), dim=0)[eos] for n, row in enumerate(ids)]
        expected = [
            float(p) if row["labels"][-1] == eos else math.nan for p, row in zip(ends, rows, strict=True)
        ]
        found = table["eos_probability"][start : start + 4].tolist()
        assert found == pytest.approx(expected, rel=1e-4, nan_ok=True)
    assert table["eos_probability"].isna().any(), "no row is cut: this test lacks that case"


def test_measuring_leaves_the_mode_as_it_was(trained, encoded):
    trained.model.train()
    summarize_row_losses(trained.model, encoded[:2])
    assert trained.model.training
    trained.model.eval()


def test_log_probs_are_the_softmax_at_the_scored_tokens(trained, encoded):
    rows = encoded[:3]
    found = next_token_log_probs(trained.model, rows)
    losses = summarize_row_losses(trained.model, rows)
    assert len(found) == losses["tokens"].sum()
    picked = torch.cat([torch.tensor([t for t in row["labels"] if t != -100]) for row in rows])
    scored = -found[torch.arange(len(found)), picked].sum().item()
    assert scored == pytest.approx(losses["loss_nats"].sum(), rel=1e-4)


# --- Perplexity and its interval ---


def frame(tokens, losses):
    return pd.DataFrame({"tokens": tokens, "loss_nats": losses})


def test_perplexity_weights_tokens_not_rows():
    table = summarize_perplexity({"base": frame([1, 3], [4.0, 4.0]), "tuned": frame([1, 3], [2.0, 2.0])})
    assert table["loss_nats"].tolist() == [2.0, 1.0, -1.0]
    assert table["perplexity"].tolist() == pytest.approx([math.e**2, math.e, math.exp(-1)])
    assert table["tokens"].tolist() == [4, 4, 4]


def test_the_interval_is_that_of_the_normal_theory_on_equal_rows():
    rows = frame([10] * 400, 10 * np.random.default_rng(1).normal(2.0, 0.5, 400))
    bounds = summarize_perplexity({"base": rows}).loc["base", ["low", "high"]].tolist()
    half = 1.96 * (rows["loss_nats"] / 10).std() / math.sqrt(400)
    middle = rows["loss_nats"].mean() / 10
    assert bounds == pytest.approx([middle - half, middle + half], abs=half * 0.15)


def test_the_interval_of_the_difference_is_paired():
    hard = np.random.default_rng(2).normal(20.0, 8.0, 100)
    table = summarize_perplexity({"base": frame([10] * 100, hard), "tuned": frame([10] * 100, hard - 1.0)})
    width = table["high"] - table["low"]
    assert width["tuned - base"] == pytest.approx(0.0, abs=1e-9)
    assert width["base"] > 0.1


@pytest.mark.parametrize(
    ("rows", "told"),
    [
        ({"base": frame([1], [1.0]), "tuned": frame([2], [1.0])}, "same rows"),
        ({"base": frame([0], [0.0])}, "at least one scored token"),
        *(
            (rows, rf"a {type(rows).__name__}; expected .* summarize_row_losses")
            for rows in ({}, None, [], {"base": 3}, pd.DataFrame({"tokens": [1]}))
        ),
    ],
)
def test_models_measured_on_other_rows_and_no_tables_of_losses_are_refused(rows, told):
    with pytest.raises(ValueError, match=told):
        summarize_perplexity(rows)


def test_rows_of_another_layout_are_named():
    def tokenizer(text):
        return SimpleNamespace(input_ids=list(map(ord, text)))

    tokenizer.eos_token = "$"
    rows = [{"prompt": "a", "completion": "b"}, {"instruction": "a", "input": "", "output": "b"}]
    with pytest.raises(ValueError, match=r"Row 1 .*'instruction', 'input', 'output'.*to_prompt_completion"):
        encode_rows(tokenizer, rows, 8)


# --- Answers and their ends ---

EOS = 9
TOKENS = {"base": torch.tensor([[1, 2, 3], [1, EOS, EOS]]), "tuned": torch.tensor([[EOS, 4, 4], [1, 2, EOS]])}
ROWS = {name: pd.DataFrame({"eos_probability": [0.2, 0.4, float("nan")]}) for name in TOKENS}


class Letters:
    """A tokenizer of ten letters; the tenth is EOS."""

    eos_token_id = EOS

    def decode(self, ids, skip_special_tokens):
        assert skip_special_tokens
        return "".join("abcdefghi<"[int(i)] for i in ids if int(i) != EOS)


def test_generations_end_at_their_first_eos():
    table = evaluation.summarize_generations(Letters(), ["p", "q"], TOKENS)
    assert table.to_dict("list") == {
        "prompt": ["p", "q"],
        "base": ["bcd", "b"],
        "base_tokens": [3, 2],
        "base_stopped": [False, True],
        "tuned": ["", "bc"],
        "tuned_tokens": [1, 3],
        "tuned_stopped": [True, True],
    }
    with pytest.raises(ValueError, match="2 answers for 1 prompts"):
        evaluation.summarize_generations(Letters(), ["p"], TOKENS)


def test_rendered_answers_are_escaped_and_say_how_they_ended():
    table = evaluation.summarize_generations(Letters(), ["<b>p</b>", "q"], TOKENS)
    table.loc[0, "tuned"] = "<script>alert(1)</script>"
    page = evaluation.render_generations(table).data
    assert "<script>" not in page
    assert "<b>p" not in page
    for shown in ("<th style='text-align:left'>tuned</th>", "&lt;script&gt;", "cut after 3 tokens"):
        assert shown in page
    assert "stopped after 2 tokens" in page


def test_stops_are_counted():
    table = evaluation.summarize_stops(ROWS, TOKENS, EOS)
    assert table.loc["base", ["stopped", "prompts"]].tolist() == [1, 2]
    assert table["stopped_share"].tolist() == [0.5, 1.0]
    assert table["median_tokens"].tolist() == [2.5, 2.0]
    assert table["eos_probability"].tolist() == pytest.approx([0.3, 0.3])


def test_the_figure_has_a_dot_a_row_and_the_counts_for_any_number_of_models():
    names = [f"model {n}" for n in range(9)]
    rows, tokens = dict.fromkeys(names, ROWS["base"]), dict.fromkeys(names, TOKENS["base"])
    ax = evaluation.plot_stops(rows, evaluation.summarize_stops(rows, tokens, EOS))
    assert [len(dots.get_offsets()) for dots in ax.collections] == [2] * 9
    labels = [label.get_text() for label in ax.get_yticklabels()]
    assert labels == [f"{name}:\n1 of 2\nanswers stop" for name in names]
    assert len({tuple(dots.get_facecolor()[0]) for dots in ax.collections[:5]}) == 5
    assert "model 0 0.300, model 1 0.300," in ax.get_title()
    assert "probability of EOS" in ax.get_xlabel()


# --- Merging ---


def test_kl_and_top1_by_hand():
    reference = torch.log(torch.tensor([[0.5, 0.5 - 1e-9, 1e-9], [0.9, 0.05, 0.05]]))
    merged = torch.log(torch.tensor([[0.25, 0.75 - 1e-9, 1e-9], [0.9, 0.05, 0.05]]))
    found = summarize_merge_fidelity(reference, merged)
    kl = 0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75)
    assert found.tolist() == pytest.approx([kl / 2, kl, 0.5, 2], rel=1e-4)
    check_merge_fidelity(reference, reference.clone(), reference, layers=32)
    for other in (merged, reference * float("nan")):
        with pytest.raises(EvaluationError, match="fresh 16-bit"):
            check_merge_fidelity(reference, other, reference, layers=32)
    with pytest.raises(ValueError, match="differ"):
        summarize_merge_fidelity(reference, merged[:1])


def test_a_16_bit_merge_is_faithful_and_a_lost_adapter_is_not(trained, encoded):
    base = AutoModelForCausalLM.from_pretrained(trained.profile.model_id, dtype=torch.bfloat16)
    model, rows = PeftModel.from_pretrained(base, trained.adapter), encoded[:4]
    layers = model.config.num_hidden_layers
    reference = next_token_log_probs(model, rows)
    with model.disable_adapter():
        without_adapter = next_token_log_probs(model, rows)
    merged = next_token_log_probs(model.merge_and_unload(), rows)
    check_merge_fidelity(reference, merged, without_adapter, layers)
    with pytest.raises(EvaluationError, match="not onto the quantized one"):
        check_merge_fidelity(reference, without_adapter, without_adapter, layers)


@pytest.mark.parametrize(("times", "passes"), [(10, False), (15, False), (17, True)])
def test_a_divergence_beyond_rounding_is_held_against_what_the_adapter_changes(times, passes):
    """The base's divergence is so many times the merged model's, by bisection on the odds of two tokens."""

    def tilted(by):
        return torch.log(torch.tensor([[0.5 + by, 0.5 - by]], dtype=torch.float64))

    reference, merged = tilted(0), tilted(0.12)
    goal, low, high = times * -math.log(1 - 0.24**2) / 2, 0.12, 0.5
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if -math.log(1 - 4 * middle**2) / 2 < goal else (low, middle)
    without = tilted(low)
    assert summarize_merge_fidelity(reference, merged)["kl_nats"] > 0.028  # what 32 layers explain
    with contextlib.nullcontext() if passes else pytest.raises(EvaluationError, match="a sixteenth"):
        check_merge_fidelity(reference, merged, without, layers=32)
