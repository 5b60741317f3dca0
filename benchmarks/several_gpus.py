"""The commands that notebook 07 prints, on one and on several GPUs of one host.

    python benchmarks/several_gpus.py --minutes 8 --out benchmarks/results/several_gpus.json

Llama 3 8B's shape (and some layers of 70B's) is made with random weights, once, in ``--work``; rows are those
the package ships. Each run is one launch; the number of processes changes, the effective batch does not.
Runs on one GPU go side by side, one on each GPU. Tokens/s count all tokens of the packed rows, from the
fourth update to the last; memory is the most that ``nvidia-smi`` shows until the model is loaded and the rows
are packed (``loaded_gib``), and in the whole run (``peak_gib``). The JSON is written after every run.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import dataclasses
import itertools
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

from launches import Memory, difference, kill_rank, watched  # noqa: E402
from report import cards, source, write  # noqa: E402

PARTS = ("ddp-int8", "fsdp-nf4", "fast", "resume", "70b")
SIZES_70B = {"hidden_size": 8192, "intermediate_size": 28672, "num_attention_heads": 64}
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
ONE_PROCESS = ["--num_processes", "1", "--num_machines", "1", "--dynamo_backend", "no"]
LEAST_SECONDS = 15  # no launch does anything in less
SAVED, KILLED = 5, 7  # the updates after which the run to be killed saves, and is killed
FSDP = ("fsdp-nf4", "70b")  # left out on a CPU, where Accelerate would run them as DDP


@dataclasses.dataclass(frozen=True)
class Run:
    """One launch: a part, its number of processes, its output folder, and changes to the printed command."""

    part: str
    processes: int
    output: str
    changes: tuple[str, ...] = ()

    @property
    def model(self) -> str:
        """Which of the bench's models it trains."""
        return "70b" if self.part == "70b" else "8b"

    @property
    def folder(self) -> str:
        """The folder in ``--work`` that holds 07's files for it."""
        return f"{self.model}-{self.processes}"


