"""One launch on GPUs, watched: what it printed, when, with how much memory, and how it is ended."""

from __future__ import annotations

import contextlib
import itertools
import json
import re
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

WARM_UPDATES = 4


class Memory:
    """The most that each GPU had in use, as ``nvidia-smi`` shows it five times a second."""

    def __init__(self) -> None:
        query = ["--query-gpu=index,memory.used", "--format=csv,noheader,nounits", "-lms", "200"]
        self.most: dict[int, int] = {}
        self.process: Any = None
        with contextlib.suppress(FileNotFoundError):
            self.process = subprocess.Popen(["nvidia-smi", *query], stdout=subprocess.PIPE, text=True)
            threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        for line in self.process.stdout:
            with contextlib.suppress(ValueError):
                index, mib = map(int, line.split(","))
                self.most[index] = max(self.most.get(index, 0), mib)

    def start(self, gpus: list[int]) -> None:
        """Forget what was seen of these GPUs."""
        self.most.update(dict.fromkeys(gpus, 0))

    def peak_gib(self, gpus: list[int]) -> list[float]:
        """Since ``start``, in the order of ``gpus``; empty where nothing was measured."""
        return [round(self.most[gpu] / 1024, 2) for gpu in gpus if self.most[gpu]]

    def stop(self) -> None:
        """End ``nvidia-smi``."""
        if self.process:
            self.process.terminate()


def watched(
    command: list[str],
    folder: Path,
    environment: dict[str, str],
    *,
    timeout: float,
    on_update: Callable[[int, int], None] | None = None,
    on_loaded: Callable[[], None] | None = None,
) -> dict[str, Any]:
    """Run a launch to its end, or kill it after ``timeout`` seconds.

    ``on_update`` gets the number of each optimizer step as its line appears, and the launcher's pid;
    ``on_loaded`` is called when the rows are packed: the model is on the cards, and no step is taken.
    """
    started, updates = time.monotonic(), 0
    lines: list[tuple[float, str]] = []
    process = subprocess.Popen(
        command, cwd=folder, env=environment, text=True, errors="replace",
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    timer = threading.Timer(timeout, end_all, [process.pid])
    timer.start()
    for line in process.stdout or ():
        lines.append((time.monotonic() - started, line))
        if on_loaded and re.match(r"Packing train dataset: 100%", line):
            on_loaded()
        updates += is_update(line)
        if on_update and is_update(line):
            on_update(updates, process.pid)
    result: dict[str, Any] = {"exit": process.wait()}
    timed_out = timer.finished.is_set()
    timer.cancel()
    result |= {"seconds": round(time.monotonic() - started, 1), **read_log(lines)}
    if result["exit"]:
        text = [line for _, line in lines if line.strip() and "%|" not in line]
        of_ranks = [line for line in text if line.startswith("[rank")]  # not what the launcher says of them
        result["error"] = ("out of time: " if timed_out else "") + "".join(of_ranks or text)[-2500:]
    return result


def is_update(line: str) -> bool:
    return "'loss': " in line and "'num_tokens': " in line


def read_log(lines: list[tuple[float, str]]) -> dict[str, Any]:
    """Losses, seconds and tokens/s from the trainer's lines, and ``fast_sft.py``'s line of switches."""
    updates = [(second, line) for second, line in lines if is_update(line)]
    found: dict[str, Any] = {"losses": [float(number("loss", line)) for _, line in updates]}
    seconds, tokens = [s for s, _ in updates], [number("num_tokens", line) for _, line in updates]
    warm = min(WARM_UPDATES, len(updates)) - 1
    if len(updates) > warm + 1:
        found["first_update_seconds"] = round(seconds[0], 1)
        found["update_seconds"] = [round(b - a, 3) for a, b in itertools.pairwise(seconds)]
        found["tokens_per_second"] = round((tokens[-1] - tokens[warm]) / (seconds[-1] - seconds[warm]), 1)
    switches = [line.split(" ", 1)[1] for _, line in lines if line.startswith("switches {")]
    return {**found, **({"switches": json.loads(switches[-1])} if switches else {})}


def number(key: str, line: str) -> float:
    found = re.search(rf"'{key}': '?([-+.\deE]+|nan)", line)
    return float(found[1]) if found else float("nan")


def difference(losses: list[float], others: list[float]) -> float | None:
    """Largest relative difference of two runs' losses, update by update; None where either is empty."""
    pairs = list(zip(losses, others, strict=False))
    return max(abs(a - b) / max(abs(b), 1e-9) for a, b in pairs) if pairs else None


def end_all(pid: int) -> None:
    """Kill a launcher and all it started, which have sessions of their own."""
    import psutil

    with contextlib.suppress(psutil.NoSuchProcess):
        for process in [*psutil.Process(pid).children(recursive=True), psutil.Process(pid)]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()


def kill_rank(launcher: int, rank: int) -> None:
    """SIGKILL for one rank: the launcher's child with that number in its environment."""
    import psutil

    for child in psutil.Process(launcher).children():
        if child.environ().get("LOCAL_RANK") == str(rank):
            child.kill()
