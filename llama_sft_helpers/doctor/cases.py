"""What is known of an exception, of its causes, and of one that was raised in a notebook's kernel."""

from __future__ import annotations

import builtins
import dataclasses
import re
import traceback
from collections.abc import Iterator
from typing import Any

_MAX_CHAIN = 20
_MAX_MESSAGE = 20_000


@dataclasses.dataclass(frozen=True)
class Case:
    """One exception; known from its text alone when it was raised in another process."""

    names: frozenset[str]  # of its class and of those it is derived from
    message: str
    where: str  # the traceback's file:function lines
    line: str  # of a notebook's cell that raised it; "" elsewhere
    exception: BaseException | None  # None if it was raised in another process

    @property
    def variables(self) -> Iterator[tuple[str, Any]]:
        """Local variables of the traceback's frames, the outermost first."""
        trace = self.exception.__traceback__ if self.exception else None
        for frame, _ in traceback.walk_tb(trace):
            yield from list(frame.f_locals.items())


def read_chain(exception: object) -> tuple[list[Case], list[Case]]:
    """The exception with its explicit causes, and those that were being handled when it was raised."""
    own: list[Case] = []
    handled: list[Case] = []
    seen: set[int] = set()
    queue: list[tuple[object, list[Case]]] = [(exception, own)]
    while queue and len(seen) < _MAX_CHAIN:
        current, found = queue.pop(0)
        if not isinstance(current, BaseException) or id(current) in seen:
            continue
        seen.add(id(current))
        found.append(_case(current))
        if isinstance(current, BaseExceptionGroup):
            queue += [(part, found) for part in current.exceptions]
        queue.append((current.__cause__, found))
        if not current.__suppress_context__:
            queue.append((current.__context__, handled))
    return own, handled


def _case(exception: BaseException) -> Case:
    ename = getattr(exception, "ename", None)
    if isinstance(ename, str) and hasattr(exception, "evalue"):  # nbclient's CellExecutionError
        return _reported_case(exception, ename)
    frames = [frame.f_code for frame, _ in traceback.walk_tb(exception.__traceback__)]
    return Case(
        frozenset(kind.__name__ for kind in type(exception).__mro__),
        _clipped(exception),
        "\n".join(f"{code.co_filename}:{code.co_name}" for code in frames),
        _cell_line(exception),
        exception,
    )


def _reported_case(report: Any, ename: str) -> Case:
    kind = getattr(builtins, ename, None)
    mro = kind.__mro__ if isinstance(kind, type) else ()
    text = re.sub(r"\x1b\[[0-9;]*m", "", _clipped(getattr(report, "traceback", "")))
    frames = re.findall(r"(?:File )?([^\s:]+\.py):\d+,? in ([\w.]+)", text)
    lines = re.findall(r"^-+> *\d+ +(.*)$", text, re.MULTILINE)
    return Case(
        frozenset({ename, "Exception", *(c.__name__ for c in mro)}),
        _clipped(report.evalue),
        "\n".join(f"{file}:{name.split('.')[-1]}" for file, name in frames),
        lines[-1].strip() if lines and not frames else "",
        None,
    )


def _cell_line(exception: BaseException) -> str:
    last = traceback.extract_tb(exception.__traceback__, limit=-1)
    in_cell = last and re.search(r"ipykernel_\d|ipython-input", last[0].filename)
    return (last[0].line or "") if in_cell else ""


def _clipped(value: object) -> str:
    try:
        return str(value)[:_MAX_MESSAGE]
    except Exception:
        return ""
