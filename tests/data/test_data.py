"""Rows, tokens, labels, lengths, packing against other truths: tiktoken, hand-made masks, brute force."""

import ast
import html
import itertools
import json
import re
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import tiny_models
import torch
import transformers
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig

from llama_sft_helpers import data

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))
import tokenize_52k  # noqa: E402
from llama3_tokenizer import build_llama3_tokenizer, special_tokens, vocabulary_file  # noqa: E402

SHIPPED = ROOT / "llama_sft_helpers" / "datasets" / "alpaca_mini.jsonl"
ROWS = [json.loads(line) for line in SHIPPED.read_text(encoding="utf-8").splitlines()]
LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@pytest.fixture(scope="module")
def llama3():
    return build_llama3_tokenizer()


@pytest.fixture(scope="module")
def tiktoken_llama3():
    """Meta's vocabulary read by another implementation: what the fast tokenizer is compared with."""
    import tiktoken
    from tiktoken.load import load_tiktoken_bpe

    special = {token: 128_000 + n for n, token in enumerate(special_tokens())}
    ranks = load_tiktoken_bpe(str(vocabulary_file()))
    return tiktoken.Encoding("llama3", pat_str=LLAMA3_PATTERN, mergeable_ranks=ranks, special_tokens=special)


@pytest.fixture(scope="module")
def examples():
    return Dataset.from_list([data.to_prompt_completion(row) for row in ROWS])


PACKED = {
    "max_length": 1024,
    "packing": True,
    "packing_strategy": "bfd",
    "per_device_train_batch_size": 1,
}


def train_batches(tokenizer, rows, folder, **changes):
    """The batches that SFTTrainer would train on."""
    tokenizer.pad_token = data.choose_pad_token(tokenizer)
    options = {"max_length": 2048, "per_device_train_batch_size": 8, **changes}
    model = tiny_models.random_model(vocab_size=len(tokenizer))
    trainer = tiny_models.build_trainer(model, folder, tokenizer, rows, **options)
    return list(trainer.get_train_dataloader())


def documents_of(batch):
    """Where each document of a packed batch starts and ends."""
    starts = [n for n, position in enumerate(batch["position_ids"][0].tolist()) if position == 0]
    return list(itertools.pairwise([*starts, batch["input_ids"].shape[1]]))


def test_summarize_tokens_counts_bytes_and_proves_the_round_trip(llama3, tiktoken_llama3):
    texts = {"English": "The model stops.", "Korean": "모델이 멈춘다.", "spaces": " a , b  .\n\n c"}
    table = data.summarize_tokens(llama3, texts)
    for name, text in texts.items():
        assert table.loc[name, "tokens"] == len(tiktoken_llama3.encode_ordinary(text))
        assert table.loc[name, "bytes"] == len(text.encode("utf-8"))
    assert table.loc["Korean", "bytes"] == 6 * 3 + 2
    assert table["round_trip"].all()


def test_summarize_tokenizer(llama3, tiny_tokenizer):
    table = data.summarize_tokenizer(llama3)
    assert table.loc["eos token", "id"] == 128_001
    assert table.loc["pad token", "value"] is None
    assert table.loc["special tokens", "value"] == "256 tokens"
    assert table.loc["BOS in front of every text", "value"]
    assert data.summarize_tokenizer(tiny_tokenizer).loc["bos token", "id"] == tiny_tokenizer.bos_token_id


def test_render_tokens_shows_partial_characters_as_bytes(tiny_tokenizer):
    text = "<b>힣 &"
    page = data.render_tokens(tiny_tokenizer, {"name": text}).data
    assert "‹ED" in page  # 힣 is ED 9E A3 in UTF-8
    shown = html.unescape("".join(re.findall(r'title="id \d+ ">(.*?)</span>', page)))
    raw = re.sub(r"‹([0-9A-F ]+)›", lambda found: bytes.fromhex(found[1]).decode("latin-1"), shown)
    assert raw.encode("latin-1").decode() == text


