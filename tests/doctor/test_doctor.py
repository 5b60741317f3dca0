"""The doctor: every entry of its table is provoked with the real libraries, and nothing else is explained."""

import importlib.metadata
import inspect
import json
import re
import shutil
import signal
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import nbformat
import numpy
import pandas
import pytest
import torch
from datasets import Dataset, load_dataset
from huggingface_hub import HfApi, constants, hf_hub_download
from hypothesis import given, settings
from hypothesis import strategies as st
from IPython.core.interactiveshell import InteractiveShell
from nbclient import NotebookClient
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
from peft.import_utils import is_torchao_available
from provocations import (
    PROVOKED,
    DownloadHub,
    file_server,
    in_another_process,
    point_client_at,
    provokes,
    raised,
    read_only,
    small_disk,
)
from tiny_models import build_trainer, random_model
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    TrainingArguments,
)
from trl import SFTConfig, SFTTrainer

from llama_sft_helpers import load_ipython_extension, unload_ipython_extension
from llama_sft_helpers.core.llama import load_llama3_config
from llama_sft_helpers.data import check_file
from llama_sft_helpers.doctor import TABLE, Explanation, explain, looks, notebook
from llama_sft_helpers.doctor.table import RENAMED_ARGUMENTS
from llama_sft_helpers.memory import plan_memory
from llama_sft_helpers.profiles import read_profile
from llama_sft_helpers.training import (
    RunGuardCallback,
    check_checkpoint,
    check_gradients_reach_adapters,
    check_loss_history,
    latest_checkpoint,
)

ROOT = Path(__file__).parents[2]
ROWS = [{"prompt": "Say hi. ", "completion": "hi there"}] * 8


def with_lora(model, rank=4, targets=("q_proj", "v_proj"), **keywords):
    config = LoraConfig(
        r=rank, lora_alpha=16, task_type="CAUSAL_LM", target_modules=list(targets), **keywords
    )
    return get_peft_model(model, config)


@pytest.fixture
def trainer(tmp_path, tiny_tokenizer):
    """An SFTTrainer over a few rows, two steps long."""

    def build(model, rows=None, **arguments):
        folder = arguments.pop("output_dir", tmp_path / "out")
        return build_trainer(model, folder, tiny_tokenizer, rows or ROWS, **arguments)

    return build


@pytest.fixture
def offline(tmp_path, monkeypatch):
    """An empty current folder, and no hub."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return tmp_path


@pytest.fixture
def hub(monkeypatch):
    with DownloadHub(monkeypatch) as hub:
        yield hub


@pytest.fixture
def disk(tmp_path):
    """A folder on a disk of 64 KiB."""
    with small_disk(tmp_path / "disk", 64) as folder:
        yield folder


# --- Packages ---


@provokes("stale-import")
def test_a_package_upgraded_under_a_running_session(tmp_path):
    # An older huggingface_hub without `auth_check` is imported, then upgraded on the disk, as pip does it.
    version = importlib.metadata.version("huggingface_hub")
    init = tmp_path / "huggingface_hub" / "__init__.py"
    shutil.copytree(_installed("huggingface_hub"), init.parent, ignore=shutil.ignore_patterns("__pycache__"))
    new = tmp_path / "new_init"
    init.rename(new)
    lines = new.read_text(encoding="utf-8").splitlines(keepends=True)
    old = "".join(line for line in lines if "auth_check" not in line)
    init.write_text(old.replace(f'__version__ = "{version}"', '__version__ = "0.36.0"'), encoding="utf-8")
    _write_metadata(tmp_path, "huggingface_hub", "0.36.0")
    code = f"""
from pathlib import Path
site = Path({str(tmp_path)!r})
sys.path.insert(0, str(site))
import huggingface_hub
def use():
    from huggingface_hub import auth_check
provoke(use)  # before the upgrade: a plain missing name
(site / "new_init").replace({str(init)!r})
metadata = site / "huggingface_hub-0.36.0.dist-info"
metadata = metadata.rename(site / "huggingface_hub-{version}.dist-info") / "METADATA"
metadata.write_text(metadata.read_text().replace("0.36.0", "{version}"))
provoke(use)
"""
    before, after = in_another_process(code)
    assert before["raised"] == after["raised"] == "ImportError"
    assert before["key"] is None
    assert f"huggingface_hub 0.36.0 is in memory, {version} is on the disk" in after["cause"]
    assert "Restart the session" in after["fix"]
    return [after]


@provokes("bitsandbytes-missing")
def test_bitsandbytes_missing_and_then_installed_into_the_same_session(tiny_model_dir):
    code = f"""
