"""From the plain recipe to the fast one, one change at a time, on one GPU.

    python benchmarks/speed_ladder.py --cap-gib 40 --out benchmarks/results/speed_h200_40gib.json

Builds Llama 3 8B's shape with random weights (some outlier channels, as real models have) in 8 bits, and
rows of an Alpaca-like length distribution out of the shipped rows' tokens (Llama 3's own tokenizer, package
``llama-models``). Each rung trains the same LoRA with TRL's ``SFTTrainer`` in a process of its own. Tokens a
second count real tokens, never padding.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import logging
import os
import re
import statistics
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

from report import LIBRARIES, card, source, write  # noqa: E402

# Packed rows differ in length; without this the allocator keeps a block for every length it has seen.
os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")

FLOP_PER_TOKEN = 30.3e9  # products of the frozen weights forward and backward, lm_head too, and LoRA
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
WARM_STEPS = 4


@dataclasses.dataclass(frozen=True)
class Rung:
    """One recipe; ``same_data_as`` names the rung whose losses it must repeat."""

    name: str
    change: str
    packing: bool = False
    padding_free: bool = False
    rows: int = 8
    max_length: int = 2048
    attn_implementation: str = "sdpa"
    checkpointing: bool = True
    fast_int8: bool = False
    fuse_lora: bool = True
    int8_units: bool = False
    outlier_columns: int = 0
    only_backward: tuple[str, ...] = ()
    leave_out: tuple[str, ...] = ()
    compile_layers: bool = False
    quick_steps: bool = False
    budget: float = 1.0
    same_data_as: str = ""
    extra: bool = False


_PACKED = {"packing": True, "rows": 3, "max_length": 2176, "same_data_as": "packed"}
_FAST = {**_PACKED, "attn_implementation": "varlen", "fast_int8": True}
_COMPILED = {**_FAST, "compile_layers": True, "quick_steps": True}
_KEPT_AT = {**_COMPILED, "checkpointing": False}
_KEPT = {**_KEPT_AT, "budget": 0.9}
_UNITS = {**_KEPT, "int8_units": True, "outlier_columns": 16}
RUNGS = [
    Rung("plain", "trl's defaults: 8 padded rows, checkpointing, LLM.int8"),
    Rung("no checkpointing", "keep the activations", checkpointing=False, same_data_as="plain"),
    Rung("padding-free", "the same 8 rows without padding, varlen attention", padding_free=True,
         attn_implementation="varlen", same_data_as="plain"),
    Rung("packed", "3 blocks of 2176 tokens of whole documents, sdpa", **{**_PACKED, "same_data_as": ""}),
    Rung("varlen", "attention within each document only", attn_implementation="varlen", **_PACKED),
    Rung("fast int8", "int8 codes dequantized inside a 16-bit product", **_FAST),
    Rung("compiled", "each decoder layer compiled, fewer walks over the modules", **_COMPILED),
    Rung("fast", "activations kept, cheap ones recomputed, instead of checkpointing", **_KEPT),
    Rung("int8 units", "frozen products of int8 by int8, 16 outlier columns in 16 bits", **_UNITS),
    # not in the ladder unless asked for by name
    Rung("fast, budget 0.6", "as fast, fewer activations kept", budget=0.6, extra=True, **_KEPT_AT),
    Rung("fast, 4 blocks", "as fast, 8704 tokens a step", extra=True,
         **{**_KEPT, "rows": 4, "same_data_as": ""}),
    Rung("fast, small blocks", "as fast, blocks of 1024", extra=True,
         **{**_KEPT, "max_length": 1024, "same_data_as": ""}),
    Rung("fast, all kept", "as fast, nothing recomputed", budget=1.0, extra=True, **_KEPT_AT),
    Rung("int8 units, 4 blocks", "as int8 units, 8704 tokens a step", extra=True,
         **{**_UNITS, "rows": 4, "same_data_as": ""}),
    Rung("int8 units, small blocks", "as int8 units, blocks of 1024", extra=True,
         **{**_UNITS, "max_length": 1024, "same_data_as": ""}),
    Rung("int8 units, none apart", "as int8 units, without outlier columns", extra=True,
         **{**_UNITS, "outlier_columns": 0}),
    Rung("int8 units, closer", "as int8 units, output of down_proj in 16 bits", extra=True,
         **{**_UNITS, "only_backward": ("down_proj",)}),
    Rung("int8 units, without down_proj", "as int8 units, down_proj in 16 bits", extra=True,
         **{**_UNITS, "leave_out": ("down_proj",)}),
    # for small cards: the activations computed again
    Rung("int8 units, checkpointing", "as int8 units, with checkpointing", extra=True,
         **{**_UNITS, "checkpointing": True, "budget": 1.0}),
    Rung("int8 units, without down_proj, checkpointing", "down_proj in 16 bits", extra=True,
         **{**_UNITS, "checkpointing": True, "budget": 1.0, "leave_out": ("down_proj",)}),
    Rung("int8 units, checkpointing, 6 blocks", "twice the tokens", extra=True,
         **{**_UNITS, "checkpointing": True, "budget": 1.0, "rows": 6, "same_data_as": ""}),
    Rung("compiled, 6 blocks", "as compiled, twice the tokens", extra=True,
         **{**_COMPILED, "rows": 6, "same_data_as": ""}),
    # without a compiler: what is best under the cap, for the fast rungs to be held against
    Rung("uncompiled, 1 block", "as fast int8, activations kept", extra=True,
         **{**_FAST, "rows": 1, "checkpointing": False, "same_data_as": ""}),
    Rung("uncompiled, 2 blocks", "as fast int8, activations kept", extra=True,
         **{**_FAST, "rows": 2, "checkpointing": False, "same_data_as": ""}),
    Rung("uncompiled, 6 blocks", "as fast int8, twice the tokens", extra=True,
         **{**_FAST, "rows": 6, "same_data_as": ""}),
]  # fmt: skip
# Data sheets, dense products of bf16 (T4: fp16), by a word of the card's name; the H100 with HBM3
PEAKS = {"HBM3": 989.4e12, "H200": 989.4e12, "A100": 312e12, "L4": 121e12, "T4": 65e12}


def build_config(tiny: bool) -> Any:
    from transformers import LlamaConfig

    numbers = json.loads((ROOT / "llama_sft_helpers/configs/llama3_8b.json").read_text(encoding="utf-8"))
    config = LlamaConfig(**{k: v for k, v in numbers.items() if not k.startswith("_")})
    if tiny:
        config.update({"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "head_dim": 32})
        config.update({"num_attention_heads": 4, "num_key_value_heads": 2})
    return config


def build_model(tiny: bool, attn_implementation: str, device: str, seed: int = 0) -> Any:
    """Llama 3 8B's shape with random weights, its linears in int8, made on the device itself."""
    import bitsandbytes as bnb
    import torch
    from transformers import BitsAndBytesConfig, LlamaForCausalLM
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
    from transformers.quantizers import AutoHfQuantizer

    config = build_config(tiny)
    dtype = torch.bfloat16
    with torch.device("meta"):
        model = LlamaForCausalLM._from_config(config, attn_implementation=attn_implementation, dtype=dtype)
    generator = torch.Generator(device).manual_seed(seed)

    def normal(shape: Any) -> Any:
        return torch.empty(shape, dtype=dtype, device=device).normal_(0, 0.02, generator=generator)

    for name, linear in list(model.named_modules()):
        if isinstance(linear, torch.nn.Linear) and name != "lm_head":
            out_features, in_features = linear.weight.shape
            with torch.device("meta"):
                int8 = bnb.nn.Linear8bitLt(
                    in_features, out_features, bias=False, has_fp16_weights=False, threshold=6.0
                )
            codes, absmax, _ = bnb.functional.int8_vectorwise_quant(normal(linear.weight.shape).half())
            int8.weight = bnb.nn.Int8Params(codes, requires_grad=False, has_fp16_weights=False)
            int8.weight.CB, int8.weight.SCB = codes, absmax
            model.set_submodule(name, int8)
    model.lm_head.weight = torch.nn.Parameter(normal(model.lm_head.weight.shape), requires_grad=False)
    model.model.embed_tokens.weight = torch.nn.Parameter(
        normal(model.model.embed_tokens.weight.shape), requires_grad=False
    )
    for name, norm in model.named_modules():
        if type(norm).__name__ == "LlamaRMSNorm":
            weight = torch.ones(config.hidden_size, dtype=dtype, device=device)
            if name != "model.norm":
                weight[torch.randperm(config.hidden_size, generator=generator, device=device)[:6]] = 12.0
            norm.weight = torch.nn.Parameter(weight, requires_grad=False)
    with torch.device(device):
        model.model.rotary_emb = LlamaRotaryEmbedding(config)
    quantization = BitsAndBytesConfig(load_in_8bit=True)
    model.config.quantization_config = quantization
    model.hf_quantizer = AutoHfQuantizer.from_config(quantization)
    model.is_quantized = model.is_loaded_in_8bit = True
    model.quantization_method = quantization.quant_method
    return model