def test_benchmark_measures_what_it_says(llama3, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(tokenize_52k, "build_llama3_tokenizer", lambda: llama3)
    out = tmp_path / "new" / "result.json"
    monkeypatch.setattr(sys, "argv", ["tokenize_52k.py", "--rows", "400", "--out", str(out)])
    assert tokenize_52k.main() == 0
    result = json.loads(out.read_text(encoding="utf-8"))
    expected = 0
    for n in range(400):  # the benchmark numbers the instructions
        row = ROWS[n % len(ROWS)]
        example = data.to_prompt_completion({**row, "instruction": f"{row['instruction']} ({n})"})
        expected += len(llama3(example["prompt"] + example["completion"]).input_ids) + 1
    assert (result["rows"], result["tokens"]) == (400, expected)
    assert result["total_seconds"] == pytest.approx(sum(result["seconds"].values()), abs=0.01)


def fake_tokenizer(special, **roles):
    tokens = {n: SimpleNamespace(content=token, special=True) for n, token in enumerate(special)}
    known = {f"{role}_token": None for role in ("eos", "bos", "pad", "unk", "sep", "cls", "mask")}
    return SimpleNamespace(added_tokens_decoder=tokens, chat_template=None, **{**known, **roles})


SMOLLM2S = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<repo_name>", "<empty_output>"]
LLAMA3S = {"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>"}


@pytest.mark.parametrize(
    ("special", "roles", "expected"),
    [
        (["</s>", "<mine>"], {"eos_token": "</s>", "pad_token": "<mine>"}, "<mine>"),
        (["<s>", "</s>", "<pad>", "<x>"], {"eos_token": "</s>", "bos_token": "<s>"}, "<pad>"),
        (["</s>", "<reserved_0>", "<reserved_1>", "<x>"], {"eos_token": "</s>"}, "<reserved_0>"),
        (["<end>", "<unk>", "<user>", "<x>"], {"eos_token": "<end>", "pad_token": "<end>"}, "<x>"),
        (SMOLLM2S, {"eos_token": "<|im_end|>", "pad_token": "<|im_end|>"}, "<empty_output>"),
        (special_tokens("3.0"), LLAMA3S, "<|reserved_special_token_2|>"),
        (special_tokens("3.1"), LLAMA3S, "<|finetune_right_pad_id|>"),
    ],
)
def test_pad_token_order(special, roles, expected):
    tokenizer = fake_tokenizer(special, unk_token="<unk>", **roles)
    tokenizer.chat_template = "{{ '<user>' }}"
    assert data.choose_pad_token(tokenizer) == expected


def test_llama_3_has_a_free_pad_token_and_it_is_left_to_the_caller(llama3):
    assert llama3.convert_tokens_to_ids(special_tokens("3.0")) == list(range(128_000, 128_256))
    llama3.pad_token = None
    assert llama3.convert_tokens_to_ids(data.choose_pad_token(llama3)) == 128_004
    assert (len(llama3), llama3.pad_token) == (128_256, None)


def test_no_free_pad_token_is_an_error():
    with pytest.raises(data.DataError, match=r"no-pad-token.*resize the embeddings yourself"):
        data.choose_pad_token(fake_tokenizer(["<s>", "</s>"], bos_token="<s>", eos_token="</s>"))


def test_templates_are_alpacas():
    example = data.to_prompt_completion({"instruction": " Add. ", "input": "2 {and} 2", "output": "4\n"})
    assert example["completion"] == "4"
    assert example["prompt"] == (
        "Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request.\n\n### Instruction:\nAdd.\n\n"
        "### Input:\n2 {and} 2\n\n### Response:\n"
    )
    for row in (
        {"instruction": "Add.", "output": "4"},
        {"instruction": "Add.", "input": None, "output": "4"},
    ):
        assert data.to_prompt_completion(row)["prompt"] == (
            "Below is an instruction that describes a task. Write a response that appropriately completes "
            "the request.\n\n### Instruction:\nAdd.\n\n### Response:\n"
        )


def chat(*texts):
    return [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(texts)]


SYSTEM = {"role": "system", "content": "Be brief."}


@pytest.mark.parametrize(
    ("turns", "instruction", "context", "output"),
    [
        (chat("Add.", "4"), "Add.", "", "4"),
        (chat("Prime?", "7", "A larger one?", "11"), "A larger one?", "User: Prime?\n\nAssistant: 7", "11"),
        ([SYSTEM, *chat("Add.", "4")], "Add.", "System: Be brief.", "4"),
    ],
)
def test_chats_get_the_same_template(turns, instruction, context, output):
    alpaca = {"instruction": instruction, "input": context, "output": output}
    assert data.to_prompt_completion({"messages": turns}) == data.to_prompt_completion(alpaca)


def test_prompt_completion_rows_stay_as_they_are():
    row = {"prompt": " Q: ", "completion": " A", "other": 1}
    assert data.to_prompt_completion(row) == {"prompt": " Q: ", "completion": " A"}


GOOD = {"instruction": "Add 2 and 2.", "input": "", "output": "4"}
BAD_ROWS = {
    "missing-column": {"instruction": "a", "input": ""},
    "null-cell": {**GOOD, "output": None},
    "wrong-type": {**GOOD, "output": 4},
    "empty-output": {**GOOD, "output": " \n"},
    "cell-too-long": {**GOOD, "input": "x" * 1_000_000},
    "lone-surrogate": {**GOOD, "output": "4 \ud83d"},
}


@pytest.mark.parametrize("reason", BAD_ROWS)
def test_bad_rows_are_named_and_counted(reason):
    other = [{**GOOD, "output": str(n)} for n in range(3)]
    rows = [*other, BAD_ROWS[reason], BAD_ROWS[reason]]
    table = data.summarize_rows(rows)
    assert table.loc[reason, "rows"] == 2
    assert table.loc[reason, "first_rows"] == [3, 4]
    assert table["rows"].sum() == 2
    assert table.attrs["usable"] == [0, 1, 2]
    with pytest.raises(data.DataError, match=rf"{reason}: 2 of 5 rows, first \[3, 4\] \(") as raised:
        data.check_rows(rows)
    assert raised.value.reason == reason
    with pytest.raises(data.DataError, match=r"Row 7: "):
        data.to_prompt_completion(BAD_ROWS[reason], 7)


def test_duplicates_special_tokens_and_long_rows(tiny_tokenizer):
    rows = [{**GOOD, "output": text} for text in ("4", "4 ", "4<|end_of_text|>5", "4 " * 300)]
    table = data.summarize_rows(rows, tiny_tokenizer, max_length=256)
    assert {name: found for name, found in table["first_rows"].items() if found} == {
        "duplicate": [1],
        "special-token": [2],
        "too-long": [3],
    }


def test_a_row_of_exactly_max_length_fits(tiny_tokenizer):
    example = data.to_prompt_completion(GOOD)
    size = len(tiny_tokenizer(example["prompt"] + example["completion"] + tiny_tokenizer.eos_token).input_ids)
    for missing in (0, 1):
        table = data.summarize_rows([GOOD], tiny_tokenizer, max_length=size - missing)
        assert table.loc["too-long", "rows"] == missing


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        ({"train": [GOOD], "test": [GOOD]}, r"dict with the keys \['train', 'test'\].*dataset\['train'\]"),
        ({}, r"\[wrong-type\] Got a dict with the keys \[\]; expected a Dataset or a list of rows"),
        ("rows.jsonl", r"'rows\.jsonl', a str.*load_rows"),
        (None, "None, a NoneType"),
        (["a", "b"], r"row 0 is 'a', a str"),
        (pd.DataFrame([GOOD]), r"a DataFrame.*Dataset\.from_pandas"),
        ([], "no-rows"),
        ([{"question": "a", "answer": "b"}], r"'question', 'answer'.*instruction \+ output.*rename_column"),
    ],
)
def test_what_is_no_data_set_is_named(dataset, message):
    with pytest.raises(data.DataError, match=message):
        data.check_rows(dataset)


