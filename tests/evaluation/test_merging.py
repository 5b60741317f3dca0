"""The merge by files: PEFT's own bytes, in the memory of one file, and a model like any other afterwards."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tiny_models import SEVEN, load_int8, random_model
from transformers import AutoModelForCausalLM

from llama_sft_helpers import evaluation
from llama_sft_helpers.evaluation import MergeError, merge_device_map
from llama_sft_helpers.evaluation.adapter import read_lora


def shards_of(folder):
    return sorted(path.name for path in folder.glob("*.safetensors"))


def tensors_of(folder):
    return {name: tensor for file in shards_of(folder) for name, tensor in load_file(folder / file).items()}


def load_bf16(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)


def save_base(folder, *, dtype=torch.bfloat16, tied=False):
    """A Llama of two layers in several shards; random weights."""
    model = random_model(vocab_size=256, tie_word_embeddings=tied)
    model.to(dtype).save_pretrained(folder, max_shard_size="50KB")
    assert len(shards_of(folder)) > 2
    return folder


def save_adapter(folder, base_folder, **settings):
    """An adapter with random A and B, as notebook 06 saves one."""
    config = LoraConfig(r=8, lora_alpha=12, task_type="CAUSAL_LM", target_modules=SEVEN)
    for key, value in settings.items():
        setattr(config, key, value)
    model = get_peft_model(load_bf16(base_folder), config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    model.save_pretrained(folder)
    return folder


def merge_by_peft(base_folder, adapter_folder, folder):
    PeftModel.from_pretrained(load_bf16(base_folder), adapter_folder).merge_and_unload().save_pretrained(
        folder
    )
    return tensors_of(folder)


@pytest.fixture
def make(tmp_path):
    """Folders of a base, of an adapter for it, and an empty one to merge into."""

    def build(settings=None, **base):
        (tmp_path / "merged").mkdir()
        base_folder = save_base(tmp_path / "base", **base)
        adapter = save_adapter(tmp_path / "adapter", base_folder, **(settings or {}))
        return {"folder": tmp_path / "merged", "base_folder": base_folder, "adapter_folder": adapter}

    return build


@pytest.fixture
def folders(make):
    return make()


def write(folders, **kwargs):
    return evaluation.write_merged_shards(**folders, **kwargs)


def check(folders):
    evaluation.check_merged_shards(**folders)


# --- The same bytes as PEFT's merge_and_unload ---


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("settings", [{}, {"use_rslora": True}], ids=["lora", "rslora"])
def test_every_tensor_is_that_of_merge_and_unload_bit_for_bit(make, tmp_path, dtype, tied, settings):
    folders = make(settings, dtype=dtype, tied=tied)
    table = write(folders, max_shard_size="50KB")
    assert table["merged"].sum() == 2 * len(SEVEN)
    assert len(table) > 2
    expected = merge_by_peft(folders["base_folder"], folders["adapter_folder"], tmp_path / "peft")
    found = tensors_of(folders["folder"])
    assert set(found) == set(expected)
    assert table["tensors"].sum() == len(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype == torch.bfloat16
        assert torch.equal(found[name], tensor), name
    check(folders)


# --- What is written is a model folder ---


@pytest.mark.parametrize("stored_twice", [False, True])
def test_the_folder_loads_with_its_dtype_and_tied_embeddings_stay_tied(make, stored_twice):
    folders = make(dtype=torch.float32, tied=True)
    if stored_twice:  # a checkpoint with both copies of the embeddings loads untied
        both = tensors_of(base := folders["base_folder"])
        both["lm_head.weight"] = both["model.embed_tokens.weight"].clone()
        for path in [*base.glob("*.safetensors"), base / "model.safetensors.index.json"]:
            path.unlink()
        save_file(both, base / "model.safetensors", metadata={"format": "pt"})
    write(folders)
    assert "lm_head.weight" not in tensors_of(folders["folder"])
    model = AutoModelForCausalLM.from_pretrained(folders["folder"])
    assert model.dtype == torch.bfloat16
    assert model.lm_head.weight is model.model.embed_tokens.weight
    check(folders)


def test_one_file_has_no_index_and_the_second_form_of_the_weights_is_not_read(folders):
    # as on the hub, where a repository can hold the weights once more under other names
    save_file({"odd": torch.ones(2)}, folders["base_folder"] / "consolidated.safetensors")
    table = write(folders)
    assert shards_of(folders["folder"]) == list(table.index) == ["model.safetensors"]
    assert not (folders["folder"] / "model.safetensors.index.json").exists()
    assert "odd" not in tensors_of(folders["folder"])
    check(folders)


_PEAK = """
import sys
import llama_sft_helpers.evaluation.shards as merging, peft, huggingface_hub, safetensors.torch, torch
def kib(key):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(key))
base, adapter, folder = sys.argv[1:]
(torch.ones(64, 64) @ torch.ones(64, 64)).to(torch.bfloat16)
open("/proc/self/clear_refs", "w").write("5")  # the peak starts anew: it would hold the parent's, too
before = kib("VmRSS")
merging.write_merged_shards(folder, base_folder=base, adapter_folder=adapter, max_shard_size="40MB")
print(kib("VmHWM") - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_peak_is_a_shard_and_some_weights_and_not_the_model(tmp_path):
    """302 MB of weights pass through 40 MB of shard and one weight of 16 MB in float32."""
    base, adapter, folder = (tmp_path / name for name in ("base", "adapter", "merged"))
    for path in (base, adapter, folder):
        path.mkdir()
    weight_map, factors = {}, {}
    for number in range(3):
        paths = [f"model.layers.{12 * number + layer}.self_attn.q_proj" for layer in range(12)]
        weights = {f"{path}.weight": torch.ones(2048, 2048, dtype=torch.bfloat16) for path in paths}
        save_file(weights, base / f"model-{number}.safetensors", metadata={"format": "pt"})
        weight_map |= dict.fromkeys(weights, f"model-{number}.safetensors")
        factors |= {f"base_model.model.{path}.lora_A.weight": torch.ones(4, 2048) for path in paths}
        factors |= {f"base_model.model.{path}.lora_B.weight": torch.ones(2048, 4) for path in paths}
    (base / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": weight_map}), encoding="utf-8"
    )
    (base / "config.json").write_text("{}", encoding="utf-8")
    save_file(factors, adapter / "adapter_model.safetensors")
    (adapter / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 4}), encoding="utf-8"
    )
    command = [sys.executable, "-c", _PEAK, str(base), str(adapter), str(folder)]
    # glibc gives blocks over 32 MB back at once, as a real model's are; here the smaller ones, too
    env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "1000000"}
    result = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    assert int(result.stdout) < 90 * 1024, f"{int(result.stdout) / 1024:.0f} MiB for 302 MB of weights"


