"""Rows, tokens, labels, lengths, packing against other truths: tiktoken, hand-made masks, brute force."""

import html
import itertools
import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import tiny_models
import torch
import transformers
from datasets import Dataset, load_dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, LlamaConfig

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


def stand_in(tokenizer):
    return tiny_models.random_model(vocab_size=len(tokenizer), initializer_range=0.1)


def build_trainer(model, tokenizer, rows, folder, **changes):
    tokenizer.pad_token = data.choose_pad_token(tokenizer)
    options = {"max_length": 2048, "per_device_train_batch_size": 8, **changes}
    return tiny_models.build_trainer(model, folder, tokenizer, rows, **options)


# --- Llama 3's tokenizer ---


def test_llama3_special_tokens_have_their_ids(llama3):
    ids = {token: 128_000 + n for n, token in enumerate(special_tokens("3.0"))}
    assert ids["<|begin_of_text|>"] == 128_000
    assert ids["<|end_of_text|>"] == 128_001
    assert ids["<|reserved_special_token_2|>"] == 128_004
    assert ids["<|start_header_id|>"] == 128_006
    assert ids["<|eot_id|>"] == 128_009
    assert ids["<|reserved_special_token_250|>"] == 128_255
    assert len(llama3) == 128_256
    assert {token: llama3.convert_tokens_to_ids(token) for token in ids} == ids
    later = special_tokens("3.1")
    assert (later[4], later[5], later[8], later[10], later[255]) == (
        "<|finetune_right_pad_id|>",
        "<|reserved_special_token_2|>",
        "<|eom_id|>",
        "<|python_tag|>",
        "<|reserved_special_token_247|>",
    )


def test_llama3_fast_tokenizer_agrees_with_tiktoken_on_every_row(llama3, tiktoken_llama3, examples):
    for row in examples:
        text = row["prompt"] + row["completion"]
        assert llama3(text).input_ids == [128_000, *tiktoken_llama3.encode_ordinary(text)]
    assert llama3("안녕하세요<|end_of_text|>").input_ids[-1] == 128_001


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


def test_render_tokens_shows_partial_characters_as_bytes_and_escapes(tiny_tokenizer):
    text = "<b>힣 &"
    page = data.render_tokens(tiny_tokenizer, {"a<b": text}).data
    assert "<b>a&lt;b</b>" in page
    assert "<b>힣" not in page
    shown = html.unescape("".join(re.findall(r'title="id \d+ ">(.*?)</span>', page)))
    plain = re.sub(r"‹([0-9A-F ]+)›", lambda m: bytes.fromhex(m[1]).decode("latin-1"), shown)
    assert plain.replace("&", "").startswith("<b>")
    assert "‹ED" in page  # 힣 is ED 9E A3 in UTF-8


