"""Measure the peak memory of LoRA training on Llama 3 8B's shape, and hold `plan_memory` against it.

Needs one NVIDIA GPU with 80 GB and a RAM disk with 17 GB free. Random weights of the real shape are made on
the card, saved, and loaded back with `from_pretrained` in 8, 4 and 16 bits; every setting then trains three
steps with `SFTTrainer`. Standard deviation 0.01 keeps LLM.int8 free of outlier columns, as nearly all columns
of a trained model are; at 0.02 random weights give nearly every input of `down_proj` one, and bitsandbytes
keeps a second copy of those columns. `--fast` measures on `speed_ladder`'s model instead (0.02, with
outliers), as its int8 product keeps no such copy.

    python benchmarks/calibrate_memory.py --out benchmarks/results/memory_h100.json
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import math
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

from report import card, source, write  # noqa: E402

from llama_sft_helpers.core.llama import load_llama3_config  # noqa: E402
from llama_sft_helpers.memory import plan_memory, planned_peak_gib  # noqa: E402
from llama_sft_helpers.profiles import Profile, read_profile  # noqa: E402

CONTEXT_GIB = 0.6  # what a CUDA context takes before the first tensor
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
# quantization, rows, max_length, packing, checkpointing; then what else differs
SETTINGS = [
    ("int8", 1, 1024, True, True, {}),
    ("int8", 2, 2048, True, True, {}),
    ("int8", 2, 4096, True, True, {}),
    ("int8", 8, 512, False, True, {}),
    ("int8", 1, 1024, False, True, {}),
    ("int8", 1, 1024, True, False, {}),
    ("int8", 1, 4096, True, False, {}),
    ("int8", 8, 512, False, False, {}),
    ("int8", 1, 512, False, True, {"dtype": "float16"}),
    ("nf4", 1, 4096, True, True, {}),
    ("nf4", 1, 4096, True, False, {}),
    ("nf4", 8, 1024, False, True, {}),
    ("nf4", 4, 512, False, False, {}),
    ("16-bit", 1, 4096, True, True, {}),
    ("16-bit", 1, 4096, True, False, {}),
    ("16-bit", 8, 1024, False, True, {}),
    ("16-bit", 4, 512, False, False, {}),
]
_FAST = {"attn_implementation": "varlen", "fast_int8": True}
_COMPILED = {**_FAST, "compile_layers": True}
FAST_SETTINGS = [
    ("int8", 1, 4096, True, False, _FAST),
    ("int8", 2, 4096, True, True, {**_FAST, "gradient_accumulation_steps": 2}),
    ("int8", 1, 4096, True, False, {**_COMPILED, "activation_memory_budget": 0.9}),
    ("int8", 2, 4096, True, False, {**_COMPILED, "activation_memory_budget": 0.5}),
    ("int8", 1, 4096, True, False, {**_COMPILED, "activation_memory_budget": 1.0}),
    ("int8", 1, 1024, True, True, {**_COMPILED, "activation_memory_budget": 1.0}),
]
PRESETS = ("colab-a100", "colab-l4", "colab-t4")
_RECORDED = ("per_device_train_batch_size", "max_length", "packing", "gradient_checkpointing", "dtype")
_PLAIN = {"attn_implementation": "sdpa", "fast_int8": False, "compile_layers": False}
_SWITCHES = ("attn_implementation", "fast_int8", "compile_layers", "activation_memory_budget")


def profile_of(setting: tuple) -> Profile:
    _, rows, max_length, packing, checkpointing, other = setting
    return read_profile(
        "colab-a100",
        per_device_train_batch_size=rows,
        max_length=max_length,
        packing=packing,
        gradient_checkpointing=checkpointing,
        **{"gradient_accumulation_steps": 1, "activation_memory_budget": 1.0, **_PLAIN, **other},
    )


def build_model(folder: Path, std: float) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    raw = json.loads((ROOT / "llama_sft_helpers/configs/llama3_8b.json").read_text(encoding="utf-8"))
    config = LlamaConfig(**{key: value for key, value in raw.items() if not key.startswith("_")})
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    model = model.to_empty(device="cuda")
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.fill_(1.0) if "norm" in name else parameter.normal_(0, std)
    model.save_pretrained(folder, max_shard_size="4GB")
    save_tokenizer(folder)


def save_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    vocab = {f"t{i}": i for i in range(100)} | {"<eos>": 100}
    words = Tokenizer(models.WordLevel(vocab, unk_token="t0"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>", pad_token="<eos>")
    tokenizer.save_pretrained(folder)


def load(folder: Path, quantization: str, dtype: str) -> Any:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    kind = {
        "int8": BitsAndBytesConfig(load_in_8bit=True),
        "nf4": BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=getattr(torch, dtype)
        ),
        "16-bit": None,
    }[quantization]
    model = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=kind, device_map={"": 0}, dtype=getattr(torch, dtype)
    )
    lora = LoraConfig(r=16, lora_alpha=16, task_type="CAUSAL_LM", target_modules=TARGETS)
    return get_peft_model(model, lora)


def rows_for(batch: int, length: int, packing: bool, steps: int):
    """Rows that fill every micro-batch: whole documents of 256 tokens, or one full row among shorter ones."""
    from datasets import Dataset

    generator = torch.Generator().manual_seed(0)
    if packing:
        lengths = [256] * (batch * length // 256 * steps)
    else:
        lengths = [length if row == 0 else length * 3 // 4 for row in range(batch)] * steps
    ids = [torch.randint(0, 128000, (n,), generator=generator).tolist() for n in lengths]
    labels = [[-100] * (len(row) // 10) + row[len(row) // 10 :] for row in ids]
    return Dataset.from_dict({"input_ids": ids, "labels": labels})


class _Probe:
    """Reads the allocator where the forward pass enters a layer, and at its end."""

    def __init__(self, model):
        self.entries: list[int] = []
        self.after_forward = (0, 0)
        layers = model.get_base_model().model.layers
        eager = [layer for layer in layers if layer._compiled_call_impl is None]  # a hook would break a graph
        self._hooks = [layer.register_forward_pre_hook(self._enter) for layer in eager]

    def _enter(self, *_):
        self.entries.append(torch.cuda.memory_allocated())

    def per_layer_mib(self, layers: int, checkpointing: bool) -> float | None:
        """What a layer's forward pass left allocated, mean over the last step; None for compiled layers."""
        if not self._hooks:
            return None
        last = self.entries[-layers * (1 + checkpointing) :][:layers]
        return (last[-1] - last[0]) / (layers - 1) / 2**20

    def remove(self):
        for hook in self._hooks:
            hook.remove()


