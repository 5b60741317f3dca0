"""Notebook 07: the adapter merged into the base model's files, a few weights at a time.

``merge_and_unload`` needs the whole 16-bit model in memory: 15 GiB for Llama 3 8B, which a T4 runtime has
nowhere. W + (alpha/r) B A needs one W at a time. So this module reads the base's safetensors files tensor by
tensor and writes files again, and no model is built. The bytes are those of a base that was loaded in
bfloat16 on a CPU and merged by PEFT (https://huggingface.co/docs/peft/developer_guides/model_merging).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from llama_sft_helpers.evaluation.adapter import read_lora
from llama_sft_helpers.evaluation.merging import MergeError

_INDEX = "model.safetensors.index.json"
_DTYPE = torch.bfloat16
_Factors = tuple[torch.Tensor, torch.Tensor]
_Files = dict[str, tuple[Path, tuple[int, ...]]]


def write_merged_shards(
    folder: str | Path,
    *,
    base_folder: str | Path,
    adapter_folder: str | Path,
    max_shard_size: str = "1GB",
) -> pd.DataFrame:
    """Write the merged model in bfloat16: its weights, their index, and the base's configuration.

    In memory are the adapter, one file of at most ``max_shard_size`` and one weight in float32; a weight
    larger than that has a file of its own.

    Args:
        folder: An empty folder, as ``new_folder`` yields it.
        base_folder: The base model's folder, as ``save_pretrained`` or ``snapshot_download`` leaves it.
        adapter_folder: The adapter folder that notebook 06 wrote.
        max_shard_size: As ``save_pretrained`` takes it.

    Returns:
        Index file: ``gib``, ``tensors``, ``merged`` (how many of them the adapter changed).

    Raises:
        AdapterError: The adapter is missing, damaged, or more than A and B.
        MergeError: The base has no safetensors files, lacks an adapted weight, or holds it quantized.
    """
    from huggingface_hub import split_torch_state_dict_into_shards
    from safetensors.torch import save_file

    folder, base_folder = Path(folder), Path(base_folder)
    lora, scale = read_lora(adapter_folder)
    files = _tensor_files(base_folder)
    _check_names(lora, files, base_folder)
    meta = {name: torch.empty(shape, dtype=_DTYPE, device="meta") for name, (_, shape) in files.items()}
    split = split_torch_state_dict_into_shards(meta, max_shard_size=max_shard_size)
    rows = []
    for file, names in split.filename_to_tensors.items():
        shard = {name: _merge(name, _read(files, name), lora, scale) for name in names}
        save_file(shard, folder / file, metadata={"format": "pt"})
        size = sum(tensor.nbytes for tensor in shard.values()) / 2**30
        rows.append((file, size, len(names), len(lora.keys() & names)))
        del shard
    if split.is_sharded:
        _write_json(folder / _INDEX, {"metadata": split.metadata, "weight_map": split.tensor_to_filename})
    _write_configs(folder, base_folder)
    return pd.DataFrame(rows, columns=["file", "gib", "tensors", "merged"]).set_index("file")


def check_merged_shards(folder: str | Path, *, base_folder: str | Path, adapter_folder: str | Path) -> None:
    """Check every merged weight against PEFT's own merge of that one layer, and the others against the base.

    One layer at a time, so that this needs no more memory than the merge. The comparison is bit for bit.

    Raises:
        MergeError: A tensor is missing, too many, or differs; the message names the first.
    """
    lora, scale = read_lora(adapter_folder)
    base, merged = _tensor_files(Path(base_folder)), _tensor_files(Path(folder))
    if odd := sorted(set(base) ^ set(merged)):
        raise MergeError(f"{odd[0]} is in the base or in {folder} only. Write the merged model anew.")
    for name in base:
        expected, found = _read(base, name).to(_DTYPE), _read(merged, name)
        if factors := lora.get(name):
            expected = _merge_by_peft(expected, factors, scale)
        if found.dtype != _DTYPE or not torch.equal(found, expected):
            raise MergeError(f"{name} in {folder} is not the merged weight. Write the merged model anew.")


def _merge(name: str, weight: torch.Tensor, lora: Mapping[str, _Factors], scale: float) -> torch.Tensor:
    """W + scale B A, summed in float32 and rounded once, where the adapter has this weight; else W."""
    factors = lora.get(name)
    if weight.is_floating_point():
        weight = weight.to(_DTYPE)
    elif factors:
        raise MergeError(
            f"{name} is stored as {weight.dtype}: the base is quantized, and a merge would lose the adapter. "
            "Give the base model in 16 or 32 bits."
        )
    if factors:
        a, b = factors
        weight = (b @ a).mul_(scale).add_(weight).to(_DTYPE)  # in place: one float32 tensor of this size
    return weight.contiguous()


@torch.no_grad()
def _merge_by_peft(weight: torch.Tensor, factors: _Factors, scale: float) -> torch.Tensor:
    """The same by PEFT: a model of this one layer, merged by its own ``merge``."""
    from peft import LoraConfig, inject_adapter_in_model

    a, b = factors
    outputs, inputs = weight.shape
    linear = torch.nn.utils.skip_init(torch.nn.Linear, inputs, outputs, bias=False, dtype=weight.dtype)
    config = LoraConfig(r=len(a), lora_alpha=scale * len(a), target_modules=["linear"])  # type: ignore[arg-type]
    model: Any = inject_adapter_in_model(config, torch.nn.ModuleDict({"linear": linear}))
    layer = model["linear"]
    layer.base_layer.weight.data = weight.clone()
    layer.lora_A["default"].weight.data, layer.lora_B["default"].weight.data = a, b
    layer.merge()
    return layer.base_layer.weight.data


def _check_names(lora: Mapping[str, _Factors], files: _Files, base_folder: Path) -> None:
    for name, (a, b) in lora.items():
        if name not in files:
            raise MergeError(
                f"The adapter has weights for {name}, {base_folder} has not: another base model."
            )
        expected, found = (b.shape[0], a.shape[1]), files[name][1]
        if found != expected:
            raise MergeError(f"{name} in {base_folder} is {found}, the adapter is made for {expected}.")


def _tensor_files(folder: Path) -> _Files:
    """Tensor name -> its file and shape; the second copy of tied embeddings is left out."""
    from safetensors import SafetensorError, safe_open

    paths = sorted(folder.glob("*.safetensors"))
    if not paths:
        raise MergeError(
            f"{folder} has no *.safetensors: give a folder that save_pretrained wrote, or what "
            "snapshot_download returned."
        )
    if (folder / _INDEX).is_file():  # a folder of the hub can hold the weights in a second form
        named = set(json.loads((folder / _INDEX).read_text(encoding="utf-8"))["weight_map"].values())
        paths = [folder / file for file in sorted(named)]
    files: _Files = {}
    for path in paths:
        try:
            with safe_open(str(path), framework="pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118  (no mapping)
                    files[name] = path, tuple(tensors.get_slice(name).get_shape())
        except (SafetensorError, OSError) as error:
            raise MergeError(
                f"{path} is missing or damaged ({error}). Download the base model again."
            ) from error
    if _is_second_copy(folder, files):
        del files["lm_head.weight"]
    return dict(sorted(files.items()))


def _is_second_copy(folder: Path, files: _Files) -> bool:
    """Whether the output weights are the embeddings once more; stored twice, they would load untied."""
    names = ("lm_head.weight", "model.embed_tokens.weight")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if not config.get("tie_word_embeddings") or any(name not in files for name in names):
        return False
    return torch.equal(_read(files, names[0]), _read(files, names[1]))


def _read(files: _Files, name: str) -> torch.Tensor:
    """One tensor; its file is closed again, so that what was read of it leaves the memory with the tensor."""
    from safetensors import safe_open

    with safe_open(str(files[name][0]), framework="pt") as tensors:
        return tensors.get_tensor(name)


def _write_configs(folder: Path, base_folder: Path) -> None:
    config = json.loads((base_folder / "config.json").read_text(encoding="utf-8"))
    config.pop("torch_dtype", None)  # the older name of the same key
    _write_json(folder / "config.json", {**config, "dtype": str(_DTYPE).removeprefix("torch.")})
    generation = base_folder / "generation_config.json"
    if generation.is_file():
        (folder / generation.name).write_bytes(generation.read_bytes())


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