CALL = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "add"}}]}


@pytest.mark.parametrize(
    "messages",
    [
        None,
        "text",
        [{"role": "user"}],
        [{"role": "user", "content": "a"}],
        [{"role": "assistant", "content": "a"}],
        [{"content": "a"}, *chat("b", "c")],
        [{"role": None, "content": "a"}, *chat("b", "c")],
        [*chat("a"), CALL],
        [*chat("a"), CALL, *chat("b", "c")],
    ],
)
def test_chats_of_a_wrong_shape(messages):
    with pytest.raises(data.DataError, match="messages"):
        data.check_rows([{"messages": messages}])


def test_a_chat_template_can_write_tool_calls():
    rows = [{"messages": messages} for messages in ([*chat("a"), CALL], [*chat("a"), CALL, *chat("b", "c")])]
    assert data.summarize_rows(rows, prompt_format="chat").attrs["usable"] == [0, 1]
    assert data.summarize_rows([{"messages": [CALL, CALL]}], prompt_format="chat").attrs["usable"] == [0]


def test_good_rows_of_all_layouts_pass(tiny_tokenizer):
    data.check_file(SHIPPED)
    data.check_rows(data.load_rows(SHIPPED)[0], tiny_tokenizer, max_length=1024)
    data.check_rows([{"prompt": "a", "completion": "b"}], tiny_tokenizer)
    data.check_rows(Dataset.from_list([{"messages": chat("a", "b")}]), tiny_tokenizer)


