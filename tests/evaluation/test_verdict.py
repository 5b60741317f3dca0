"""Tasks, forgetting and the verdict, each against an independent truth."""

import json
from pathlib import Path

import pandas as pd
import pytest
import torch

from llama_sft_helpers import evaluation
from llama_sft_helpers.evaluation import read_tasks, score_tasks, summarize_tasks, summarize_verdict

PACKAGE = Path(__file__).parents[2] / "llama_sft_helpers"
TEXTS = (PACKAGE / "evaluation" / "plain_text.txt").read_text(encoding="utf-8").split("\n\n")
# An answer that is right for each shipped task, written by hand.
RIGHT = r"""13|The answer is 27.|7 times 6 = 42|8|12 + 12 + 12 = 36 eggs|14
apple\nplum\nfig|1\n2\n3\n4\n5|apple, melon, pear|A, B, C, D|- Joy.\n\n- Knowledge.|11, 7, 4
The train leaves at nine.|green-42-kettle|Snow fell on the quiet harbour.|ABC def GHI|3.14159
one two three two one|Yes.|no|{"colour": "red"}|HELLO|2024-03-05|4"""


class Scripted:
    """A model that writes the given answers, one a prompt."""

    device = "cpu"

    def __init__(self, tokenizer, answers):
        self.tokenizer, self.answers = tokenizer, iter(answers)

    def generate(self, input_ids, **_):
        answers = [next(self.answers) for _ in input_ids]
        made = self.tokenizer(answers, add_special_tokens=False, padding=True, return_tensors="pt").input_ids
        return torch.cat([input_ids, made], dim=1)


def test_right_answers_are_right_and_empty_or_wordy_ones_wrong(tiny_tokenizer):
    tiny_tokenizer.pad_token = tiny_tokenizer.eos_token

    def score(answers):
        return score_tasks(Scripted(tiny_tokenizer, answers), tiny_tokenizer, read_tasks(), "{}".format)

    answers = [a.replace("\\n", "\n") for line in RIGHT.splitlines() for a in line.split("|")]
    table = score(answers)
    assert table["right"].all(), table[~table["right"]]
    for wrong in ("", "I like 5 green apples.\n1, 2\n\nyes and no\n{}"):
        assert not score([wrong] * len(answers))["right"].any()


def test_the_shipped_tasks_and_texts_are_in_no_training_row():
    data = (PACKAGE / "datasets" / "alpaca_mini.jsonl").read_text(encoding="utf-8")
    assert not [task for task in read_tasks() if json.dumps(task["instruction"])[1:-1] in data]
    assert not [text for text in TEXTS if text[:40] in data]


@pytest.mark.parametrize("change", [{"check": "taste"}, {"points": "1"}])
def test_a_task_that_is_none_is_refused(change):
    with pytest.raises(ValueError, match=r"A task is .*exact, regex, number, lines"):
        score_tasks(None, None, [read_tasks()[0] | change], "{}".format)


def test_batched_answers_are_those_of_one_prompt_alone(trained, tiny_model):
    tokenizer, tasks = trained.tokenizer, read_tasks()[:3]
    for task, answer in zip(
        tasks, score_tasks(tiny_model, tokenizer, tasks, "{} ->".format)["answer"], strict=True
    ):
        ids = tokenizer(f"{task['instruction']} ->", return_tensors="pt").input_ids
        made = tiny_model.generate(ids, max_new_tokens=48, do_sample=False)[0, ids.shape[1] :]
        assert answer == tokenizer.decode(made, skip_special_tokens=True).strip()