def test_benchmark_measures_what_it_says(llama3, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(tokenize_52k, "build_llama3_tokenizer", lambda: llama3)
    out = tmp_path / "new" / "result.json"
    monkeypatch.setattr(sys, "argv", ["tokenize_52k.py", "--rows", "400", "--out", str(out)])
    assert tokenize_52k.main() == 0
    result = json.loads(out.read_text(encoding="utf-8"))
    texts = [data.to_prompt_completion({**ROWS[n % len(ROWS)]}) for n in range(400)]
    for n, example in enumerate(texts):  # the benchmark numbers the instructions
        instruction = ROWS[n % len(ROWS)]["instruction"]
        example["prompt"] = example["prompt"].replace(instruction, f"{instruction} ({n})", 1)
    assert result["rows"] == 400
    assert result["tokens"] == sum(
        len(llama3(example["prompt"] + example["completion"]).input_ids) + 1 for example in texts
    )
    assert result["total_seconds"] == pytest.approx(sum(result["seconds"].values()), abs=0.01)


# --- Pad token ---


def fake_tokenizer(special, **roles):
    tokens = {n: SimpleNamespace(content=token, special=True) for n, token in enumerate(special)}
    known = {f"{role}_token": None for role in ("eos", "bos", "pad", "unk", "sep", "cls", "mask")}
    return SimpleNamespace(added_tokens_decoder=tokens, chat_template=None, **{**known, **roles})


def test_pad_token_of_llama_3_and_3_1_is_one_id(llama3):
    llama3.pad_token = None
    chosen = data.choose_pad_token(llama3)
    assert chosen == "<|reserved_special_token_2|>"
    assert llama3.convert_tokens_to_ids(chosen) == 128_004
    assert (len(llama3), llama3.pad_token) == (128_256, None)  # nothing added, nothing changed
    names = special_tokens("3.1")
    newer = fake_tokenizer(names, bos_token=names[0], eos_token=names[1])
    assert data.choose_pad_token(newer) == "<|finetune_right_pad_id|>" == names[4]


@pytest.mark.parametrize(
    ("special", "roles", "expected"),
    [
        (["</s>", "<mine>"], {"eos_token": "</s>", "pad_token": "<mine>"}, "<mine>"),
        (["<s>", "</s>", "<pad>", "<x>"], {"eos_token": "</s>", "bos_token": "<s>"}, "<pad>"),
        (["</s>", "<reserved_0>", "<reserved_1>", "<x>"], {"eos_token": "</s>"}, "<reserved_0>"),
        (["<end>", "<unk>", "<user>", "<x>"], {"eos_token": "<end>", "pad_token": "<end>"}, "<x>"),
    ],
)
def test_pad_token_order(special, roles, expected):
    tokenizer = fake_tokenizer(special, unk_token="<unk>", **roles)
    tokenizer.chat_template = "{{ '<user>' }}"
    assert data.choose_pad_token(tokenizer) == expected


def test_pad_token_of_smollm2():
    """Its special tokens in their order; EOS is also its pad token."""
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<repo_name>", "<empty_output>"]
    roles = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "pad_token": "<|im_end|>"}
    assert (
        data.choose_pad_token(fake_tokenizer(special, unk_token="<|endoftext|>", **roles)) == "<empty_output>"
    )


def test_no_free_pad_token_is_an_error():
    with pytest.raises(data.DataError, match=r"no-pad-token.*resize the embeddings yourself"):
        data.choose_pad_token(fake_tokenizer(["<s>", "</s>"], bos_token="<s>", eos_token="</s>"))


# --- Rows ---


def test_templates_are_alpacas():
    with_input = data.to_prompt_completion({"instruction": " Add. ", "input": "2 {and} 2", "output": "4\n"})
    assert with_input == {
        "prompt": "Below is an instruction that describes a task, paired with an input that provides further "
        "context. Write a response that appropriately completes the request.\n\n### Instruction:\nAdd.\n\n"
        "### Input:\n2 {and} 2\n\n### Response:\n",
        "completion": "4",
    }
    for row in (
        {"instruction": "Add.", "output": "4"},
        {"instruction": "Add.", "input": None, "output": "4"},
    ):
        assert data.to_prompt_completion(row)["prompt"] == (
            "Below is an instruction that describes a task. Write a response that appropriately completes "
            "the request.\n\n### Instruction:\nAdd.\n\n### Response:\n"
        )


def test_chats_get_the_same_template():
    def chat(*texts):
        roles = itertools.cycle(["user", "assistant"])
        return {
            "messages": [{"role": role, "content": text} for role, text in zip(roles, texts, strict=False)]
        }

    assert data.to_prompt_completion(chat("Add.", "4")) == data.to_prompt_completion(
        {"instruction": "Add.", "input": "", "output": "4"}
    )
    longer = chat("A prime?", "7", "A larger one?", "11")
    assert data.to_prompt_completion(longer) == data.to_prompt_completion(
        {"instruction": "A larger one?", "input": "User: A prime?\n\nAssistant: 7", "output": "11"}
    )
    system = {"messages": [{"role": "system", "content": "Be brief."}, *chat("Add.", "4")["messages"]]}
    assert "### Input:\nSystem: Be brief.\n" in data.to_prompt_completion(system)["prompt"]


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
    assert table.loc[reason, "first_indices"] == [3, 4]
    assert table["rows"].sum() == 2
    assert table.attrs["usable"] == [0, 1, 2]
    with pytest.raises(data.DataError, match=rf"{reason}: 2 of 5 rows, first \[3, 4\]") as raised:
        data.check_rows(rows)
    assert (raised.value.reason, raised.value.row) == (reason, 3)
    with pytest.raises(data.DataError, match=r"Row 7: ") as raised:
        data.to_prompt_completion(BAD_ROWS[reason], 7)
    assert raised.value.row == 7