hide("bitsandbytes")
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
def load():
    AutoModelForCausalLM.from_pretrained({str(tiny_model_dir)!r}, device_map="cpu",
        quantization_config=BitsAndBytesConfig(load_in_8bit=True))
def plain():
    import bitsandbytes
provoke(load)
provoke(plain)
hide()
provoke(load)
"""
    missing, plain, unseen = in_another_process(code)
    assert plain["raised"] == "ModuleNotFoundError"
    assert "pip install bitsandbytes" in missing["fix"]
    # installed by now, but transformers remembers its first answer: a stale session, not a missing package
    assert unseen["message"] == missing["message"]
    assert unseen["key"] == "stale-import"
    return [missing, plain]


@provokes("bitsandbytes-native")
def test_bitsandbytes_without_its_compiled_library(tmp_path):
    # The package as it is, but for its libraries, where torch reports a CUDA card.
    broken = tmp_path / "bitsandbytes"
    broken.mkdir()
    for path in _installed("bitsandbytes").iterdir():
        if path.suffix != ".so":
            (broken / path.name).symlink_to(path)
    code = f"""
import torch
torch.cuda.is_available = lambda: True
torch.version.cuda = "12.8"
torch.cuda.get_device_capability = lambda device=None: (8, 0)
torch.cuda.device_count = lambda: 1
torch._C._cuda_getCurrentRawStream = None  # named at import, not used
sys.path.insert(0, {str(tmp_path)!r})
from bitsandbytes.cextension import lib
provoke(lambda: lib.cquantize_blockwise_fp32())
"""
    found = in_another_process(code)
    assert "python -m bitsandbytes" in found[0]["fix"]
    return found


@provokes("torchao-too-old")
def test_torchao_of_colabs_image(tmp_path, tiny_model, monkeypatch):
    (tmp_path / "torchao").mkdir()
    (tmp_path / "torchao" / "__init__.py").write_text("__version__ = '0.10.0'\n", encoding="utf-8")
    _write_metadata(tmp_path, "torchao", "0.10.0")
    monkeypatch.syspath_prepend(tmp_path)
    is_torchao_available.cache_clear()
    found = raised(with_lora, tiny_model)
    is_torchao_available.cache_clear()
    assert "here it is 0.10.0" in explain(found).cause
    return [found]


@provokes("renamed-argument")
def test_arguments_of_older_releases(tiny_model, tiny_tokenizer, tmp_path):
    tokenizer = raised(SFTTrainer, model=tiny_model, tokenizer=tiny_tokenizer)
    assert "processing_class" in explain(tokenizer).fix
    length = raised(SFTConfig, max_seq_length=512)
    assert "max_length" in explain(length).fix
    misspelt = raised(LoraConfig, lora_alfa=16)
    assert explain(misspelt).fix == "The nearest of its arguments is lora_alpha."
    tiny_model.save_pretrained(tmp_path)
    eight_bit = raised(AutoModelForCausalLM.from_pretrained, tmp_path, load_in_8bit=True)
    assert "BitsAndBytesConfig(load_in_8bit=True)" in explain(eight_bit).fix
    return [tokenizer, length, misspelt, eight_bit]


@pytest.mark.parametrize("old", RENAMED_ARGUMENTS)
def test_the_renamed_arguments_are_refused_and_their_successors_are_taken(old):
    new = RENAMED_ARGUMENTS[old]
    if old in ("load_in_8bit", "load_in_4bit"):
        return  # from_pretrained's; provoked above
    refused_by = SFTConfig if old not in inspect.signature(SFTConfig).parameters else SFTTrainer
    assert f"unexpected keyword argument '{old}'" in str(raised(refused_by, **{old: 1}))
    if match := re.match(r"(\w+)\((\w+)=", new):
        owner = {"SFTConfig": SFTConfig, "SFTTrainer": SFTTrainer}[match[1]]
        assert match[2] in inspect.signature(owner).parameters
    else:
        assert new.startswith("nothing")


@provokes("flash-attention-missing")
def test_flash_attention_without_its_package(tiny_model_dir):
    load = AutoModelForCausalLM.from_pretrained
    return [raised(load, tiny_model_dir, attn_implementation="flash_attention_2")]


@provokes("widget-not-shown")
def test_a_widget_without_ipywidgets():
    code = """
