"""Prompt formats: which is chosen, what is scored, and the template that is saved."""

import json
from pathlib import Path

import pytest
from datasets import Dataset
from tiny_models import build_trainer

from llama_sft_helpers import data

SHIPPED = Path(__file__).parents[2] / "llama_sft_helpers" / "datasets" / "alpaca_mini.jsonl"
ROWS = [json.loads(line) for line in SHIPPED.read_text(encoding="utf-8").splitlines()]
SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
TALK = [
    ("system", "Be brief.\n"),
    ("user", "Name a prime."),
    ("assistant", "7"),
    ("tool", '{"answer": 11}'),
    ("assistant", "11, says the tool.\n\nOr 13."),
    ("user", "한국의 수도는?"),
    ("assistant", "서울입니다. 🙂"),
]


def encode(row, tokenizer):
    """The ids and labels that a row is trained with."""
    (encoded,) = data.format_rows(Dataset.from_list([row]), tokenizer, "chat")
    return encoded


def chat(*turns):
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


@pytest.fixture(scope="module")
def smollm2(smollm2_tokenizer):
    return smollm2_tokenizer


def by_hand(tokenizer, turns):
    """ChatML put together turn by turn from token ids, without any template: ids, and which are scored."""
    ids, scored = [], []
    turns = turns if turns[0][0] == "system" else [("system", SYSTEM), *turns]
    for role, content in turns:
        said = [*tokenizer(content).input_ids, tokenizer.convert_tokens_to_ids("<|im_end|>")]
        head = tokenizer(f"<|im_start|>{role}\n").input_ids
        ids += head + said + tokenizer("\n").input_ids
        scored += [False] * len(head) + [role == "assistant"] * len(said) + [False]
    last = len(scored) - scored[::-1].index(True)
    return ids[:last], scored[:last]


@pytest.mark.parametrize("turns", [TALK, TALK[1:3], TALK[:5], [*TALK, ("user", "Thanks!")]])
def test_all_assistant_turns_are_scored_and_nothing_else(smollm2, turns):
    ids, scored = by_hand(smollm2, turns)
    encoded = encode(chat(*turns), smollm2)
    assert encoded["input_ids"] == ids
    assert encoded["labels"] == [token if mark else -100 for token, mark in zip(ids, scored, strict=True)]


def test_the_trainer_takes_the_scored_tokens_as_they_are(smollm2, tiny_model, tmp_path):
    rows = data.format_rows(Dataset.from_list([chat(*TALK), chat(*TALK[1:3])]), smollm2, "chat")
    expected = sorted(label for row in rows["labels"] for label in row if label != -100)
    for packing in (False, True):
        trainer = build_trainer(tiny_model, tmp_path, smollm2, rows, max_length=512, packing=packing)
        (batch,) = trainer.get_train_dataloader()
        assert sorted(label for label in batch["labels"].flatten().tolist() if label != -100) == expected


def test_a_template_that_changes_earlier_turns_or_forgets_eos_is_refused(smollm2):
    smollm2 = type(smollm2)(tokenizer_object=smollm2.backend_tokenizer, eos_token="<|im_end|>")
    last_only = "{% for m in messages %}{{ m.content if loop.last else '' }}<|im_end|>{% endfor %}"
    for template in (last_only, "{% for m in messages %}{{ m.content }}{% endfor %}"):
        smollm2.chat_template = template
        with pytest.raises(data.DataError, match=r"Turn \d cannot be found.*prompt_format='alpaca'"):
            encode(chat(*TALK), smollm2)


def test_the_format_is_chosen_from_data_and_tokenizer(smollm2, tiny_tokenizer):
    def chosen(layout, tokenizer, asked="auto"):
        return data.choose_prompt_format(layout, tokenizer, asked)[0]

    assert chosen("alpaca", smollm2) == chosen("messages", smollm2) == "chat"
    assert chosen("alpaca", tiny_tokenizer) == chosen("messages", tiny_tokenizer) == "alpaca"
    assert chosen("prompt-completion", smollm2) == chosen("prompt-completion", smollm2, "alpaca") == "plain"
    assert chosen("alpaca", smollm2, "alpaca") == "alpaca"
    tiny_tokenizer.chat_template = smollm2.chat_template  # a base model that carries another's template
    assert chosen("messages", tiny_tokenizer) == "alpaca"
    tiny_tokenizer.chat_template = None
    for layout, asked in (("alpaca", "plain"), ("messages", "chat")):
        with pytest.raises(data.DataError, match="take 'auto'"):
            chosen(layout, tiny_tokenizer, asked)