def test_control_tokens_that_the_tokenizer_does_not_name_are_found_too(tiny_tokenizer):
    """As Llama 3's: BOS and EOS are named, the other special tokens are only in its table."""
    few = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tiny_tokenizer.backend_tokenizer, eos_token="<|end_of_text|>"
    )
    assert "<|eot_id|>" not in few.all_special_tokens
    rows = [{**GOOD, "output": f"hi {token}"} for token in ("<|eot_id|>", "<b>")]
    assert data.summarize_rows(rows, few).loc["special-token", "first_rows"] == [0]


def test_boundary_is_refused_where_a_token_reaches_across(llama3, tiny_tokenizer, examples):
    good = {"prompt": "### Response:\n", "completion": "The"}
    spaced = {"prompt": "### Response: ", "completion": "The answer"}
    for tokenizer in (llama3, tiny_tokenizer):
        data.check_boundary(examples, tokenizer)
        with pytest.raises(data.TokenError, match=r"Row 1: .* together"):
            data.check_boundary([good, spaced], tokenizer)
    with pytest.raises(data.TokenError, match="Row 0"):
        data.check_boundary([{"prompt": "### Response:\n", "completion": "\n\nThe"}], llama3)


@settings(max_examples=150, deadline=None)
@given(*[st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=40) for _ in range(3)])
def test_boundary_holds_for_any_text(llama3, instruction, context, output):
    row = {"instruction": instruction, "input": context, "output": output}
    if output.strip() and "<|" not in instruction + context + output:
        data.check_boundary([data.to_prompt_completion(row)], llama3)


@pytest.fixture(scope="module")
def hand_made(tiktoken_llama3, examples):
    """Ids -> labels, worked out without trl: BOS and prompt masked, completion and EOS scored."""
    masks = {}
    for row in examples:
        prompt, completion = (tiktoken_llama3.encode_ordinary(row[key]) for key in ("prompt", "completion"))
        masks[(128_000, *prompt, *completion, 128_001)] = [-100] * (1 + len(prompt)) + [*completion, 128_001]
    return masks


def test_labels_of_real_batches_equal_a_hand_made_mask(llama3, hand_made, examples, tmp_path):
    seen = set()
    for batch in train_batches(llama3, examples, tmp_path):
        data.check_eos_is_trained(batch, llama3)
        table = data.summarize_loss_mask(batch, llama3)
        parts = (batch[key] for key in ("input_ids", "labels", "attention_mask"))
        for row, (ids, labels, mask) in enumerate(zip(*parts, strict=True)):
            size = int(mask.sum())
            key = tuple(ids[:size].tolist())
            assert labels[:size].tolist() == hand_made[key]
            assert (labels[size:] == -100).all()
            assert (ids[size:] == 128_004).all()
            scored = sum(label != -100 for label in hand_made[key])
            assert tuple(table.loc[row]) == (size - scored, scored - 1, 1, len(ids) - size, scored, True)
            seen.add(key)
    assert len(seen) == len(examples) >= 200


def test_packed_labels_equal_the_same_mask(llama3, hand_made, examples, tmp_path):
    found = 0
    for batch in train_batches(llama3, examples, tmp_path, **PACKED | {"per_device_train_batch_size": 2}):
        data.check_eos_is_trained(batch, llama3)
        for start, end in documents_of(batch):
            ids = tuple(batch["input_ids"][0, start:end].tolist())
            assert batch["labels"][0, start:end].tolist() == hand_made[ids]
            found += 1
    assert found == len(examples)