hide("ipywidgets", "IPython.html")
import tqdm.notebook
provoke(lambda: tqdm.notebook.tqdm(range(3)))
provoke(lambda: __import__("ipywidgets"))
"""
    bar, plain = in_another_process(code)
    assert "IProgress" in bar["message"]
    return [bar, plain]


# --- The hub ---


def _download(repo, tmp_path, token=None):
    return raised(hf_hub_download, repo, "config.json", token=token or False, cache_dir=tmp_path)


def _load(repo, tmp_path, token=None):
    return raised(AutoTokenizer.from_pretrained, repo, token=token or False, cache_dir=tmp_path)


_REFUSALS = [
    ("token-missing", "org/gated", None),
    ("token-invalid", "org/gated", "hf_unknown"),
    ("token-invalid", "org/gated", "old"),
    ("token-scope", "org/gated", "narrow"),
    ("gated-licence", "org/licence", "good"),
    ("gated-pending", "org/pending", "good"),
    ("gated-rejected", "org/rejected", "good"),
    ("repository-not-found", "org/nothing", "good"),
]


@provokes(*(key for key, *_ in _REFUSALS))
@pytest.mark.parametrize(("key", "repo", "token"), _REFUSALS)
def test_the_hub_refuses(key, repo, token, hub, tmp_path):
    found = [_download(repo, tmp_path, token), _load(repo, tmp_path, token)]
    if key in ("token-missing", "gated-licence"):
        assert all(f"https://huggingface.co/{repo}" in explain(error).fix for error in found)
    return found


@provokes("token-invalid")
def test_whose_a_token_is_that_the_hub_does_not_know(hub):
    return [raised(HfApi(endpoint=hub.url).whoami, token="hf_unknown")]


@provokes("hub-unreachable")
def test_a_hub_that_is_down_or_refuses_connections(hub, tmp_path, monkeypatch):
    hub.fail_status = 503
    down = [_download("org/gated", tmp_path), _load("org/gated", tmp_path)]
    hub.__exit__()
    point_client_at(hub.url, monkeypatch)  # nobody listens there any more
    dead = [_download("org/gated", tmp_path), _load("org/gated", tmp_path)]
    rows = raised(load_dataset, "org/rows", cache_dir=tmp_path)
    return [*down, *dead, rows]


@provokes("hub-unreachable")
def test_a_model_that_is_not_in_the_cache_while_offline(offline):
    return [_download("org/gated", offline), _load("org/gated", offline)]


@provokes("download-interrupted")
def test_a_download_that_breaks_off(tmp_path, monkeypatch):
    with file_server(monkeypatch):
        return [_download("org/cut", tmp_path)]


# --- Disk ---


@provokes("disk-full")
def test_a_full_disk_under_every_writer(tiny_model, trainer, disk, monkeypatch):
    found = [raised(tiny_model.save_pretrained, disk / "model")]
    found.append(raised(torch.save, tiny_model.state_dict(), disk / "weights.pt"))
    _empty(disk)
    found.append(raised(load_dataset, str(ROOT / "llama_sft_helpers" / "datasets"), cache_dir=str(disk)))
    _empty(disk)
    with file_server(monkeypatch):
        found.append(raised(hf_hub_download, "org/large", "config.json", cache_dir=disk))
    _empty(disk)
    run = {"output_dir": str(disk / "run"), "save_strategy": "steps", "save_steps": 1}
    found.append(raised(trainer(with_lora(tiny_model, rank=64), **run).train))
    assert not (disk / "run" / "checkpoint-1" / "adapter_model.safetensors").exists()
    return found


@provokes("disk-full")
def test_a_file_beyond_the_limit(tiny_model, tmp_path):
    """Without root: the system's limit on a file's size."""
    resource = pytest.importorskip("resource", reason="needs limits of a process, which Windows has not")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (16_384, before[1]))
    try:
        return [
            raised(tiny_model.save_pretrained, tmp_path / "model"),
            raised(torch.save, tiny_model.state_dict(), tmp_path / "weights.pt"),
            raised((tmp_path / "text").write_text, "x" * 100_000),
        ]
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


@provokes("folder-not-writable")
def test_a_read_only_folder(tiny_model, disk):
    read_only(disk)
    found = [raised(tiny_model.save_pretrained, disk / "model")]
    found.append(raised((disk / "file").write_text, "x"))
    assert str(disk / "model") in explain(found[0]).cause
    return found


@provokes("folder-not-writable")
@pytest.mark.skipif(sys.platform == "win32", reason="needs a system where chmod can close a folder")
def test_a_folder_of_someone_else(tmp_path):
    """Without root: the folder's own permissions; with root: a user who may not."""
    code = f"""
import os
os.chmod({str(tmp_path)!r}, 0o555)
if os.geteuid() == 0:
    os.seteuid(65534)
provoke(lambda: open({str(tmp_path / "file")!r}, "w"))
"""
    return in_another_process(code)


# --- Paths ---


