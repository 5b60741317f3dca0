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
    from peft import PeftModel

    from llama_sft_helpers.profiles import Profile


def write_engine_configs(
    folder: str | Path,
    *,
    profile: Profile,
    model: PeftModel,
    train_rows: Iterable[Mapping[str, str]],
    eval_rows: Iterable[Mapping[str, str]],
    processes: int | None = None,
) -> pd.DataFrame:
    """Write the run into an empty folder, as files that ``accelerate launch`` and trl read.

    Two pairs: DDP with int8 weights, where each GPU holds the whole model and takes a share of the rows; and
    FSDP with nf4 weights, where each GPU holds a share of the model. Both keep the profile's effective batch.
    Of the ``PeftModel`` they take the adapter's settings and the class of its decoder layers; of the rows,
    text or tokens.

    ``processes`` counts GPUs (CPU processes where there is none): by default the fewest from 2 on that can
    share the effective batch evenly. A batch of one row becomes one row for each of two.

    Returns:
        Index name (``ddp-int8``, ``fsdp-nf4``): ``effective_batch_rows``, ``command`` (run it in the folder).

    Raises:
        ValueError: ``processes`` is less than 2 or does not divide the effective batch, or there are no
            training rows.
    """
    import yaml  # type: ignore[import-untyped]

    folder = Path(folder)
    if processes is None:
        processes = _fewest_processes(profile)
    if processes < 2:
        raise ValueError(
            f"processes is {processes}, expected at least 2; one process is what notebook 06 does."
        )
    shared = _sft_settings(profile, model.active_peft_config, processes)
    if not _write_rows(folder / "data" / "train.jsonl", train_rows):
        raise ValueError("There are no training rows to write; pass the rows that notebook 06 trained on.")
    _write_rows(folder / "data" / "test.jsonl", eval_rows)
    layer = type(model.get_decoder().layers[0]).__name__
    ddp = _ddp(profile, processes)
    pairs = {"ddp-int8": (_INT8, ddp), "fsdp-nf4": (_NF4, ddp | _fsdp(layer))}
    rows = shared["per_device_train_batch_size"] * shared["gradient_accumulation_steps"] * processes
    table = {}
    for name, (quantization, accelerate) in pairs.items():
        sft, launch = f"sft_{name}.yaml", f"accelerate_{name}.yaml"
        trl = {**shared, **quantization, "output_dir": f"adapter-{name}"}
        for file, content in ((sft, trl), (launch, accelerate)):
            (folder / file).write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
        command = f"accelerate launch --config_file {launch} -m trl.scripts.sft --config {sft}"
        table[name] = {"effective_batch_rows": rows, "command": command}
    return pd.DataFrame.from_dict(table, orient="index").rename_axis("name")


# Every adapter weight takes part in every step: DDP need not search the graph for those that do not.
_INT8: dict[str, Any] = {"load_in_8bit": True, "ddp_find_unused_parameters": False}

# FSDP shares out tensors of one type, so the 4-bit codes are stored in the type of everything else.
_NF4: dict[str, Any] = {
    "load_in_4bit": True,
    "bnb_4bit_quant_type": "nf4",
    "use_bnb_nested_quant": True,
    "bnb_4bit_quant_storage": "bfloat16",
    "dtype": "bfloat16",
    "use_cpu": False,
    "gradient_checkpointing_kwargs": {"use_reentrant": False},
}


def _sft_settings(profile: Profile, peft_config: Any, processes: int) -> dict[str, Any]:
    on_gpu, targets = profile.gpu_gib > 0, peft_config.target_modules
    batch, accumulation = _share_batch(profile, processes)
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
        "per_device_train_batch_size": batch,
        "per_device_eval_batch_size": batch,
        "gradient_accumulation_steps": accumulation,
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


def _fewest_processes(profile: Profile) -> int:
    """Two, or the next number that divides the effective batch: 3 for the 9 rows of ``colab-l4``."""
    rows = profile.per_device_train_batch_size * profile.gradient_accumulation_steps
    return next((number for number in range(2, rows + 1) if rows % number == 0), 2)


def _share_batch(profile: Profile, processes: int) -> tuple[int, int]:
    """Rows in a micro-batch and micro-batches of each process: the largest that keep the effective batch."""
    most, accumulated = profile.per_device_train_batch_size, profile.gradient_accumulation_steps
    share, rest = divmod(max(most * accumulated, 2), processes)
    if rest:
        raise ValueError(
            f"The effective batch of {most * accumulated} rows ({most} in a micro-batch x {accumulated} "
            f"accumulated) cannot be shared by processes={processes}. Pass a number that divides it, or a "
            f"profile that does: load_profile(gradient_accumulation_steps={processes})."
        )
    batch = max(rows for rows in range(1, most + 1) if share % rows == 0)
    return batch, share // batch


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


def _fsdp(layer: str) -> dict[str, Any]:
    """What sets FSDP apart from DDP."""
    settings = {
        # Version 1 changes the modules' names, under which PEFT 0.21 then finds no LoRA to save.
        "fsdp_version": 2,
        "fsdp_reshard_after_forward": True,
        "fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
        "fsdp_transformer_layer_cls_to_wrap": layer,
        "fsdp_cpu_ram_efficient_loading": True,
        "fsdp_offload_params": False,
        "fsdp_state_dict_type": "FULL_STATE_DICT",
    }
    return {"distributed_type": "FSDP", "mixed_precision": "bf16", "fsdp_config": settings}


_COLUMNS = ("prompt", "completion", "input_ids", "labels")  # a conversation comes as tokens already


def _write_rows(path: Path, rows: Iterable[Mapping[str, str]]) -> int:
    kept = ({key: row[key] for key in _COLUMNS if key in row} for row in rows)
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in kept]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(lines), encoding="utf-8")
    return len(lines)
