"""Minutes of the tests and of the demo at two commits, in turn on one machine: OLD NEW OLD NEW ...

    python benchmarks/minutes.py OLD NEW --rounds 3 --out benchmarks/results/minutes.json

Run it with the Python of an installed checkout (``.venv``); each commit is checked out beside it, and its own
tests and notebooks run with its own package. Models that an earlier run has built are used, compiled code is
not. ``--limit avx2`` runs as on a CPU without AVX-512. ``--add`` keeps the rounds that ``--out``
holds, for rounds on another day: a round is a pair on one machine, and the summary puts ratios together.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import report
import torch

ROOT = Path(__file__).parent.parent
LIMITS = {
    "none": {},
    "avx2": {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"},
}
RUN = ["-m", "llama_sft_helpers.cli", "run", "--profile", "cpu-demo", "--out"]


def options_of(tree, target):
    """The words after ``pytest`` in what make would run, so that each commit runs as its own make does."""
    plan = subprocess.run(["make", "-n", target], cwd=tree, check=True, stdout=subprocess.PIPE, text=True)
    return plan.stdout.split("-m pytest ", 1)[1].splitlines()[0].split()


def command(part, tree, scratch, only):
    if part == "tests":
        return [sys.executable, "-m", "pytest", "-q", *options_of(tree, "test-only")]
    return [sys.executable, *RUN, str(scratch / "demo"), *(["--only", only] if only else [])]


def memory_gib(process):
    """Of a process and all that it started; memory that they share counts once where the system tells."""
    total = 0
    for each in [process, *process.children(recursive=True)]:
        try:
            info = each.memory_full_info()
        except psutil.Error:  # it has just ended
            continue
        total += getattr(info, "pss", info.rss)
    return total / 2**30


def measure(words, tree, environment):
    """Run a command to its end: wall seconds, CPU seconds of all its processes, their peak memory."""
    before, start, peak = os.times(), time.monotonic(), 0.0
    with tempfile.TemporaryFile() as log:
        process = psutil.Popen(words, cwd=tree, env=environment, stdout=log, stderr=subprocess.STDOUT)
        while process.poll() is None:
            try:
                peak = max(peak, memory_gib(process))
            except psutil.NoSuchProcess:
                break
            time.sleep(1)
        code, seconds, after = process.wait(), time.monotonic() - start, os.times()
        log.seek(0)
        last = log.read().decode(errors="replace").strip().splitlines()[-3:]
    cpu = sum(after[2:4]) - sum(before[2:4])
    found = {"seconds": seconds, "cpu_seconds": cpu, "peak_gib": peak, "exit": code, "last_lines": last}
    return {key: round(value, 2) if isinstance(value, float) else value for key, value in found.items()}


def one_run(part, tree, args):
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        own = {"PYTHONPATH": str(tree), "TORCHINDUCTOR_CACHE_DIR": str(scratch / "inductor")}
        own |= {"SFT_MODELS_DIR": str(args.models), "TOKENIZERS_PARALLELISM": "false"}
        environment = {**os.environ, **LIMITS[args.limit], **own}
        return measure(command(part, tree, scratch, args.only), tree, environment)


def main():
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
    earlier = json.loads(args.out.read_text(encoding="utf-8"))["runs"] if args.add else []
    if other := {run["commit"] for run in earlier} - set(args.commits):
        parser.error(f"{args.out} holds rounds of {other}, expected {args.commits}; take another --out")
    result = {**report.source(report.card()), "limit": args.limit, "runs": earlier}
    first = max((run["round"] + 1 for run in earlier), default=0)
    capability = torch.backends.cpu.get_cpu_capability()
    with tempfile.TemporaryDirectory() as folder:
        trees = {commit: Path(folder, str(place)) for place, commit in enumerate(args.commits)}
        for commit, tree in trees.items():
            subprocess.run(["git", "worktree", "add", "--detach", str(tree), commit], cwd=ROOT, check=True)
        try:
            for number in range(first, first + args.rounds):
                for part in args.parts.split(","):
                    for commit, tree in trees.items():
                        run = {"round": number, "part": part, "commit": commit, "host_cpu": capability}
                        run |= one_run(part, tree, args)
                        result["runs"].append(run)
                        print(run, flush=True)
                        result["summary"] = summarize(result["runs"], *args.commits)
                        report.write(args.out, result)
        finally:
            for tree in trees.values():
                subprocess.run(["git", "worktree", "remove", "--force", str(tree)], cwd=ROOT, check=False)


def summarize(runs, old, new):
    """By part: the median of the rounds' ratios, new over old, and the largest peak of each."""
    summary = {}
    for part in dict.fromkeys(run["part"] for run in runs):
        seconds = {
            commit: [run["seconds"] for run in runs if (run["part"], run["commit"]) == (part, commit)]
            for commit in (old, new)
        }
        ratios = [after / before for before, after in zip(seconds[old], seconds[new], strict=False)]
        if ratios:
            peaks = [run["peak_gib"] for run in runs if (run["part"], run["commit"]) == (part, new)]
            summary[part] = {"new_over_old": round(statistics.median(ratios), 3), "peak_gib_new": max(peaks)}
    return summary


if __name__ == "__main__":
    main()
