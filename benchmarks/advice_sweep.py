"""Learning rate, rank and epochs by size of data: the runs behind notebook 09's advice.

    python benchmarks/advice_sweep.py --model FOLDER --minutes 4 --at-a-time 6 --out X.json
    python benchmarks/advice_sweep.py --tiny --out X.json

Each run trains an adapter as 06 does (8-bit base, seven linears, LoRA's alpha equal to its rank, rate
falling in a straight line to 0) on some of the rows that the package ships, and measures the held-out loss
after every epoch. The held-out rows are the same in all runs; the seed picks the rows, their order and A's
start. The rate falls over all ``--epochs``, so a point of the curve is what this run had by then, as 09's
best checkpoint is, and not what a run of so few epochs would end with. The main rank comes first, and the
JSON is written after each run: what the minutes do not allow is left out, and ``--add`` goes on from there.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import functools
import itertools
import json
import logging
import multiprocessing
import os
import platform
import shlex
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]
from report import card, source  # noqa: E402

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
TINY = {"model": "local:tiny-llama", "sizes": [8, 16], "rates": [5e-3], "ranks": [4, 8],
        "epochs": 2, "eval_rows": 8}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Run:
    """One training; 0 rows are all that are not held out."""

    rows: int
    learning_rate: float
    rank: int
    seed: int


@dataclasses.dataclass(frozen=True)
class Settings:
    """What all runs share."""

    model: str
    prompt_format: str
    max_length: int
    eval_rows: int
    rows_per_update: int
    epochs: int
    fast_int8: bool
    dtype: str


def plan(args: argparse.Namespace) -> list[Run]:
    """The main rank from each seed, then the other ranks from the first; large sets first."""
    sizes = sorted(args.sizes, key=lambda size: size or 1e9, reverse=True)
    main, *others = args.ranks
    ranks = [(main, seed) for seed in range(args.seeds)] + [(rank, 0) for rank in others]
    return [Run(n, rate, r, seed) for (r, seed), n, rate in itertools.product(ranks, sizes, args.rates)]


def share(args: argparse.Namespace) -> Settings:
    """The settings of all runs: those of this machine's profile that 06 would take, and the options."""
    from llama_sft_helpers.profiles import read_profile

    profile = read_profile("colab-a100" if args.on_gpu else "cpu-demo")
    return Settings(
        str(args.model), args.prompt_format, args.max_length, args.eval_rows, args.rows_per_update,
        args.epochs, profile.fast_int8, profile.dtype,
    )  # fmt: skip


@functools.cache
def tokenizer_and_rows(settings: Settings) -> tuple[Any, Any]:
    """The tokenizer, and the shipped rows that fit, split: ``test`` is the same for every run."""
    from transformers import AutoTokenizer

    from llama_sft_helpers import data
    from llama_sft_helpers.profiles import load_profile

    tokenizer = AutoTokenizer.from_pretrained(settings.model)
    rows, _ = data.load_rows(load_profile("ci-tiny", model_id=settings.model).dataset_id)
    report = data.summarize_rows(rows, tokenizer, settings.max_length, settings.prompt_format)
    usable = rows.select(report.attrs["usable"])
    usable = data.format_rows(usable, tokenizer, settings.prompt_format)
    return tokenizer, usable.train_test_split(test_size=settings.eval_rows, seed=42)


def load_model(settings: Settings, run: Run) -> Any:
    """The 8-bit base with a new adapter, as 06 has it."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig, set_seed

    from llama_sft_helpers.profiles import device_map

    set_seed(run.seed)
    base = AutoModelForCausalLM.from_pretrained(
        settings.model,
        quantization_config=BitsAndBytesConfig(load_in_8bit=True),
        device_map=device_map(),
        dtype=getattr(torch, settings.dtype),
    )
    lora = LoraConfig(
        r=run.rank, lora_alpha=run.rank, lora_dropout=0, bias="none", task_type="CAUSAL_LM",
        target_modules=TARGETS,
    )  # fmt: skip
    return get_peft_model(base, lora)


def training_arguments(settings: Settings, run: Run, folder: str) -> Any:
    """06's arguments for one run: both losses once an epoch, and no checkpoints."""
    import torch
    from trl import SFTConfig

    return SFTConfig(
        output_dir=folder,
        max_length=settings.max_length,
        per_device_train_batch_size=settings.rows_per_update,
        per_device_eval_batch_size=settings.rows_per_update,
        num_train_epochs=settings.epochs,
        learning_rate=run.learning_rate,
        lr_scheduler_type="linear",
        bf16=settings.dtype == "bfloat16",
        gradient_checkpointing=False,
        eval_strategy="epoch",
        logging_strategy="epoch",
        save_strategy="no",
        seed=run.seed,
        dataloader_pin_memory=torch.cuda.is_available(),
        report_to="none",
        disable_tqdm=True,
    )


def build_trainer(settings: Settings, run: Run, folder: str) -> Any:
    """06's trainer for one run."""
    from trl import SFTTrainer

    from llama_sft_helpers.speed import use_fast_int8

    tokenizer, split = tokenizer_and_rows(settings)
    rows = split["train"].shuffle(seed=run.seed)
    rows = rows.select(range(min(run.rows or len(rows), len(rows))))
    model, args = load_model(settings, run), training_arguments(settings, run, folder)
    trainer = SFTTrainer(
        model, args, train_dataset=rows, eval_dataset=split["test"], processing_class=tokenizer
    )
    for parameter in (weight for weight in model.parameters() if weight.requires_grad):
        parameter.data = parameter.data.float()  # trl rounds the adapter to bfloat16, see 06
    if settings.fast_int8:
        use_fast_int8(model)
    return trainer