def tasks_table(before, after):
    frame = pd.DataFrame({"kind": ["a", "b"] * (len(before) // 2), "instruction": list(range(len(before)))})
    return summarize_tasks(frame.assign(right=before), frame.assign(right=after))


def test_tasks_are_counted_by_kind_with_wilsons_interval():
    table = tasks_table([True, False, True, False], [True, True, False, True])
    assert table.loc["all", ["tasks", "before", "after", "gained", "lost"]].tolist() == [4, 2, 3, 2, 1]
    assert table.loc["b", ["before", "after"]].tolist() == [0, 2]
    assert table.loc["all", ["low", "high"]].tolist() == pytest.approx([0.3006, 0.9544], abs=1e-4)
    with pytest.raises(ValueError, match="same tasks"):
        summarize_tasks(pd.DataFrame({"instruction": ["a"]}), pd.DataFrame({"instruction": ["b"]}))


def test_forgetting_is_transformers_own_loss_and_torchs_own_divergence(trained):
    table = evaluation.measure_forgetting(trained.model, trained.tokenizer, TEXTS[:2])
    nats, divergence, tokens = {"base": 0.0, "tuned": 0.0}, 0.0, 0
    for text in TEXTS[:2]:
        ids = trained.tokenizer(text, return_tensors="pt").input_ids
        with torch.no_grad():
            tuned = trained.model(ids, labels=ids)
            with trained.model.disable_adapter():
                base = trained.model(ids, labels=ids)
        tokens += (n := ids.shape[1] - 1)
        nats["base"] += n * base.loss.item()
        nats["tuned"] += n * tuned.loss.item()
        p, q = (torch.log_softmax(out.logits[0, :-1].double(), -1) for out in (base, tuned))
        divergence += torch.nn.functional.kl_div(q, p, reduction="sum", log_target=True).item()
    for name, total in nats.items():
        assert table.loc[name, "loss_nats"] == pytest.approx(total / tokens, rel=1e-5)
    assert table.loc["tuned", "kl_nats"] == pytest.approx(divergence / tokens, rel=1e-4) != 0
    assert table.loc["base", "kl_nats"] == 0
    with pytest.raises(ValueError, match="texts is empty"):
        evaluation.measure_forgetting(trained.model, trained.tokenizer, [])


UNTOLD, LOWER = "It cannot be told", "Lower the learning rate"
CASES = [
    (
        [-1.0] * 40,
        0,
        ["Yes: the loss on 40", "Yes: 0 of 24 were right before, 24 after", "No: "],
        ["", "", ""],
    ),
    (
        [1.0] * 40,
        24,
        ["No: the loss on 40", "No, it is worse: 24 of 24", "Yes: "],
        [LOWER, LOWER, "A lower learning rate"],
    ),
    (
        [-1.0, 1.0] * 10,
        12,
        [f"{UNTOLD}: the loss on 20", f"{UNTOLD}: 12 of 24", UNTOLD],
        [f"{LOWER}, take fewer steps, or add rows. The interval reaches 0", "", ""],
    ),
    (
        [-1.0] * 4,
        12,
        ["Yes: the loss on 4", UNTOLD, "No: "],
        ["So few rows make the interval itself uncertain", "", ""],
    ),
]


@pytest.mark.parametrize(("changes", "lost", "verdicts", "advice"), CASES)
def test_the_verdict_says_what_can_be_told(changes, lost, verdicts, advice):
    base = pd.DataFrame({"tokens": 10, "loss_nats": [20.0] * len(changes)})
    tuned = base.assign(loss_nats=base["loss_nats"] + changes)
    losses = evaluation.summarize_perplexity({"base": base, "tuned": tuned})
    before = [True] * lost + [False] * (24 - lost)
    tasks = tasks_table(before, [not right for right in before])
    table = summarize_verdict(losses, tasks=tasks, forgetting=losses.assign(kl_nats=0.125))
    for column, expected in (("verdict", verdicts), ("advice", advice)):
        for found, start in zip(table[column], expected, strict=True):
            assert found.startswith(start), found
            assert bool(found) == bool(start)
    assert "0.125 nats per token (KL)" in table["verdict"].iloc[2]
    assert len(summarize_verdict(losses)) == 1


@pytest.mark.parametrize(("probability", "answer"), [(0.75, "Yes: "), (0.25, "No: ")])
def test_whether_it_stops_is_told_with_its_counts(probability, answer):
    losses = pd.DataFrame({"tuned - base": {"loss_nats": -1.0, "low": -1.1, "high": -0.9, "rows": 99}}).T
    stops = pd.DataFrame({"eos_probability": [0.5, probability], "stopped": [1, 8], "prompts": 10})
    row = summarize_verdict(losses, stops.set_axis(["base", "tuned"])).loc["Does it know when to stop?"]
    assert row["verdict"].startswith(answer)
    assert f"from 0.500 to {probability:.3f}; 8 of 10 answers stop (95%: 49% to 94%), 1 did" in row["verdict"]
    assert bool(row["advice"]) == (answer == "No: ")