@provokes("folder-missing")
def test_a_folder_that_is_not_there(tiny_model, offline):
    (offline / "outputs" / "adapter").mkdir(parents=True)
    typo = raised(AutoModelForCausalLM.from_pretrained, "outputs/adaptr")  # also the form of a hub name
    assert "The nearest name there is outputs/adapter." in explain(typo).cause
    return [
        typo,
        raised(AutoTokenizer.from_pretrained, "outputz"),
        raised(AutoModelForCausalLM.from_pretrained, "/content/nowhere"),
        raised(AutoTokenizer.from_pretrained, "./outputs/adaptr"),
        raised(PeftModel.from_pretrained, tiny_model, "outputs/adaptr"),
        raised(load_dataset, "outputs/rows"),
    ]


@provokes("folder-missing")
def test_a_folder_that_a_hub_which_answers_does_not_know(hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "outputs").mkdir()
    return [_load("outputs/adaptr", tmp_path, "good")]


@provokes("adapter-missing")
def test_a_folder_without_an_adapter(tiny_model, offline):
    (offline / "merged").mkdir()
    load = PeftModel.from_pretrained
    found = [raised(load, tiny_model, name) for name in ("merged", str(offline / "merged"))]
    return [*found, raised(AutoPeftModelForCausalLM.from_pretrained, "merged")]


@provokes("data-file-missing")
def test_a_data_file_that_is_not_there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_rows.csv").write_text("", encoding="utf-8")
    found = raised(pandas.read_csv, "my_row.csv")
    assert "The nearest name there is my_rows.csv." in explain(found).cause
    return [
        found,
        raised(load_dataset, "json", data_files="my.jsonl"),
        raised(load_dataset, "/nowhere/rows"),
        raised(check_file, "my.csv"),
    ]


# --- Rows ---


def _rows(number):
    return Dataset.from_list([{"question": "a", "answer": "b"}] * number)


@provokes("column-missing")
def test_a_column_that_does_not_exist():
    rows = _rows(3)
    found = raised(lambda: rows["instruction"])
    assert "the column `instruction`" in explain(found).cause
    return [
        found,
        raised(rows.remove_columns, "text"),
        raised(rows.rename_column, "text", "prompt"),
        raised(rows.select_columns, ["text"]),
        raised(rows.sort, "text"),
        raised(rows.map, lambda row: {"prompt": row["instruction"]}),
        raised(rows.map, lambda batch: {"prompt": batch["instruction"]}, batched=True),
    ]


@provokes("split-too-small")
def test_fewer_rows_than_a_split_needs():
    found = raised(_rows(40).train_test_split, test_size=200)
    assert "only 40 rows" in explain(found).cause
    return [
        found,
        raised(_rows(1).train_test_split, test_size=0.1),
        raised(_rows(40).train_test_split, test_size=30, train_size=30),
        raised(_rows(40).select, range(64)),
        raised(lambda: _rows(40)[63]),
    ]


# --- Precision ---


@provokes("dtype-mismatch")
def test_a_product_of_two_dtypes():
    half, ones = torch.ones(1, 4, 4, dtype=torch.float16), torch.ones(1, 4, 4)
    found = raised(torch.nn.Linear(4, 4).half(), ones[0])
    assert "(Float and Half)" in explain(found).cause
    attend = torch.nn.functional.scaled_dot_product_attention
    return [
        found,
        raised(lambda: ones[0] @ half[0]),
        raised(torch.bmm, ones, half),
        raised(attend, ones[None], half[None], ones[None]),
    ]


@provokes("fp16-unscale")
def test_weights_trained_in_fp16(tiny_model, tiny_tokenizer):
    model = tiny_model.half()
    scaler = torch.amp.GradScaler("cpu")
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    ids = torch.tensor([tiny_tokenizer("Say hi.").input_ids])
    scaler.scale(model(input_ids=ids, labels=ids).loss).backward()
    return [raised(scaler.unscale_, optimizer)]


@provokes("cast-of-8-bit-model")
def test_a_cast_of_an_8_bit_model(tiny_model_int8):
    return [raised(tiny_model_int8.to, torch.float16), raised(tiny_model_int8.half)]


@provokes("no-gpu")
def test_a_gpu_is_asked_for_where_there_is_none(tiny_model_dir):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    return [
        raised(AutoModelForCausalLM.from_pretrained, tiny_model_dir, device_map={"": 0}),
        raised(torch.ones(1).cuda),
        raised(TrainingArguments, output_dir="unused", bf16=True),
    ]


# --- Training ---


@provokes("quantized-not-trainable")
def test_a_quantized_model_without_adapters(tiny_model_int8, trainer):
    return [raised(trainer, tiny_model_int8)]


@provokes("no-gradient")
def test_an_adapter_loaded_for_inference(tiny_model, trainer, tmp_path):
    base = with_lora(tiny_model)
    base.save_pretrained(tmp_path / "adapter")
    model = PeftModel.from_pretrained(base.unload(), tmp_path / "adapter")
    return [raised(trainer(model).train)]