@pytest.mark.parametrize("name", ["tiny", "smollm2"])
def test_alpacas_saved_template_writes_the_training_prompt_token_for_token(name, smollm2, tiny_tokenizer):
    tokenizer = {"tiny": tiny_tokenizer, "smollm2": smollm2}[name]
    template = data.training_template(tokenizer, "alpaca")

    def ids(messages, **options):
        done = tokenizer.apply_chat_template(messages, chat_template=template, **options)
        return done["input_ids"] if hasattr(done, "keys") else done

    for row in ROWS:
        context = [{"role": "input", "content": row["input"]}] if row["input"] else []
        asked = [*context, {"role": "user", "content": row["instruction"]}]
        example = data.to_prompt_completion(row)
        assert ids(asked, add_generation_prompt=True) == tokenizer(example["prompt"]).input_ids
        whole = example["prompt"] + example["completion"] + tokenizer.eos_token
        assert ids([*asked, {"role": "assistant", "content": row["output"]}]) == tokenizer(whole).input_ids
    for talk in (chat(*TALK[:3]), chat(*TALK)):
        prompt = data.to_prompt_completion(talk)["prompt"]
        assert ids(talk["messages"][:-1], add_generation_prompt=True) == tokenizer(prompt).input_ids


def test_a_prompt_has_the_tokens_that_stand_before_the_answer_in_training(smollm2, tiny_tokenizer):
    row = {"instruction": "Add 2 and 2.", "output": "4"}
    bos_first = "{{ bos_token }}" + smollm2.chat_template.replace("<|im_end|>", "<|end_of_text|>")
    for tokenizer, template in ((smollm2, smollm2.chat_template), (tiny_tokenizer, bos_first)):
        tokenizer.chat_template = template
        encoded = encode(row, tokenizer)
        last = len(encoded["labels"]) - encoded["labels"][::-1].index(-100)
        for asked in (row, "Add 2 and 2."):
            prompt = data.render_prompt(asked, tokenizer, "chat")
            assert tokenizer(prompt).input_ids == encoded["input_ids"][:last]
    assert data.training_template(smollm2, "chat") == smollm2.chat_template
    assert data.training_template(smollm2, "plain") is None
    assert data.render_prompt("Add 2 and 2.", smollm2, "plain") == "Add 2 and 2."
    for asked in (row, "Add 2 and 2."):  # 09 asks with rows
        assert data.render_prompt(asked, smollm2, "alpaca") == data.to_prompt_completion(row)["prompt"]


def test_rows_are_judged_by_the_format_they_are_trained_in(smollm2):
    with_tool = chat(*TALK[:5])
    assert data.summarize_rows([with_tool], smollm2).attrs["usable"] == []
    size = len(by_hand(smollm2, TALK[:5])[0])
    fits = data.summarize_rows([with_tool], smollm2, size, "chat")
    assert fits.attrs["usable"] == [0]
    assert data.summarize_rows([with_tool], smollm2, size - 1, "chat").loc["too-long", "rows"] == 1
    for row in (chat(("user", "a")), chat(("user", "a<|im_end|>"), ("assistant", "b"))):
        assert data.summarize_rows([row], smollm2, size, "chat").attrs["usable"] == []


@pytest.mark.parametrize("prompt_format", ["alpaca", "chat"])
def test_rows_are_sorted_by_their_tokens_and_keep_their_order_where_equally_long(smollm2, prompt_format):
    rows = [{"instruction": f"Say it: {n}", "output": "yes " * (1 + n % 3)} for n in range(9)]
    formatted = data.format_rows(Dataset.from_list(rows), smollm2, prompt_format)
    done = data.sort_by_length(formatted, smollm2)
    assert done.to_list() == [formatted[n] for n in (0, 3, 6, 1, 4, 7, 2, 5, 8)]
