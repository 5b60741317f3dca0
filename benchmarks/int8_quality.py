"""What int8 inputs cost in quality: held-out losses and LoRA gradients of a real model, by variant.

    python benchmarks/int8_quality.py --model FOLDER --minutes 4.5 --at-a-time 8 --out X.json
    python benchmarks/int8_quality.py --tiny --out X.json

Each run trains a LoRA on the package's rows as notebook 06 does (int8 base, seven linears, loss on
completions, rate falling in a straight line to 0), and differs from the reference, ``use_fast_int8``, in the
frozen layers' product alone: same rows, same order, same start. Held-out losses are measured with the product
trained with, and with the 16-bit one. Variants marked ``fake`` round in float32 what an int8 kernel would.
``16-bit product, LoRA apart`` computes the reference's numbers in another order: how far it strays is chance.

One more job trains the reference for a few steps, and compares each variant's gradients there with those of
the 16-bit and of a float32 product, for batches of several sizes: rounding errors of many tokens cancel out
in part, so a large batch's gradient is closer than a small one's.

Jobs wait in order of importance for one of ``--at-a-time`` processes, and the JSON is written after each:
what the minutes do not allow is left out, and ``--add`` goes on.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import functools
import itertools
import json
import logging
import math
import multiprocessing
import os
import random
import statistics
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

import torch  # noqa: E402
from report import card, source, write  # noqa: E402

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
REFERENCE, TRUTH = "16-bit product", "float32 product"
# options of use_int8_units, or of Fake; the first have all seeds before the others have one
MAIN: dict[str, dict[str, Any]] = {
    REFERENCE: {},
    "int8 forward and dX": {"int8_backward": True},
    "int8 forward": {"int8_backward": False},
    "16 outlier columns": {"outlier_columns": 16},
    "without down_proj": {"leave_out": ["down_proj"]},
}
OTHERS: dict[str, dict[str, Any]] = {
    "16-bit product, LoRA apart": {},
    "tiles of 128 (fake)": {"tile": 128},
    "Hadamard (fake)": {"tile": None},
    "16 outlier columns, without down_proj": {"outlier_columns": 16, "leave_out": ["down_proj"]},
    "16 outlier columns, down_proj only backward": {"outlier_columns": 16, "only_backward": ["down_proj"]},
    "64 outlier columns, down_proj only backward": {"outlier_columns": 64, "only_backward": ["down_proj"]},
    "LLM.int8 of bitsandbytes": {},
}
VARIANTS = MAIN | OTHERS
TINY = {
    "model": "local:tiny-llama",
    "steps": [2, 4],
    "seeds": 2,
    "eval_rows": 8,
    "warm_steps": 3,
    "gradient_rows": [2, 4],
}


# --- the variants ---


def round_rows(x: torch.Tensor, tile: int | None = None) -> torch.Tensor:
    """Float32 values on the int8 grid of each row, or of each tile of a row."""
    width = tile or x.shape[-1]
    tiles = torch.nn.functional.pad(x, (0, -x.shape[-1] % width)).unflatten(-1, (-1, width))
    scale = (tiles.abs().amax(-1, keepdim=True) / 127).clamp(min=1e-30)
    return ((tiles / scale).round() * scale).flatten(-2)[..., : x.shape[-1]]


@functools.cache
def hadamard(size: int, device: torch.device) -> torch.Tensor:
    matrix = torch.ones(1, 1, device=device)
    while len(matrix) < size:
        matrix = torch.kron(matrix, torch.tensor([[1.0, 1.0], [1.0, -1.0]], device=device))
    return matrix / math.sqrt(size)


def rotate(x: torch.Tensor) -> torch.Tensor:
    """Blocks of each row, as long as the greatest power of 2 up to 256 that divides it, times Hadamard's."""
    block = math.gcd(x.shape[-1], 256)
    return (x.unflatten(-1, (-1, block)) @ hadamard(block, x.device)).flatten(-2)