class Bench:
    """What the command line asked for, and the report as far as it has come."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.work, self.on_gpu = args, args.work.absolute(), args.device == "cuda"
        self.deadline = time.monotonic() + 60 * args.minutes
        self.counts = sorted({int(n) for n in args.processes.split(",")} | {1})
        self.memory, self.runs = Memory(), {}  # type: ignore[var-annotated]
        self.models = {"8b": (args.model or self.work / "llama3-8b-shape").absolute()}
        self.parts = [part for part in args.part if self.on_gpu or part not in FSDP]
        if "70b" in self.parts:
            self.models["70b"] = self.work / f"llama3-70b-{args.layers_70b}-layers"
        self.report: dict[str, Any] = {
            **source(cards() if self.on_gpu else "CPU"),
            "python": platform.python_version(),
            "adapters": {},
        }
        if args.add and args.out.is_file():
            self.add_to(json.loads(args.out.read_text(encoding="utf-8")))

    def add_to(self, earlier: dict[str, Any]) -> None:
        """Keep an earlier report's command, other parts and runs of one process; ours come beside them."""
        about = {key: self.report[key] for key in ("card", "versions", "command")}
        added = [*earlier.get("added", []), {"parts": self.args.part, **about}]
        self.report = {**earlier, "added": added}
        ours = self.args.part
        kept = [row for row in earlier["runs"] if row["part"] not in ours or row["processes"] == 1]
        self.runs = {Run(row["part"], row["processes"], row["output"]): row for row in kept}

    def left(self) -> float:
        """Seconds of the time allowed."""
        return max(0.0, self.deadline - time.monotonic())

    def save(self) -> None:
        """Write the report as far as it has come."""
        self.report |= {"scaling": compare(self.runs), "runs": list(self.runs.values())}
        write(self.args.out, self.report)

    def prepare(self) -> None:
        """Build the models that are not there, side by side, and write 07's files for each."""
        self.work.mkdir(parents=True, exist_ok=True)
        building = {}
        for number, (name, folder) in enumerate(self.models.items()):
            if not (folder / "config.json").is_file():
                layers = ["--layers-70b", str(self.args.layers_70b)] if name == "70b" else []
                tokenizer = ["--tokenizer", str(self.args.tokenizer)] if self.args.tokenizer else []
                command = [
                    sys.executable,
                    __file__,
                    "--build",
                    str(folder),
                    *layers,
                    *tokenizer,
                    "--out",
                    "-",
                ]
                gpu = str(self.args.first_gpu + number % max(self.counts))
                building[name] = subprocess.Popen(command, env={**os.environ, "CUDA_VISIBLE_DEVICES": gpu})
        for name, process in building.items():
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=self.left())
            self.report.setdefault("build_exit", {})[name] = process.poll()
        for name, folder in self.models.items():
            if (folder / "config.json").is_file():
                self.write_configs(name, folder)

    def write_configs(self, name: str, model: Path) -> None:
        """07's files in a folder for each number of processes; one process reads those of two."""
        from llama_sft_helpers.evaluation import write_engine_configs
        from llama_sft_helpers.profiles import read_profile

        profile = read_profile(
            "colab-a100" if self.on_gpu else "ci-tiny", model_id=str(model.absolute()), packing=True,
            max_steps=self.args.steps, save_steps=self.args.steps, eval_steps=10 * self.args.steps,
            max_length=self.args.max_length, learning_rate=2e-4,
            per_device_train_batch_size=1, gradient_accumulation_steps=max(2, *self.counts),
        )  # fmt: skip
        rows, peft_model = shipped_rows(), empty_peft_model(model)
        for processes in self.counts:
            table = write_engine_configs(
                self.work / f"{name}-{processes}", profile=profile, model=peft_model, train_rows=rows,
                eval_rows=rows[:4], processes=max(2, processes),
            )  # fmt: skip
            self.report["printed_commands"] = table["command"].to_dict()
            self.report["effective_batch_rows"] = int(table["effective_batch_rows"].iloc[0])

    def command(self, run: Run) -> list[str]:
        """The printed command, with Accelerate's module for its name, and options for one process."""
        name = "fsdp-nf4" if run.part in FSDP else "ddp-int8"
        printed = shlex.split(self.report["printed_commands"][name])
        place = printed.index("-m")
        options, script = ["--main_process_port", "0", *printed[2:place]], printed[place:]
        if run.processes == 1:
            options = [*ONE_PROCESS, "--mixed_precision", "bf16" if self.on_gpu else "no"]
            script += ["--gradient_accumulation_steps", str(self.report["effective_batch_rows"])]
        if run.part == "fast":
            script[:2] = [str(Path(__file__).with_name("fast_sft.py"))]
            script += ["--max_length", str(2 * self.args.max_length)]
        launcher = [sys.executable, "-m", "accelerate.commands.launch"]
        return [*launcher, *options, *script, "--output_dir", run.output, *run.changes]

    def launch(self, run: Run, gpus: list[int], on_update: Callable[[int, int], None] | None = None) -> None:
        """Run one launch within its time and note what it printed and took."""
        folder = self.work / run.folder
        result = self.runs[run] = {"part": run.part, "processes": run.processes, "output": run.output}
        if self.left() < LEAST_SECONDS or not folder.is_dir():
            result["error"] = "no time was left" if folder.is_dir() else "its model was not built in time"
            return
        command = self.command(run)
        result["command"] = shlex.join(["python", *command[1:]]).replace(f"{ROOT}/", "")
        self.memory.start(gpus)
        environment = {
            **os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / f"home-{run.output}"),
            "PYTHONUNBUFFERED": "1", "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
            "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
            "CUDA_VISIBLE_DEVICES": ",".join(map(str, gpus)) if self.on_gpu else "",
        }  # fmt: skip
        timeout = min(self.args.timeout, self.left())

        def loaded() -> None:
            result["loaded_gib"] = self.memory.peak_gib(gpus)  # before FSDP shares it out

        result |= watched(
            command, folder, environment, timeout=timeout, on_update=on_update, on_loaded=loaded
        )
        result["peak_gib"] = self.memory.peak_gib(gpus)

    def run_together(self, runs: list[Run]) -> None:
        """Launch runs at once, each on GPUs of its own, and write what is known then."""
        places = itertools.accumulate([self.args.first_gpu, *(run.processes for run in runs[:-1])])
        with concurrent.futures.ThreadPoolExecutor(len(runs)) as pool:
            started = [
                pool.submit(self.launch, run, list(range(first, first + run.processes)))
                for run, first in zip(runs, places, strict=True)
            ]
        for future in started:
            future.result()
        self.save()
        for run in runs:
            print(json.dumps({k: v for k, v in self.runs[run].items() if k != "command"}), flush=True)

    def measure(self, part: str) -> None:
        """One part: by one process, together with other parts' runs on the GPUs left, then by several."""
        rest = [p for p in self.parts[self.parts.index(part) :] if p != "resume"]
        waiting = [p for p in rest if Run(p, 1, f"{p}-1") not in self.runs]
        if part in waiting:
            self.run_together([Run(p, 1, f"{p}-1") for p in waiting[: max(self.counts)]])
        for processes in self.counts[1:]:
            self.run_together([Run(part, processes, f"{part}-{processes}")])

    def resume(self) -> None:
        """Kill one rank after a checkpoint, go on from it, and hold the losses against the run left alone."""
        processes, killed_at = max(self.counts), []
        found = self.report["resume"] = {"killed_rank": processes - 1, "killed_after_update": KILLED}

        def kill(updates: int, launcher: int) -> None:
            if updates == KILLED:
                killed_at.append(time.monotonic())
                kill_rank(launcher, processes - 1)

        killed = Run("resume", processes, "killed", ("--save_steps", str(SAVED)))
        first = self.args.first_gpu
        self.launch(killed, list(range(first, first + processes)), kill)
        if killed_at:
            self.runs[killed].pop("error", None)  # what was asked for
            found["seconds_until_the_launcher_ended"] = round(time.monotonic() - killed_at[0], 1)
        checkpoint = self.work / killed.folder / "killed" / f"checkpoint-{SAVED}"
        # several CPU processes cannot: transformers loads the optimizer to "cpu:0", which torch does not know
        change = ("--resume_from_checkpoint", str(checkpoint))
        resumed = Run("resume", processes if self.on_gpu else 1, "resumed", change)
        self.run_together([resumed])
        whole = self.runs.get(Run("ddp-int8", processes, f"ddp-int8-{processes}"), {}).get("losses", [])
        losses = self.runs[resumed].get("losses", [])
        found |= {"updates_after_resuming": len(losses)}
        found["largest_loss_difference"] = difference(losses, whole[SAVED:])
        before = self.runs[killed].get("losses", [])
        found["largest_loss_difference_from_the_killed"] = difference(losses, before[SAVED:])

    def check_adapters(self, part: str) -> None:
        """Load what the part's finished runs saved with ``PeftModel``, in a process that sees no GPU."""
        done = [run for run, row in self.runs.items() if row.get("exit") == 0 and run.part == part]
        folders = [str(self.work / run.folder / run.output) for run in done]
        folders = [folder for folder in folders if Path(folder).is_dir()]  # not those of an earlier report
        if not folders:
            return
        command = [
            sys.executable,
            __file__,
            "--check",
            *folders,
            "--model",
            str(self.models[done[0].model]),
            "--out",
            "-",
        ]
        output = subprocess.run(
            command, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""}, capture_output=True, text=True,
            timeout=self.left(), check=False,
        )  # fmt: skip
        said = output.stdout.strip().splitlines()
        self.report["adapters"][part] = output.stderr[-1500:] if output.returncode else json.loads(said[-1])