def measure(model, folder: Path, profile: Profile, quantization: str, steps: int = 3) -> dict:
    from transformers import AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    batch, length = profile.per_device_train_batch_size, profile.max_length
    accumulation, checkpointing = profile.gradient_accumulation_steps, profile.gradient_checkpointing
    if not checkpointing:
        model.gradient_checkpointing_disable()
    config = SFTConfig(
        output_dir="calibrate",
        max_length=length,
        packing=profile.packing,
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulation,
        max_steps=steps,
        learning_rate=1e-4,
        bf16=profile.dtype == "bfloat16",
        fp16=profile.dtype == "float16",
        gradient_checkpointing=checkpointing,
        save_strategy="no",
        logging_steps=1,
        report_to="none",
        disable_tqdm=True,
        train_sampling_strategy="sequential",
    )
    data = rows_for(batch, length, profile.packing, steps * accumulation)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    trainer = SFTTrainer(model, config, train_dataset=data, processing_class=tokenizer)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    probe = _Probe(model)
    compute_loss, after_forward = trainer.compute_loss, []

    def watched(*args, **kwargs):
        loss = compute_loss(*args, **kwargs)
        after_forward.append((torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated()))
        return loss

    trainer.compute_loss = watched
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    started = time.perf_counter()
    trainer.train()
    torch.cuda.synchronize()
    setting = {name: getattr(profile, name) for name in _RECORDED}
    if profile.fast_int8 or profile.compile_layers or profile.attn_implementation != "sdpa":
        setting |= {name: getattr(profile, name) for name in _SWITCHES}
    result = {
        "setting": {"quantization": quantization, **setting, "gradient_accumulation_steps": accumulation},
        "measured_gib": torch.cuda.max_memory_allocated() / 2**30,
        "reserved_gib": torch.cuda.max_memory_reserved() / 2**30,
        "before_training_gib": before / 2**30,
        "after_forward_gib": after_forward[-1][0] / 2**30,
        "peak_until_forward_end_gib": after_forward[-1][1] / 2**30,
        "kept_per_layer_mib": probe.per_layer_mib(model.config.num_hidden_layers, checkpointing),
        "losses": [row["loss"] for row in trainer.state.log_history if "loss" in row],
        "seconds": time.perf_counter() - started,
    }
    probe.remove()
    del trainer, probe
    model.zero_grad(set_to_none=True)
    gc.collect()
    torch.cuda.empty_cache()
    return result