def plain_batch(tokenizer, pad_token, rows):
    tokenizer.pad_token = pad_token
    encoded = [tokenizer(row["prompt"] + row["completion"] + tokenizer.eos_token) for row in rows]
    return transformers.DataCollatorForLanguageModeling(tokenizer, mlm=False)(encoded)


def test_pad_equal_to_eos_loses_every_eos_in_the_plain_collator(llama3, examples):
    rows = examples.select(range(6))
    lost = plain_batch(llama3, llama3.eos_token, rows)
    assert not (lost["labels"] == llama3.eos_token_id).any()
    table = data.summarize_loss_mask(lost, llama3)
    assert table["eos"].tolist() == [1] * 6
    assert not table["eos_scored"].any()
    with pytest.raises(data.TokenError, match=r"6 of 6 rows train no EOS .*\[0, 1, 2, 3, 4\]"):
        data.check_eos_is_trained(lost, llama3)
    data.check_eos_is_trained(plain_batch(llama3, "<|reserved_special_token_2|>", rows), llama3)


def test_cut_rows_are_counted(tiny_tokenizer, examples, tmp_path):
    batches = train_batches(tiny_tokenizer, examples, tmp_path, max_length=128)
    cut = [~data.summarize_loss_mask(batch, tiny_tokenizer)["eos_scored"] for batch in batches]
    sizes = data.count_tokens(examples[:], tiny_tokenizer)
    pairs = zip(sizes["tokens"], sizes["prompt_tokens"], strict=True)
    assert int(pd.concat(cut).sum()) == sum(size > 128 > prompt for size, prompt in pairs) > 100


def test_batch_without_mask_or_positions_is_refused(tiny_tokenizer):
    ids = torch.tensor([[1, 2]])
    with pytest.raises(ValueError, match=r"input_ids.*expected attention_mask or position_ids"):
        data.summarize_loss_mask({"input_ids": ids, "labels": ids}, tiny_tokenizer)


def test_picture_shows_every_token_with_its_role(tiny_tokenizer):
    tiny_tokenizer.pad_token = data.choose_pad_token(tiny_tokenizer)
    encoded = [tiny_tokenizer(text + tiny_tokenizer.eos_token) for text in ("<script>&\n x", "한")]
    batch = transformers.DataCollatorForLanguageModeling(tiny_tokenizer, mlm=False)(encoded)
    batch["labels"][0, :3] = -100
    page = data.render_loss_mask(batch, tiny_tokenizer, rows=[0, 1]).data
    assert "<script>" not in page
    titles = re.findall(r'title="id (\d+) label (-?\d+), ([^"]+)"', page)
    counted = Counter(role for _, _, role in titles)
    table = data.summarize_loss_mask(batch, tiny_tokenizer).sum()
    assert counted["not scored"] == table["prompt"] == 4  # the first token of the second row too
    assert counted["scored"] == table["completion"]
    assert counted["EOS, scored"] == table["eos"] == 2
    assert f"&times; {table['pad']})" in page
    tokens, labels, _ = zip(*titles[: len(encoded[0].input_ids)], strict=True)
    assert list(map(int, tokens)) == encoded[0].input_ids
    assert list(map(int, labels)) == batch["labels"][0, : len(labels)].tolist()


def test_the_picture_speaks_without_styles(tiny_tokenizer):
    """GitHub strips styles: between the marks stands what is scored."""
    row = {"prompt": "Say:\n", "completion": "a b"}
    batch = plain_batch(tiny_tokenizer, data.choose_pad_token(tiny_tokenizer), [row])
    batch["labels"][0, : len(tiny_tokenizer("Say:\n").input_ids)] = -100
    eos = tiny_tokenizer.eos_token
    for label, marked in ((tiny_tokenizer.eos_token_id, f"«{eos}»"), (-100, f"[{eos}]")):
        batch["labels"][0, -1] = label
        page = data.render_loss_mask(batch, tiny_tokenizer, rows=[0]).data
        assert html.unescape(re.sub(r"<[^>]+>", "", page)).endswith(f"Say:⏎«a b»{marked}")
    page = data.render_tokens(tiny_tokenizer, {"two": "a b"}).data
    ids = tiny_tokenizer("a b", add_special_tokens=False).input_ids
    assert re.sub(r"<[^>]+>", "", page).count("|") == len(ids) - 1 > 0


