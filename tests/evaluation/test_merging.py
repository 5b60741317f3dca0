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
from safetensors.torch import load_file, save_file
from tiny_models import SEVEN, load_int8, random_model

from llama_sft_helpers import evaluation
from llama_sft_helpers.evaluation import (
    AdapterError,
    MergeError,
    check_merged_shards,
    merge_device_map,
    write_merged_shards,
)
from llama_sft_helpers.evaluation.adapter import read_lora


def shards_of(folder):
    return sorted(path.name for path in folder.glob("*.safetensors"))


def tensors_of(folder):
    return {name: tensor for file in shards_of(folder) for name, tensor in load_file(folder / file).items()}


def save_base(folder, *, dtype=torch.bfloat16, tied=False, seed=0, **kwargs):
    """A Llama of two layers in several shards; random weights."""
    model = random_model(seed=seed, vocab_size=256, tie_word_embeddings=tied)
    model.to(dtype).save_pretrained(folder, max_shard_size="50KB", **kwargs)
    assert len(shards_of(folder)) > 2
    return folder


def save_adapter(folder, base_folder, **settings):
    """An adapter with random A and B, as notebook 06 saves one."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    config = LoraConfig(r=8, lora_alpha=12, task_type="CAUSAL_LM", target_modules=SEVEN)
    for key, value in settings.items():
        setattr(config, key, value)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base_folder, dtype=torch.bfloat16), config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    model.save_pretrained(folder)
    return folder


def merge_by_peft(base_folder, adapter_folder, folder):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(base_folder, dtype=torch.bfloat16)
    PeftModel.from_pretrained(base, adapter_folder).merge_and_unload().save_pretrained(folder)
    return folder


@pytest.fixture
def folders(tmp_path):
    base = save_base(tmp_path / "base")
    adapter = save_adapter(tmp_path / "adapter", base)
    (tmp_path / "merged").mkdir()
    return {"base_folder": base, "adapter_folder": adapter, "folder": tmp_path / "merged"}


def write(folders, **kwargs):
    return write_merged_shards(
        folders["folder"],
        base_folder=folders["base_folder"],
        adapter_folder=folders["adapter_folder"],
        **kwargs,
    )


def check(folders):
    check_merged_shards(
        folders["folder"], base_folder=folders["base_folder"], adapter_folder=folders["adapter_folder"]
    )


# --- The same bytes as PEFT's merge_and_unload ---


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("settings", [{}, {"use_rslora": True}], ids=["lora", "rslora"])
def test_every_tensor_is_that_of_merge_and_unload_bit_for_bit(tmp_path, dtype, tied, settings):
    base = save_base(tmp_path / "base", dtype=dtype, tied=tied)
    adapter = save_adapter(tmp_path / "adapter", base, **settings)
    (tmp_path / "merged").mkdir()
    folders = {"folder": tmp_path / "merged", "base_folder": base, "adapter_folder": adapter}
    table = write(folders, max_shard_size="50KB")
    assert table["merged"].sum() == 2 * len(SEVEN)
    assert len(table) > 2
    expected = tensors_of(merge_by_peft(base, adapter, tmp_path / "peft"))
    found = tensors_of(folders["folder"])
    assert set(found) == set(expected)
    assert table["tensors"].sum() == len(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype == torch.bfloat16
        assert torch.equal(found[name], tensor), name
    check(folders)


def test_the_adapter_of_notebook_06_merges_to_the_same_bytes_and_answers(trained, tmp_path):
    from transformers import AutoModelForCausalLM

    base = trained.profile.model_id
    folders = {"folder": tmp_path / "merged", "base_folder": base, "adapter_folder": trained.adapter}
    folders["folder"].mkdir()
    assert len(write(folders, max_shard_size="100KB")) > 2
    peft = merge_by_peft(base, trained.adapter, tmp_path / "peft")
    expected, found = tensors_of(peft), tensors_of(folders["folder"])
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    batch = torch.arange(4, 24)[None]
    logits = [AutoModelForCausalLM.from_pretrained(path)(batch).logits for path in (peft, folders["folder"])]
    assert torch.equal(*logits)
    unmerged = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)(batch).logits
    assert not torch.equal(logits[0], unmerged)


def test_the_sum_is_right_by_float64(folders):
    """Each weight is the float64 sum, rounded to bfloat16: by at most a 256th, and float32's own."""
    write(folders)
    base, merged = tensors_of(folders["base_folder"]), tensors_of(folders["folder"])
    factors = load_file(folders["adapter_folder"] / "adapter_model.safetensors")
    for layer in ("self_attn.q_proj", "mlp.down_proj"):
        path = f"model.layers.1.{layer}"
        a, b = (factors[f"base_model.model.{path}.lora_{kind}.weight"].double() for kind in "AB")
        exact = base[f"{path}.weight"].double() + 12 / 8 * b @ a
        error = (merged[f"{path}.weight"].double() - exact).abs()
        assert (error <= exact.abs() / 256 + 1e-6).all()
        assert (merged[f"{path}.weight"] != base[f"{path}.weight"]).any()


# --- What is written is a model folder ---


