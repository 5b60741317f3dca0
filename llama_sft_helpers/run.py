"""Execute the notebooks in order into a folder: what ``llama-sft run`` does."""

from __future__ import annotations

import asyncio
import html
import json
import os
import re
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from rich.console import Console

from llama_sft_helpers.core.files import FilesError, write_text
from llama_sft_helpers.core.progress import PROGRESS_FILE, ProgressLines, clock
from llama_sft_helpers.settings import environment_settings
from llama_sft_helpers.training.summary import read_training_summary

if TYPE_CHECKING:
    from rich.progress import Progress

_IN_CHECKOUT = Path(__file__).parent.parent / "notebooks"

# notebooks that train -> where in the output folder they leave their summary
_RESULTS = {"06_training": ".", "09_your_run": "your_run"}

_NO_DESCRIPTION = "No description has been provided for this image"  # nbconvert's words

_INDEX_PAGE = """<!doctype html>
<html lang="en">
<head><meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{title}</title></head>
<body style="font-family:sans-serif;max-width:40em;margin:2em auto"><h1>{title}</h1><ol>{rows}</ol></body>
</html>
"""


class RunError(RuntimeError):
    """A run could not start, or a cell failed."""


def run_notebooks(
    profile_name: str | None,
    *,
    only: str | None,
    out: Path,
    notebooks: Path | None = None,
    cell_timeout_seconds: int | None = None,
    settings: Mapping[str, Any] | None = None,
) -> dict[str, float]:
    """Execute notebooks for a profile, and write each as .ipynb and .html, and an index.

    The originals are read, never written. A failing notebook is written too, up to its failing cell.

    Args:
        profile_name: Profile or a TOML file of one's own; None picks by the GPU that is there.
        only: Comma-separated numbers, ``"03,04"``; None runs all.
        out: Folder for the results; made if missing.
        notebooks: Folder of the originals; None as for ``find_notebooks``.
        cell_timeout_seconds: Limit for one cell; None for none.
        settings: What to change of the profile, for every notebook alike.

    Returns:
        Seconds that each notebook took, its kernel's start included.

    Raises:
        RunError: Nothing to run, a folder that cannot be written or is in use, or the failing cell's message.
        ProfileError: The profile is not valid.
        KeyboardInterrupt: Ctrl-C; the kernel is gone by then, and no file half-written.
    """
    from llama_sft_helpers.profiles import load_profile, pick_profile

    paths = find_notebooks(notebooks, only)
    out = out.expanduser().resolve()
    if any(path.resolve().parent == out for path in paths):
        raise RunError(
            f"{out} holds the originals, which are never written. Choose another folder: --out DIR."
        )
    with _output_folder(out), _terminable():
        (out / "index.html").unlink(missing_ok=True)  # it would speak of an earlier run
        picked = pick_profile(profile_name)
        changes = {**environment_settings(), **(settings or {})}
        profile = load_profile(picked, **changes)
        environment = dict(
            os.environ, SFT_PROFILE=picked, SFT_SETTINGS=json.dumps(changes), SFT_OUTPUT_DIR=str(out)
        )
        environment.pop("MPLBACKEND", None)  # figures belong in the notebooks
        _say(f"profile {profile.name}, model {profile.model_id}, data {profile.dataset_id}, into {out}")
        pages = _execute_all(paths, out, cell_timeout_seconds, environment)
        _write(out / "index.html", _index_page(profile.name, pages))
    for folder in [out / _RESULTS[path.stem] for path in paths if path.stem in _RESULTS]:
        _report(folder)
    _say(f"open:          {out / 'index.html'}")
    return dict(pages)


def find_notebooks(folder: Path | None = None, only: str | None = None) -> list[Path]:
    """The notebooks in order, of ``./notebooks`` or else of the checkout unless a folder is given.

    Raises:
        RunError: No notebook is found, or a number in ``only`` is not among them.
    """
    folder = folder or (Path("notebooks") if Path("notebooks").is_dir() else _IN_CHECKOUT)
    paths = sorted(folder.glob("[0-9][0-9]_*.ipynb"))
    if not paths:
        raise RunError(
            f"No notebooks in {folder.resolve()}. Run this in a checkout, or name them: --notebooks DIR."
        )
    if only is None:
        return paths
    wanted = [number.strip().zfill(2) for number in only.split(",") if number.strip()]
    numbers = [path.name[:2] for path in paths]
    if not wanted:
        raise RunError(f"--only {only!r} names no notebook. Valid numbers: {', '.join(numbers)}.")
    if unknown := [number for number in wanted if number not in numbers]:
        raise RunError(f"There is no notebook {', '.join(unknown)}. Valid numbers: {', '.join(numbers)}.")
    return [path for path in paths if path.name[:2] in wanted]


@contextmanager
def _output_folder(out: Path) -> Iterator[None]:
    """Make the folder, prove it can be written, and hold it for this run alone."""
    from filelock import FileLock, Timeout

    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            pass
    except OSError as error:
        raise RunError(
            f"Cannot write to the output folder {out}: {error.strerror}. Choose another: --out DIR."
        ) from error
    with ExitStack() as held:
        try:
            held.enter_context(FileLock(out / ".llama-sft-run.lock", timeout=0))
        except Timeout as error:
            raise RunError(
                f"Another run is writing to {out}. Wait for it, or choose another folder: --out DIR."
            ) from error
        yield


