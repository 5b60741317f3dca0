"""The adapter folder: its faults are told before it is loaded; what was loaded is what was trained."""

import json
import shutil

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

from llama_sft_helpers import evaluation
from llama_sft_helpers.evaluation import AdapterError, check_adapter, check_adapter_loaded, find_base_model
from llama_sft_helpers.training import hash_files


@pytest.fixture
def folder(trained, tmp_path):
    return shutil.copytree(trained.adapter, tmp_path / "adapter")


@pytest.fixture
def weights(folder):
    return folder / "adapter_model.safetensors"


@pytest.fixture
def tuned(trained, tiny_model_int8):
    return PeftModel.from_pretrained(tiny_model_int8, trained.adapter).eval()


def test_the_reloaded_model_gives_the_trained_models_logits_bit_for_bit(trained, tuned):
    check_adapter_loaded(tuned, trained.adapter)
    ids = torch.tensor([trained.tokenizer("What is the capital of Portugal?").input_ids])
    with torch.no_grad():
        assert torch.equal(tuned(ids).logits, trained.model(ids).logits)


def test_a_model_that_is_not_the_file_is_noticed(tuned, folder, weights):
    tensors = load_file(weights)
    name = next(iter(tensors))
    save_file({**tensors, name: tensors[name] + 1e-3}, weights)
    with pytest.raises(AdapterError, match="differs from the file"):
        check_adapter_loaded(tuned, folder)
    save_file({key: value for key, value in tensors.items() if key != name}, weights)
    with pytest.raises(AdapterError, match="in the file or in the model only"):
        check_adapter_loaded(tuned, folder)


def test_a_wrong_folder_is_told(tmp_path, tiny_model, tiny_model_dir):
    with pytest.raises(
        AdapterError, match=rf"no adapter folder {tmp_path / 'none'}.*\n- Run notebook 06 first"
    ):
        check_adapter(tmp_path / "none", tiny_model, "x")
    with pytest.raises(AdapterError, match=r"no adapter folder: it has no adapter_config.json"):
        check_adapter(tiny_model_dir, tiny_model, "x")
    for config, told in (('{"peft_type": "IA3"}', "no LoRA adapter"), ('{"peft_type"', "is damaged")):
        (tmp_path / "adapter_config.json").write_text(config, encoding="utf-8")
        with pytest.raises(AdapterError, match=told):
            check_adapter(tmp_path, tiny_model, "x")


def test_an_adapter_of_another_profile_is_named(folder, tiny_model):
    (here := folder.parent / "cpu-demo").mkdir()
    folder.rename(here / "adapter")
    with pytest.raises(AdapterError, match=r"cpu-demo/adapter is there: load_profile\('cpu-demo'\) finds it"):
        check_adapter(folder.parent / "colab-a100" / "adapter", tiny_model, "x")


def _cut(size):
    return lambda path: path.write_bytes(path.read_bytes()[:size])


def _overwrite_header(path):
    path.write_bytes(path.read_bytes()[:9] + b"\xff" * 31 + path.read_bytes()[40:])


def _change(edit):
    return lambda path: save_file(edit(load_file(path)), path)


DAMAGES = {
    "empty": (_cut(0), "is damaged"),
    "in the header's length": (_cut(4), "is damaged"),
    "in the header": (_cut(200), "is damaged"),
    "at the end": (_cut(-1), "is damaged"),
    "overwritten": (_overwrite_header, "is damaged"),
    "missing": (lambda path: path.unlink(), "has no adapter_model.safetensors"),
    "nan": (_change(lambda found: {name: w * float("nan") for name, w in found.items()}), "not finite"),
    "narrow": (
        _change(lambda found: {name: w[:, :8].contiguous() for name, w in found.items()}),
        "belongs to another base model",
    ),
    "deep": (
        _change(lambda found: {name.replace("layers.1.", "layers.7."): w for name, w in found.items()}),
        "which this model has not",
    ),
    # what PEFT 0.21 saves under FSDP version 1
    "no LoRA": (_change(lambda found: {}), r"holds no LoRA.* PEFT 0\.21\.0 .*version 2, .*peft<0\.21"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_told(folder, weights, tiny_model, damage):
    base = find_base_model(folder)
    check_adapter(folder, tiny_model, base)
    change, told = DAMAGES[damage]
    change(weights)
    with pytest.raises(AdapterError, match=told):
        check_adapter(folder, tiny_model, base)


def test_another_base_and_a_changed_byte_are_noticed_by_name_and_hash(folder, weights, tiny_model):
    base, written = find_base_model(folder), hash_files(folder)
    check_adapter(folder, tiny_model, f"/elsewhere/{base.rpartition('/')[2]}", sha256=written)
    with pytest.raises(AdapterError, match="was trained on"):
        check_adapter(folder, tiny_model, "meta-llama/Meta-Llama-3-8B")
    content = bytearray(weights.read_bytes())
    content[-5] ^= 1
    weights.write_bytes(content)
    check_adapter(folder, tiny_model, base)  # a finite number of the right shape
    with pytest.raises(AdapterError, match=f"expected {written[:16]}.*they changed since"):
        check_adapter(folder, tiny_model, base, sha256=written)


def test_an_adapter_names_a_demo_model_and_not_this_machine(folder, tiny_model, tiny_model_dir):
    assert str(tiny_model_dir) in (folder / "adapter_config.json").read_text(encoding="utf-8")
    for _ in range(2):
        assert evaluation.name_base_model(folder) == "local:tiny-llama"
    assert str(tiny_model_dir) not in (folder / "adapter_config.json").read_text(encoding="utf-8")
    assert find_base_model(folder) == str(tiny_model_dir)
    check_adapter(folder, tiny_model, str(tiny_model_dir))


def test_another_base_model_keeps_its_name(folder):
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    text = json.dumps({**config, "base_model_name_or_path": "meta-llama/Meta-Llama-3-8B"})
    (folder / "adapter_config.json").write_text(text, encoding="utf-8")
    assert evaluation.name_base_model(folder) == find_base_model(folder) == "meta-llama/Meta-Llama-3-8B"
    assert (folder / "adapter_config.json").read_text(encoding="utf-8") == text


# --- Why not into int8 ---


def test_the_int8_share_is_that_of_pefts_own_merge(tuned):
    layers = {name: layer for name, layer in tuned.named_modules() if hasattr(layer, "get_delta_weight")}
    before = {name: layer.base_layer.weight.data.clone() for name, layer in layers.items()}
    table = evaluation.summarize_int8_merge(tuned)
    assert all(torch.equal(layer.base_layer.weight.data, before[name]) for name, layer in layers.items())
    with pytest.warns(UserWarning, match="8-bit"):
        tuned.merge_adapter()
    changed = sum(int((layer.base_layer.weight.data != before[name]).sum()) for name, layer in layers.items())
    found = table.loc["all"]
    assert found["changed"] == changed > 0
    assert found["entries"] == table["entries"][:-1].sum() == sum(codes.numel() for codes in before.values())
    assert found["changed_share"] == pytest.approx(found["over_half_step_share"], abs=0.02)


def test_a_small_adapter_is_lost_whole_in_int8(tuned):
    for name, weight in tuned.named_parameters():
        if "lora_B" in name:
            weight.data *= 1e-4
    table = evaluation.summarize_int8_merge(tuned)
    assert table.loc["all", "changed_share"] < 1e-3
    assert table.loc["all", "update_error"] > 0.9


def test_a_model_without_8_bit_layers_is_refused(tiny_model):
    with pytest.raises(ValueError, match="load_in_8bit"):
        evaluation.summarize_int8_merge(tiny_model)