def compare(runs: dict[Run, dict[str, Any]]) -> list[dict[str, Any]]:
    """Each run of several processes beside the same part's run of one."""
    table = []
    for run, row in runs.items():
        one = runs.get(Run(run.part, 1, f"{run.part}-1"), {})
        if run.processes > 1 and {"losses", "tokens_per_second"} <= row.keys() and "tokens_per_second" in one:
            times = row["tokens_per_second"] / one["tokens_per_second"]
            table.append(
                {
                    "part": run.part,
                    "processes": run.processes,
                    "times_one_process": round(times, 3),
                    "scaling_efficiency": round(times / run.processes, 3),
                    "updates": len(row["losses"]),
                    "largest_loss_difference": difference(row["losses"], one["losses"]),
                }
            )
    return table


def shipped_rows(times: int = 4) -> list[dict[str, str]]:
    """The package's rows as prompt and completion, several times over: a run needs no second epoch."""
    from llama_sft_helpers.data import to_prompt_completion

    lines = (ROOT / "llama_sft_helpers/datasets/alpaca_mini.jsonl").read_text(encoding="utf-8").splitlines()
    return [to_prompt_completion(json.loads(line)) for line in lines] * times


def empty_peft_model(folder: Path) -> Any:
    """The model's modules with LoRA on them and no weights."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
        lora = LoraConfig(r=16, lora_alpha=16, lora_dropout=0, task_type="CAUSAL_LM", target_modules=TARGETS)
        return get_peft_model(model, lora)


def build(folder: Path, tokenizer: Path | None, layers_70b: int) -> None:
    """Random weights in 8B's shape, or in as many layers of 70B's; the tiny Llama's tokenizer if no other."""
    from llama3_tokenizer import build_llama3_tokenizer
    from notebooks_on_gpu import make_llama3_shape
    from transformers import AutoTokenizer

    try:
        words = AutoTokenizer.from_pretrained(tokenizer) if tokenizer else build_llama3_tokenizer()
    except (ImportError, FileNotFoundError, ValueError) as error:
        print(f"Llama 3's tokenizer is not here, the tiny Llama's is taken: {error}")
        words = AutoTokenizer.from_pretrained(ROOT / "llama_sft_helpers/models/tiny-llama")
    sizes = {**SIZES_70B, "num_hidden_layers": layers_70b} if layers_70b else {}
    making = folder.with_name(f"{folder.name}.part")
    shutil.rmtree(making, ignore_errors=True)  # what a cut run left
    make_llama3_shape(making, words, **sizes)
    os.replace(making, folder)