def build_rows(tokenizer: Any, count: int, seed: int = 0) -> list[dict[str, list[int]]]:
    """Rows with Alpaca-like lengths, their tokens those of the shipped rows, read in a circle.

    Prompt: 30 + exponential(17.6) tokens; completion: log-normal(4.31, 1.33), cut to [2, 560]. Mean 184,
    median 120, 95 % under 596; of 700 rows of Alpaca: 192, 153, 433. The loss is on the completion, as in
    notebook 06.
    """
    import numpy as np

    from llama_sft_helpers.data import to_prompt_completion

    lines = (ROOT / "llama_sft_helpers/datasets/alpaca_mini.jsonl").read_text(encoding="utf-8").splitlines()
    texts = [to_prompt_completion(json.loads(line)) for line in lines]
    flat = np.array(tokenizer("\n".join(t["prompt"] + t["completion"] for t in texts))["input_ids"][1:])
    random = np.random.default_rng(seed)
    rows, place = [], 0
    for _ in range(count):
        prompt = 30 + int(random.exponential(17.6))
        completion = int(np.clip(random.lognormal(4.31, 1.33), 2, 560))
        body = np.take(flat, range(place, place + prompt + completion - 2), mode="wrap").tolist()
        place += prompt + completion - 2
        ids = [tokenizer.bos_token_id, *body, tokenizer.eos_token_id]
        rows.append({"input_ids": ids, "labels": [-100] * prompt + ids[prompt:]})
    return rows