class FakeProduct(torch.autograd.Function):
    """``x @ weight.T`` and its input's gradient with both factors rounded: tiles of rows, or rotated rows."""

    @staticmethod
    def forward(ctx: Any, x: Any, codes: Any, absmax: Any, tile: int | None) -> Any:
        """Without a ``tile`` both factors are rotated first, so the weight is rounded once more."""
        ctx.save_for_backward(codes, absmax)
        ctx.tile = tile
        weight, rows = codes * (absmax.float() / 127)[:, None], x.float()
        if tile is None:
            return (round_rows(rotate(rows)) @ round_rows(rotate(weight)).t()).to(x.dtype)
        return (round_rows(rows, tile) @ weight.t()).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        """The gradient of ``x``, in its type."""
        (grad,), (codes, absmax) = grads, ctx.saved_tensors
        scales, rows = absmax.float() / 127, grad.float()
        if ctx.tile is None:
            columns = round_rows(rotate((codes * scales[:, None]).t().contiguous()))
            grad_x = round_rows(rotate(rows)) @ columns.t()
        else:
            grad_x = round_rows(rows * scales, ctx.tile) @ codes.float()
        return grad_x.to(grad.dtype), None, None, None


class Fake(torch.nn.Module):
    """Takes the place of ``Int8Units``: the base's product as ``FakeProduct``, LoRA's in 16 bits."""

    def __init__(self, tile: int | None) -> None:
        super().__init__()
        self.tile = tile

    def forward(  # noqa: PLR0917 - called as Int8Units is
        self, x: Any, codes: Any, absmax: Any, a: Any, b: Any, scaling: float
    ) -> torch.Tensor:
        """The layer's output, in the type of autocast."""
        from llama_sft_helpers.speed.int8_product import in_autocast

        x = in_autocast(x)
        with torch.autocast(x.device.type, enabled=False):  # it would round float32 factors to 16 bits
            out: torch.Tensor = FakeProduct.apply(x, codes, absmax, self.tile)
        return out + (x @ a.to(x.dtype).t()) @ (b * scaling).to(x.dtype).t()


def switch_on(model: Any, variant: str, calibration: dict[str, torch.Tensor]) -> None:
    from peft.tuners.lora.bnb import Linear8bitLt

    from llama_sft_helpers.speed import use_fast_int8, use_int8_units
    from llama_sft_helpers.speed.int8_product import frozen_linears

    options = VARIANTS.get(variant, {})
    use_int8_units(model, enabled=False)
    if variant.startswith("LLM.int8"):
        use_fast_int8(model, enabled=False)
    elif variant.endswith("LoRA apart"):
        for module in model.modules():
            if isinstance(module, Linear8bitLt):
                vars(module).pop("forward", None)
    elif "tile" in options:
        for linear in frozen_linears(model).values():
            linear.int8_units = Fake(**options)
    elif options:
        use_int8_units(model, calibration if "outlier_columns" in options else None, **options)


@contextlib.contextmanager
def in_16_bits(model: Any, variant: str) -> Iterator[None]:
    """The 16-bit product for a moment; outlier columns are not chosen again."""
    kept = {module: module.int8_units for module in model.modules() if hasattr(module, "int8_units")}
    switch_on(model, REFERENCE, {})
    yield
    if not kept:
        switch_on(model, variant, {})
    for module, units in kept.items():
        module.int8_units = units


# --- training ---


@functools.cache
def base_model(folder: str, dtype: torch.dtype, device: str) -> Any:
    """The int8 base, frozen, loaded once in each process."""
    from padding_and_int8 import load

    return load(folder, dtype, device)


@functools.cache
def rows_of(folder: str, max_length: int, eval_rows: int) -> tuple[list[Any], list[Any], int]:
    """Training rows, held-out rows and the pad token."""
    from padding_and_int8 import read_rows

    rows, pad = read_rows(folder, sys.maxsize, max_length)
    random.Random(42).shuffle(rows)  # the same held-out rows in every run
    return rows[eval_rows:], sorted(rows[:eval_rows], key=lambda row: len(row["input_ids"])), pad


