"""Notebook 07: the run as configuration files for trl and Accelerate, to go on with on several GPUs.

Written are a ``trl sft`` YAML (https://huggingface.co/docs/trl/clis), an Accelerate configuration
(https://huggingface.co/docs/accelerate/usage_guides/explore) and the formatted rows; nothing of this
package is needed to run them.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

if TYPE_CHECKING:
    from llama_sft_helpers.profiles import Profile

_LAUNCH = "accelerate launch --config_file {accelerate} -m trl.scripts.sft --config {sft}"


def write_engine_configs(
    folder: str | Path,
    *,
    profile: Profile,
    peft_config: Any,
    train_rows: Iterable[Mapping[str, str]],
    eval_rows: Iterable[Mapping[str, str]],
    processes: int = 2,
) -> pd.DataFrame:
    """Write the run as files that ``accelerate launch`` and trl read.

    Two pairs: DDP with int8 weights, where each GPU holds the whole model and takes a share of the rows; and
    FSDP with nf4 weights, where each GPU holds a share of the model.

    Args:
        folder: An empty folder, as ``new_folder`` yields it.
        profile: The run's profile. Its effective batch is kept if ``processes`` divides the accumulation.
        peft_config: The adapter's ``LoraConfig``.
        train_rows: Rows with ``prompt`` and ``completion``.
        eval_rows: Held-out rows with the same.
        processes: GPUs (CPU processes where there is none).

    Returns:
        Index name (``ddp-int8``, ``fsdp-nf4``): ``effective_batch_rows``, ``command`` (run it in the folder).

    Raises:
        ValueError: ``processes`` is less than 2, or there are no training rows.
    """
    folder = Path(folder)
    if processes < 2:
        raise ValueError(
            f"processes is {processes}, expected at least 2; one process is what notebook 06 does."
        )
    if not _write_rows(folder / "data" / "train.jsonl", train_rows):
        raise ValueError("There are no training rows to write; pass the rows that notebook 06 trained on.")
    _write_rows(folder / "data" / "test.jsonl", eval_rows)
    shared = _sft_settings(profile, peft_config, processes)
    pairs: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
        "ddp-int8": ({"load_in_8bit": True}, _ddp(profile, processes)),
        "fsdp-nf4": (_NF4, _fsdp(profile, processes)),
    }
    table: dict[str, dict[str, Any]] = {}
    for name, (quantization, accelerate) in pairs.items():
        files = {"sft": f"sft_{name}.yaml", "accelerate": f"accelerate_{name}.yaml"}
        _write_yaml(folder / files["sft"], {**shared, **quantization, "output_dir": f"adapter-{name}"})
        _write_yaml(folder / files["accelerate"], accelerate)
        table[name] = {"effective_batch_rows": _effective_batch(shared, processes)}
        table[name] |= {"command": _LAUNCH.format(**files)}
    return pd.DataFrame(table).T.rename_axis("name")


# FSDP cuts one flat tensor into shares, so the 4-bit codes are stored in the type of everything else.
_NF4 = {
    "load_in_4bit": True,
    "bnb_4bit_quant_type": "nf4",
    "use_bnb_nested_quant": True,
    "bnb_4bit_quant_storage": "bfloat16",
    "dtype": "bfloat16",
    "use_cpu": False,
}


def _sft_settings(profile: Profile, peft_config: Any, processes: int) -> dict[str, Any]:
    on_gpu, targets = profile.gpu_gib > 0, peft_config.target_modules
    return {
        "model_name_or_path": profile.model_id,
        # trl's command line keeps LoRA in bfloat16, which float16's loss scaling refuses
        "dtype": "bfloat16" if on_gpu else profile.dtype,
        "bf16": on_gpu,
        "fp16": False,
        "use_cpu": not on_gpu,
        "dataset_name": "data",
        "dataset_train_split": "train",
        "dataset_test_split": "test",
        "use_peft": True,
        "lora_r": peft_config.r,
        "lora_alpha": peft_config.lora_alpha,
        "lora_dropout": float(peft_config.lora_dropout),
        "lora_task_type": "CAUSAL_LM",
        "lora_target_modules": targets if isinstance(targets, str) else sorted(targets),
        "use_rslora": peft_config.use_rslora,
        "use_dora": peft_config.use_dora,
        "max_length": profile.max_length,
        "packing": profile.packing,
        "per_device_train_batch_size": profile.per_device_train_batch_size,
        "per_device_eval_batch_size": profile.per_device_train_batch_size,
        "gradient_accumulation_steps": max(1, profile.gradient_accumulation_steps // processes),
        "max_steps": profile.max_steps,
        "learning_rate": profile.learning_rate,
        "lr_scheduler_type": "linear",
        # trl's command line compiles no layers, which is what lets a profile do without
        "gradient_checkpointing": profile.gradient_checkpointing or profile.compile_layers,
        "eval_strategy": "steps",
        "eval_steps": profile.eval_steps,
        "save_steps": profile.save_steps,
        "save_total_limit": 2,
        "logging_steps": 1,
        "seed": 42,
        "report_to": "none",
    }


def _effective_batch(settings: Mapping[str, Any], processes: int) -> int:
    return int(processes * settings["per_device_train_batch_size"] * settings["gradient_accumulation_steps"])


def _ddp(profile: Profile, processes: int) -> dict[str, Any]:
    # Without a GPU the same launcher starts CPU processes, which trl's `use_cpu` connects by gloo.
    return {
        "compute_environment": "LOCAL_MACHINE",
        "distributed_type": "MULTI_GPU",
        "mixed_precision": "bf16" if profile.gpu_gib else "no",
        "num_machines": 1,
        "num_processes": processes,
        "machine_rank": 0,
        "rdzv_backend": "static",
        "same_network": True,
        "use_cpu": False,
    }


def _fsdp(profile: Profile, processes: int) -> dict[str, Any]:
    settings = {  # Accelerate reads from the model which of its layers to wrap.
        "fsdp_version": 1,
        "fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
        "fsdp_sharding_strategy": "FULL_SHARD",
        "fsdp_cpu_ram_efficient_loading": True,
        "fsdp_sync_module_states": True,
        "fsdp_use_orig_params": False,
        "fsdp_offload_params": False,
        "fsdp_state_dict_type": "FULL_STATE_DICT",
    }
    base = {**_ddp(profile, processes), "mixed_precision": "bf16"}
    return {**base, "distributed_type": "FSDP", "fsdp_config": settings}


def _write_rows(path: Path, rows: Iterable[Mapping[str, str]]) -> int:
    path.parent.mkdir(parents=True, exist_ok=True)
    count = 0
    with path.open("w", encoding="utf-8") as file:
        for count, row in enumerate(rows, start=1):  # noqa: B007  (the count is the result)
            kept = {"prompt": row["prompt"], "completion": row["completion"]}
            file.write(json.dumps(kept, ensure_ascii=False) + "\n")
    return count


def _write_yaml(path: Path, content: Mapping[str, Any]) -> None:
    import yaml  # type: ignore[import-untyped]

    path.write_text(yaml.safe_dump(dict(content), sort_keys=False), encoding="utf-8")