@contextmanager
def _terminable() -> Iterator[None]:
    """Let SIGTERM end the run as Ctrl-C does: with the kernel shut down and scratch files removed."""

    def stop(number: int, frame: object) -> None:
        raise SystemExit(128 + number)

    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may set handlers
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _execute_all(
    paths: list[Path], out: Path, timeout: int | None, environment: dict[str, str]
) -> list[tuple[str, float]]:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn

    columns = ("{task.description:<18}", BarColumn(), MofNCompleteColumn(), "cells", TimeElapsedColumn())
    pages = []
    with Progress(*columns, console=Console(stderr=True), redirect_stdout=False) as progress:
        for path in paths:
            start = time.monotonic()
            _execute(path, out, timeout, environment, progress)
            pages.append((path.stem, time.monotonic() - start))
            _tell(f"{path.stem}: done in {clock(pages[-1][1])}")
    return pages


def _execute(
    path: Path, out: Path, timeout: int | None, environment: dict[str, str], progress: Progress
) -> None:
    from nbclient import NotebookClient
    from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError

    notebook = _read_without_outputs(path)
    code_cells = sum(cell.cell_type == "code" and bool(cell.source.strip()) for cell in notebook.cells)
    task = progress.add_task(path.stem, total=code_cells)
    with tempfile.TemporaryFile() as kernel_log, tempfile.TemporaryDirectory() as scratch:
        step = Path(scratch, "step")  # kept closed here, as Windows lets no second process open an open file
        step.write_text("")
        lines = ProgressLines(path.stem, code_cells, step)

        def cell_done(**_: Any) -> None:
            progress.advance(task)
            lines.cell_done()

        client = NotebookClient(
            notebook,
            timeout=timeout,
            kernel_name="python3",
            resources={"metadata": {"path": str(out)}},
            on_cell_executed=cell_done,
        )
        kernel = {"env": {**environment, PROGRESS_FILE: str(step)}, "stderr": kernel_log}
        try:
            _execute_interruptibly(client, lambda: _tell(lines.news()), **kernel)
        except DeadKernelError as error:
            death = "the kernel died; most often the machine ran out of memory."
            raise RunError(f"{path.name}: {death}{_last_words(kernel_log)}") from error
        except CellExecutionError as error:
            failure = f"a cell failed with {error.ename}: {error.evalue}\n(see {out / path.name})"
            raise RunError(f"{path.name}: {failure}{_explained(error)}") from error
        except CellTimeoutError as error:
            raise RunError(f"{path.name}: a cell took longer than {timeout} seconds.") from error
        finally:
            _write_notebook(notebook, out / path.name)


def _read_without_outputs(path: Path) -> Any:
    """A notebook whose saved outputs are gone: those of a run that stops early would pass for its own."""
    import nbformat

    notebook = nbformat.read(path, as_version=4)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    return notebook


def _execute_interruptibly(client: Any, meanwhile: Callable[[], None], **kernel: Any) -> None:
    """Execute in a second thread: in the main one, nbclient takes a Ctrl-C for the kernel's death."""
    started: Future[Any] = Future()
    with ThreadPoolExecutor(1) as pool:
        execution = pool.submit(asyncio.run, _execute_and_stop(client, started, **kernel))
        try:
            while not wait([execution], timeout=0.2).done:  # with a timeout, so that signals are seen
                meanwhile()
        except BaseException:  # Ctrl-C or SIGTERM
            client.shutdown_kernel = "immediate"
            task = started.result()
            with suppress(RuntimeError):  # its loop has just ended by itself
                task.get_loop().call_soon_threadsafe(task.cancel)
            raise
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
    from nbconvert import HTMLExporter

    _write(path, nbformat.writes(notebook))
    page, _ = HTMLExporter().from_notebook_node(notebook, resources={"metadata": {"name": path.stem}})
    _write(path.with_suffix(".html"), describe_figures(page, notebook))


def describe_figures(page: str, notebook: Any) -> str:
    """Give a page's figures the text alternatives that their cells carry as ``alt`` in their metadata.

    nbconvert's own template says of every figure that it has no description.
    """
    texts = iter(
        cell.metadata.get("alt", _NO_DESCRIPTION)
        for cell in notebook.cells
        for output in cell.get("outputs", [])
        if "image/png" in output.get("data", {})
    )
    pattern = f'alt="{_NO_DESCRIPTION}"'
    return re.sub(pattern, lambda _: f'alt="{html.escape(next(texts, _NO_DESCRIPTION))}"', page)


def _write(path: Path, text: str) -> None:
    """Write a whole file or none."""
    try:
        write_text(path, text)
    except OSError as error:
        raise RunError(f"Cannot write {path}: {error.strerror}.{_explained(error)}") from error


def _index_page(profile_name: str, pages: list[tuple[str, float]]) -> str:
    names = [(html.escape(stem), seconds) for stem, seconds in pages]
    rows = "\n".join(
        f'<li><a href="{name}.html">{name}</a> ({seconds:.0f} s)</li>' for name, seconds in names
    )
    return _INDEX_PAGE.format(title=f"llama-sft run, profile {html.escape(profile_name)}", rows=rows)


def _report(folder: Path) -> None:
    """Print what a training left in its folder."""
    if not (path := folder / "training_summary.json").is_file():
        return
    try:
        summary = read_training_summary(path)
    except FilesError as error:
        raise RunError(str(error)) from error
    before, after = summary["eval_loss_before"], summary["eval_loss_after"]
    _say(f"held-out loss: {before:.4f} before, {after:.4f} after training")
    _say(f"adapter:       {folder / 'adapter'}")


def _tell(line: str) -> None:
    """Print a line about the run's progress, where no terminal shows the bar."""
    if line and not sys.stdout.isatty():
        with suppress(OSError):  # a full disk must not end the run
            _say(line)


def _say(line: str) -> None:
    Console(soft_wrap=True, highlight=False).print(line)
