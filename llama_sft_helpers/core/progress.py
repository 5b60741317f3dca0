"""How far a run is, in plain lines: for a log, or wherever no terminal draws a bar."""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path

PROGRESS_FILE = "SFT_PROGRESS_FILE"  # the environment variable that names the file for the training step
_SECONDS_BETWEEN_LINES = 10.0


def clock(seconds: float) -> str:
    """Minutes and seconds: 83.4 seconds are ``1:23``."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02d}"


def report_step(step: int, max_steps: int, loss: float, seconds_left: float) -> None:
    """Write how far a training is into the file that ``$SFT_PROGRESS_FILE`` names, if it names one."""
    if path := os.environ.get(PROGRESS_FILE):
        told = f"training step {step} of {max_steps}, loss {loss:.4f}"
        told += f", {clock(seconds_left)} left" if step < max_steps else ""  # evaluation may follow
        with contextlib.suppress(OSError):  # a full disk must not end the training
            Path(path).write_text(told + "\n", encoding="utf-8")


class ProgressLines:
    """Tells how far a notebook is, in at most one line every ten seconds.

    Args:
        name: The notebook's.
        cells: Number of its code cells.
        step: The file in which the kernel reports its training step; emptied when a cell is done.
    """

    def __init__(self, name: str, cells: int, step: Path) -> None:
        self._name, self._cells, self._step = name, cells, step
        self._done = 0
        self._told, self._at = "", -_SECONDS_BETWEEN_LINES

    def cell_done(self) -> None:
        """Count a cell."""
        self._done += 1
        self._step.write_text("")

    def news(self) -> str:
        """The line to print now: empty if nothing has changed, or the last line is too recent."""
        now = time.monotonic()
        step, end, _ = self._step.read_text(encoding="utf-8").partition("\n")
        if step and not end:  # the kernel is writing it
            return ""
        line = f"{self._name}: {self._done} of {self._cells} cells" + (step and f", {step}")
        if line == self._told or now - self._at < _SECONDS_BETWEEN_LINES:
            return ""
        self._told, self._at = line, now
        return line