def measure_matmul(device: str) -> float:
    """Measured bf16 rate of an 8192 x 8192 x 8192 product on random data, in FLOP/s (median of 30)."""
    import torch

    size = 8192 if device == "cuda" else 256
    a, b = (torch.randn(size, size, dtype=torch.bfloat16, device=device) for _ in range(2))
    seconds = []
    for _ in range(35):
        if device == "cuda":
            torch.cuda.synchronize()
        started = time.perf_counter()
        a @ b
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    return 2 * size**3 / statistics.median(seconds[5:])


def run_rung(rung: Rung, args: argparse.Namespace) -> dict[str, Any]:  # noqa: PLR0915 - one recipe, in order
    import torch
    from datasets import Dataset
    from llama3_tokenizer import build_llama3_tokenizer
    from peft import LoraConfig, get_peft_model
    from transformers import TrainerCallback
    from trl import SFTConfig, SFTTrainer

    from llama_sft_helpers import speed

    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    device = "cpu" if args.tiny else "cuda"
    tokenizer = build_llama3_tokenizer()
    tokenizer.pad_token = "<|reserved_special_token_0|>"
    steps = args.steps
    need = steps * rung.rows * (rung.max_length // 160 if rung.packing else 1) + 64
    dataset = Dataset.from_list(build_rows(tokenizer, need))
    wait_for_turn(args.turn)
    if device == "cuda" and args.cap_gib:
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, args.cap_gib * 2**30 / total))
    started = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore" if args.tiny else "default")
        name = speed.register_varlen_attention()
    attention = name if rung.attn_implementation == "varlen" else "sdpa"
    torch.manual_seed(0)
    model = build_model(args.tiny, attention, device)
    built_seconds = time.perf_counter() - started
    torch.manual_seed(0)
    model = get_peft_model(
        model,
        LoraConfig(
            r=16, lora_alpha=16, lora_dropout=0, bias="none", task_type="CAUSAL_LM", target_modules=TARGETS
        ),
    )
    config = SFTConfig(
        output_dir="outputs/speed", max_steps=steps, per_device_train_batch_size=rung.rows,
        max_length=None if rung.padding_free else rung.max_length, packing=rung.packing,
        padding_free=rung.padding_free,
        gradient_checkpointing=rung.checkpointing, gradient_checkpointing_kwargs={"use_reentrant": False},
        learning_rate=args.learning_rate, lr_scheduler_type="constant", logging_steps=1, report_to="none",
        save_strategy="no", disable_tqdm=True, bf16=True, use_cpu=args.tiny, seed=0,
        logging_nan_inf_filter=not rung.quick_steps,
    )  # fmt: skip

    class QuickTrainer(speed.QuickSteps, SFTTrainer):
        """trl's trainer with fewer walks over all modules."""

    trainer_class = QuickTrainer if rung.quick_steps else SFTTrainer
    trainer = trainer_class(model=model, args=config, train_dataset=dataset, processing_class=tokenizer)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    if rung.fast_int8:
        speed.use_fast_int8(model)
    if rung.int8_units:
        ids = [token for row in dataset["input_ids"][:64] for token in row][:2048]
        calibration = {"input_ids": torch.tensor([ids], device=device)} if rung.outlier_columns else None
        speed.use_int8_units(model, calibration, rung.outlier_columns, rung.leave_out, rung.only_backward)
    if not rung.fuse_lora:
        from peft.tuners.lora.bnb import Linear8bitLt

        for module in model.modules():
            if isinstance(module, Linear8bitLt):
                vars(module).pop("forward", None)
    compiled = speed.compile_decoder_layers(model, rung.budget) if rung.compile_layers else None

    class Clock(TrainerCallback):
        times: list[float] = []  # noqa: RUF012
        losses: list[float] = []  # noqa: RUF012
        norms: list[float] = []  # noqa: RUF012

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            if not self.times:
                self.on_step_end()
            if args.profile and len(self.times) == WARM_STEPS + 2:
                profiler.start()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            if device == "cuda":
                torch.cuda.synchronize()
            self.times.append(time.perf_counter())
            if args.profile and len(self.times) == WARM_STEPS + 4:
                profiler.stop()

        def on_log(self, *_: Any, logs: Any = None, **__: Any) -> None:
            if "loss" in logs:
                self.losses.append(logs["loss"])
                self.norms.append(float(logs["grad_norm"]))

    collate, tokens = trainer.data_collator, []

    def count_and_collate(rows: list[dict[str, Any]]) -> Any:
        tokens.append(sum(len(row["input_ids"]) for row in rows))
        return collate(rows)

    trainer.data_collator = count_and_collate
    profiler: Any = torch.profiler.profile() if args.profile else None
    clock = Clock()
    trainer.add_callback(clock)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    result: dict[str, Any] = {
        "rung": rung.name,
        **{k: v for k, v in dataclasses.asdict(rung).items() if k != "name"},
    }
    try:
        trainer.train()
    except torch.OutOfMemoryError as error:
        return {**result, "error": f"out of memory: {str(error).splitlines()[0][:160]}"}
    step_seconds = [b - a for a, b in zip(clock.times, clock.times[1:], strict=False)]
    warm = min(WARM_STEPS, steps - 1)
    real_tokens = sum(tokens[warm:steps])
    timed = sum(step_seconds[warm:])
    per_second = real_tokens / timed
    steady = statistics.median(step_seconds[warm:])
    if args.profile:
        (Path(args.profile)).write_text(
            profiler.key_averages().table(sort_by="cuda_time_total", row_limit=60, max_name_column_width=90),
            encoding="utf-8",
        )
        with contextlib.suppress(OSError):
            profiler.export_chrome_trace(args.profile + ".trace.json")
    memory = torch.cuda if device == "cuda" else None
    return {
        **result,
        "tokens_per_second": round(per_second, 1),
        "median_step_seconds": round(steady, 4),
        "tokens_per_step": round(real_tokens / (steps - warm), 1),
        "peak_allocated_gib": round(memory.max_memory_allocated() / 2**30, 2) if memory else None,
        "peak_reserved_gib": round(memory.max_memory_reserved() / 2**30, 2) if memory else None,
        "compile_seconds": round(compiled.seconds, 1) if compiled else 0.0,
        "warm_up_seconds": round(sum(step_seconds[:warm]) - warm * steady, 1),
        "graphs": compiled.graphs if compiled else 0,
        "fallback": compiled.fallback if compiled else "",
        "build_seconds": round(built_seconds, 1),
        "step_seconds": [round(s, 4) for s in step_seconds],
        "losses": clock.losses,
        "grad_norms": [round(n, 4) for n in clock.norms],
    }