def train(settings: Settings, run: Run, deadline: float) -> dict[str, Any] | None:
    """One run's curve; None if the deadline (of ``time.time``) came before its end."""
    import datasets
    import transformers
    from transformers import PrinterCallback, TrainerCallback

    class StopInTime(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            control.should_training_stop |= time.time() > deadline

    if time.time() > deadline:
        return None
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        trainer = build_trainer(settings, run, folder)
        trainer.remove_callback(PrinterCallback)
        before = trainer.evaluate()["eval_loss"]
        trainer.add_callback(StopInTime())
        trainer.train()
    if trainer.state.global_step < trainer.state.max_steps:
        return None
    history = trainer.state.log_history
    return {
        **dataclasses.asdict(run),
        "rows": len(trainer.train_dataset),
        "all_rows": not run.rows,
        "updates": trainer.state.global_step,
        "loss_before": before,
        "held_out_loss": [entry["eval_loss"] for entry in history if "eval_loss" in entry],
        "training_loss": [entry["loss"] for entry in history if "loss" in entry],
        "seconds": round(time.monotonic() - started, 1),
    }


def run_of(row: dict[str, Any]) -> Run:
    """The run that a row of the JSON came from."""
    return Run(0 if row["all_rows"] else row["rows"], row["learning_rate"], row["rank"], row["seed"])


def describe(args: argparse.Namespace, settings: Settings) -> dict[str, Any]:
    """The report without runs, or, with ``--add``, what the file holds of the same settings."""
    shared = dataclasses.asdict(settings) | {"model": Path(settings.model).name}
    places = {settings.model: "FOLDER", str(args.out): args.out.name}  # not where they lie on this machine
    words = [places.get(word, word) for word in sys.argv[1:]]
    report = {
        **source(card()),
        "python": platform.python_version(),
        "command": shlex.join(["python", "benchmarks/advice_sweep.py", *words]),
        "minutes": 0.0,
        "runs_at_a_time": args.at_a_time,
        "settings": shared,
        "runs": [],
    }
    if args.add and args.out.is_file():
        earlier = json.loads(args.out.read_text(encoding="utf-8"))
        for key in ("card", "settings"):
            if earlier[key] != report[key]:
                sys.exit(
                    f"{args.out} has the {key} {earlier[key]}, this is {report[key]}: take another --out"
                )
        report |= {"minutes": earlier["minutes"], "runs": earlier["runs"]}
    return report


def save(path: Path, report: dict[str, Any]) -> None:
    """Write beside the place, then move there: a cut sweep leaves a whole file."""
    report["runs"].sort(key=lambda row: (row["rows"], row["rank"], row["learning_rate"], row["seed"]))
    part = path.with_suffix(".part")
    part.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    os.replace(part, path)


def sweep(args: argparse.Namespace, settings: Settings, report: dict[str, Any]) -> int:
    """Train what is missing, several at a time; the number of runs that failed or found no time."""
    started, earlier_minutes = time.time(), report["minutes"]
    done = {run_of(row) for row in report["runs"]}
    runs = [run for run in plan(args) if run not in done]
    # CUDA cannot be used in a forked process
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(args.at_a_time, context) as pool:
        waiting = {pool.submit(train, settings, run, started + 60 * args.minutes): run for run in runs}
        for future in concurrent.futures.as_completed(waiting):
            if error := future.exception():
                print(waiting[future], repr(error), flush=True)
            elif row := future.result():
                report["runs"].append(row)
                report["minutes"] = round(earlier_minutes + (time.time() - started) / 60, 1)
                save(args.out, report)
                print(json.dumps(row), flush=True)
    return len(runs) + len(done) - len(report["runs"])


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", help="folder of SmolLM2-135M-Instruct; built if left out")
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--add", action="store_true", help="keep --out's runs and train the missing ones")
    parser.add_argument("--minutes", type=float, default=60.0, help="no update begins after these")
    parser.add_argument("--at-a-time", type=int, default=1, help="runs side by side, a process each")
    parser.add_argument("--device", choices=("cuda", "cpu"), help="a GPU if there is one")
    parser.add_argument("--tiny", action="store_true", help="two sizes of the tests' tiny Llama on the CPU")
    parser.add_argument("--sizes", type=int, nargs="+", default=[40, 120, 0], help="training rows; 0 for all")
    parser.add_argument("--rates", type=float, nargs="+", default=[2e-4, 1e-3, 5e-5, 5e-3])
    parser.add_argument("--ranks", type=int, nargs="+", default=[16, 4, 64], help="the main rank first")
    parser.add_argument("--seeds", type=int, default=2, help="of the main rank; the others have one")
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--eval-rows", type=int, default=48)
    parser.add_argument("--rows-per-update", type=int, default=8)
    parser.add_argument("--max-length", type=int, default=256, help="rows with more tokens are left out")
    parser.add_argument("--prompt-format", choices=("alpaca", "chat"), default="alpaca")
    args = parser.parse_args()
    if args.tiny:
        vars(args).update(TINY, device="cpu")
    return args


def main() -> int:
    args = parse()
    if args.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before torch looks
    import torch

    from llama_sft_helpers.demo_model import ensure_model

    args.on_gpu = torch.cuda.is_available()
    if args.device == "cuda" and not args.on_gpu:
        sys.exit("--device cuda: PyTorch finds no GPU; take --device cpu")
    model = args.model or "local:smollm2-135m-instruct"
    args.model = ensure_model(model.removeprefix("local:")) if model.startswith("local:") else model
    settings = share(args)
    report = describe(args, settings)
    missing = sweep(args, settings, report)
    print(f"{len(report['runs'])} runs in {args.out}; {missing} are missing (--add trains those)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
