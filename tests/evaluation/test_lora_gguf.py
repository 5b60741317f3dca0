"""The adapter as a GGUF file: what is in it, and that rotated rows stand where llama.cpp looks for them."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_merging import save_adapter, save_base
from tiny_models import SEVEN

from llama_sft_helpers.evaluation import AdapterError
from llama_sft_helpers.evaluation.lora_gguf import write_lora_gguf

gguf = pytest.importorskip("gguf")


@pytest.fixture
def folders(tmp_path):
    base = save_base(tmp_path / "base")
    return {"adapter_folder": save_adapter(tmp_path / "adapter", base), "base_folder": base}


def write(path, folders):
    """What is in the written file: fields and tensors."""
    write_lora_gguf(path, **folders)
    reader = gguf.GGUFReader(path)
    tensors = {tensor.name: torch.from_numpy(tensor.data.copy()) for tensor in reader.tensors}
    return {name: field.contents() for name, field in reader.fields.items()}, tensors


def saved(folders):
    weights = load_file(folders["adapter_folder"] / "adapter_model.safetensors")
    return {name.removeprefix("base_model.model.model.layers."): weight for name, weight in weights.items()}


def test_the_file_holds_every_a_and_b_and_what_llama_cpp_asks_for(folders, tmp_path):
    fields, tensors = write(tmp_path / "lora.gguf", folders)
    keys = ("general.architecture", "general.type", "adapter.type", "adapter.lora.alpha")
    assert [fields[key] for key in keys] == ["llama", "adapter", "lora", 12]
    assert len(tensors) == 2 * 2 * len(SEVEN)
    for ours, theirs in (("mlp.down_proj", "ffn_down"), ("self_attn.v_proj", "attn_v")):
        for kind in "AB":
            tensor = tensors[f"blk.1.{theirs}.weight.lora_{kind.lower()}"]
            assert tensor.dtype == torch.float32
            assert torch.equal(tensor, saved(folders)[f"1.{ours}.lora_{kind}.weight"])


def rotate(x, angles, one, other):
    """``x`` with the entries ``one`` and ``other`` rotated together, pair by pair."""
    out = torch.empty_like(x)
    out[one] = x[one] * angles.cos() - x[other] * angles.sin()
    out[other] = x[other] * angles.cos() + x[one] * angles.sin()
    return out


def test_scores_of_rotated_queries_and_keys_are_the_same_in_both_orders(folders, tmp_path):
    """What attention computes from the adapter's queries and keys, by each library's own rotation."""
    _, theirs = write(tmp_path / "lora.gguf", folders)
    ours = saved(folders)
    torch.manual_seed(1)
    x, angles = torch.randn(2, 64), torch.rand(2, 8)  # two positions; heads of 16 entries, 8 pairs

    def vector(a, b, position, head, pairs):
        return rotate((b @ a @ x[position]).view(-1, 16)[head], angles[position], *pairs)

    halves, neighbours = (slice(0, 8), slice(8, 16)), (slice(0, 16, 2), slice(1, 16, 2))
    for head in range(4):
        in_ours, in_theirs = [], []
        for position, (kind, row) in enumerate((("q", head), ("k", head // 2))):  # two heads share a key
            a, b = (ours[f"0.self_attn.{kind}_proj.lora_{side}.weight"] for side in "AB")
            in_ours.append(vector(a, b, position, row, halves))
            a, b = (theirs[f"blk.0.attn_{kind}.weight.lora_{side}"] for side in "ab")
            in_theirs.append(vector(a, b, position, row, neighbours))
        torch.testing.assert_close(torch.dot(*in_ours), torch.dot(*in_theirs), rtol=1e-4, atol=1e-5)


def test_the_scale_of_rslora_is_kept(folders, tmp_path):
    folders["adapter_folder"] = save_adapter(tmp_path / "rs", folders["base_folder"], use_rslora=True)
    alpha = write(tmp_path / "lora.gguf", folders)[0]["adapter.lora.alpha"]
    assert alpha / 8 == pytest.approx(12 / 8**0.5)  # llama.cpp divides by the rank


def test_the_program_writes_the_same_file(folders, tmp_path):
    write(tmp_path / "one.gguf", folders)
    program = [sys.executable, "-m", "llama_sft_helpers.evaluation.lora_gguf"]
    subprocess.run([*program, *map(str, folders.values()), str(tmp_path / "two.gguf")], check=True)
    assert (tmp_path / "one.gguf").read_bytes() == (tmp_path / "two.gguf").read_bytes()
    assert not list(tmp_path.glob(".*"))


def test_another_architecture_and_an_unknown_layer_are_refused(folders, tmp_path):
    weights = load_file(path := folders["adapter_folder"] / "adapter_model.safetensors")
    save_file({name.replace("up_proj", "odd_proj"): tensor for name, tensor in weights.items()}, path)
    with pytest.raises(AdapterError, match=r"no place for model.layers.0.mlp.odd_proj"):
        write(tmp_path / "x.gguf", folders)
    config = folders["base_folder"] / "config.json"
    config.write_text(
        json.dumps(json.loads(config.read_text(encoding="utf-8")) | {"model_type": "qwen2"}), encoding="utf-8"
    )
    with pytest.raises(AdapterError, match="'qwen2', expected 'llama'"):
        write(tmp_path / "x.gguf", folders)
    assert not list(tmp_path.glob("*.gguf"))