@provokes("no-gradient")
def test_gradients_that_do_not_reach_the_adapters(tiny_model):
    model = with_lora(tiny_model)
    with torch.no_grad():
        model(input_ids=torch.tensor([[1, 2, 3]]))
    return [raised(check_gradients_reach_adapters, model)]


@provokes("no-trained-token")
def test_prompts_that_fill_max_length(tiny_model, trainer):
    rows = [{"prompt": "Say hi. " * 40, "completion": "hi there"}] * 8
    return [raised(trainer(with_lora(tiny_model), rows=rows, max_length=16).train)]


@provokes("loss-nan-or-zero")
def test_a_number_that_overflowed(tiny_model, trainer):
    with torch.no_grad():
        tiny_model.model.norm.weight.fill_(float("inf"))
    ids = torch.tensor([[1, 2, 3]])
    sampled = raised(tiny_model.generate, input_ids=ids, do_sample=True, max_new_tokens=2, pad_token_id=0)
    tiny_model.train()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with torch.autograd.detect_anomaly():
            backward = raised(tiny_model(input_ids=ids, labels=ids).loss.backward)
    run = trainer(with_lora(tiny_model))
    run.train()
    losses = [entry["loss"] for entry in run.state.log_history if "loss" in entry]
    assert losses == [0.0, 0.0]  # what the trainer logs for NaN
    checked = raised(check_loss_history, run.state.log_history)
    assert "loss is 0.0 at step 1" in str(checked)
    return [sampled, backward, checked]


# --- Tokenizer and data ---


@provokes("pad-token-missing")
def test_no_token_to_pad_with(tiny_model, tiny_tokenizer, trainer):
    assert tiny_tokenizer.pad_token is None
    rows = [tiny_tokenizer("a"), tiny_tokenizer("b c d e")]
    collator = DataCollatorForLanguageModeling(tiny_tokenizer, mlm=False)
    return [
        raised(tiny_tokenizer, ["a", "b c d e"], padding=True),
        raised(collator, rows),
        raised(trainer, tiny_model, pad_token="<pad>"),
    ]


@provokes("token-id-out-of-range")
def test_ids_and_labels_outside_the_vocabulary(tiny_model):
    good, bad = torch.tensor([[1, 2, 3]]), torch.tensor([[1, 2, 1024]])
    return [raised(tiny_model, input_ids=bad), raised(tiny_model, input_ids=good, labels=bad)]


@provokes("embedding-size-mismatch")
def test_an_embedding_of_another_size(tiny_model_dir, tiny_model, tmp_path):
    config = AutoConfig.from_pretrained(tiny_model_dir)
    config.vocab_size = 2048
    whole = raised(AutoModelForCausalLM.from_pretrained, tiny_model_dir, config=config)
    tiny_model.resize_token_embeddings(1032)
    with_lora(tiny_model, modules_to_save=["embed_tokens", "lm_head"]).save_pretrained(tmp_path / "adapter")
    base = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    return [whole, raised(PeftModel.from_pretrained, base, tmp_path / "adapter")]


@provokes("adapter-of-another-base")
def test_an_adapter_of_another_base(tiny_model, tmp_path):
    tiny_model = with_lora(tiny_model)
    tiny_model.save_pretrained(tmp_path / "adapter")
    wide = random_model(hidden_size=128)
    shapes = raised(PeftModel.from_pretrained, wide, tmp_path / "adapter")
    config = tmp_path / "adapter" / "adapter_config.json"
    config.write_text(
        config.read_text(encoding="utf-8").replace("q_proj", "c_attn").replace("v_proj", "c_proj"),
        encoding="utf-8",
    )
    return [shapes, raised(PeftModel.from_pretrained, tiny_model.unload(), tmp_path / "adapter")]


@provokes("target-modules-missing")
def test_target_modules_of_another_architecture(tiny_model):
    found = raised(with_lora, tiny_model, targets=["c_attn"])
    assert "{'c_attn'}" in explain(found).cause
    return [found]


@provokes("dataset-columns")
def test_rows_without_the_trainers_columns(tiny_model, trainer):
    return [raised(trainer, tiny_model, rows=[{"instruction": "Say hi.", "output": "hi"}])]


# --- Files and checkpoints ---


@pytest.fixture
def checkpointed(tiny_model_dir, trainer, tmp_path):
    """Trains to step 2 with checkpoints, then returns a builder of trainers that resume from there."""

    def build(adapter=None, **arguments):
        model = with_lora(AutoModelForCausalLM.from_pretrained(tiny_model_dir), **(adapter or {}))
        guard = RunGuardCallback({"model": "a"})
        return trainer(model, callbacks=[guard], save_strategy="steps", save_steps=1, **arguments)

    build().train()
    build.folder = tmp_path / "out" / "checkpoint-2"
    assert build.folder.is_dir()
    return build