def wait_for_turn(turn: str) -> None:
    """Imports may overlap the rung before; the GPU is used by one process at a time."""
    while turn and not Path(turn).exists():
        time.sleep(0.05)


def compare_losses(rungs: list[dict[str, Any]]) -> None:
    """Add to each rung the largest relative difference of loss from the rung with the same data."""
    losses = {rung["rung"]: rung["losses"] for rung in rungs if "losses" in rung}
    for rung in rungs:
        reference = losses.get(rung["same_data_as"])
        if "losses" in rung and reference:
            pairs = list(zip(rung["losses"], reference, strict=False))
            rung["compared_steps"] = len(pairs)
            rung["largest_loss_difference"] = round(max(abs(a - b) / b for a, b in pairs), 5)


def run_all(args: argparse.Namespace, rungs: list[Rung]) -> list[dict[str, Any]]:
    scratch = Path(args.out).parent / "scratch"
    scratch.mkdir(parents=True, exist_ok=True)
    jobs = []
    for number, rung in enumerate(rungs):
        paths = scratch / f"{number}.json", scratch / f"{number}.turn", scratch / f"{number}.log"
        for path in paths:
            path.unlink(missing_ok=True)
        jobs.append((rung, *paths))

    def start(number: int) -> subprocess.Popen[bytes]:
        rung, result, turn, log = jobs[number]
        command = [
            sys.executable,
            __file__,
            "--rung",
            json.dumps(dataclasses.asdict(rung)),
            "--out",
            str(result),
        ]
        command += ["--turn", str(turn), "--steps", str(args.steps), "--cap-gib", str(args.cap_gib)]
        command += ["--learning-rate", str(args.learning_rate)]
        command += ["--tiny"] if args.tiny else []
        command += ["--profile", f"{args.profile}-{number}.txt"] if args.profile else []
        return subprocess.Popen(command, stdout=log.open("wb"), stderr=subprocess.STDOUT)

    results = []
    running = [start(0)]
    for number, (rung, result, turn, log) in enumerate(jobs):
        if number + 1 < len(jobs):
            running.append(start(number + 1))
        turn.touch()
        running[number].wait()
        if result.exists():
            results.append(json.loads(result.read_text(encoding="utf-8")))
        else:
            error = log.read_text(encoding="utf-8")[-1500:]
            results.append({"rung": rung.name, **dataclasses.asdict(rung), "error": error})
        show = {
            k: results[-1].get(k)
            for k in ("tokens_per_second", "peak_reserved_gib", "warm_up_seconds", "error")
        }
        print(rung.name, {k: v for k, v in show.items() if v is not None}, flush=True)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", required=True, help="JSON file to write")
    parser.add_argument("--cap-gib", type=float, default=0.0, help="memory the process may use; 0 for all")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--learning-rate", type=float, default=2e-4)
    parser.add_argument("--rungs", default="", help="names separated by ';'; all if left out")
    parser.add_argument("--tiny", action="store_true", help="a tiny model on the CPU, to try the script")
    parser.add_argument("--profile", default="", help="write a profile of two steps under this name")
    parser.add_argument("--rung", default="", help=argparse.SUPPRESS)
    parser.add_argument("--turn", default="", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.rung:
        result = run_rung(Rung(**json.loads(args.rung)), args)
        Path(args.out).write_text(json.dumps(result), encoding="utf-8")
        return
    import torch

    wanted = [name.strip() for name in args.rungs.split(";") if name.strip()]
    unknown = sorted(set(wanted) - {rung.name for rung in RUNGS})
    if unknown:
        parser.error(f"no rung {unknown}; there are {[rung.name for rung in RUNGS]}")
    rungs = [rung for rung in RUNGS if rung.name in wanted or not (wanted or rung.extra)]
    device = "cpu" if args.tiny else "cuda"
    rate = measure_matmul(device)
    if device == "cuda":
        torch.cuda.empty_cache()
    results = run_all(args, rungs)
    compare_losses(results)
    finished = [rung for rung in results if "tokens_per_second" in rung]
    peak = next((PEAKS[word] for word in re.split("[ -]", card()) if word in PEAKS), None)
    for rung in finished:
        rung["share_of_ceiling"] = round(rung["tokens_per_second"] * FLOP_PER_TOKEN / rate, 4)
        rung["mfu"] = round(rung["tokens_per_second"] * FLOP_PER_TOKEN / peak, 4) if peak else None
    uncompiled = [rung for rung in finished if not rung["compile_layers"]]
    best = max(uncompiled, key=lambda rung: rung["tokens_per_second"], default={"rung": None})
    about = source(card() if device == "cuda" else "CPU", ("triton", *LIBRARIES))
    about["command"] = about["command"].replace(args.out, f"benchmarks/results/{Path(args.out).name}")
    report = {
        **about,
        "cap_gib": args.cap_gib or None,
        "allocator": os.environ["PYTORCH_CUDA_ALLOC_CONF"],
        "matmul_flop_per_second": rate,
        "flop_per_token": FLOP_PER_TOKEN,
        "ceiling_tokens_per_second": round(rate / FLOP_PER_TOKEN),
        "peak_flop_per_second": peak,
        "best_uncompiled": best["rung"],
        "rungs": results,
    }
    write(args.out, report)
    ceiling = report["ceiling_tokens_per_second"]
    print(f"bf16 ceiling: {ceiling} tokens/s at {rate / 1e12:.0f} TFLOP/s, {report['card']}")
    for rung in results:
        if "error" in rung:
            print(f"{rung['rung']:>16}  {rung['error']}")
            continue
        print(
            f"{rung['rung']:>16}  {rung['tokens_per_second']:>9.1f} tok/s, "
            f"{rung['share_of_ceiling']:.1%} of the bf16 ceiling, MFU {rung['mfu']}, "
            f"{rung['peak_reserved_gib']} GiB reserved, "
            f"{rung['compile_seconds']} s compile, {rung['graphs']} graphs, "
            f"loss {rung['losses'][0]:.3f} -> {rung['losses'][-1]:.3f}, "
            f"off by {rung.get('largest_loss_difference')}"
        )


if __name__ == "__main__":
    main()