# --- What cannot be merged is told ---


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (None, "another base model"),
        (torch.ones(32, 64), r"is \(32, 64\), the adapter is made for \(64, 64\)"),
        (torch.ones(64, 64, dtype=torch.int8), "the base is quantized"),
    ],
)
def test_a_base_that_does_not_fit_is_told(folders, tmp_path, weight, message):
    name, tensors = "model.layers.0.self_attn.q_proj.weight", tensors_of(folders["base_folder"])
    del tensors[name]
    (tmp_path / "other").mkdir()
    shutil.copy(folders["base_folder"] / "config.json", tmp_path / "other")
    save_file(tensors | ({} if weight is None else {name: weight}), tmp_path / "other" / "model.safetensors")
    with pytest.raises(MergeError, match=message):
        write({**folders, "base_folder": tmp_path / "other"})


def test_a_damaged_or_missing_shard_is_named(folders, tmp_path):
    shard = folders["base_folder"] / shards_of(folders["base_folder"])[0]
    for damage in (lambda: shard.write_bytes(shard.read_bytes()[:100]), shard.unlink):
        damage()
        with pytest.raises(MergeError, match=f"{shard.name} is missing or damaged"):
            write(folders)
    with pytest.raises(MergeError, match=r"has no \*.safetensors"):
        write({**folders, "base_folder": tmp_path})