@provokes("resume-with-other-settings")
def test_resuming_with_other_settings(checkpointed):
    others = ({"rank": 8}, {"targets": ["q_proj"]}, {"targets": ["q_proj", "v_proj", "o_proj"]})
    trainers = [checkpointed(other, max_steps=3) for other in others]
    trainers.append(checkpointed(max_steps=3, optim="adafactor"))
    return [raised(one.train, resume_from_checkpoint=True) for one in trainers]


@provokes("resume-with-other-settings")
def test_the_training_helpers_refuse_another_run(checkpointed):
    return [raised(latest_checkpoint, checkpointed.folder.parent, {"model": "b"})]


@provokes("truncated-file")
def test_files_that_are_cut_off(checkpointed, tiny_model_dir, tmp_path):
    names = (
        "adapter_model.safetensors",
        "optimizer.pt",
        "scheduler.pt",
        "rng_state.pth",
        "trainer_state.json",
    )
    found = []
    for path in (checkpointed.folder / name for name in names):
        whole = path.read_bytes()
        path.write_bytes(whole[: len(whole) // 2])
        found.append(raised(checkpointed(max_steps=3).train, resume_from_checkpoint=True))
        if path.suffix == ".safetensors":
            found.append(raised(check_checkpoint, checkpointed.folder))
        path.write_bytes(whole)
    for kept in (0, 4, 100, 50_000):
        folder = shutil.copytree(tiny_model_dir, tmp_path / f"model-{kept}")
        weights = folder / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:kept])
        found.append(raised(AutoModelForCausalLM.from_pretrained, folder))
    return found


@provokes("merge-into-8-bit")
def test_merging_into_8_bit_weights(tiny_model_int8):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with_lora(tiny_model_int8).merge_and_unload()
    return [warning.message for warning in caught if "Merge lora" in str(warning.message)][:1]


# --- Memory, the kernel and the notebook ---


@provokes("system-memory")
def test_more_ram_than_there_is():
    return [raised(torch.empty, 2**50), raised(numpy.ones, 2**50)]


def _client(folder, *cells, **options):
    built = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    where = {"metadata": {"path": folder}}
    return NotebookClient(built, timeout=60, kernel_name="python3", resources=where, **options)


@pytest.fixture(scope="module")
def executed(tmp_path_factory):
    """Executed in a real kernel: known, unknown and warned-of failures, with and without the extension."""
    client = _client(
        tmp_path_factory.mktemp("notebook"),
        "%load_ext llama_sft_helpers",
        "import torch\ntorch.empty(2**50)",
        'open("/")',  # IsADirectoryError: not in the table
        'import warnings\nwarnings.warn("Merge lora module to 8-bit linear may get different generations")',
        "1 + 1",
        "%unload_ext llama_sft_helpers",
        "torch.empty(2**50)",
        "import os\nos._exit(9)  # dead without a word, as where the system kills it when RAM is full",
        allow_errors=True,
    )
    client.nb.dead = raised(client.execute)
    return client.nb


@provokes("kernel-died")
def test_a_kernel_that_was_killed(executed):
    return [executed.dead]


def test_the_extension_shows_cause_and_fix_under_the_traceback(executed):
    error, shown = executed.cells[1].outputs
    assert (error.output_type, shown.output_type) == ("error", "display_data")
    assert error.ename == "RuntimeError"  # the traceback itself stays
    assert "torch.empty(2**50)" in re.sub(r"\x1b\[[0-9;]*m", "", "\n".join(error.traceback))
    assert re.search("Cause: Not the graphics card.*Fix:", shown.data["text/plain"], re.DOTALL)
    assert '<a href="https://huggingface.co/docs/' in shown.data["text/html"]


def test_the_extension_leaves_the_rest_alone_explains_warnings_and_can_be_unloaded(executed):
    kinds = [[output.output_type for output in cell.outputs] for cell in executed.cells]
    unknown, warned, fine, _, unloaded = kinds[2:7]
    assert (unknown, fine, unloaded) == (["error"], ["execute_result"], ["error"])
    warning, shown = executed.cells[3].outputs
    assert warned == ["stream", "display_data"]
    assert "UserWarning" in warning.text
    assert "merge_and_unload() there" in shown.data["text/plain"]