def collate(rows: list[Any], pad: int, device: str) -> dict[str, torch.Tensor]:
    """Rows filled up on the right, where causal attention lets no real token see them."""
    longest = max(len(row["input_ids"]) for row in rows)
    batch = {}
    for key, filler in (("input_ids", pad), ("labels", -100)):
        filled = [row[key] + [filler] * (longest - len(row[key])) for row in rows]
        batch[key] = torch.tensor(filled).to(device, non_blocking=True)
    return batch


@contextlib.contextmanager
def adapted(args: argparse.Namespace, dtype: torch.dtype, seed: int) -> Iterator[Any]:
    """The base with a new adapter, which is gone afterwards."""
    from peft import LoraConfig, get_peft_model
    from transformers import set_seed

    from llama_sft_helpers.speed import use_fast_int8

    set_seed(seed)
    lora = LoraConfig(
        r=16, lora_alpha=16, lora_dropout=0, bias="none", task_type="CAUSAL_LM", target_modules=TARGETS
    )
    model = get_peft_model(base_model(args.model, dtype, args.device), lora).train()
    for parameter in trained(model):
        parameter.data = parameter.data.float()
    use_fast_int8(model)
    try:
        yield model
    finally:
        switch_on(model, REFERENCE, {})
        use_fast_int8(model.unload(), enabled=False)


def trained(model: Any) -> list[Any]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def autocast(args: argparse.Namespace) -> Any:
    return torch.autocast(args.device, torch.bfloat16, enabled=args.device == "cuda")


def calibration(args: argparse.Namespace) -> dict[str, torch.Tensor]:
    """Eight training rows, one after the other: without padding, which would choose columns too."""
    rows, _, _ = rows_of(args.model, args.max_length, args.eval_rows)
    ids = list(itertools.chain.from_iterable(row["input_ids"] for row in rows[:8]))
    return {"input_ids": torch.tensor([ids], device=args.device)}


def batches(args: argparse.Namespace, seed: int) -> Iterator[dict[str, torch.Tensor]]:
    rows, _, pad = rows_of(args.model, args.max_length, args.eval_rows)
    order = random.Random(seed)
    while True:
        shuffled = order.sample(rows, len(rows))
        for start in range(0, len(rows) - args.rows_per_update + 1, args.rows_per_update):
            yield collate(shuffled[start : start + args.rows_per_update], pad, args.device)


def held_out_loss(args: argparse.Namespace, model: Any) -> float:
    """Mean over the completions' tokens of the held-out rows, in nats."""
    _, rows, pad = rows_of(args.model, args.max_length, args.eval_rows)
    total, count = torch.zeros((), device=args.device), 0
    model.eval()
    with torch.no_grad(), autocast(args):
        for start in range(0, len(rows), 16):
            batch = collate(rows[start : start + 16], pad, args.device)
            logits = model(input_ids=batch["input_ids"], use_cache=False).logits[:, :-1].flatten(0, 1)
            labels = batch["labels"][:, 1:].flatten()
            total += torch.nn.functional.cross_entropy(logits.float(), labels, reduction="sum")
            count += sum(label != -100 for row in rows[start : start + 16] for label in row["labels"][1:])
    model.train()
    return total.item() / count


