"""One notebook, executed in a kernel of its own and written as .ipynb and .html, for ``llama-sft run``."""

from __future__ import annotations

import asyncio
import dataclasses
import importlib.util
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from rich.console import Console

from llama_sft_helpers.core.files import write_text
from llama_sft_helpers.core.progress import PROGRESS_FILE, ProgressLines
from llama_sft_helpers.notebook_page import notebook_page

if TYPE_CHECKING:
    from rich.progress import Progress


_RUNNER = ("ipykernel", "latex2mathml", "nbclient", "nbconvert", "nbformat")  # what the extra `run` brings

# At its end Python looks once more for garbage among the million objects that PyTorch and the libraries
# around it make, for 1.7 s; frozen ones it passes over (https://docs.python.org/3/library/gc.html#gc.freeze).
_NO_LAST_LOOK = "__import__('atexit').register(__import__('gc').freeze)"  # binds no name in the notebook


class RunError(RuntimeError):
    """A run could not start, or a cell failed."""


@dataclasses.dataclass(frozen=True)
class Run:
    """What the notebooks of a run share."""

    out: Path  # the folder that they are written to, and run in
    timeout: int | None  # seconds for a cell
    environment: dict[str, str]  # of their kernels
    progress: Progress  # a bar for each
    stop: threading.Event  # set where all of them must end


def check_runner() -> None:
    """Check that what executes notebooks is installed, which only the extra ``run`` brings.

    Raises:
        RunError: Something is missing; it names that, and the command that installs it.
    """
    if missing := [name for name in _RUNNER if importlib.util.find_spec(name) is None]:
        raise RunError(
            f"Notebooks are executed by packages that are not installed here: {', '.join(missing)}. "
            'Install them: pip install "llama-sft-helpers[run]", or with [colab] all that the series needs.'
        )


def execute(path: Path, run: Run) -> float:
    """Execute one notebook and write it, up to its failing cell if one fails.

    Returns:
        Seconds that it took, its kernel's start included.

    Raises:
        RunError: A cell failed or took too long, or the kernel died.
        CancelledError: The run was stopped.
    """
    from nbclient import NotebookClient
    from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError

    start, notebook = time.monotonic(), read_without_outputs(path)
    code_cells = sum(cell.cell_type == "code" and bool(cell.source.strip()) for cell in notebook.cells)
    task = run.progress.add_task(path.stem, total=code_cells)
    with tempfile.TemporaryFile() as kernel_log, tempfile.TemporaryDirectory() as scratch:
        step = Path(scratch, "step")  # kept closed here, as Windows lets no second process open an open file
        step.write_text("")
        lines = ProgressLines(path.stem, code_cells, step)

        def cell_done(**_: Any) -> None:
            run.progress.advance(task)
            lines.cell_done()

        client = NotebookClient(
            notebook,
            timeout=run.timeout,
            kernel_name="python3",
            extra_arguments=[f"--IPKernelApp.code_to_run={_NO_LAST_LOOK}"],
            resources={"metadata": {"path": str(run.out)}},
            on_cell_executed=cell_done,
        )
        kernel = {"env": {**run.environment, PROGRESS_FILE: str(step)}, "stderr": kernel_log}
        try:
            _execute_interruptibly(client, lambda: tell(lines.news()), run.stop, **kernel)
        except DeadKernelError as error:
            death = "the kernel died; most often the machine ran out of memory."
            raise RunError(f"{path.name}: {death}{_last_words(kernel_log)}") from error
        except CellExecutionError as error:
            failure = f"a cell failed with {error.ename}: {error.evalue}\n(see {run.out / path.name})"
            raise RunError(f"{path.name}: {failure}{_explained(error)}") from error
        except CellTimeoutError as error:
            raise RunError(f"{path.name}: a cell took longer than {run.timeout} seconds.") from error
        finally:
            _write_notebook(notebook, run.out / path.name)
    return time.monotonic() - start


def read_without_outputs(path: Path) -> Any:
    """A notebook whose saved outputs are gone: those of a run that stops early would pass for its own."""
    import nbformat

    notebook = nbformat.read(path, as_version=4)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    return notebook


def _execute_interruptibly(
    client: Any, meanwhile: Callable[[], None], stop: threading.Event, **kernel: Any
) -> None:
    """Execute in another thread, and shut the kernel down once ``stop`` is set."""
    started: Future[Any] = Future()
    with ThreadPoolExecutor(1) as pool:
        execution = pool.submit(asyncio.run, _execute_and_stop(client, started, **kernel))
        while not wait([execution], timeout=0.2).done and not stop.is_set():
            meanwhile()
        if not execution.done():
            client.shutdown_kernel = "immediate"
            task = started.result()
            with suppress(RuntimeError):  # its loop has just ended by itself
                task.get_loop().call_soon_threadsafe(task.cancel)
    execution.result()


async def _execute_and_stop(client: Any, started: Future[Any], **kernel: Any) -> None:
    started.set_result(asyncio.current_task())
    try:
        await client.async_execute(**kernel)
    finally:
        manager = client.km  # nbclient has stopped it, unless this was cancelled while it started
        if manager is not None and manager.has_kernel:
            await manager.shutdown_kernel(now=True)


def _last_words(kernel_log: IO[bytes]) -> str:
    """What the kernel's process printed at last, outside any cell: a crash's own message."""
    kernel_log.seek(0)
    lines = kernel_log.read().decode("utf-8", errors="replace").splitlines()
    told = [line for line in lines if line.strip() and "[IPKernelApp]" not in line]
    return "".join(f"\n  {line}" for line in told[-5:])


def _explained(error: Exception) -> str:
    """Cause and fix, if the doctor knows the failure."""
    from llama_sft_helpers.doctor.explanation import explain

    found = explain(error)
    return f"\n{found}" if found else ""


def _write_notebook(notebook: Any, path: Path) -> None:
    import nbformat

    write(path, nbformat.writes(notebook))
    write(path.with_suffix(".html"), notebook_page(notebook, path.stem))


def write(path: Path, text: str) -> None:
    """Write a whole file or none."""
    try:
        write_text(path, text)
    except OSError as error:
        raise RunError(f"Cannot write {path}: {error.strerror}.{_explained(error)}") from error


def tell(line: str) -> None:
    """Print a line about the run's progress, where no terminal shows the bar."""
    if line and not sys.stdout.isatty():
        with suppress(OSError):  # a full disk must not end the run
            say(line)


def say(line: str) -> None:
    """Print a line as it is."""
    Console(soft_wrap=True, highlight=False).print(line)