def test_a_cell_that_failed_in_a_kernel_is_explained_from_its_report(tmp_path):
    code = "import torch\ntorch.nn.Embedding(1024, 8)(torch.tensor([5000]))"
    wrapped = RuntimeError("01_x.ipynb: a cell failed")
    wrapped.__cause__ = raised(_client(tmp_path, code).execute)
    assert explain(wrapped).key == "token-id-out-of-range"


@provokes("cell-assert")
def test_a_bare_assert_in_a_cell(tmp_path):
    code = "before, after = 2.0, 2.5\nassert after < before"
    reported = raised(_client(tmp_path, code).execute)
    assert "`assert after < before` is false" in explain(reported).cause
    here = InteractiveShell().run_cell(code).error_in_exec
    return [reported, here]


# --- Out of memory: the plan's part needs no GPU ---


def test_the_plan_names_its_largest_item_and_a_smaller_setting(monkeypatch):
    settings = {"per_device_train_batch_size": 8, "gradient_checkpointing": False}
    monkeypatch.setenv("SFT_PROFILE", "colab-t4")
    monkeypatch.setenv("SFT_SETTINGS", json.dumps(settings))
    text = "CUDA out of memory. Tried to allocate 1.25 GiB. GPU 0 has a total capacity of 14.74 GiB"
    found = explain(torch.OutOfMemoryError(text))
    plan = plan_memory(load_llama3_config(), read_profile("colab-t4", **settings))
    largest = plan.sort_values("gib").iloc[-1]
    assert found.key == "cuda-out-of-memory"
    assert "asked for 1.25 GiB more" in found.cause
    assert f"largest item is {largest['component']}: {largest['gib']:.2f} GiB" in found.cause
    assert "gradient_checkpointing=True" in found.fix


def test_the_plan_is_that_of_the_model_in_the_traceback(tiny_model):
    def step(model):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 MiB.")

    found = explain(raised(step, SimpleNamespace(model=tiny_model)))  # as a trainer holds it
    assert "The plan for profile ci-tiny is 0.0" in found.cause  # of the tiny model, not of Llama 3 8B


# --- Nothing else is explained, and nothing is raised ---


class _UnprintableError(Exception):
    def __str__(self):
        raise RuntimeError("no text")


class _LyingError(Exception):
    ename = "KeyError"
    evalue = property(lambda self: 1 / 0)
    filename = property(lambda self: 1 / 0)


class _Mine:
    def __init__(self):
        pass


def _refuse(message, kind=AssertionError):
    raise kind(message) if message else kind


# Failures of everyday code, and failures that look like one of the table and are another.
_NOT_KNOWN = {
    "key": lambda: {}["loss"],
    "index": lambda: list(range(3))[3],
    "division": lambda: 1 / 0,
    "number": lambda: int("x"),
    "attribute": lambda: None.shape,
    "package": lambda: __import__("no_such_package"),
    "argument": lambda: print(1, colour="red"),
    "JSON": lambda: json.loads("{"),
    "bytes": b"\xff".decode,
    "syntax": lambda: eval("1 +"),
    "iterator": lambda: next(iter([])),
    "sum of two shapes": lambda: torch.ones(2) + torch.ones(3),
    "tensor's index": lambda: torch.tensor([1, 2])[5],
    "frame's column": lambda: pandas.DataFrame({"a": [1]})["text"],
    "like dtype-mismatch: shapes": lambda: torch.ones(2, 3) @ torch.ones(2, 3),
    "like dtype-mismatch: labels": lambda: torch.nn.functional.nll_loss(torch.ones(2, 3), torch.ones(2)),
    "like renamed-argument": lambda: _Mine(tokenizer=None),
    "like renamed-argument: a misspelling": lambda: _Mine(lora_alfa=16),
    "like folder-missing": lambda: next(Path("/nowhere/at/all").iterdir()),
    "like data-file-missing": lambda: Path("/nowhere/at/all.py").read_text(encoding="utf-8"),
    "like column-missing": lambda: {}["instruction"],
    "like split-too-small": lambda: torch.arange(3)[63],
    "like cell-assert: of a library": lambda: _refuse(""),
    "like cell-assert: with its reason": lambda: _refuse("3 rows"),
    "like target-modules-missing": lambda: torch.nn.Linear(2, 2).get_submodule("c_attn"),
    "like adapter-missing": lambda: _refuse("Can't find 'vocab.json' at '/'", ValueError),
}


@pytest.mark.parametrize("what", _NOT_KNOWN)
def test_what_is_not_known_is_not_explained(what):
    exception = raised(_NOT_KNOWN[what])
    assert explain(exception) is None, (exception, explain(exception))


