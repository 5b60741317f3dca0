"""The adapter folder, checked before and after it is loaded.

Nothing here loads an adapter into a model: the notebook does.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from llama_sft_helpers.core.files import hash_files, write_text

_WEIGHTS = "adapter_model.safetensors"
# PEFT 0.21 selects tensors by the names of modules, which FSDP's version 1 changes, and finds none.
_NO_LORA = (
    "{path} holds no LoRA tensor: what was trained is not in it. PEFT 0.21.0 to 0.21.2 save such a file "
    "under FSDP's version 1. Train again with version 2, as notebook 07 writes it, or with peft<0.21."
)


class AdapterError(ValueError):
    """The adapter folder is missing, damaged, belongs to another base model, or is not what was loaded."""


def find_base_model(folder: str | Path) -> str:
    """The base model that an adapter folder names; a demo model's folder, which is built where it is missing.

    Raises:
        AdapterError: Folder or file missing or damaged.
    """
    from llama_sft_helpers.demo_model import ensure_model

    name = str(_read_adapter_config(Path(folder)).get("base_model_name_or_path"))
    return str(ensure_model(name.removeprefix("local:"))) if name.startswith("local:") else name


def name_base_model(folder: str | Path) -> str:
    """Let an adapter name a demo model as profiles do, ``local:NAME``, instead of by this machine's cache.

    Its ``adapter_config.json`` is written anew; a hub id or a folder of your own stays as it is.

    Returns:
        The base model's name as the adapter now has it.
    """
    config = _read_adapter_config(Path(folder))
    base = Path(str(config["base_model_name_or_path"]))
    if (base / "built_by_llama_sft_helpers.json").is_file():
        config["base_model_name_or_path"] = f"local:{base.name}"
        write_text(Path(folder) / "adapter_config.json", json.dumps(config, indent=2, sort_keys=True) + "\n")
    return str(config["base_model_name_or_path"])


def check_adapter(
    folder: str | Path, model: torch.nn.Module, base_model_id: str, sha256: str | None = None
) -> None:
    """Check an adapter folder against the base model it is about to be loaded on.

    ``PeftModel.from_pretrained`` only warns about missing tensors, and takes an adapter of any base whose
    shapes happen to fit.

    Args:
        folder: The adapter folder that notebook 06 wrote.
        model: The base model, without an adapter.
        base_model_id: The id or folder it was loaded from.
        sha256: ``training.hash_files`` of the folder when it was written, which alone tells a changed byte.

    Raises:
        AdapterError: Folder or file missing or damaged, another base model, or shapes that do not fit.
    """
    folder = Path(folder)
    trained_on = find_base_model(folder)
    if Path(trained_on).name != Path(base_model_id).name:  # the same model may lie in another place
        raise AdapterError(
            f"The adapter in {folder} was trained on {trained_on!r}, the model here is {base_model_id!r}. "
            "Load the same base model, or run notebook 06 with this profile."
        )
    weights = _read_weights(folder)
    for name, tensor in weights.items():
        if not torch.isfinite(tensor).all():
            raise AdapterError(f"{name} in {folder} is not finite. Train again with a lower learning rate.")
    _check_shapes(folder, weights, model)
    if sha256 is not None and (found := hash_files(folder)) != sha256:
        raise AdapterError(
            f"The weights in {folder} have the hash {found[:16]}..., expected {sha256[:16]}...: they changed "
            "since notebook 06 wrote them. Copy the folder again, or run notebook 06 again."
        )


def check_adapter_loaded(model: torch.nn.Module, folder: str | Path) -> None:
    """Check that the model holds every tensor of the adapter file, bit for bit, and no other LoRA weight.

    With equal base weights, equal adapter weights make equal logits.

    Raises:
        AdapterError: A tensor is missing, differs, or was left at its initial value.
    """
    from peft import get_peft_model_state_dict

    saved = _read_weights(Path(folder))
    # left to itself PEFT looks on the hub whether the vocabulary has grown, for a local model too
    embeddings = any("embed_tokens" in name or "lm_head" in name for name in saved)
    loaded = get_peft_model_state_dict(model, save_embedding_layers=embeddings)
    if odd := sorted(set(loaded) ^ set(saved)):
        raise AdapterError(
            f"{len(odd)} LoRA tensors are in the file or in the model only, the first: {odd[0]}."
        )
    for name, tensor in saved.items():
        here = loaded[name].detach().cpu()
        if not torch.equal(here, tensor.to(here.dtype)):
            raise AdapterError(f"{name} differs from the file; load the adapter anew.")


def read_lora(folder: str | Path) -> tuple[dict[str, tuple[torch.Tensor, torch.Tensor]], float]:
    """Read the A and B of every adapted layer, and the scale of their product.

    Returns:
        Name of a weight of the base model (``model.layers.0.self_attn.q_proj.weight``) -> (A of r x inputs,
        B of outputs x r), in float32; and alpha / r, or alpha / sqrt(r) with ``use_rslora``
        (https://arxiv.org/abs/2312.03732).

    Raises:
        AdapterError: Folder or file missing or damaged, or the adapter is more than A and B (DoRA, trained
            embeddings, ranks that differ by layer): ``merge_and_unload`` merges those.
    """
    folder = Path(folder)
    config = _read_adapter_config(folder)
    odd = [key for key in ("use_dora", "rank_pattern", "alpha_pattern", "fan_in_fan_out") if config.get(key)]
    factors = {name: tensor.float() for name, tensor in _read_weights(folder).items()}
    layers = sorted({name.partition(".lora_")[0] for name in factors})
    names = {layer: [f"{layer}.lora_{kind}.weight" for kind in "AB"] for layer in layers}
    odd += sorted(set(factors) ^ {name for pair in names.values() for name in pair})
    if odd:
        raise AdapterError(
            f"The adapter in {folder} is more than A and B of one rank ({odd[0]}). Load it with "
            "PeftModel.from_pretrained and merge it with merge_and_unload()."
        )
    scale = config["lora_alpha"] / config["r"] ** (0.5 if config.get("use_rslora") else 1)
    prefix = "base_model.model."
    return {
        f"{layer.removeprefix(prefix)}.weight": (factors[a], factors[b]) for layer, (a, b) in names.items()
    }, scale


def _read_adapter_config(folder: Path) -> dict[str, Any]:
    path = folder / "adapter_config.json"
    if not folder.is_dir():
        raise AdapterError(_no_adapter(folder))
    if not path.is_file():
        raise AdapterError(
            f"{folder} is no adapter folder: it has no {path.name}. Give the folder that notebook 06 wrote."
        )
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise AdapterError(f"{path} is damaged ({error}). Copy it again, or run 06 again.") from error
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        raise AdapterError(f"{path} describes no LoRA adapter. Give the folder that notebook 06 wrote.")
    return config


def _no_adapter(folder: Path) -> str:
    """The ways to an adapter; one of another profile is named, as 06 may have run on another GPU."""
    others = [path.parent for path in folder.parent.parent.glob("*/adapter/adapter_config.json")]
    found = "".join(f"\n- {path} is there: load_profile({path.parent.name!r}) finds it." for path in others)
    return (
        f"There is no adapter folder {folder}. Ways to one:\n"
        "- Run notebook 06 first: it writes it.\n"
        "- On Colab each notebook has a machine of its own: mount Google Drive in 06 and in 07 "
        "(`connect_drive()`), so that 07 finds what 06 wrote.\n"
        '- Take a published one by its name on the hub: adapter = "owner/name" in notebook 07.' + found
    )


def _read_weights(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = folder / _WEIGHTS
    if not path.is_file():
        raise AdapterError(f"{folder} has no {_WEIGHTS}. Run notebook 06 again, or copy the whole folder.")
    try:
        weights = load_file(path)
    except SafetensorError as error:
        raise AdapterError(f"{path} is damaged ({error}). Copy it again, or run 06 again.") from error
    if not any(".lora_" in name for name in weights):
        raise AdapterError(_NO_LORA.format(path=path))
    return weights


def _check_shapes(folder: Path, weights: Mapping[str, torch.Tensor], model: torch.nn.Module) -> None:
    modules = dict(model.named_modules())
    for name, tensor in weights.items():
        path, _, kind = name.removeprefix("base_model.model.").rpartition(".lora_")
        if not path or kind.startswith("embedding"):
            continue  # a whole layer (modules_to_save) or embeddings: PEFT checks their shapes
        layer: Any = modules.get(path)
        if layer is None:
            raise AdapterError(f"The adapter in {folder} has weights for {path}, which this model has not.")
        expected = layer.in_features if kind.startswith("A") else layer.out_features
        found = tensor.shape[1] if kind.startswith("A") else tensor.shape[0]
        if found != expected:
            raise AdapterError(
                f"{name} in {folder} is made for a width of {found}, this model's {path} has {expected}: "
                "it belongs to another base model. Load that one, or run notebook 06 with this profile."
            )
