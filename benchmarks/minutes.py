"""Minutes of the tests and of the demo at two commits, in turn on one machine: OLD NEW OLD NEW ...

    python benchmarks/minutes.py OLD NEW --rounds 3 --out benchmarks/results/minutes.json

Run it with the Python of an installed checkout (``.venv``); each commit is checked out beside it, and its own
tests and notebooks run with its own package. Models that an earlier run has built are used, compiled code is
not. ``--limit avx2`` runs as on a CPU without AVX-512. ``--add`` keeps the rounds that ``--out``
holds, for rounds on another day: a round is a pair on one machine, and the summary puts ratios together.
A run that failed stays in ``--out`` with the end of its output; its round is not in the summary.
"""

import argparse
import contextlib
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import report
import torch
from rich.console import Console

ROOT = Path(__file__).parent.parent
LIMITS = {
    "none": {},
    "avx2": {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"},
}
LINES_OF_A_FAILURE = 30
# 04 trains as many adapters as fit in its time; all of them, as a commit that trains fewer would seem faster
RUN = ["-m", "llama_sft_helpers.cli", "run", "--profile", "cpu-demo", "--set", "sweep_seconds=600", "--out"]


def options_of(tree, target):
    """The words after ``pytest`` in what make would run, so that each commit runs as its own make does."""
    plan = subprocess.run(["make", "-n", target], cwd=tree, check=True, stdout=subprocess.PIPE, text=True)
    return plan.stdout.split("-m pytest ", 1)[1].splitlines()[0].split()


def command(part, tree, scratch, only):
    if part == "tests":
        return [sys.executable, "-m", "pytest", "-q", *options_of(tree, "test-only")]
    return [sys.executable, *RUN, str(scratch / "demo"), *(["--only", only] if only else [])]


def memory_gib(process, above):
    """Of a process and all that it started; memory that they share counts once where the system tells.

    To tell takes the system 30 ms for 2 GiB, in which that process waits. So it is asked only where the plain
    sums, which count shared memory for each, lie above a number of GiB.
    """
    every = [process, *process.children(recursive=True)]
    resident = sum_gib(every, lambda each: each.memory_info().rss)
    if resident <= above:
        return resident
    return sum_gib(every, lambda each: getattr(each.memory_full_info(), "pss", each.memory_info().rss))


def sum_gib(processes, size):
    total = 0
    for each in processes:
        with contextlib.suppress(psutil.Error):  # it has just ended
            total += size(each)
    return total / 2**30


def measure(words, tree, environment):
    """Run a command to its end: its output; wall and CPU seconds, and peak memory of all its processes."""
    before, start, peak = os.times(), time.monotonic(), 0.0
    with tempfile.TemporaryFile() as log:
        process = psutil.Popen(words, cwd=tree, env=environment, stdout=log, stderr=subprocess.STDOUT)
        while process.poll() is None:
            with contextlib.suppress(psutil.NoSuchProcess):
                peak = max(peak, memory_gib(process, above=peak))
            time.sleep(1)
        code, seconds, after = process.wait(), time.monotonic() - start, os.times()
        log.seek(0)
        output = log.read().decode(errors="replace")
    cpu = sum(after[2:4]) - sum(before[2:4])
    found = {"seconds": seconds, "cpu_seconds": cpu, "peak_gib": peak}
    return {name: round(value, 2) for name, value in found.items()} | {"exit": code}, output


def adapters_of(notebook):
    """How many adapters an executed copy of 04 trained; None where it was not executed so far."""
    text = notebook.read_text(encoding="utf-8") if notebook.exists() else ""
    found = re.search(r"(\d+) adapters trained in \d+ s", text)
    return int(found[1]) if found else None


def words_of(part, code, output):
    """What is kept of an output: its end, longer where the run failed; of a demo its notebooks too."""
    last = output.strip().splitlines()[-(LINES_OF_A_FAILURE if code else 3) :]
    return {"last_lines": last} | ({"notebook_seconds": notebook_seconds(output)} if part == "demo" else {})


def notebook_seconds(output):
    """Of each notebook that is done: ``06_training: done in 6:22`` are 382 seconds."""
    done = re.findall(r"^(\d\d_\w+): done in (\d+):(\d\d)\s*$", output, re.MULTILINE)
    return {name: 60 * int(minutes) + int(seconds) for name, minutes, seconds in done}


def one_run(part, tree, args):
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        own = {"PYTHONPATH": str(tree), "TORCHINDUCTOR_CACHE_DIR": str(scratch / "inductor")}
        own |= {"SFT_MODELS_DIR": str(args.models), "TOKENIZERS_PARALLELISM": "false"}
        environment = {**os.environ, **LIMITS[args.limit], **own}
        found, output = measure(command(part, tree, scratch, args.only), tree, environment)
        if part == "demo":
            found["adapters"] = adapters_of(scratch / "demo" / "04_lora.ipynb")
    return found | words_of(part, found["exit"], output)


def tell(run):
    """Print a run; one that failed in red, with the end of its output."""
    console = Console(soft_wrap=True, highlight=False, markup=False)
    if run["exit"]:
        failed = f"FAILED with exit code {run['exit']}, so this round does not count: "
        console.print(failed + f"{run['part']} at {run['commit']}", style="bold red")
        console.print("\n".join(run["last_lines"]), style="red")
    console.print({key: value for key, value in run.items() if key != "last_lines"})


@contextlib.contextmanager
def checked_out(commits):
    """Folders with each commit's files."""
    with tempfile.TemporaryDirectory() as folder:
        trees = {commit: Path(folder, str(place)) for place, commit in enumerate(commits)}
        try:
            for commit, tree in trees.items():
                subprocess.run(
                    ["git", "worktree", "add", "--detach", str(tree), commit], cwd=ROOT, check=True
                )
            yield trees
        finally:
            for tree in trees.values():
                subprocess.run(["git", "worktree", "remove", "--force", str(tree)], cwd=ROOT, check=False)


def earlier_runs(path, commits, limit):
    """The runs of a result to add to; ValueError where it compares other commits, or under another limit."""
    result = json.loads(path.read_text(encoding="utf-8"))
    if other := {run["commit"] for run in result["runs"]} - set(commits):
        raise ValueError(f"{path} holds rounds of {other}, expected {commits}; take another --out")
    if result["limit"] != limit:
        raise ValueError(
            f"{path} holds rounds with --limit {result['limit']}, got {limit}; take another --out"
        )
    return result["runs"]


def summarize(runs, old, new):
    """By part, over rounds in which neither run failed: ratios, their median, minutes, the largest peaks."""
    summary = {}
    for part in dict.fromkeys(run["part"] for run in runs):
        good = {
            commit: {
                run["round"]: run
                for run in runs
                if (run["part"], run["commit"], run["exit"]) == (part, commit, 0)
            }
            for commit in (old, new)
        }
        if pairs := [(good[old][number], good[new][number]) for number in good[old] if number in good[new]]:
            ratios = [after["seconds"] / before["seconds"] for before, after in pairs]
            summary[part] = {"rounds": len(pairs), "new_over_old": round(statistics.median(ratios), 3)}
            summary[part]["ratios"] = [round(ratio, 3) for ratio in ratios]
            for name, side in zip(("old", "new"), zip(*pairs, strict=True), strict=True):
                minutes = statistics.median(run["seconds"] for run in side) / 60
                summary[part][f"minutes_{name}"] = round(minutes, 2)
                summary[part][f"peak_gib_{name}"] = max(run["peak_gib"] for run in side)
    return summary


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("commits", nargs=2, metavar="COMMIT")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--parts", default="tests,demo")
    parser.add_argument("--only", help="notebooks of the demo: 03,04")
    parser.add_argument("--limit", choices=LIMITS, default="none")
    parser.add_argument("--models", type=Path, default=ROOT / ".cache" / "models")
    parser.add_argument("--add", action="store_true", help="keep the rounds of --out")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    try:
        return args, earlier_runs(args.out, args.commits, args.limit) if args.add else []
    except ValueError as error:
        parser.error(str(error))


def main():
    args, runs = arguments()
    result = {**report.source(report.card()), "limit": args.limit, "runs": runs}
    first = max((run["round"] + 1 for run in runs), default=0)
    capability = torch.backends.cpu.get_cpu_capability()
    with checked_out(args.commits) as trees:
        for number in range(first, first + args.rounds):
            for part in args.parts.split(","):
                for commit, tree in trees.items():
                    run = {"round": number, "part": part, "commit": commit, "host_cpu": capability}
                    runs.append(run | one_run(part, tree, args))
                    tell(runs[-1])
                    result["summary"] = summarize(runs, *args.commits)
                    report.write(args.out, result)


if __name__ == "__main__":
    main()