def test_a_hub_name_is_not_taken_for_a_folder(hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert explain(_load("org/nothing", tmp_path, "good")).key == "repository-not-found"


def test_what_is_no_exception_or_cannot_be_read_gives_none():
    loop = ValueError("a")
    loop.__cause__ = KeyError("b")
    loop.__cause__.__cause__ = loop
    deep = ValueError("0")
    for number in range(5000):
        deeper = ValueError(str(number))
        deeper.__cause__ = deep
        deep = deeper
    group = ExceptionGroup("g", [ValueError("v")])
    odd = [None, "text", 3, ValueError, _UnprintableError(), _LyingError("x"), loop, deep, group]
    odd += [KeyboardInterrupt(), SystemExit(1), ValueError("x" * 5_000_000)]
    assert [explain(exception) for exception in odd] == [None] * len(odd)


def test_a_known_failure_is_found_inside_a_group_and_behind_a_cause():
    full = OSError(28, "No space left on device")
    outer, hidden = ValueError("saving failed"), ValueError("mine")
    outer.__cause__, hidden.__context__ = full, full
    for exception in (ExceptionGroup("tasks", [ValueError("v"), full]), outer, hidden):
        assert explain(exception).key == "disk-full"
    hidden.__suppress_context__ = True  # raise ... from None
    assert explain(hidden) is None


_KINDS = [ValueError, RuntimeError, OSError, ImportError, KeyError, TypeError, AttributeError, IndexError]


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(_KINDS), st.text(max_size=300), st.text(max_size=40), st.booleans())
def test_explain_never_raises(kind, text, ename, dressed):
    exception = kind(text)
    if dressed:
        exception.ename, exception.evalue, exception.traceback = ename, text, text
    found = explain(exception)
    assert found is None or isinstance(found, Explanation)


# --- The table itself ---


def test_every_entry_is_provoked_here_or_on_a_gpu():
    gpu = (ROOT / "tests" / "gpu" / "test_doctor_gpu.py").read_text(encoding="utf-8")
    on_gpu = set(re.findall(r'@provokes\("([\w-]+)"\)', gpu))
    keys = [failure.key for failure in TABLE]
    assert len(set(keys)) == len(keys)
    assert set(PROVOKED) | on_gpu == set(keys)
    assert on_gpu >= {"cuda-out-of-memory", "device-side-assert", "grad-scaler-bf16"}


@pytest.mark.parametrize("failure", TABLE, ids=lambda failure: failure.key)
def test_entries_are_complete(failure):
    for sign in failure.signs:
        assert sign.raised
        re.compile(sign.message)
        re.compile(sign.where)
        assert sign.look in ("", *looks.LOOKS)
        assert sign.message or sign.where or sign.look or sign.raised not in ("Exception", "RuntimeError")
    assert failure.link.startswith("https://")
    assert failure.fix[0].isupper() or failure.fix[0] in "`{" or "(" in failure.fix.split()[0]
    for code in re.findall(r"`(for [^`]+)`", failure.fix):
        compile(code, failure.key, "exec")


def test_the_failure_page_is_that_of_the_table_and_the_counts():
    check = [sys.executable, str(ROOT / "tools" / "failures.py"), "--check"]
    assert subprocess.run(check, timeout=60).returncode == 0, "run python tools/failures.py"
    counts = json.loads((ROOT / "docs" / "failures.json").read_text(encoding="utf-8"))
    assert {failure.key for failure in TABLE} >= set(counts["failures"])
    for found in counts["failures"].values():
        assert found["provoked"] == found["explained"] > 0
    for found in counts["drills"].values():
        assert not any(found.get(bad) for bad in ("lost checkpoints", "tokens leaked", "silently wrong"))


def test_texts_from_the_exception_are_escaped_and_tokens_left_out():
    found = explain(OSError(28, "No space left on device", "/data/<script>alert(1)</script>/hf_abcDEF123456"))
    page = found._repr_html_()
    assert "hf_abcDEF123456" not in str(found) + page
    assert "<script>" not in page
    assert "&lt;script&gt;" in page


def test_attach_and_detach_leave_no_trace():
    shell = InteractiveShell()
    before = list(shell.events.callbacks["post_run_cell"]), warnings.showwarning
    load_ipython_extension(shell)
    load_ipython_extension(shell)  # %reload_ext
    assert shell.events.callbacks["post_run_cell"].count(notebook._after_cell) == 1
    unload_ipython_extension(shell)
    unload_ipython_extension(shell)
    assert (list(shell.events.callbacks["post_run_cell"]), warnings.showwarning) == before


def _empty(folder):
    for path in folder.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def _installed(package):
    return Path(importlib.metadata.distribution(package).locate_file(package))


def _write_metadata(site, name, version):
    folder = site / f"{name}-{version}.dist-info"
    folder.mkdir(parents=True)
    (folder / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n", encoding="utf-8"
    )