def test_duplicates_special_tokens_and_long_rows(tiny_tokenizer):
    rows = [
        GOOD,
        {**GOOD, "output": "4 "},
        {**GOOD, "output": "4<|end_of_text|>5"},
        {**GOOD, "output": "4 " * 300},
    ]
    table = data.summarize_rows(rows, tiny_tokenizer, max_length=256)
    assert {name: found for name, found in table["first_indices"].items() if found} == {
        "duplicate": [1],
        "special-token": [2],
        "too-long": [3],
    }


@pytest.mark.parametrize("extra", [0, 1])
def test_row_of_exactly_max_length_fits(tiny_tokenizer, extra):
    example = data.to_prompt_completion(GOOD)
    size = len(tiny_tokenizer(example["prompt"] + example["completion"] + tiny_tokenizer.eos_token).input_ids)
    table = data.summarize_rows([GOOD], tiny_tokenizer, max_length=size - extra)
    assert table.loc["too-long", "rows"] == extra


def test_a_plan_for_fewer_rows_than_a_batch_holds():
    plan = data.plan_packing([10, 20], batch_size=8, max_length=64)
    assert plan["batches"].tolist() == [1, 1, 1]
    assert plan["padding_share"].tolist() == [0.25, 0.25, 0.0]  # both rows in 20 slots: 10 of 40 are padding
    for batch_size in (0, -1):
        with pytest.raises(ValueError, match=rf"batch_size={batch_size} .*expected at least 1"):
            data.plan_packing([10, 20], batch_size, 64)


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        ({"train": [GOOD], "test": [GOOD]}, r"a dict with the keys \['train', 'test'\].*dataset\['train'\]"),
        ({}, r"a dict with the keys \[\]"),
        ("rows.jsonl", r"'rows\.jsonl', a str"),
        (None, "None, a NoneType"),
        (["a", "b"], r"row 0 is 'a', a str"),
        (pd.DataFrame([GOOD]), r"a DataFrame.*Dataset\.from_pandas"),
    ],
)
def test_what_is_no_data_set_is_named(dataset, message):
    with pytest.raises(data.DataError, match=message) as raised:
        data.summarize_rows(dataset)
    assert raised.value.reason == "wrong-type"
    assert "list of rows" in str(raised.value)


def test_unknown_columns_and_no_rows_are_errors():
    with pytest.raises(data.DataError, match=r"'question', 'answer'.*instruction \+ output.*rename_column"):
        data.check_rows([{"question": "a", "answer": "b"}])
    with pytest.raises(data.DataError, match="no-rows"):
        data.check_rows([])


@pytest.mark.parametrize(
    "messages",
    [
        None,
        "text",
        [{"role": "user"}],
        [{"role": "user", "content": "a"}],
        [{"role": "assistant", "content": "a"}],
    ],
)
def test_chats_of_a_wrong_shape(messages):
    with pytest.raises(data.DataError, match="messages"):
        data.check_rows([{"messages": messages}])


def test_good_rows_of_all_layouts_pass(tiny_tokenizer):
    data.check_rows(Dataset.from_list(ROWS), tiny_tokenizer, max_length=1024)
    data.check_rows([{"prompt": "a", "completion": "b"}], tiny_tokenizer)
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    data.check_rows(Dataset.from_list([{"messages": turns}]), tiny_tokenizer)


# --- Files ---