def test_lengths_table_by_hand():
    lengths = [10] * 190 + [100] * 9 + [1000]
    table = data.summarize_lengths(lengths)
    assert table["rows_cut"].to_dict() == {128: 1, 256: 1, 512: 1, 1024: 0, 2048: 0, 4096: 0}
    kept = {128: 1900 + 900 + 128, 512: 1900 + 900 + 512, 1024: 3800}
    assert table["share_of_tokens_kept"][list(kept)].tolist() == pytest.approx(
        [n / 3800 for n in kept.values()]
    )
    assert table.index[table["recommended"]].tolist() == [128]  # 199 of 200 rows are whole: 99.5 %
    assert data.summarize_lengths([5000]).index[-1] == 5056


@pytest.mark.parametrize("lengths", [[], [0], [3, -1]])
def test_lengths_must_be_positive(lengths):
    with pytest.raises(ValueError, match="positive token counts"):
        data.summarize_lengths(lengths)


def test_count_tokens_agrees_with_tiktoken(llama3, tiktoken_llama3, examples):
    counted = data.count_tokens(examples[:], llama3)
    for key in ("prompt", "completion"):
        sizes = [len(tiktoken_llama3.encode_ordinary(text)) + 1 for text in examples[key]]  # BOS, EOS
        assert counted[f"{key}_tokens"] == sizes
    assert counted["tokens"] == np.add(counted["prompt_tokens"], counted["completion_tokens"]).tolist()