def test_the_folder_loads_with_its_dtype_and_tied_embeddings_stay_tied(tmp_path):
    from transformers import AutoModelForCausalLM

    base = save_base(tmp_path / "base", dtype=torch.float32, tied=True)
    adapter = save_adapter(tmp_path / "adapter", base)
    # trap: a checkpoint with both copies of the embeddings loads untied
    both = tensors_of(base)
    both["lm_head.weight"] = both["model.embed_tokens.weight"].clone()
    twice = tmp_path / "twice"
    twice.mkdir()
    shutil.copy(base / "config.json", twice)
    save_file(both, twice / "model.safetensors", metadata={"format": "pt"})
    for source in (base, twice):
        target = tmp_path / f"merged-{source.name}"
        target.mkdir()
        write_merged_shards(target, base_folder=source, adapter_folder=adapter)
        assert "lm_head.weight" not in tensors_of(target)
        model = AutoModelForCausalLM.from_pretrained(target)
        assert model.dtype == torch.bfloat16
        assert model.lm_head.weight is model.model.embed_tokens.weight
        check_merged_shards(target, base_folder=source, adapter_folder=adapter)


def test_one_file_has_no_index_and_the_second_form_of_the_weights_is_not_read(folders):
    table = write(folders)
    assert shards_of(folders["folder"]) == list(table.index) == ["model.safetensors"]
    assert not (folders["folder"] / "model.safetensors.index.json").exists()
    # as on the hub, where a repository can hold the weights once more under other names
    save_file({"odd": torch.ones(2)}, folders["base_folder"] / "consolidated.safetensors")
    write(folders)
    assert "odd" not in tensors_of(folders["folder"])
    check(folders)


# --- Memory ---

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
    weights, index, factors = {}, {}, {}
    for layer in range(36):
        path = f"model.layers.{layer}.self_attn.q_proj"
        weights[f"{path}.weight"] = torch.ones(2048, 2048, dtype=torch.bfloat16)
        factors[f"base_model.model.{path}.lora_A.weight"] = torch.ones(4, 2048)
        factors[f"base_model.model.{path}.lora_B.weight"] = torch.ones(2048, 4)
        if layer % 12 == 11:
            file = f"model-{layer}.safetensors"
            save_file(weights, base / file, metadata={"format": "pt"})
            index |= dict.fromkeys(weights, file)
            weights = {}
    (base / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    (base / "config.json").write_text("{}")
    save_file(factors, adapter / "adapter_model.safetensors")
    (adapter / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 4}))
    command = [sys.executable, "-c", _PEAK, str(base), str(adapter), str(folder)]
    # glibc gives blocks over 32 MB back at once, as a real model's are; here the smaller ones, too
    env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "1000000"}
    result = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    peak_kib = int(result.stdout)
    assert peak_kib < 90 * 1024, f"{peak_kib / 1024:.0f} MiB for 302 MB of weights"


# --- What cannot be merged is told ---


def test_another_base_a_missing_base_and_a_quantized_one_are_told(folders, tmp_path):
    base, path = folders["base_folder"], "model.layers.0.self_attn.q_proj"
    with pytest.raises(MergeError, match=r"has no \*.safetensors"):
        write({**folders, "base_folder": folders["adapter_folder"].parent})
    few = {name: tensor for name, tensor in tensors_of(base).items() if path not in name}
    for weight, message in (
        (None, "another base model"),
        (torch.ones(32, 64), r"is \(32, 64\), the adapter is made for \(64, 64\)"),
        (torch.ones(64, 64, dtype=torch.int8), "the base is quantized"),
    ):
        other = tmp_path / "other"
        shutil.rmtree(other, ignore_errors=True)
        other.mkdir()
        shutil.copy(base / "config.json", other)
        save_file(few if weight is None else {**few, f"{path}.weight": weight}, other / "model.safetensors")
        with pytest.raises(MergeError, match=message):
            write({**folders, "base_folder": other})


def test_a_damaged_or_missing_shard_is_named(folders):
    shard = folders["base_folder"] / shards_of(folders["base_folder"])[0]
    shard.write_bytes(shard.read_bytes()[:100])
    with pytest.raises(MergeError, match=f"{shard.name} is missing or damaged"):
        write(folders)
    shard.unlink()
    with pytest.raises(MergeError, match=f"{shard.name} is missing or damaged"):
        write(folders)


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
def test_an_adapter_that_is_more_than_a_and_b_is_refused(tmp_path, settings):
    base = save_base(tmp_path / "base")
    adapter = save_adapter(tmp_path / "adapter", base, **settings)
    with pytest.raises(AdapterError, match="more than A and B"):
        read_lora(adapter)


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


# --- Notebook 07 on a machine without the memory ---

NOTEBOOK = Path(__file__).parents[2] / "notebooks" / "07_evaluation.ipynb"
LLAMA3_BYTES = 2 * 8_030_261_248


def fake_memory(monkeypatch, *, ram, gpu):
    """What psutil and torch report as free, in bytes; no GPU memory is used."""
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=ram))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu > 0)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (gpu, gpu))


def test_a_t4_runtime_has_no_room_for_llama_3_in_16_bits(monkeypatch):
    fake_memory(monkeypatch, ram=int(12.7e9), gpu=int(14.6 * 2**30))
    with pytest.raises(
        MergeError, match=r"needs 17.5 GiB; free are 14.6 GiB of GPU memory and 11.8 GiB of RAM"
    ):
        merge_device_map(LLAMA3_BYTES)


@pytest.mark.parametrize("room", [False, True])
def test_07_goes_on_where_neither_gpu_nor_ram_holds_the_model(
    trained,
    tmp_path,
    monkeypatch,
    room,
):
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
    space |= {"sizes": [0] * 2 * len(SEVEN), "WORDS": {}, "batch_size": 4}
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
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors_of(peft).items())
    assert (tmp_path / "merged" / "tokenizer.json").is_file()