def switch_on(model, profile: Profile) -> Callable[[], None]:
    """Notebook 08's switches as a profile asks for them; returns what takes the compiled layers back."""
    from llama_sft_helpers import speed

    if profile.fast_int8:
        speed.use_fast_int8(model)
    if profile.attn_implementation == "varlen":
        model.set_attn_implementation(speed.register_varlen_attention())
    if not profile.compile_layers:
        return lambda: None
    return speed.compile_decoder_layers(model, profile.activation_memory_budget).remove


def run_group(folder: Path, out: Path, indices: list[int]) -> None:
    model, loaded = None, None
    for index in indices:
        quantization, profile = SETTINGS[index][0], profile_of(SETTINGS[index])
        wanted = (quantization, profile.dtype)
        try:
            if loaded != wanted:
                model = None
                gc.collect()
                torch.cuda.empty_cache()
                model, loaded = load(folder, quantization, profile.dtype), wanted
            result = measure(model, folder, profile, quantization)
        except Exception as error:
            result = {"setting": repr(profile), "error": f"{type(error).__name__}: {str(error)[:600]}"}
            model, loaded = None, None
        _append(out, result)


def run_fast(folder: Path, out: Path) -> None:
    """The fast settings in one process, on the int8 model that `speed_ladder` makes on the card itself."""
    from peft import LoraConfig, get_peft_model
    from speed_ladder import build_model as build_int8

    save_tokenizer(folder)
    model = build_int8(tiny=False, attn_implementation="sdpa", device="cuda")
    model = get_peft_model(model, LoraConfig(r=16, lora_alpha=16, target_modules=TARGETS))
    clean_gib = math.inf  # what is allocated before training; compiled code can hold an earlier trainer alive
    for setting in FAST_SETTINGS:
        profile = profile_of(setting)
        take_back = switch_on(model, profile)
        try:
            result = measure(model, folder, profile, setting[0])
            clean_gib = min(clean_gib, result["before_training_gib"])
            leftover_gib = result["before_training_gib"] - clean_gib
            if leftover_gib > 0.1:
                result["leftover_gib"] = leftover_gib
                result["measured_gib"] -= leftover_gib
                result["reserved_gib"] -= leftover_gib
        except Exception as error:
            result = {"setting": repr(profile), "error": f"{type(error).__name__}: {str(error)[:600]}"}
            gc.collect()
        take_back()
        torch._dynamo.reset()
        _append(out, result)


def run_preset(folder: Path, out: Path, name: str) -> None:
    """Twenty steps with a preset's own settings on a card limited to its size; accumulation 2 shortens it."""
    profile = read_profile(name, gradient_accumulation_steps=2)
    total_gib = torch.cuda.get_device_properties(0).total_memory / 2**30
    torch.cuda.set_per_process_memory_fraction((profile.gpu_gib - CONTEXT_GIB) / total_gib)
    model = load(folder, "int8", profile.dtype)
    switch_on(model, profile)
    result = measure(model, folder, profile, "int8", steps=20)
    share = (result["reserved_gib"] + CONTEXT_GIB) / profile.gpu_gib
    _append(out, {"preset": name, "card_gib": profile.gpu_gib, "share_of_card": share, **result})