@pytest.mark.parametrize(
    "settings",
    [
        {"use_dora": True},
        {"modules_to_save": ["lm_head"]},
        {"rank_pattern": {"q_proj": 4}},
        {"target_modules": ["embed_tokens"]},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_an_adapter_that_is_more_than_a_and_b_is_checked_but_not_merged_by_files(make, settings):
    folders = make(settings)
    base = folders["base_folder"]
    evaluation.check_adapter(folders["adapter_folder"], load_bf16(base), str(base))
    with pytest.raises(evaluation.AdapterError, match="more than A and B"):
        read_lora(folders["adapter_folder"])


@pytest.mark.parametrize("damage", ["bit", "missing", "dtype", "norm"])
def test_a_merged_weight_that_is_not_it_is_noticed(folders, damage):
    write(folders)
    path = folders["folder"] / "model.safetensors"
    tensors = load_file(path)
    name = "model.norm.weight" if damage == "norm" else "model.layers.1.mlp.up_proj.weight"
    if damage == "missing":
        del tensors[name]
    elif damage == "dtype":
        tensors[name] = tensors[name].float()
    else:
        flat = tensors[name].view(-1)
        flat[7] = torch.nextafter(flat[7], flat.new_tensor(9.0))  # one step of bfloat16
    save_file(tensors, path)
    with pytest.raises(MergeError, match=name.replace(".", r"\.")):
        check(folders)


# --- Where there is room, and notebook 07 where there is none ---

NOTEBOOK = Path(__file__).parents[2] / "notebooks" / "07_evaluation.ipynb"


def fake_memory(monkeypatch, *, ram, gpu):
    """What psutil and torch report as free, in bytes; no GPU memory is used."""
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=ram))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu > 0)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (gpu, gpu))


def test_where_a_merge_of_llama_3_has_room(monkeypatch):
    weight_bytes = 2 * 8_030_261_248
    for ram, gpu, place in ((0, 39 * 2**30, 0), (64 * 2**30, 2**30, "cpu")):
        fake_memory(monkeypatch, ram=ram, gpu=gpu)
        assert merge_device_map(weight_bytes) == {"": place}
    fake_memory(monkeypatch, ram=int(12.7e9), gpu=int(14.6 * 2**30))  # a T4 runtime
    told = r"needs 17.5 GiB; free are 14.6 GiB of GPU memory and 11.8 GiB of RAM. Choose a larger machine"
    with pytest.raises(MergeError, match=told):
        merge_device_map(weight_bytes)


@pytest.mark.parametrize("room", [False, True])
def test_07_goes_on_where_neither_gpu_nor_ram_holds_the_model(trained, tmp_path, monkeypatch, room):
    """The notebook's own cells, from the merge to the last check; a tiny model and as little free memory."""
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    sources = {cell["id"]: "".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"}
    names = list(sources)
    wanted = names[names.index("07-052") : names.index("07-055b") + 1]
    space = {"sys": sys}
    exec(sources["07-002"], space)
    settings = {"model_id": trained.profile.model_id, "output_dir": tmp_path}
    held_out = evaluation.encode_rows(trained.tokenizer, trained.eval_rows.select(range(4)), 128)
    space |= {"profile": SimpleNamespace(**settings), "tokenizer": trained.tokenizer, "held_out": held_out}
    space |= {"adapter_folder": trained.adapter, "base": load_int8(trained.profile.model_id)}
    space |= {"WORDS": {}, "batch_size": 4}
    space["tuned_rows"] = evaluation.summarize_row_losses(space["base"], held_out)
    fake_memory(monkeypatch, ram=2**40 if room else 2**20, gpu=0 if room else 2**20)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    for name in wanted:
        exec(sources[name], space)
    monkeypatch.undo()
    assert (space["merged"] is not None) == (space["in_16_bits"] is not None) == room
    assert ("A merge needs" in space["no_room"]) != room
    peft = merge_by_peft(trained.profile.model_id, trained.adapter, tmp_path / "peft")
    found = tensors_of(tmp_path / "merged")
    assert all(torch.equal(found[name], tensor) for name, tensor in peft.items())
    assert (tmp_path / "merged" / "tokenizer.json").is_file()