@pytest.mark.parametrize("batch_size", [1, 2, 3, 7])
def test_expected_padding_equals_brute_force(batch_size):
    lengths = [3, 9, 4, 4, 20, 7, 11]
    slots = []
    for order in itertools.permutations(range(7)):
        batches = [order[start : start + batch_size] for start in range(0, 7, batch_size)]
        slots.append(sum(max(lengths[i] for i in batch) * len(batch) for batch in batches))
    plan = data.plan_packing(lengths, batch_size, max_length=64)
    assert plan.loc["padded", "padding_share"] == pytest.approx(1 - sum(lengths) / np.mean(slots))
    assert plan["tokens"].tolist() == [58] * 3
    assert plan["batches"].tolist() == [-(-7 // batch_size)] * 2 + [1]
    assert data.plan_packing(lengths, batch_size, max_length=10).loc["padded", "tokens"] == 47


def test_padding_is_counted_in_real_batches_as_predicted(tiny_tokenizer, examples, tmp_path):
    lengths = data.count_tokens(examples[:], tiny_tokenizer)["tokens"]
    plan = data.plan_packing(lengths, batch_size=8, max_length=1024)
    changes = {"padded": {}, "sorted": {"train_sampling_strategy": "group_by_length"}, "packed": PACKED}
    loaders = {
        name: train_batches(tiny_tokenizer, examples, tmp_path, **change) for name, change in changes.items()
    }
    table = data.summarize_packing(loaders, plan)
    assert table["tokens"].tolist() == [sum(lengths)] * 3
    assert table.loc["packed", "padding_tokens"] == 0
    assert table["padding_share"].tolist() == pytest.approx(plan["padding_share"].tolist(), abs=0.04)
    pads = sum(int((batch["input_ids"] == tiny_tokenizer.pad_token_id).sum()) for batch in loaders["padded"])
    assert table.loc["padded", "padding_tokens"] == pads
    assert table.loc["padded", "padding_share"] > 4 * table.loc["sorted", "padding_share"]


def test_a_plan_for_fewer_rows_than_a_batch_holds():
    plan = data.plan_packing([10, 20], batch_size=8, max_length=64)
    assert plan["batches"].tolist() == [1, 1, 1]
    assert plan["padding_share"].tolist() == [0.25, 0.25, 0.0]  # both rows in 20 slots: 10 of 40 are padding
    for batch_size in (0, -1):
        with pytest.raises(ValueError, match=rf"batch_size={batch_size} .*expected at least 1"):
            data.plan_packing([10, 20], batch_size, 64)


def test_packed_documents_do_not_see_each_other(tiny_model, tiny_tokenizer, examples, tmp_path):
    """The pretrained tiny model; the loss alone is the one that the model itself computes."""
    from peft import LoraConfig, get_peft_model

    batches = train_batches(tiny_tokenizer, examples.select(range(40)), tmp_path, **PACKED)
    batch = max(batches, key=lambda batch: len(documents_of(batch)))
    table = data.summarize_isolation(tiny_model, batch)
    assert len(table) == len(documents_of(batch)) >= 3
    for document, (start, end) in enumerate(documents_of(batch)):
        part = {key: batch[key][:, start:end] for key in ("input_ids", "labels")}
        with torch.no_grad():
            assert table.loc[document, "alone"] == pytest.approx(tiny_model(**part).loss.item(), abs=1e-5)
    data.check_isolation(table)
    with pytest.raises(data.TokenError, match="it sees its neighbours"):
        data.check_isolation(table, column="without_position_ids")
    assert table.loc[0, "without_position_ids"] == pytest.approx(table.loc[0, "alone"], abs=1e-5)
    model = get_peft_model(tiny_model, LoraConfig(r=2, target_modules=["q_proj"], lora_dropout=0.5)).train()
    adapted = data.summarize_isolation(model, batch)
    assert adapted["alone"].tolist() == pytest.approx(table["alone"].tolist(), abs=1e-6)
    assert model.training
    table.loc[1, "packed"] = float("nan")
    with pytest.raises(data.TokenError, match="Row 1 of the block"):
        data.check_isolation(table)


def test_figures_are_labelled():
    import matplotlib.pyplot as plt

    ax = data.plot_lengths([10, 20, 300], max_length=256)
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("tokens in a row (EOS counted)", "rows")
    assert "max_length: 256 tokens" in [text.get_text() for text in ax.get_legend().get_texts()]
    ax = data.plot_packing([[60, 30], [50]] * 15, max_length=100)
    assert ax.get_title() == "45 rows in 30 blocks, 70.0% filled (hatched: free)"
    assert ax.get_ylabel() == "block (first 20)"
    assert sum(patch.get_width() for patch in ax.patches) == 20 * 100
    plt.close("all")


@pytest.mark.slow
def test_notebook_runs_on_llama_3s_own_tokenizer(tmp_path, monkeypatch):
    """As on Colab: Meta-Llama-3-8B's tokenizer and the A100's profile; only the rows are the shipped ones."""
    import nbformat
    from nbclient import NotebookClient

    folder = tmp_path / "llama3"
    tokenizer = build_llama3_tokenizer()
    tokenizer.save_pretrained(folder)
    LlamaConfig(vocab_size=128_256, hidden_size=4096, num_key_value_heads=8).save_pretrained(folder)
    monkeypatch.setenv("SFT_OUTPUT_DIR", str(tmp_path / "out"))
    notebook = nbformat.read(ROOT / "notebooks" / "05_data.ipynb", 4)
    call = "load_profile()"
    changed = f'load_profile("colab-a100", model_id={str(folder)!r}, dataset_id="local:alpaca_mini")'
    cells = [cell for cell in notebook.cells if cell.cell_type == "code" and call in cell.source]
    assert len(cells) == 1
    cells[0].source = cells[0].source.replace(call, changed)
    NotebookClient(notebook, timeout=180).execute()
    shown = json.dumps(notebook, ensure_ascii=False)
    assert "<|reserved_special_token_2|>', 128004" in shown
    assert "375 of 375 rows are used, 0 are left out" in shown


def test_what_05_says_that_korean_costs_with_llama3s_tokenizer(llama3):
    path = Path(__file__).parents[2] / "notebooks" / "05_data.ipynb"
    cells = {cell["id"]: "".join(cell["source"]) for cell in json.loads(path.read_text("utf-8"))["cells"]}
    texts = ast.literal_eval(cells["05-015"].removeprefix("both = ").partition("\ncost")[0])
    english, korean = data.summarize_tokens(llama3, texts)["tokens"]
    said = f"{english} tokens in English and {korean} in Korean, {korean / english:.1f} times"
    assert said in cells["05-014"]