LINE = json.dumps(GOOD, ensure_ascii=False)
BAD_FILES = {
    "bad-json": ("a.jsonl", f"{LINE}\n{LINE[:-3]}\n{LINE}\n".encode()),
    "missing-column": ("a.jsonl", f'{LINE}\n{{"instruction": "a"}}\n'.encode()),
    "null-cell": ("a.jsonl", f'{LINE}\n{{"instruction": "a", "output": null}}\n'.encode()),
    "cell-too-long": ("a.jsonl", f"{LINE}\n{json.dumps({**GOOD, 'output': 'x' * 2**20})}\n".encode()),
    "wrong-encoding": (
        "a.jsonl",
        f"{LINE}\n".encode() + '{"instruction": "수도", "output": "a"}\n'.encode("cp949"),
    ),
    "lone-surrogate": ("a.jsonl", f'{LINE}\n{{"instruction": "a", "output": "\\ud800"}}\n'.encode()),
    "wrong-type": ("a.jsonl", f"{LINE}\n[1, 2]\n".encode()),
    "empty-output": ("a.csv", b"instruction,input,output\na,,b\nc,,\n"),
    "bad-csv": ("a.csv", b"instruction,input,output\na,,b\nc,d\n"),
}


@pytest.mark.parametrize("reason", BAD_FILES)
def test_broken_files_name_the_line_and_the_row(tmp_path, reason):
    name, content = BAD_FILES[reason]
    path = tmp_path / name
    path.write_bytes(content)
    line = 3 if name.endswith("csv") else 2
    with pytest.raises(data.DataError, match=rf"\[{reason}\] {re.escape(name)}, line {line}\b") as raised:
        data.check_file(path)
    assert (raised.value.reason, raised.value.row) == (reason, 1)
    assert path.read_bytes() == content


@pytest.mark.parametrize(
    ("reason", "content"),
    [
        ("cell-too-long", b"instruction,output\na,b\nc," + b"x" * 2**20 + b"\n"),
        ("wrong-encoding", "instruction,output\na,b\n수도,c\n".encode("cp949")),
        ("bad-csv", b'instruction,output\na,b\n"c,d\n'),
    ],
)
def test_broken_csv_files(tmp_path, reason, content):
    path = tmp_path / "a.csv"
    path.write_bytes(content)
    with pytest.raises(data.DataError, match=rf"\[{reason}\] a\.csv, line 3") as raised:
        data.check_file(path)
    assert raised.value.row == 1


def test_other_files(tmp_path):
    for name, content, reason in (
        ("a.txt", "x", "unknown-file"),
        ("a.jsonl", "\n \n", "no-rows"),
        ("a.json", "[]", "no-rows"),
        ("a.csv", "instruction,output\n", "no-rows"),
    ):
        path = tmp_path / name
        path.write_text(content, encoding="utf-8")
        with pytest.raises(data.DataError) as raised:
            data.check_file(path)
        assert raised.value.reason == reason
    with pytest.raises(FileNotFoundError):
        data.check_file(tmp_path / "none.jsonl")


@pytest.mark.parametrize("indent", [None, 0, 1, 4])
def test_an_array_names_the_line_on_which_the_row_begins(tmp_path, indent):
    path = tmp_path / "a.json"
    rows = [{**GOOD, "output": f"{n}], [{{\n"} for n in range(3)]
    text = json.dumps([*rows, {**GOOD, "output": 4}, GOOD], indent=indent)
    path.write_text("\n" + text, encoding="utf-8")
    # counted by a second way: the fourth line that opens an object, or the one line of all
    opening = [number for number, line in enumerate(path.read_text().split("\n"), 1) if line.strip() == "{"]
    line = opening[3] if indent is not None else 2
    with pytest.raises(data.DataError, match=rf"\[wrong-type\] a\.json, line {line} \(row 3\)") as raised:
        data.check_file(path)
    assert raised.value.row == 3


def test_the_second_row_of_an_indented_array_begins_on_line_8(tmp_path):
    path = tmp_path / "a.json"
    row = {**GOOD, "source": "x"}
    path.write_text(json.dumps([row, {**row, "output": ""}], indent=2), encoding="utf-8")
    with pytest.raises(data.DataError, match=r"line 8 \(row 1\): output is empty"):
        data.check_file(path)


