"""No token leaks, no pickle or remote code runs, and text from data cannot become markup."""

import base64
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
import time

import ledger as counts
import nbformat
import pandas as pd
import psutil
import pytest
import torch
from fake_hub import Account, FakeHub
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import SafetensorError
from tiny_models import build_trainer
from transformers import AutoModelForCausalLM, AutoTokenizer

from llama_sft_helpers import data, evaluation, quantization
from llama_sft_helpers.doctor import explain
from llama_sft_helpers.evaluation import AdapterError, check_adapter
from llama_sft_helpers.run import run_notebooks

SCRIPT = "<script>alert('planted')</script><img src=x onerror=alert(1)>"


# --- Tokens ---


@pytest.mark.slow
def test_a_planted_token_is_nowhere_after_a_whole_run(tmp_path, tiny_model_dir):
    token = "hf_" + "".join(chr(ord("a") + (i * 7) % 26) for i in range(34))
    home = tmp_path / "hf_home"
    home.mkdir()
    (home / "token").write_text(token, encoding="utf-8")  # where `hf auth login` keeps it
    out = tmp_path / "out"
    with FakeHub() as hub:
        hub.accounts[token] = Account("ada")
        environment = os.environ | {"HF_TOKEN": token, "HF_HOME": str(home), "HF_ENDPOINT": hub.url}
        command = [sys.executable, "-m", "llama_sft_helpers.cli", "run", "--profile", "ci-tiny"]
        with (tmp_path / "printed.txt").open("wb") as printed:
            process = subprocess.Popen(
                [*command, "--out", str(out)], stdout=printed, stderr=printed, env=environment
            )
            seen_in_process_list = _watch(process, token)
        code = process.returncode
        used = [user for _, _, user in hub.requests]
    assert "ada" in used, "the planted token was never used"
    assert not seen_in_process_list
    files = [path for path in tmp_path.rglob("*") if path.is_file() and path != home / "token"]
    assert len(files) > 20
    marks = (token.encode(), token[3:19].encode(), base64.b64encode(token.encode())[:40])
    leaks = [path for path in files if any(mark in path.read_bytes() for mark in marks)]
    found = {"files searched": len(files), "tokens leaked": len(leaks)}
    counts.record("drills", "a planted token hunted in every file of a run", **found)
    assert not leaks
    assert code == 0, (tmp_path / "printed.txt").read_text(encoding="utf-8")[-3000:]


def _watch(process, token):
    """Whether the token stood in any process's command line while the run lasted."""
    seen = False
    while process.poll() is None:
        for other in psutil.process_iter(["cmdline"]):
            seen |= token in " ".join(other.info["cmdline"] or [])
        time.sleep(0.3)
    return seen


def test_the_hunt_can_find_a_token(tmp_path):
    sleeper = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(2)", "hf_planted"])
    assert _watch(sleeper, "hf_planted")


# --- Pickle ---


class _Payload:
    """Unpickling it writes a file."""

    def __init__(self, path):
        self._path = str(path)

    def __reduce__(self):
        return (open, (self._path, "w"))


@pytest.fixture
def payload(tmp_path):
    marker = tmp_path / "pickle-was-run"
    yield _Payload(marker)
    assert not marker.exists(), "code in a pickle was run"
    pickle.loads(pickle.dumps(_Payload(marker)))
    assert marker.exists(), "the payload does not work"


@pytest.fixture
def lora_model(tiny_model, tiny_model_dir):
    tiny_model.config._name_or_path = str(tiny_model_dir)
    return get_peft_model(tiny_model, LoraConfig(r=4, task_type="CAUSAL_LM", target_modules=["q_proj"]))


@pytest.fixture
def adapter(tmp_path, lora_model, payload):
    """An adapter whose weights lie in a pickle."""
    lora_model.save_pretrained(tmp_path / "adapter")
    (tmp_path / "adapter" / "adapter_model.safetensors").unlink()
    torch.save({"weight": payload}, tmp_path / "adapter" / "adapter_model.bin")
    return tmp_path / "adapter"


def test_an_adapter_in_a_pickle_is_refused(adapter, tiny_model_dir):
    base = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    with pytest.raises(AdapterError, match=r"has no adapter_model\.safetensors"):
        check_adapter(adapter, base, str(tiny_model_dir))
    with pytest.raises(pickle.UnpicklingError):  # peft's own second line: weights_only
        PeftModel.from_pretrained(base, adapter)