def check(model: Path, folders: list[Path]) -> dict[str, str]:
    """What ``PeftModel`` and 07's checks say of each adapter on its base model, and how large B became."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from llama_sft_helpers.evaluation import check_adapter, check_adapter_loaded

    base, found = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16), {}
    for folder in folders:
        try:
            check_adapter(folder, base, str(model))
            loaded = PeftModel.from_pretrained(base, folder)
            check_adapter_loaded(loaded, folder)
            largest = max(p.abs().max().item() for n, p in loaded.named_parameters() if "lora_B" in n)
            found[folder.name] = f"loaded, largest entry of B {largest:.2e}"
            base = loaded.unload()
        except Exception as error:  # one adapter's failure is a finding
            found[folder.name] = f"{type(error).__name__}: {error}"[:500]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--work", type=Path, default=Path("several-gpus"), help="folder for models and runs")
    parser.add_argument("--model", type=Path, help="folder of the 8B model; made in --work if left out")
    parser.add_argument("--tokenizer", type=Path, help="folder of the tokenizer for models made here")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--part", action="append", choices=PARTS, help="again for another; all if left out")
    parser.add_argument("--processes", default="1,2", help="numbers of processes, as 1,2,4")
    parser.add_argument("--first-gpu", type=int, default=0, help="the GPUs from this one on are used")
    parser.add_argument("--minutes", type=float, default=8.0, help="for everything; then what is there stays")
    parser.add_argument("--timeout", type=float, default=150.0, help="seconds for one launch")
    parser.add_argument("--add", action="store_true", help="keep --out's other parts and one-process runs")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--max-length", type=int, default=2048, help="tokens in a row; the fast part has two")
    parser.add_argument("--layers-70b", type=int, default=0, help="decoder layers of 70B's shape; 8")
    parser.add_argument("--build", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--check", type=Path, nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.part = sorted(args.part or PARTS, key=PARTS.index)
    if args.build:
        build(args.build, args.tokenizer, args.layers_70b)
        return
    if args.check:
        print(json.dumps(check(args.model, args.check)))
        return
    args.layers_70b = args.layers_70b or 8
    bench = Bench(args)
    try:
        bench.prepare()
        with concurrent.futures.ThreadPoolExecutor() as beside:
            for part in bench.parts:
                bench.resume() if part == "resume" else bench.measure(part)
                beside.submit(bench.check_adapters, part)
    finally:
        bench.memory.stop()
        bench.save()


if __name__ == "__main__":
    main()