@pytest.mark.parametrize(
    ("rest", "line", "row"),
    [
        ('\n {"instruction": "c",\n  "output" "d"}]', 4, 2),  # a colon is missing
        ('\n {"instruction": "c", "output": "d"}\n {}]', 4, 3),  # a comma is missing
        ('\n {"instruction": "c", "output": "d"}', 3, 3),  # cut off
        ('\n {"instruction": "c", "output": "d"}] x', 3, 3),  # something follows
    ],
)
def test_a_broken_array_names_line_and_row(tmp_path, rest, line, row):
    path = tmp_path / "a.json"
    path.write_text(f"[{json.dumps(GOOD)},\n {json.dumps({**GOOD, 'output': '5'})},{rest}", encoding="utf-8")
    with pytest.raises(data.DataError, match=rf"\[bad-json\] a\.json, line {line} \(row {row}\)"):
        data.check_file(path)


def test_files_of_other_kinds_are_named_in_one_clear_line(tmp_path):
    Dataset.from_list([GOOD]).to_parquet(tmp_path / "a.parquet")
    (tmp_path / "folder.jsonl").mkdir()
    for name, disguise in (("b.jsonl", "Parquet"), ("c.csv", "Parquet")):
        (tmp_path / name).write_bytes((tmp_path / "a.parquet").read_bytes())
        with pytest.raises(data.DataError, match=rf"\[unknown-file\] {name} is a {disguise} file") as raised:
            data.check_file(tmp_path / name)
        assert "UTF-8" not in str(raised.value)
    (tmp_path / "d.csv").write_bytes(b"PK\x03\x04\x14\x00\x06\x00\xde")
    with pytest.raises(data.DataError, match=r"d\.csv is a zip or Excel file, not text"):
        data.check_file(tmp_path / "d.csv")
    with pytest.raises(data.DataError, match=r"\[unknown-file\] folder\.jsonl is a folder"):
        data.check_file(tmp_path / "folder.jsonl")
    with pytest.raises(data.DataError) as raised:
        data.check_file(tmp_path / "a.parquet")
    said = str(raised.value)
    assert said.startswith(
        "[unknown-file] a.parquet is a '.parquet' file; expected one of .csv, .jsonl, .json."
    )
    assert 'load_dataset("parquet"' in said
    assert "\n" not in said


def test_good_files_pass_and_load_the_same(tmp_path):
    rows = [GOOD, {**GOOD, "input": 'a "quoted", cell\nof two lines', "output": "수도\u2028x"}]
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    files = {
        "a.jsonl": "\n".join(lines) + "\n\n",
        "b.json": "[" + ",\n".join(lines) + "]",
        "c.csv": pd.DataFrame(rows).to_csv(index=False),
        "d.csv": "\ufeff" + pd.DataFrame(rows).to_csv(index=False),
    }
    for name, content in files.items():
        path = tmp_path / name
        path.write_text(content, encoding="utf-8")
        data.check_file(path)
        loaded = load_dataset(
            "csv" if name.endswith("csv") else "json",
            data_files=str(path),
            split="train",
            cache_dir=str(tmp_path / "cache"),
        )
        prompts = [data.to_prompt_completion(row) for row in loaded]
        assert prompts == [data.to_prompt_completion(row) for row in rows], name


# --- The boundary ---


def test_boundary_holds_on_every_shipped_row(llama3, tiny_tokenizer, examples):
    data.check_boundary(examples, llama3)
    data.check_boundary(examples, tiny_tokenizer)


def test_boundary_is_refused_where_a_token_reaches_across(llama3, tiny_tokenizer):
    good = {"prompt": "### Response:\n", "completion": "The"}
    spaced = {"prompt": "### Response: ", "completion": "The answer"}
    for tokenizer in (llama3, tiny_tokenizer):
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


# --- Labels ---


def hand_made(encode, bos, eos, examples):
    """input ids -> labels, worked out without trl: prompt masked, completion and EOS scored."""
    masks = {}
    for row in examples:
        prompt, completion = [*bos, *encode(row["prompt"])], [*encode(row["completion"]), eos]
        masks[(*prompt, *completion)] = [-100] * len(prompt) + completion
    return masks