def test_the_chat_command_refuses_a_pickle(adapter, chat_command):
    done = chat_command(adapter, "--prompt", "hi")
    assert done.exit_code == 1, done.stderr
    assert "adapter_model.safetensors" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_safetensors_file_that_is_a_pickle_is_refused(adapter, payload, tiny_model_dir):
    (adapter / "adapter_model.safetensors").write_bytes(pickle.dumps({"weight": payload}))
    with pytest.raises(SafetensorError):
        PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model_dir), adapter)


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_a_checkpoint_does_not_run_a_pickle(name, payload, tmp_path, lora_model, tiny_tokenizer):
    rows = [{"prompt": "Say hi. ", "completion": "hi"}] * 8
    saving = {"save_strategy": "steps", "save_steps": 1}
    trainer = build_trainer(lora_model, tmp_path / "run", tiny_tokenizer, rows, **saving)
    trainer.train()
    torch.save({"state": payload}, tmp_path / "run" / "checkpoint-1" / name)
    with pytest.raises(pickle.UnpicklingError):
        trainer.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-1"))


def test_a_base_model_in_a_pickle_does_not_run(payload, tmp_path, tiny_model_dir):
    folder = tmp_path / "model"
    shutil.copytree(tiny_model_dir, folder)
    (folder / "model.safetensors").unlink()
    torch.save({"model.embed_tokens.weight": payload}, folder / "pytorch_model.bin")
    with pytest.raises(Exception, match=r"(?i)weights_only|unpickl|weights only|pytorch_model"):
        AutoModelForCausalLM.from_pretrained(folder)


def test_a_models_own_code_is_not_run(tmp_path, tiny_model_dir):
    folder = tmp_path / "model"
    shutil.copytree(tiny_model_dir, folder)
    marker = tmp_path / "remote-code-was-run"
    (folder / "evil.py").write_text(f"open({str(marker)!r}, 'w').close()\n", encoding="utf-8")
    for name, classes in (
        ("config.json", {"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"}),
        ("tokenizer_config.json", {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}),
    ):
        settings = json.loads((folder / name).read_text(encoding="utf-8"))
        (folder / name).write_text(json.dumps(settings | {"auto_map": classes}), encoding="utf-8")
    AutoModelForCausalLM.from_pretrained(folder)
    AutoTokenizer.from_pretrained(folder)
    assert not marker.exists()


# --- Markup ---


def _rendered(what, tokenizer, tiny_model):
    ids = torch.tensor([tokenizer(SCRIPT).input_ids])
    batch = {"input_ids": ids, "labels": ids.clone(), "attention_mask": torch.ones_like(ids)}
    if what == "tokens":
        return data.render_tokens(tokenizer, {SCRIPT: SCRIPT}).data
    if what == "loss mask":
        return data.render_loss_mask(batch, tokenizer, rows=[0]).data
    if what == "answers":
        columns = {"prompt": [SCRIPT], "base": [SCRIPT], "tuned": [SCRIPT]}
        columns |= {f"{name}_{extra}": [3] for name in ("base", "tuned") for extra in ("tokens", "stopped")}
        return evaluation.render_generations(pd.DataFrame(columns)).data
    if what == "layers":
        return quantization.render_side_by_side(tiny_model.lm_head, tiny_model.lm_head, (SCRIPT, SCRIPT)).data
    return explain(OSError(28, "No space left on device", SCRIPT))._repr_html_()


@pytest.mark.parametrize("what", ["tokens", "loss mask", "answers", "layers", "doctor"])
def test_text_from_data_is_escaped(what, tiny_tokenizer, tiny_model):
    page = _rendered(what, tiny_tokenizer, tiny_model)
    assert "<script" not in page
    assert "<img" not in page
    text = re.sub(r"<[^>]+>", "", page)  # what a browser would show
    assert "&lt;" in text, "the planted text is not in the page at all"


def test_the_pages_of_a_run_escape_what_notebooks_print(tmp_path):
    cells = [f"text = {SCRIPT!r}\nprint(text)", "text", "import pandas as pd\npd.DataFrame({text: [text]})"]
    built = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    (tmp_path / "originals").mkdir()
    nbformat.write(built, tmp_path / "originals" / "01_a.ipynb")
    run_notebooks("ci-tiny", only=None, out=tmp_path / "out", notebooks=tmp_path / "originals")
    page = (tmp_path / "out" / "01_a.html").read_text(encoding="utf-8")
    assert "planted" in page
    assert "<script>alert('planted')" not in page
    assert "<img src=x" not in page
