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
    return base, save_adapter(tmp_path / "adapter", base)


def read(path):
    reader = gguf.GGUFReader(path)
    tensors = {tensor.name: torch.from_numpy(tensor.data.copy()) for tensor in reader.tensors}
    return {name: field.contents() for name, field in reader.fields.items()}, tensors


def test_the_file_holds_every_a_and_b_and_what_llama_cpp_asks_for(folders, tmp_path):
    base, adapter = folders
    write_lora_gguf(tmp_path / "lora.gguf", adapter_folder=adapter, base_config=base)
    fields, tensors = read(tmp_path / "lora.gguf")
    assert fields["general.architecture"] == "llama"
    assert fields["general.type"] == "adapter"
    assert fields["adapter.type"] == "lora"
    assert fields["adapter.lora.alpha"] == 12
    assert len(tensors) == 2 * 2 * len(SEVEN)
    saved = load_file(adapter / "adapter_model.safetensors")
    prefix = "base_model.model.model.layers.1"
    for ours, theirs in (("mlp.down_proj", "ffn_down"), ("self_attn.v_proj", "attn_v")):
        for kind in "AB":
            tensor = tensors[f"blk.1.{theirs}.weight.lora_{kind.lower()}"]
            assert tensor.dtype == torch.float32
            assert torch.equal(tensor, saved[f"{prefix}.{ours}.lora_{kind}.weight"])


def rotate_halves(x, angles):
    """transformers: entry i of a head with entry i + d/2."""
    one, other = x.chunk(2)
    return torch.cat([one * angles.cos() - other * angles.sin(), other * angles.cos() + one * angles.sin()])


def rotate_neighbours(x, angles):
    """llama.cpp: entry 2i of a head with entry 2i + 1."""
    one, other = x[0::2], x[1::2]
    pairs = [one * angles.cos() - other * angles.sin(), other * angles.cos() + one * angles.sin()]
    return torch.stack(pairs, dim=1).flatten()


def test_scores_of_rotated_queries_and_keys_are_the_same_in_both_orders(folders, tmp_path):
    """What attention computes from the adapter's queries and keys, by each library's own rotation."""
    base, adapter = folders
    write_lora_gguf(tmp_path / "lora.gguf", adapter_folder=adapter, base_config=base)
    _, tensors = read(tmp_path / "lora.gguf")
    saved = load_file(adapter / "adapter_model.safetensors")
    prefix = "base_model.model.model.layers.0.self_attn"
    torch.manual_seed(1)
    x, angles = torch.randn(2, 64), torch.rand(2, 8)  # two positions; heads of 16 entries, 8 pairs
    for head in range(4):
        scores = []
        for rotate, name in ((rotate_halves, f"{prefix}.{{}}_proj"), (rotate_neighbours, "blk.0.attn_{}")):
            vectors = []
            for position, (kind, row) in enumerate((("q", head), ("k", head // 2))):  # two heads share a key
                path = name.format(kind)
                if rotate is rotate_halves:
                    a, b = saved[f"{path}.lora_A.weight"], saved[f"{path}.lora_B.weight"]
                else:
                    a, b = tensors[f"{path}.weight.lora_a"], tensors[f"{path}.weight.lora_b"]
                projected = (b @ a @ x[position]).view(-1, 16)[row]
                vectors.append(rotate(projected, angles[position]))
            scores.append(vectors[0] @ vectors[1])
        torch.testing.assert_close(scores[0], scores[1], rtol=1e-4, atol=1e-5)


def test_the_scale_of_rslora_is_kept(tmp_path):
    base = save_base(tmp_path / "base")
    adapter = save_adapter(tmp_path / "adapter", base, use_rslora=True)
    write_lora_gguf(tmp_path / "lora.gguf", adapter_folder=adapter, base_config=base)
    alpha = read(tmp_path / "lora.gguf")[0]["adapter.lora.alpha"]
    assert alpha / 8 == pytest.approx(12 / 8**0.5)  # llama.cpp divides by the rank


def test_the_program_writes_the_same_file(folders, tmp_path):
    base, adapter = folders
    write_lora_gguf(tmp_path / "one.gguf", adapter_folder=adapter, base_config=base / "config.json")
    command = [
        sys.executable,
        "-m",
        "llama_sft_helpers.evaluation.lora_gguf",
        adapter,
        base,
        tmp_path / "two.gguf",
    ]
    subprocess.run(list(map(str, command)), check=True)
    assert (tmp_path / "one.gguf").read_bytes() == (tmp_path / "two.gguf").read_bytes()
    assert not list(tmp_path.glob(".*"))


def test_another_architecture_and_an_unknown_layer_are_refused(folders, tmp_path):
    base, adapter = folders
    config = json.loads((base / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "model_type": "qwen2"}))
    with pytest.raises(AdapterError, match="'qwen2', expected 'llama'"):
        write_lora_gguf(tmp_path / "x.gguf", adapter_folder=adapter, base_config=tmp_path)
    weights = load_file(adapter / "adapter_model.safetensors")
    odd = {name.replace("up_proj", "odd_proj"): tensor for name, tensor in weights.items()}
    save_file(odd, adapter / "adapter_model.safetensors")
    with pytest.raises(AdapterError, match=r"no place for model.layers.0.mlp.odd_proj"):
        write_lora_gguf(tmp_path / "x.gguf", adapter_folder=adapter, base_config=base)
    assert not list(tmp_path.glob("*.gguf"))