def _append(out: Path, result: dict) -> None:
    with out.open("a") as lines:
        lines.write(json.dumps(result) + "\n")
    print(json.dumps(result), flush=True)


def compare(result: dict) -> str:
    """One line: planned, measured, difference, setting."""
    if "error" in result:
        return f"{result['error']} {result['setting']}"
    settings = {**_PLAIN, **result["setting"]}
    quantization = settings.pop("quantization")
    settings.setdefault("gradient_accumulation_steps", 1)
    profile = read_profile("colab-a100", **settings)
    plan = plan_memory(load_llama3_config(), profile, quantization=quantization)
    planned, measured = planned_peak_gib(plan), result["measured_gib"]
    return f"{planned:6.2f} {measured:6.2f} {100 * (planned / measured - 1):+5.1f} % {result['setting']}"


def groups() -> list[list[int]]:
    """Settings that can share a process: those that load the model the same way."""
    found: dict[tuple, list[int]] = {}
    for index, setting in enumerate(SETTINGS):
        found.setdefault((setting[0], profile_of(setting).dtype), []).append(index)
    return list(found.values())


def quiet() -> None:
    import transformers

    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    transformers.utils.logging.disable_progress_bar()


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/memory_h100.json")
    parser.add_argument("--folder", type=Path, default=Path("/dev/shm/llama3-8b-shape"))
    parser.add_argument("--std", type=float, default=0.01, help="standard deviation of the random weights")
    parser.add_argument("--fast", action="store_true", help="the settings of notebook 08 instead")
    parser.add_argument("--presets", action="store_true", help="20 steps of each preset on a limited card")
    parser.add_argument("--keep", action="store_true", help="leave the model folder there")
    parser.add_argument("--task", help=argparse.SUPPRESS)
    return parser.parse_args()


def run_task(task: str, args: argparse.Namespace) -> None:
    """What a process of its own does: build, a group of settings, or a preset."""
    quiet()
    lines = args.out.with_suffix(".jsonl")
    if task == "build":
        build_model(args.folder, args.std)
    elif task == "fast":
        run_fast(args.folder, lines)
    elif task in PRESETS:
        run_preset(args.folder, lines, task)
    else:
        run_group(args.folder, lines, json.loads(task))


def main() -> None:
    args = parse_arguments()
    if args.task:
        run_task(args.task, args)
        return
    lines = args.out.with_suffix(".jsonl")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    lines.unlink(missing_ok=True)
    started = time.perf_counter()
    env = {**os.environ, "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}

    def in_process(task: str, check: bool = False) -> None:
        command = [sys.executable, __file__, "--out", str(args.out), "--folder", str(args.folder)]
        command += ["--std", str(args.std), "--task", task]
        subprocess.run(command, env=env, check=check)
        print(f"{time.perf_counter() - started:.0f} s", flush=True)

    if not args.fast and not (args.folder / "config.json").exists():
        in_process("build", check=True)
    tasks = ["fast"] if args.fast else PRESETS if args.presets else map(json.dumps, groups())
    for task in tasks:
        in_process(task)
    results = [json.loads(line) for line in lines.read_text(encoding="utf-8").splitlines()]
    total_gib = torch.cuda.get_device_properties(0).total_memory / 2**30
    about = {**source(card()), "card_gib": total_gib, "std": 0.02 if args.fast else args.std}
    write(args.out, {**about, "results": results})
    lines.unlink()
    if not args.keep:
        shutil.rmtree(args.folder, ignore_errors=True)
    for row in results:
        print(compare(row), f"{row['share_of_card']:.0%} of the card" if "preset" in row else "")


if __name__ == "__main__":
    main()