def steps_of(args: argparse.Namespace, model: Any, seed: int, count: int) -> Iterator[torch.Tensor]:
    """Train step by step and give each loss; the rate falls to 0 at the last of all steps."""
    weights, total = trained(model), args.steps[-1]
    optimizer = torch.optim.AdamW(weights, args.learning_rate, weight_decay=0.0, fused=args.device == "cuda")
    for step, batch in zip(range(count), batches(args, seed), strict=False):
        optimizer.param_groups[0]["lr"] = args.learning_rate * (1 - step / total)
        with autocast(args):
            loss = model(**batch, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        yield loss.detach()


def train(args: argparse.Namespace, variant: str, seed: int, deadline: float) -> dict[str, Any] | None:
    """One run's held-out losses; those it had when the deadline (of ``time.time``) came, or None."""
    prepare(args)
    row: dict[str, Any] = {"variant": variant, "seed": seed, "steps": [], "held_out_loss": []}
    row |= {"held_out_loss_16_bit": [], "training_loss": []}
    if time.time() > deadline:
        return None
    started = time.monotonic()
    with adapted(args, args.dtype, seed) as model:
        switch_on(model, variant, calibration(args))
        losses: list[torch.Tensor] = []
        for step, loss in enumerate(steps_of(args, model, seed, args.steps[-1]), 1):
            losses.append(loss)
            if step in args.steps:
                row["steps"].append(step)
                row["held_out_loss"].append(held_out_loss(args, model))
                with in_16_bits(model, variant):
                    row["held_out_loss_16_bit"].append(held_out_loss(args, model))
                row["training_loss"].append(torch.stack(losses[-50:]).mean().item())
            if time.time() > deadline or step == args.stop_after:
                break
    row["seconds"] = round(time.monotonic() - started, 1)
    return row if row["steps"] else None


def prepare(args: argparse.Namespace) -> None:
    import transformers

    warnings.simplefilter("ignore")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    transformers.utils.logging.disable_progress_bar()
    if args.device == "cuda":
        torch.set_num_threads(1)


# --- gradients at one set of weights ---


def gradients(args: argparse.Namespace) -> list[dict[str, Any]]:
    """For each size of batch, every variant's LoRA gradients against those of the two products."""
    prepare(args)
    rows, _, pad = rows_of(args.model, args.max_length, args.eval_rows)
    batches = [collate(rows[-count:], pad, args.device) for count in args.gradient_rows]
    found: list[dict[str, Any]] = [{} for _ in batches]
    with adapted(args, args.dtype, 0) as model:
        for _ in steps_of(args, model, 0, args.warm_steps):
            pass
        weights = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
        for variant in VARIANTS:
            switch_on(model, variant, calibration(args))
            for one, batch in zip(found, batches, strict=True):
                one[variant] = measure(model, batch, autocast(args))
    with adapted(args, torch.float32, 0) as model:
        model.load_state_dict(weights, strict=False)
        for one, batch in zip(found, batches, strict=True):
            one[TRUTH] = measure(model, batch, contextlib.nullcontext())
    return [
        {
            "rows": len(batch["labels"]),
            "scored_tokens": int((batch["labels"] != -100).sum()),
            "steps_before": args.warm_steps,
            **{f"against the {name}": {v: compare(one[v], one[name]) for v in VARIANTS if v != name}
               for name in (REFERENCE, TRUTH)},
        }
        for one, batch in zip(found, batches, strict=True)
    ]  # fmt: skip


def measure(model: Any, batch: dict[str, torch.Tensor], context: Any) -> dict[str, torch.Tensor]:
    """Gradients by the parameter's name, and the hidden states of scored tokens after each layer."""
    scored, hidden = int((batch["labels"][:, 1:] != -100).sum()), []
    for ids, labels in zip(batch["input_ids"].split(16), batch["labels"].split(16), strict=True):
        with context:
            out = model(
                input_ids=ids,
                labels=labels,
                num_items_in_batch=scored,
                use_cache=False,
                output_hidden_states=True,
            )
        out.loss.backward()  # the parts' gradients add up to the batch's
        hidden.append(torch.stack([states.detach()[labels != -100].float() for states in out.hidden_states]))
    found = {name: p.grad.double().flatten() for name, p in model.named_parameters() if p.requires_grad}
    model.zero_grad(set_to_none=True)
    return found | {"hidden": torch.cat(hidden, 1)}


def compare(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Cosines and ratios of norms, by kind of module and by layer, and how far hidden states moved."""
    rows = []
    layers: dict[int, list[str]] = {}
    for name in theirs.keys() - {"hidden"}:
        cosine, ratio = alike([ours[name]], [theirs[name]])
        _, _, path = name.partition(".layers.")
        layer, _, module, factor, *_ = path.split(".")
        rows.append((cosine, ratio, int(layer), module, factor.removeprefix("lora_")))
        layers.setdefault(int(layer), []).append(name)
    worst = min(rows)
    error = (ours["hidden"] - theirs["hidden"]).norm(dim=-1) / theirs["hidden"].norm(dim=-1)

    def least(keys: list[str], place: int) -> dict[str, float]:
        return {key: round(min(row[0] for row in rows if row[place] == key), 5) for key in keys}

    def of(names: list[str]) -> tuple[float, float]:
        return alike([ours[name] for name in names], [theirs[name] for name in names])

    cosine, ratio = of(list(itertools.chain.from_iterable(layers.values())))
    return {
        "cosine": cosine,
        "norm_ratio": ratio,
        "median_cosine": statistics.median(row[0] for row in rows),
        "least_cosine": {"cosine": worst[0], "layer": worst[2], "module": worst[3], "factor": worst[4]},
        "norm_ratios": [min(row[1] for row in rows), max(row[1] for row in rows)],
        "least_cosine_by_module": least(TARGETS, 3),
        "least_cosine_by_factor": least(["A", "B"], 4),
        "cosine_by_layer": [round(of(names)[0], 5) for _, names in sorted(layers.items())],
        "hidden_error_by_layer": [round(value, 5) for value in error.median(1).values.tolist()],
    }


def alike(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> tuple[float, float]:
    """Cosine and ratio of norms of two gradients, each given in parts."""
    x, y = torch.cat(ours), torch.cat(theirs)
    return (torch.dot(x, y) / (x.norm() * y.norm())).item(), (x.norm() / y.norm()).item()


# --- all jobs ---


def plan(args: argparse.Namespace) -> list[tuple[str, int]]:
    wanted = [name for name in VARIANTS if name in args.variants]
    groups = ([n for n in wanted if n in MAIN], [n for n in wanted if n not in MAIN])
    return [(name, seed) for names in groups for seed in range(args.seeds) for name in names]


def summarize(report: dict[str, Any]) -> dict[str, Any]:
    """Each variant's difference from the reference, in percent of its loss: mean and error over the seeds."""
    runs = {(run["variant"], run["seed"]): run for run in report["runs"]}
    summary: dict[str, Any] = {}
    places = list(enumerate(report["settings"]["steps"]))
    for variant, (at, step), kind in itertools.product(VARIANTS, places, ("", "_16_bit")):
        seeds = [s for v, s in runs if v == variant != REFERENCE and (REFERENCE, s) in runs]
        pairs = [[runs[v, s]["held_out_loss" + kind] for v in (variant, REFERENCE)] for s in seeds]
        apart = [
            100 * (ours[at] / theirs[at] - 1) for ours, theirs in pairs if at < min(map(len, (ours, theirs)))
        ]
        if apart:
            error = statistics.stdev(apart) / math.sqrt(len(apart)) if len(apart) > 1 else None
            found = {"percent": statistics.mean(apart), "standard_error": error, "seeds": len(apart)}
            summary.setdefault(variant, {})[f"step {step}{kind}"] = found
    return summary


def save(args: argparse.Namespace, report: dict[str, Any]) -> None:
    report["summary"] = summarize(report)
    write(args.out, report)


def describe(args: argparse.Namespace) -> dict[str, Any]:
    """The report without runs; with ``--add`` what the file holds."""
    if args.add and args.out.is_file():
        earlier: dict[str, Any] = json.loads(args.out.read_text(encoding="utf-8"))
        settings = earlier["settings"] | {"gradient_rows": args.gradient_rows}
        added = [
            *earlier.get("added", []),
            source(card())["command"].replace(args.given or "FOLDER", "FOLDER"),
        ]
        return earlier | {"variants": VARIANTS, "settings": settings, "added": added}
    about = source(card())
    about["command"] = about["command"].replace(args.given or "FOLDER", "FOLDER")
    about["command"] = about["command"].replace(str(args.out), f"benchmarks/results/{args.out.name}")
    kept = ("steps", "learning_rate", "rows_per_update", "max_length", "eval_rows", "gradient_rows")
    settings = {key: getattr(args, key) for key in kept} | {"dtype": str(args.dtype).removeprefix("torch.")}
    return {**about, "model": Path(args.model).name, "minutes": 0.0, "at_a_time": args.at_a_time,
            "settings": settings, "variants": VARIANTS, "gradients": [], "runs": []}  # fmt: skip


def run_all(args: argparse.Namespace, report: dict[str, Any]) -> int:
    """Do what is missing, several jobs at a time; the number of jobs that failed or found no time."""
    started, earlier = time.time(), report["minutes"]
    deadline = started + 60 * args.minutes
    asked = [step for step in args.steps if not args.stop_after or step <= args.stop_after]
    done = {(r["variant"], r["seed"]) for r in report["runs"] if r["steps"][: len(asked)] == asked}
    jobs = [job for job in plan(args) if job not in done]
    compared = report["gradients"]
    sizes = [one["rows"] for one in compared]
    incomplete = sizes != args.gradient_rows or any(
        VARIANTS.keys() - one[f"against the {TRUTH}"] for one in compared
    )
    missing = len(jobs) + incomplete
    # CUDA cannot be used in a forked process
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(args.at_a_time, context) as pool:
        waiting: dict[Any, Any] = {}
        if incomplete:
            waiting[pool.submit(gradients, args)] = "gradients"
        waiting |= {pool.submit(train, args, *job, deadline): job for job in jobs}
        for future in concurrent.futures.as_completed(waiting):
            if error := future.exception():
                print(waiting[future], repr(error), flush=True)
                continue
            found = future.result()
            if waiting[future] == "gradients":
                report["gradients"] = found
            elif found:
                others = [run for run in report["runs"] if (run["variant"], run["seed"]) != waiting[future]]
                report["runs"] = [*others, found]
            missing -= waiting[future] == "gradients" or bool(found and found["steps"] == asked)
            report["minutes"] = round(earlier + (time.time() - started) / 60, 1)
            save(args, report)
            print(waiting[future], json.dumps(found)[:300], flush=True)
    return missing


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="", help="folder of SmolLM2-135M-Instruct; built if left out")
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--add", action="store_true", help="keep --out's runs and do the missing ones")
    parser.add_argument("--minutes", type=float, default=60.0, help="no step begins after these")
    parser.add_argument("--at-a-time", type=int, default=1, help="runs side by side, a process each")
    parser.add_argument("--tiny", action="store_true", help="a few steps of the tests' tiny Llama on the CPU")
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS))
    parser.add_argument("--steps", type=int, nargs="+", default=[60, 300], help="held-out loss after these")
    parser.add_argument("--stop-after", type=int, default=0, help="cut each run after so many steps")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--learning-rate", type=float, default=5e-4)
    parser.add_argument("--rows-per-update", type=int, default=4)
    parser.add_argument("--max-length", type=int, default=256, help="rows with more tokens are left out")
    parser.add_argument("--eval-rows", type=int, default=48)
    parser.add_argument("--warm-steps", type=int, default=20, help="before gradients are compared")
    parser.add_argument("--gradient-rows", type=int, nargs="+", default=[4, 16, 128], help="sizes of batches")
    args = parser.parse_args()
    if args.tiny:
        vars(args).update(TINY)
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before torch looks
    return args


def main() -> int:
    from llama_sft_helpers.demo_model import ensure_model

    args = parse()
    args.given = args.model
    args.device = "cuda" if torch.cuda.is_available() else "cpu"
    args.dtype = torch.bfloat16 if args.device == "cuda" else torch.float32
    model = args.model or "local:smollm2-135m-instruct"
    args.model = str(ensure_model(model.removeprefix("local:"))) if model.startswith("local:") else model
    report = describe(args)
    missing = run_all(args, report)
    print(json.dumps(report.get("summary"), indent=1))
    print(f"{len(report['runs'])} runs in {args.out}; {missing} jobs are missing (--add does those)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