def test_labels_of_real_batches_equal_a_hand_made_mask(llama3, tiktoken_llama3, examples, tmp_path):
    trainer = build_trainer(stand_in(llama3), llama3, examples, tmp_path)
    expected = hand_made(tiktoken_llama3.encode_ordinary, [128_000], 128_001, examples)
    seen = set()
    for batch in trainer.get_train_dataloader():
        data.check_eos_is_trained(batch, llama3)
        table = data.summarize_loss_mask(batch, llama3)
        for row, (ids, labels, mask) in enumerate(
            zip(batch["input_ids"], batch["labels"], batch["attention_mask"], strict=True)
        ):
            size = int(mask.sum())
            key = tuple(ids[:size].tolist())
            assert labels[:size].tolist() == expected[key]
            assert (labels[size:] == -100).all()
            assert (ids[size:] == 128_004).all()
            assert labels[size - 1] == 128_001
            scored = sum(label != -100 for label in expected[key])
            counted = (size - scored, scored - 1, 1, len(ids) - size, scored, True)
            assert tuple(table.loc[row]) == counted
            seen.add(key)
    assert len(seen) == len(examples) >= 200
    assert trainer.model.get_input_embeddings().num_embeddings == 128_256


def test_packed_labels_equal_the_same_mask(llama3, tiktoken_llama3, examples, tmp_path):
    options = {
        "max_length": 1024,
        "packing": True,
        "packing_strategy": "bfd",
        "per_device_train_batch_size": 2,
    }
    trainer = build_trainer(stand_in(llama3), llama3, examples, tmp_path, **options)
    expected = hand_made(tiktoken_llama3.encode_ordinary, [128_000], 128_001, examples)
    found = 0
    for batch in trainer.get_train_dataloader():
        data.check_eos_is_trained(batch, llama3)
        starts = [n for n, position in enumerate(batch["position_ids"][0].tolist()) if position == 0]
        for start, end in itertools.pairwise([*starts, batch["input_ids"].shape[1]]):
            ids = tuple(batch["input_ids"][0, start:end].tolist())
            assert batch["labels"][0, start:end].tolist() == expected[ids]
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


def test_cut_rows_are_refused(tiny_tokenizer, examples, tmp_path):
    trainer = build_trainer(stand_in(tiny_tokenizer), tiny_tokenizer, examples, tmp_path, max_length=128)
    cut = [
        ~data.summarize_loss_mask(batch, tiny_tokenizer)["eos_scored"]
        for batch in trainer.get_train_dataloader()
    ]
    tokens = [len(tiny_tokenizer(row["prompt"] + row["completion"]).input_ids) + 1 for row in examples]
    prompts = [len(tiny_tokenizer(row["prompt"]).input_ids) for row in examples]
    expected = sum(size > 128 and prompt < 128 for size, prompt in zip(tokens, prompts, strict=True))
    assert int(pd.concat(cut).sum()) == expected > 100


def test_batch_without_mask_or_positions_is_refused(tiny_tokenizer):
    ids = torch.tensor([[1, 2]])
    with pytest.raises(ValueError, match=r"input_ids.*expected attention_mask or position_ids"):
        data.summarize_loss_mask({"input_ids": ids, "labels": ids}, tiny_tokenizer)


def test_picture_shows_every_token_with_its_role(tiny_tokenizer):
    texts = ["<script>&\n x", "한"]
    encoded = [tiny_tokenizer(text + tiny_tokenizer.eos_token) for text in texts]
    tiny_tokenizer.pad_token = data.choose_pad_token(tiny_tokenizer)
    batch = transformers.DataCollatorForLanguageModeling(tiny_tokenizer, mlm=False)(encoded)
    batch["labels"][0, :3] = -100
    page = data.render_loss_mask(batch, tiny_tokenizer, rows=[0, 1]).data
    assert "<script>" not in page
    table = data.summarize_loss_mask(batch, tiny_tokenizer)
    titles = re.findall(r'title="id (\d+) label (-?\d+), ([^"]+)"', page)
    roles = [role for _, _, role in titles]
    assert roles.count("not scored") == table["prompt"].sum() == 3
    assert roles.count("scored") == table["completion"].sum()
    assert roles.count("EOS, scored") == table["eos"].sum() == 2
    pads = int(table["pad"].sum())
    assert f"&times; {pads})" in page
    size = len(encoded[0].input_ids)
    assert [int(token) for token, _, _ in titles[:size]] == encoded[0].input_ids
    assert [int(label) for _, label, _ in titles[:size]] == batch["labels"][0, :size].tolist()


