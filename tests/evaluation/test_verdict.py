"""Tasks, forgetting and the verdict, each against an independent truth."""

import json
from pathlib import Path

import pandas as pd
import pytest
import torch

from llama_sft_helpers.evaluation import (
    measure_forgetting,
    read_tasks,
    score_tasks,
    summarize_perplexity,
    summarize_tasks,
    summarize_verdict,
)

ROOT = Path(__file__).parents[2]


# An answer that is right for each shipped task, written by hand, and one that is not.
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


def scored(tokenizer, answers, tasks=None):
    tasks = tasks or read_tasks()
    tokenizer.pad_token = tokenizer.eos_token
    return score_tasks(Scripted(tokenizer, answers), tokenizer, tasks, "{}".format)


def test_right_answers_are_right_and_empty_or_wordy_ones_wrong(tiny_tokenizer):
    answers = [a.replace("\\n", "\n") for line in RIGHT.splitlines() for a in line.split("|")]
    right = scored(tiny_tokenizer, answers)
    assert right["right"].all(), right[~right["right"]]
    for wrong in ("", "I like 5 green apples.\n1, 2\n\nyes and no\n{}"):
        assert not scored(tiny_tokenizer, [wrong] * len(answers))["right"].any()


def test_the_shipped_tasks_and_texts_are_in_no_training_row():
    data = (ROOT / "llama_sft_helpers/datasets/alpaca_mini.jsonl").read_text(encoding="utf-8")
    assert not [task for task in read_tasks() if json.dumps(task["instruction"])[1:-1] in data]
    texts = (ROOT / "llama_sft_helpers/evaluation/plain_text.txt").read_text(encoding="utf-8")
    assert not [text for text in texts.split("\n\n") if text[:40] in data]
    assert len(read_tasks()) == 24


def test_a_task_that_is_none_is_refused(tmp_path):
    path = tmp_path / "tasks.jsonl"
    path.write_text('{"kind": "k", "instruction": "i", "check": "taste", "expected": "e"}')
    with pytest.raises(ValueError, match=r"Line 1 .*taste.*exact, regex, number, lines"):
        read_tasks(path)


def test_batched_answers_are_those_of_one_prompt_alone(trained, tiny_model):
    tasks = read_tasks()[:3]
    table = score_tasks(tiny_model, trained.tokenizer, tasks, "{} ->".format, max_new_tokens=8)
    for task, answer in zip(tasks, table["answer"], strict=True):
        batch = trained.tokenizer(f"{task['instruction']} ->", return_tensors="pt")
        ids = tiny_model.generate(**batch, max_new_tokens=8, do_sample=False)[
            0, batch["input_ids"].shape[1] :
        ]
        assert answer == trained.tokenizer.decode(ids, skip_special_tokens=True).strip()


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
    texts = ["The river is old.", "Bread rises because yeast eats the sugar."]
    table = measure_forgetting(trained.model, trained.tokenizer, texts)
    nats, divergence, tokens = {"base": 0.0, "tuned": 0.0}, 0.0, 0
    for text in texts:
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
        measure_forgetting(trained.model, trained.tokenizer, [])


@pytest.mark.parametrize(
    ("changes", "lost", "expected", "advised"),
    [
        (
            [-1.0] * 40,
            0,
            ["Yes: the loss on 40", "Yes: 0 of 24 were right before, 24 after", "No: "],
            [False] * 3,
        ),
        ([1.0] * 40, 24, ["No: the loss on 40", "No, it is worse: 24 of 24", "Yes: "], [True] * 3),
        (
            [-1.0, 1.0] * 10,
            12,
            ["It cannot be told: the loss on 20", "It cannot be told: 12 of 24", "It cannot"],
            [True, False, False],
        ),
    ],
)
def test_the_verdict_says_what_can_be_told(changes, lost, expected, advised):
    base = pd.DataFrame({"tokens": 10, "loss_nats": [20.0] * len(changes)})
    losses = summarize_perplexity({"base": base, "tuned": base.assign(loss_nats=base["loss_nats"] + changes)})
    before = [True] * lost + [False] * (24 - lost)
    tasks = tasks_table(before, [not right for right in before])
    table = summarize_verdict(losses, tasks=tasks, forgetting=losses.assign(kl_nats=0.125))
    for verdict, start in zip(table["verdict"], expected, strict=True):
        assert verdict.startswith(start), verdict
    assert [bool(advice) for advice in table["advice"]] == advised
    assert "0.125 nats a token (KL)" in table["verdict"].iloc[2]
    assert len(summarize_verdict(losses)) == 1
