"""The adapter folder: its faults are told before it is loaded; what was loaded is what was trained."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import load_int8

from llama_sft_helpers.evaluation import (
    AdapterError,
    MergeError,
    check_adapter,
    check_adapter_loaded,
    find_base_model,
    merge_device_map,
    name_base_model,
    summarize_int8_merge,
)
from llama_sft_helpers.training import hash_files


@pytest.fixture
def folder(trained, tmp_path):
    return shutil.copytree(trained.adapter, tmp_path / "adapter")


@pytest.fixture
def base(tiny_model_int8):
    return tiny_model_int8


def weights(folder):
    return folder / "adapter_model.safetensors"


def test_a_good_adapter_passes_on_the_same_model_in_another_place(folder, base):
    named = find_base_model(folder)
    check_adapter(folder, base, named)
    check_adapter(folder, base, f"/elsewhere/{named.rpartition('/')[2]}")


def test_the_reloaded_model_gives_the_trained_models_logits_bit_for_bit(trained, tiny_model_dir):
    from peft import PeftModel

    again = PeftModel.from_pretrained(load_int8(tiny_model_dir), trained.adapter).eval()
    check_adapter_loaded(again, trained.adapter)
    ids = torch.tensor([trained.tokenizer("What is the capital of Portugal?").input_ids])
    with torch.no_grad():
        assert torch.equal(again(ids).logits, trained.model(ids).logits)


def test_a_model_that_is_not_the_file_is_noticed(trained, folder, base):
    from peft import PeftModel

    model = PeftModel.from_pretrained(base, folder)
    tensors = load_file(weights(folder))
    name = next(iter(tensors))
    save_file({**tensors, name: tensors[name] + 1e-3}, weights(folder))
    with pytest.raises(AdapterError, match="differs from the file"):
        check_adapter_loaded(model, folder)
    save_file({key: value for key, value in tensors.items() if key != name}, weights(folder))
    with pytest.raises(AdapterError, match="in the file or in the model only"):
        check_adapter_loaded(model, folder)


def test_a_file_without_lora_names_peft_and_fsdp(trained, folder, base):
    save_file({}, weights(folder))  # what PEFT 0.21 saves under FSDP version 1
    for check in (lambda: check_adapter(folder, base, find_base_model(folder)),
                  lambda: check_adapter_loaded(trained.model, folder)):  # fmt: skip
        with pytest.raises(AdapterError, match=r"holds no LoRA.* PEFT 0\.21\.0 .*version 2, .*peft<0\.21"):
            check()


def test_a_missing_folder_says_to_run_06_and_names_the_path(tmp_path, base):
    with pytest.raises(AdapterError, match=r"Run notebook 06 first") as caught:
        check_adapter(tmp_path / "none", base, "x")
    assert str(tmp_path / "none") in str(caught.value)


def test_a_wrong_folder_is_told(tmp_path, base, tiny_model_dir):
    with pytest.raises(AdapterError, match=r"no adapter folder: it has no adapter_config.json"):
        check_adapter(tiny_model_dir, base, "x")
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "IA3"}')
    with pytest.raises(AdapterError, match="no LoRA adapter"):
        check_adapter(tmp_path, base, "x")
    (tmp_path / "adapter_config.json").write_text('{"peft_type"')
    with pytest.raises(AdapterError, match="damaged"):
        check_adapter(tmp_path, base, "x")


def test_an_adapter_of_another_base_is_told_by_name_and_by_shape(folder, base):
    with pytest.raises(AdapterError, match="was trained on"):
        check_adapter(folder, base, "meta-llama/Meta-Llama-3-8B")
    tensors = load_file(weights(folder))
    wide = {
        name: torch.zeros(tensor.shape[0], 128) if "lora_A" in name else tensor
        for name, tensor in tensors.items()
    }
    save_file(wide, weights(folder))
    with pytest.raises(AdapterError, match="belongs to another base model"):
        check_adapter(folder, base, find_base_model(folder))
    deep = {name.replace("layers.1.", "layers.7."): tensor for name, tensor in tensors.items()}
    save_file(deep, weights(folder))
    with pytest.raises(AdapterError, match="which this model has not"):
        check_adapter(folder, base, find_base_model(folder))


@pytest.mark.parametrize("size", [0, 4, 200, -1])
def test_a_truncated_file_is_damaged(folder, base, size):
    content = weights(folder).read_bytes()
    weights(folder).write_bytes(content[:size])
    with pytest.raises(AdapterError, match="is damaged"):
        check_adapter(folder, base, find_base_model(folder))


def test_a_changed_byte_among_the_weights_is_noticed_by_the_hash(folder, base):
    written = hash_files(folder)
    check_adapter(folder, base, find_base_model(folder), sha256=written)
    content = bytearray(weights(folder).read_bytes())
    content[-5] ^= 1
    weights(folder).write_bytes(content)
    check_adapter(folder, base, find_base_model(folder))  # a finite number of the right shape
    with pytest.raises(AdapterError, match=f"expected {written[:16]}.*they changed since"):
        check_adapter(folder, base, find_base_model(folder), sha256=written)


def test_a_corrupted_header_is_damaged_and_a_missing_file_is_missing(folder, base):
    content = bytearray(weights(folder).read_bytes())
    content[9:40] = b"\xff" * 31
    weights(folder).write_bytes(content)
    with pytest.raises(AdapterError, match="is damaged"):
        check_adapter(folder, base, find_base_model(folder))
    weights(folder).unlink()
    with pytest.raises(AdapterError, match=r"has no adapter_model.safetensors"):
        check_adapter(folder, base, find_base_model(folder))


def test_weights_that_are_not_numbers_are_damaged(folder, base):
    tensors = load_file(weights(folder))
    name = next(iter(tensors))
    tensors[name][0, 0] = float("nan")
    save_file(tensors, weights(folder))
    with pytest.raises(AdapterError, match="not finite"):
        check_adapter(folder, base, find_base_model(folder))


# --- Why not into int8 ---


def test_the_int8_share_is_that_of_pefts_own_merge(trained, tiny_model_dir):
    from peft import PeftModel

    model = PeftModel.from_pretrained(load_int8(tiny_model_dir), trained.adapter)
    layers = {name: layer for name, layer in model.named_modules() if hasattr(layer, "get_delta_weight")}
    before = {name: layer.base_layer.weight.data.clone() for name, layer in layers.items()}
    table = summarize_int8_merge(model)
    assert all(torch.equal(layer.base_layer.weight.data, before[name]) for name, layer in layers.items())
    with pytest.warns(UserWarning, match="8-bit"):
        model.merge_adapter()
    changed = sum(int((layer.base_layer.weight.data != before[name]).sum()) for name, layer in layers.items())
    assert table.loc["all", "changed"] == changed > 0
    assert table.loc["all", "entries"] == sum(codes.numel() for codes in before.values())
    assert table["entries"][:-1].sum() == table.loc["all", "entries"]
    assert table.loc["all", "changed_share"] == pytest.approx(
        table.loc["all", "over_half_step_share"], abs=0.02
    )


def test_a_small_adapter_is_lost_whole_in_int8(trained, tiny_model_dir):
    from peft import PeftModel

    model = PeftModel.from_pretrained(load_int8(tiny_model_dir), trained.adapter)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            weight.data *= 1e-4
    table = summarize_int8_merge(model)
    assert table.loc["all", "changed_share"] < 1e-3
    assert table.loc["all", "update_error"] > 0.9


def test_a_model_without_8_bit_layers_is_refused(tiny_model):
    with pytest.raises(ValueError, match="load_in_8bit"):
        summarize_int8_merge(tiny_model)


def test_where_a_merge_has_room(monkeypatch):
    assert merge_device_map(10 * 2**20) == {"": "cpu"}
    with pytest.raises(MergeError, match="Choose a larger machine"):
        merge_device_map(2**50)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (39 * 2**30, 40 * 2**30))
    assert merge_device_map(15 * 2**30) == {"": 0}


def test_the_config_is_what_notebook_06_writes(trained):
    config = json.loads((trained.adapter / "adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"] == 16


def test_an_adapter_names_a_demo_model_and_not_this_machine(folder, tiny_model_dir):
    assert str(tiny_model_dir) in (folder / "adapter_config.json").read_text()
    for _ in range(2):
        assert name_base_model(folder) == "local:tiny-llama"
    assert str(tiny_model_dir) not in (folder / "adapter_config.json").read_text()
    assert find_base_model(folder) == str(tiny_model_dir)
    check_adapter(folder, load_int8(tiny_model_dir), str(tiny_model_dir))


def test_another_base_model_keeps_its_name(folder):
    config = json.loads((folder / "adapter_config.json").read_text())
    text = json.dumps({**config, "base_model_name_or_path": "meta-llama/Meta-Llama-3-8B"})
    (folder / "adapter_config.json").write_text(text)
    assert name_base_model(folder) == find_base_model(folder) == "meta-llama/Meta-Llama-3-8B"
    assert (folder / "adapter_config.json").read_text() == text