def test_the_picture_speaks_without_styles(tiny_tokenizer):
    """GitHub strips styles: between the marks stands what is scored."""
    batch = plain_batch(
        tiny_tokenizer, data.choose_pad_token(tiny_tokenizer), [{"prompt": "Say:\n", "completion": "a b"}]
    )
    batch["labels"][0, : len(tiny_tokenizer("Say:\n").input_ids)] = -100
    eos = tiny_tokenizer.eos_token
    for label, marked in ((tiny_tokenizer.eos_token_id, f"«{eos}»"), (-100, f"[{eos}]")):
        batch["labels"][0, -1] = label
        page = data.render_loss_mask(batch, tiny_tokenizer).data
        assert html.unescape(re.sub(r"<[^>]+>", "", page)).endswith(f"Say:⏎«a b»{marked}")
    page = data.render_tokens(tiny_tokenizer, {"two": "a b"}).data
    ids = tiny_tokenizer("a b", add_special_tokens=False).input_ids
    assert re.sub(r"<[^>]+>", "", page).count("|") == len(ids) - 1 > 0


# --- Lengths and packing ---


def test_lengths_table_by_hand():
    lengths = [10] * 190 + [100] * 9 + [1000]
    table = data.summarize_lengths(lengths)
    assert table["rows_cut"].to_dict() == {128: 1, 256: 1, 512: 1, 1024: 0, 2048: 0, 4096: 0}
    kept = {128: 1900 + 900 + 128, 512: 1900 + 900 + 512, 1024: 3800}
    assert table["tokens_kept_share"][list(kept)].tolist() == pytest.approx([n / 3800 for n in kept.values()])
    assert table.index[table["recommended"]].tolist() == [128]  # 199 of 200 rows are whole: 99.5 %
    assert data.summarize_lengths([5000]).index[-1] == 5056


@pytest.mark.parametrize("lengths", [[], [0], [3, -1]])
def test_lengths_must_be_positive(lengths):
    with pytest.raises(ValueError, match="positive token counts"):
        data.summarize_lengths(lengths)


def test_count_tokens_agrees_with_tiktoken(llama3, tiktoken_llama3, examples):
    counted = examples.map(data.count_tokens, batched=True, fn_kwargs={"tokenizer": llama3})
    for row in counted:
        prompt, completion = (
            len(tiktoken_llama3.encode_ordinary(row[key])) for key in ("prompt", "completion")
        )
        assert (row["prompt_tokens"], row["completion_tokens"]) == (prompt + 1, completion + 1)
        assert row["tokens"] == prompt + completion + 2


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
    model = stand_in(tiny_tokenizer)
    counted = examples.map(data.count_tokens, batched=True, fn_kwargs={"tokenizer": tiny_tokenizer})
    lengths = counted["tokens"]
    plan = data.plan_packing(lengths, batch_size=8, max_length=1024)
    changes = {
        "padded": {},
        "sorted": {"train_sampling_strategy": "group_by_length"},
        "packed": {
            "packing": True,
            "packing_strategy": "bfd",
            "per_device_train_batch_size": 1,
            "max_length": 1024,
        },
    }
    loaders = {
        name: list(build_trainer(model, tiny_tokenizer, examples, tmp_path, **change).get_train_dataloader())
        for name, change in changes.items()
    }
    table = data.summarize_packing(loaders, plan)
    assert table["tokens"].tolist() == [sum(lengths)] * 3
    assert table.loc["packed", "padding_tokens"] == 0
    assert table["padding_share"].tolist() == pytest.approx(plan["padding_share"].tolist(), abs=0.04)
    pads = sum(int((batch["input_ids"] == tiny_tokenizer.pad_token_id).sum()) for batch in loaders["padded"])
    assert table.loc["padded", "padding_tokens"] == pads
    assert table.loc["padded", "padding_share"] > 4 * table.loc["sorted", "padding_share"]


