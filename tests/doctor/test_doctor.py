"""The doctor: every entry of its table is provoked with the real libraries, and nothing else is explained."""

import importlib.metadata
import inspect
import json
import re
import resource
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import nbformat
import pandas
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
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

from llama_sft_helpers.doctor import TABLE, Explanation, explain, looks, notebook
from llama_sft_helpers.doctor.table import RENAMED_ARGUMENTS
from llama_sft_helpers.training import check_loss_history

ROOT = Path(__file__).parents[2]
ROWS = [{"prompt": "Say hi. ", "completion": "hi there"}] * 8


@pytest.fixture
def lora():
    from peft import LoraConfig

    def config(rank=4, targets=("q_proj", "v_proj"), **keywords):
        return LoraConfig(
            r=rank, lora_alpha=16, task_type="CAUSAL_LM", target_modules=list(targets), **keywords
        )

    return config


@pytest.fixture
def trainer(tmp_path, tiny_tokenizer):
    """An SFTTrainer over a few rows, two steps long."""

    def build(model, rows=None, **arguments):
        folder = arguments.pop("output_dir", tmp_path / "out")
        return build_trainer(model, folder, tiny_tokenizer, rows or ROWS, **arguments)

    return build


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
    site = tmp_path / "site"
    real = Path(importlib.metadata.distribution("huggingface_hub").locate_file("huggingface_hub"))
    shutil.copytree(real, site / "huggingface_hub", ignore=shutil.ignore_patterns("__pycache__"))
    init = site / "huggingface_hub" / "__init__.py"
    new = init.read_text(encoding="utf-8")
    version = importlib.metadata.version("huggingface_hub")
    old = "".join(line for line in new.splitlines(keepends=True) if "auth_check" not in line)
    init.write_text(old.replace(f'__version__ = "{version}"', '__version__ = "0.36.0"'), encoding="utf-8")
    (tmp_path / "new_init").write_text(new, encoding="utf-8")
    _write_metadata(site, "huggingface_hub", "0.36.0")
    code = f"""
import shutil
from pathlib import Path
sys.path.insert(0, {str(site)!r})
import huggingface_hub
def use():
    from huggingface_hub import auth_check
provoke(use)  # before the upgrade: a plain missing name
site = Path({str(site)!r})
shutil.copy({str(tmp_path / "new_init")!r}, site / "huggingface_hub" / "__init__.py")
shutil.move(site / "huggingface_hub-0.36.0.dist-info", site / "huggingface_hub-{version}.dist-info")
metadata = site / "huggingface_hub-{version}.dist-info" / "METADATA"
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
    real = Path(importlib.metadata.distribution("bitsandbytes").locate_file("bitsandbytes"))
    broken = tmp_path / "bitsandbytes"
    broken.mkdir()
    for path in real.iterdir():
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
def test_torchao_of_colabs_image(tmp_path, tiny_model, lora, monkeypatch):
    from peft import get_peft_model
    from peft.import_utils import is_torchao_available

    (tmp_path / "torchao").mkdir()
    (tmp_path / "torchao" / "__init__.py").write_text("__version__ = '0.10.0'\n")
    _write_metadata(tmp_path, "torchao", "0.10.0")
    monkeypatch.syspath_prepend(tmp_path)
    is_torchao_available.cache_clear()
    found = raised(get_peft_model, tiny_model, lora())
    is_torchao_available.cache_clear()
    assert "here it is 0.10.0" in explain(found).cause
    return [found]


@provokes("renamed-argument")
def test_arguments_of_older_releases(tiny_model, tiny_tokenizer, tmp_path):
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM
    from trl import SFTConfig, SFTTrainer

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
    from trl import SFTConfig, SFTTrainer

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
    from transformers import AutoModelForCausalLM

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
    from huggingface_hub import hf_hub_download

    return raised(hf_hub_download, repo, "config.json", token=token or False, cache_dir=tmp_path)


def _load(repo, tmp_path, token=None):
    from transformers import AutoTokenizer

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
    from huggingface_hub import HfApi

    return [raised(HfApi(endpoint=hub.url).whoami, token="hf_unknown")]


@provokes("hub-unreachable")
def test_a_hub_that_is_down_or_refuses_connections(hub, tmp_path, monkeypatch):
    from datasets import load_dataset

    hub.fail_status = 503
    down = [_download("org/gated", tmp_path), _load("org/gated", tmp_path)]
    hub.__exit__()
    point_client_at(hub.url, monkeypatch)  # nobody listens there any more
    dead = [_download("org/gated", tmp_path), _load("org/gated", tmp_path)]
    rows = raised(load_dataset, "org/rows", cache_dir=tmp_path)
    return [*down, *dead, rows]


@provokes("hub-unreachable")
def test_a_model_that_is_not_in_the_cache_while_offline(tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return [_download("org/gated", tmp_path), _load("org/gated", tmp_path)]


@provokes("download-interrupted")
def test_a_download_that_breaks_off(tmp_path, monkeypatch):
    with file_server(monkeypatch):
        return [_download("org/cut", tmp_path)]


# --- Disk ---


@provokes("disk-full")
def test_a_full_disk_under_every_writer(tiny_model, lora, trainer, disk, monkeypatch):
    import torch
    from datasets import load_dataset
    from huggingface_hub import hf_hub_download
    from peft import get_peft_model

    found = [raised(tiny_model.save_pretrained, disk / "model")]
    found.append(raised(torch.save, tiny_model.state_dict(), disk / "weights.pt"))
    _empty(disk)
    found.append(raised(load_dataset, str(doctor_rows()), cache_dir=str(disk)))
    _empty(disk)
    with file_server(monkeypatch):
        found.append(raised(hf_hub_download, "org/large", "config.json", cache_dir=disk))
    _empty(disk)
    model = get_peft_model(tiny_model, lora(rank=64))
    run = trainer(model, output_dir=str(disk / "run"), save_strategy="steps", save_steps=1)
    found.append(raised(run.train))
    assert not (disk / "run" / "checkpoint-1" / "adapter_model.safetensors").exists()
    return found


@provokes("disk-full")
def test_a_file_beyond_the_limit(tiny_model, tmp_path):
    """Without root: the system's limit on a file's size."""
    import signal

    import torch

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
def test_a_folder_that_is_not_there(tiny_model, tmp_path, monkeypatch):
    from datasets import load_dataset
    from huggingface_hub import constants
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    (tmp_path / "outputs" / "adapter").mkdir(parents=True)
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
def test_a_folder_without_an_adapter(tiny_model, tmp_path, monkeypatch):
    from huggingface_hub import constants
    from peft import AutoPeftModelForCausalLM, PeftModel

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    (tmp_path / "merged").mkdir()
    load = PeftModel.from_pretrained
    found = [raised(load, tiny_model, name) for name in ("merged", str(tmp_path / "merged"))]
    return [*found, raised(AutoPeftModelForCausalLM.from_pretrained, "merged")]


@provokes("data-file-missing")
def test_a_data_file_that_is_not_there(tmp_path, monkeypatch):
    from datasets import load_dataset

    from llama_sft_helpers.data import check_file

    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_rows.csv").write_text("")
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
    from datasets import Dataset

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
    import torch

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
    import torch

    model = tiny_model.half()
    scaler = torch.amp.GradScaler("cpu")
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    ids = torch.tensor([tiny_tokenizer("Say hi.").input_ids])
    scaler.scale(model(input_ids=ids, labels=ids).loss).backward()
    return [raised(scaler.unscale_, optimizer)]


@provokes("cast-of-8-bit-model")
def test_a_cast_of_an_8_bit_model(tiny_model_int8):
    import torch

    return [raised(tiny_model_int8.to, torch.float16), raised(tiny_model_int8.half)]


@provokes("no-gpu")
def test_a_gpu_is_asked_for_where_there_is_none(tiny_model_dir):
    import torch
    from transformers import AutoModelForCausalLM, TrainingArguments

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
def test_an_adapter_loaded_for_inference(tiny_model, lora, trainer, tmp_path):
    from peft import PeftModel, get_peft_model

    base = get_peft_model(tiny_model, lora())
    base.save_pretrained(tmp_path / "adapter")
    model = PeftModel.from_pretrained(base.unload(), tmp_path / "adapter")
    return [raised(trainer(model).train)]


@provokes("no-gradient")
def test_gradients_that_do_not_reach_the_adapters(tiny_model, lora):
    import torch
    from peft import get_peft_model

    from llama_sft_helpers.training import check_gradients_reach_adapters

    model = get_peft_model(tiny_model, lora())
    with torch.no_grad():
        model(input_ids=torch.tensor([[1, 2, 3]]))
    return [raised(check_gradients_reach_adapters, model)]


@provokes("no-trained-token")
def test_prompts_that_fill_max_length(tiny_model, lora, trainer):
    from peft import get_peft_model

    rows = [{"prompt": "Say hi. " * 40, "completion": "hi there"}] * 8
    return [raised(trainer(get_peft_model(tiny_model, lora()), rows=rows, max_length=16).train)]


@provokes("loss-nan-or-zero")
def test_a_number_that_overflowed(tiny_model, lora, trainer):
    import torch
    from peft import get_peft_model

    with torch.no_grad():
        tiny_model.model.norm.weight.fill_(float("inf"))
    ids = torch.tensor([[1, 2, 3]])
    sampled = raised(tiny_model.generate, input_ids=ids, do_sample=True, max_new_tokens=2, pad_token_id=0)
    loss = tiny_model.train()(input_ids=ids, labels=ids).loss
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with torch.autograd.detect_anomaly():
            loss = tiny_model(input_ids=ids, labels=ids).loss
            backward = raised(loss.backward)
    run = trainer(get_peft_model(tiny_model, lora()))
    run.train()
    losses = [entry["loss"] for entry in run.state.log_history if "loss" in entry]
    assert losses == [0.0, 0.0]  # what the trainer logs for NaN
    checked = raised(check_loss_history, run.state.log_history)
    assert "loss is 0.0 at step 1" in str(checked)
    return [sampled, backward, checked]


# --- Tokenizer and data ---


@provokes("pad-token-missing")
def test_no_token_to_pad_with(tiny_model, tiny_tokenizer, trainer):
    from transformers import DataCollatorForLanguageModeling

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
    import torch

    good, bad = torch.tensor([[1, 2, 3]]), torch.tensor([[1, 2, 1024]])
    return [raised(tiny_model, input_ids=bad), raised(tiny_model, input_ids=good, labels=bad)]


@provokes("embedding-size-mismatch")
def test_an_embedding_of_another_size(tiny_model_dir, tiny_model, lora, tmp_path):
    from peft import PeftModel, get_peft_model
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(tiny_model_dir)
    config.vocab_size = 2048
    whole = raised(AutoModelForCausalLM.from_pretrained, tiny_model_dir, config=config)
    tiny_model.resize_token_embeddings(1032)
    model = get_peft_model(tiny_model, lora(modules_to_save=["embed_tokens", "lm_head"]))
    model.save_pretrained(tmp_path / "adapter")
    base = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    return [whole, raised(PeftModel.from_pretrained, base, tmp_path / "adapter")]


@provokes("adapter-of-another-base")
def test_an_adapter_of_another_base(tiny_model, lora, tmp_path):
    from peft import PeftModel, get_peft_model

    tiny_model = get_peft_model(tiny_model, lora())
    tiny_model.save_pretrained(tmp_path / "adapter")
    wide = random_model(hidden_size=128)
    shapes = raised(PeftModel.from_pretrained, wide, tmp_path / "adapter")
    config = tmp_path / "adapter" / "adapter_config.json"
    config.write_text(config.read_text().replace("q_proj", "c_attn").replace("v_proj", "c_proj"))
    return [shapes, raised(PeftModel.from_pretrained, tiny_model.unload(), tmp_path / "adapter")]


@provokes("target-modules-missing")
def test_target_modules_of_another_architecture(tiny_model, lora):
    from peft import get_peft_model

    found = raised(get_peft_model, tiny_model, lora(targets=["c_attn"]))
    assert "{'c_attn'}" in explain(found).cause
    return [found]


@provokes("dataset-columns")
def test_rows_without_the_trainers_columns(tiny_model, trainer):
    return [raised(trainer, tiny_model, rows=[{"instruction": "Say hi.", "output": "hi"}])]


# --- Files and checkpoints ---


@pytest.fixture
def checkpointed(tiny_model_dir, lora, trainer, tmp_path):
    """Trains to step 2 with checkpoints, then returns a builder of trainers that resume from there."""
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM

    def build(config=None, **arguments):
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_model_dir), config or lora())
        return trainer(model, **{"save_strategy": "steps", "save_steps": 1, **arguments})

    build().train()
    build.folder = tmp_path / "out" / "checkpoint-2"
    assert build.folder.is_dir()
    return build


@provokes("resume-with-other-settings")
def test_resuming_with_other_settings(checkpointed, lora):
    return [
        raised(checkpointed(config, max_steps=3, **arguments).train, resume_from_checkpoint=True)
        for config, arguments in [
            (lora(rank=8), {}),
            (lora(targets=["q_proj"]), {}),
            (lora(targets=["q_proj", "v_proj", "o_proj"]), {}),
            (None, {"optim": "adafactor"}),
        ]
    ]


@provokes("resume-with-other-settings")
def test_the_training_helpers_refuse_another_run(checkpointed):
    from llama_sft_helpers.training import latest_checkpoint
    from llama_sft_helpers.training.checkpoints import RUN_FILE

    (checkpointed.folder.parent / RUN_FILE).write_text(json.dumps({"model": "a"}))
    return [raised(latest_checkpoint, checkpointed.folder.parent, {"model": "b"})]


@provokes("truncated-file")
def test_files_that_are_cut_off(checkpointed, tiny_model_dir, tmp_path):
    from transformers import AutoModelForCausalLM

    from llama_sft_helpers.training import check_checkpoint

    found = []
    for name in (
        "adapter_model.safetensors",
        "optimizer.pt",
        "scheduler.pt",
        "rng_state.pth",
        "trainer_state.json",
    ):
        path = checkpointed.folder / name
        whole = path.read_bytes()
        path.write_bytes(whole[: len(whole) // 2])
        found.append(raised(checkpointed(max_steps=3).train, resume_from_checkpoint=True))
        if name == "adapter_model.safetensors":
            found.append(raised(check_checkpoint, checkpointed.folder))
        path.write_bytes(whole)
    for kept in (0, 4, 100, 50_000):
        folder = tmp_path / f"model-{kept}"
        shutil.copytree(tiny_model_dir, folder)
        path = folder / "model.safetensors"
        path.write_bytes(path.read_bytes()[:kept])
        found.append(raised(AutoModelForCausalLM.from_pretrained, folder))
    return found


@provokes("merge-into-8-bit")
def test_merging_into_8_bit_weights(tiny_model_int8, lora):
    from peft import get_peft_model

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        get_peft_model(tiny_model_int8, lora()).merge_and_unload()
    return [warning.message for warning in caught if "Merge lora" in str(warning.message)][:1]


# --- Memory, the kernel and the notebook ---


@provokes("system-memory")
def test_more_ram_than_there_is():
    import numpy
    import torch

    return [raised(torch.empty, 2**50), raised(numpy.ones, 2**50)]


@pytest.fixture(scope="module")
def executed(tmp_path_factory):
    """Executed in a real kernel: known, unknown and warned-of failures, with and without the extension."""
    from nbclient import NotebookClient
    from nbclient.exceptions import DeadKernelError

    fail = 'open("/")'  # IsADirectoryError: not in the table
    cells = [
        "%load_ext llama_sft_helpers",
        "import torch\ntorch.empty(2**50)",
        fail,
        'import warnings\nwarnings.warn("Merge lora module to 8-bit linear may get different generations")',
        "1 + 1",
        "%unload_ext llama_sft_helpers",
        "torch.empty(2**50)",
        "import os, signal\nos.kill(os.getpid(), signal.SIGKILL)  # what the system does when RAM is full",
    ]
    built = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    folder = tmp_path_factory.mktemp("notebook")
    client = NotebookClient(
        built, timeout=60, allow_errors=True, kernel_name="python3", resources={"metadata": {"path": folder}}
    )
    with pytest.raises(DeadKernelError) as dead:
        client.execute()
    built.dead = dead.value
    return built


@provokes("kernel-died")
def test_a_kernel_that_was_killed(executed):
    return [executed.dead]


def _shown(cell):
    return [output.data for output in cell.outputs if output.output_type == "display_data"]


def test_the_extension_shows_cause_and_fix_under_the_traceback(executed):
    known = executed.cells[1].outputs
    assert [output.output_type for output in known] == ["error", "display_data"]
    assert known[0].ename == "RuntimeError"  # the traceback itself stays
    assert "torch.empty(2**50)" in re.sub(r"\x1b\[[0-9;]*m", "", "\n".join(known[0].traceback))
    text, page = known[1].data["text/plain"], known[1].data["text/html"]
    assert "Cause: Not the graphics card" in text
    assert "Fix:" in text
    assert '<a href="https://huggingface.co/docs/' in page


def test_the_extension_leaves_unknown_failures_alone_and_explains_warnings(executed):
    unknown, warned, fine = executed.cells[2], executed.cells[3], executed.cells[4]
    assert [output.output_type for output in unknown.outputs] == ["error"]
    assert "merge_and_unload() there" in _shown(warned)[0]["text/plain"]
    assert any("UserWarning" in output.get("text", "") for output in warned.outputs)
    assert [output.output_type for output in fine.outputs] == ["execute_result"]


def test_the_extension_can_be_unloaded(executed):
    assert [output.output_type for output in executed.cells[6].outputs] == ["error"]


def _failure_in_a_kernel(tmp_path, code):
    from nbclient import NotebookClient

    built = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code)])
    client = NotebookClient(
        built, timeout=60, kernel_name="python3", resources={"metadata": {"path": tmp_path}}
    )
    return raised(client.execute)


def test_a_cell_that_failed_in_a_kernel_is_explained_from_its_report(tmp_path):
    code = "import torch\ntorch.nn.Embedding(1024, 8)(torch.tensor([5000]))"
    wrapped = RuntimeError("01_x.ipynb: a cell failed")
    wrapped.__cause__ = _failure_in_a_kernel(tmp_path, code)
    assert explain(wrapped).key == "token-id-out-of-range"


@provokes("cell-assert")
def test_a_bare_assert_in_a_cell(tmp_path):
    from IPython.core.interactiveshell import InteractiveShell

    code = "before, after = 2.0, 2.5\nassert after < before"
    reported = _failure_in_a_kernel(tmp_path, code)
    assert "`assert after < before` is false" in explain(reported).cause
    here = InteractiveShell().run_cell(code).error_in_exec
    return [reported, here]


# --- Out of memory: the plan's part needs no GPU ---


def test_the_plan_names_its_largest_item_and_a_smaller_setting():
    import torch

    from llama_sft_helpers.memory import plan_memory
    from llama_sft_helpers.profiles import read_profile

    profile = read_profile("colab-t4", per_device_train_batch_size=8, gradient_checkpointing=False)
    text = "CUDA out of memory. Tried to allocate 1.25 GiB. GPU 0 has a total capacity of 14.74 GiB"
    found = explain(torch.OutOfMemoryError(text), profile=profile)
    config = looks.config_of(profile.model_id)
    plan = plan_memory(config, profile)
    largest = plan.sort_values("gib").iloc[-1]
    assert found.key == "cuda-out-of-memory"
    assert "asked for 1.25 GiB more" in found.cause
    assert f"largest item is {largest['component']}: {largest['gib']:.2f} GiB" in found.cause
    assert "gradient_checkpointing=True" in found.fix


def test_the_plan_is_that_of_the_model_in_the_traceback(tiny_model):
    import torch

    class Trainer:
        def __init__(self, model):
            self.model = model

        def step(self):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 MiB.")

    found = explain(raised(Trainer(tiny_model).step))
    assert "The plan for profile ci-tiny is 0.0" in found.cause  # of the tiny model, not of Llama 3 8B


# --- Nothing else is explained, and nothing is raised ---


class _UnprintableError(Exception):
    def __str__(self):
        raise RuntimeError("no text")


class _LyingError(Exception):
    ename = "KeyError"
    evalue = property(lambda self: 1 / 0)
    filename = property(lambda self: 1 / 0)


def _refuse(message, kind=AssertionError):
    raise kind(message) if message else kind


# Failures of everyday code, and failures that look like one of the table and are another.
_NOT_KNOWN = {
    "key": lambda torch: {}["loss"],
    "index": lambda torch: list(range(3))[3],
    "division": lambda torch: 1 / 0,
    "number": lambda torch: int("x"),
    "attribute": lambda torch: None.shape,
    "package": lambda torch: __import__("no_such_package"),
    "argument": lambda torch: print(1, colour="red"),
    "JSON": lambda torch: json.loads("{"),
    "bytes": lambda torch: b"\xff".decode(),
    "syntax": lambda torch: eval("1 +"),
    "iterator": lambda torch: next(iter([])),
    "sum of two shapes": lambda torch: torch.ones(2) + torch.ones(3),
    "tensor's index": lambda torch: torch.tensor([1, 2])[5],
    "frame's column": lambda torch: pandas.DataFrame({"a": [1]})["text"],
    "like dtype-mismatch: shapes": lambda torch: torch.ones(2, 3) @ torch.ones(2, 3),
    "like dtype-mismatch: labels": lambda torch: torch.nn.functional.nll_loss(
        torch.ones(2, 3), torch.ones(2)
    ),
    "like folder-missing": lambda torch: next(Path("/nowhere/at/all").iterdir()),
    "like data-file-missing": lambda torch: Path("/nowhere/at/all.py").read_text(),
    "like column-missing": lambda torch: {}["instruction"],
    "like split-too-small": lambda torch: torch.arange(3)[63],
    "like cell-assert: of a library": lambda torch: _refuse(""),
    "like cell-assert: with its reason": lambda torch: _refuse("3 rows"),
    "like target-modules-missing": lambda torch: torch.nn.Linear(2, 2).get_submodule("c_attn"),
    "like adapter-missing": lambda torch: _refuse("Can't find 'vocab.json' at '/'", ValueError),
}


@pytest.mark.parametrize("what", _NOT_KNOWN)
def test_what_is_not_known_is_not_explained(what):
    import torch

    exception = raised(_NOT_KNOWN[what], torch)
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
    odd = [
        None,
        "text",
        3,
        ValueError,
        _UnprintableError(),
        _LyingError("x"),
        loop,
        deep,
        KeyboardInterrupt(),
    ]
    odd += [SystemExit(1), ValueError("x" * 5_000_000), ExceptionGroup("g", [ValueError("v")])]
    assert [explain(exception) for exception in odd] == [None] * len(odd)


def test_a_known_failure_is_found_inside_a_group_and_behind_a_cause():
    full = OSError(28, "No space left on device")
    assert explain(ExceptionGroup("tasks", [ValueError("v"), full])).key == "disk-full"
    outer = ValueError("saving failed")
    outer.__cause__ = full
    assert explain(outer).key == "disk-full"
    hidden = ValueError("mine")
    hidden.__context__ = full
    assert explain(hidden).key == "disk-full"
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
        assert not sign.look or sign.look in looks.LOOKS
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
        assert [found.get(bad, 0) for bad in ("lost checkpoints", "tokens leaked", "silently wrong")] == [
            0
        ] * 3


def test_texts_from_the_exception_are_escaped_and_tokens_left_out():
    error = OSError(28, "No space left on device", "/data/<script>alert(1)</script>/hf_abcDEF123456")
    found = explain(error)
    assert "hf_abcDEF123456" not in str(found)
    page = found._repr_html_()
    assert "<script>" not in page
    assert "&lt;script&gt;" in page
    assert "hf_abcDEF123456" not in page


def test_attach_and_detach_leave_no_trace():
    from IPython.core.interactiveshell import InteractiveShell

    from llama_sft_helpers import load_ipython_extension, unload_ipython_extension

    shell = InteractiveShell()
    before = list(shell.events.callbacks["post_run_cell"]), warnings.showwarning
    load_ipython_extension(shell)
    load_ipython_extension(shell)  # %reload_ext
    assert shell.events.callbacks["post_run_cell"].count(notebook._after_cell) == 1
    unload_ipython_extension(shell)
    unload_ipython_extension(shell)
    assert (list(shell.events.callbacks["post_run_cell"]), warnings.showwarning) == before


def doctor_rows():
    return ROOT / "llama_sft_helpers" / "datasets"


def _empty(folder):
    for path in folder.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def _write_metadata(site, name, version):
    folder = site / f"{name}-{version}.dist-info"
    folder.mkdir(parents=True)
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    assert sys.version_info >= (3, 11)