@pytest.fixture
def packed_batch(tiny_tokenizer, examples, tmp_path):
    options = {
        "max_length": 1024,
        "packing": True,
        "packing_strategy": "bfd",
        "per_device_train_batch_size": 1,
    }
    rows = examples.select(range(40))
    trainer = build_trainer(stand_in(tiny_tokenizer), tiny_tokenizer, rows, tmp_path, **options)
    batches = list(trainer.get_train_dataloader())
    return max(batches, key=lambda batch: int((batch["position_ids"] == 0).sum()))


def test_packed_documents_do_not_see_each_other(tiny_model_dir, packed_batch):
    """The pretrained tiny model; the loss alone is the one that the model itself computes."""
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32).eval()
    table = data.summarize_isolation(model, packed_batch)
    starts = [n for n, position in enumerate(packed_batch["position_ids"][0].tolist()) if position == 0]
    assert len(table) == len(starts) >= 3
    for document, (start, end) in enumerate(
        itertools.pairwise([*starts, packed_batch["input_ids"].shape[1]])
    ):
        with torch.no_grad():
            own = model(
                input_ids=packed_batch["input_ids"][:, start:end], labels=packed_batch["labels"][:, start:end]
            )
        assert table.loc[document, "alone"] == pytest.approx(own.loss.item(), abs=1e-5)
    data.check_isolation(table)
    with pytest.raises(data.TokenError, match="it sees its neighbours"):
        data.check_isolation(table, column="without_position_ids")
    assert table.loc[0, "without_position_ids"] == pytest.approx(table.loc[0, "alone"], abs=1e-5)


def test_isolation_works_through_peft_and_restores_training_mode(tiny_model, packed_batch):
    from peft import LoraConfig, get_peft_model

    plain = data.summarize_isolation(tiny_model, packed_batch)
    model = get_peft_model(tiny_model, LoraConfig(r=2, target_modules=["q_proj"], lora_dropout=0.5))
    model.train()
    table = data.summarize_isolation(model, packed_batch)
    assert model.training
    assert table["alone"].tolist() == pytest.approx(plain["alone"].tolist(), abs=1e-6)


def test_a_loss_that_is_not_a_number_is_refused():
    table = pd.DataFrame({"alone": [1.0, 1.0], "packed": [1.0, float("nan")]})
    with pytest.raises(data.TokenError, match="Document 1"):
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


# --- The notebook on Llama 3's tokenizer ---


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


def test_control_tokens_that_the_tokenizer_does_not_name_are_found_too(tiny_tokenizer):
    """As Llama 3's: BOS and EOS are named, the other special tokens are only in its table."""
    from transformers import PreTrainedTokenizerFast

    few = PreTrainedTokenizerFast(
        tokenizer_object=tiny_tokenizer.backend_tokenizer,
        bos_token="<|begin_of_text|>",
        eos_token="<|end_of_text|>",
    )
    assert "<|eot_id|>" not in few.all_special_tokens
    rows = [{"instruction": "Say", "input": "", "output": f"hi {token}"} for token in ("<|eot_id|>", "<b>")]
    report = data.summarize_rows(rows, few)
    assert report.loc["special-token", "first_indices"] == [0]


def test_a_chat_turn_without_a_role_is_a_wrong_type(tiny_tokenizer):
    turns = [{"content": "a"}, {"role": "user", "content": "b"}, {"role": "assistant", "content": "c"}]
    report = data.summarize_rows(
        [{"messages": turns}, {"messages": [{"role": None, "content": "x"}, *turns[1:]]}]
    )
    assert report.loc["wrong-type", "rows"] == 2
