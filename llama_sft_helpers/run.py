"""Execute the notebooks in order into a folder: what ``llama-sft run`` does."""

from __future__ import annotations

import json
import os
import signal
import tempfile
import threading
import webbrowser
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console

from llama_sft_helpers.core.files import FilesError
from llama_sft_helpers.core.language import reader_language
from llama_sft_helpers.core.progress import clock
from llama_sft_helpers.execution import Run, RunError, check_runner, execute, say, tell, write
from llama_sft_helpers.play import play_page
from llama_sft_helpers.result_page import RESULTS, result_page
from llama_sft_helpers.settings import environment_settings
from llama_sft_helpers.training.summary import read_training_summary

# Where the series may lie: in the reader's own folder, in a wheel, in a checkout.
_PLACES = tuple(place / "notebooks" for place in (Path(), Path(__file__).parent, Path(__file__).parents[1]))

# notebooks of the series -> those whose results they read; any other notebook waits for all before it.
# Where several run at a time they are begun in this order: 07 has 06 in time, both cores end together, and
# of those that take 2 GiB of memory or more (06, 08, 09, the end of 03) each runs beside 04, 05 or 07.
_NEEDS: dict[str, tuple[str, ...]] = {
    "01_environment": (),
    "05_data": (),
    "02_login": (),
    "06_training": (),
    "04_lora": (),
    "08_speed": (),
    "07_evaluation": ("06_training",),
    "09_your_run": (),
    "03_quantization": (),
}
_Show = Callable[[Mapping[str, float | None], Collection[str] | None], None]  # seconds, and those at work
# For glibc on Linux (https://man7.org/linux/man-pages/man3/mallopt.3.html). By itself it learns to keep freed
# blocks of up to 32 MiB, half a GiB of some notebooks; above the first size, in bytes, they now go back. To
# take them anew costs time, less of it in pages of 2 MiB than of 4 KiB (its manual's chapter "Tunables").
_GIVE_BACK = {
    "MALLOC_MMAP_THRESHOLD_": str(4 * 2**20),
    "MALLOC_TRIM_THRESHOLD_": str(128 * 2**20),
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
}
_GIB_FOR_TWO = 6.0  # of free memory: what two of the series' notebooks take on a CPU, and some room


def run_notebooks(
    profile_name: str | None,
    *,
    only: str | None,
    out: Path,
    notebooks: Path | None = None,
    cell_timeout_seconds: int | None = None,
    settings: Mapping[str, Any] | None = None,
    jobs: int | None = None,
    open_page: bool = False,
) -> dict[str, float]:
    """Execute notebooks for a profile, write each as .ipynb and .html, and ``index.html`` from the start on.

    The originals are read, never written. A failing notebook is written too, up to its failing cell. Two at a
    time share the cores: one begins before those above it are done if it reads nothing of theirs.

    Args:
        profile_name: Profile or a TOML file of one's own; None picks by the GPU that is there.
        only: Comma-separated numbers, ``"03,04"``; None runs all.
        out: Folder for the results; made if missing.
        notebooks: Folder of the originals; None as for ``find_notebooks``.
        cell_timeout_seconds: Limit for one cell; None for none.
        settings: What to change of the profile, for every notebook alike.
        jobs: How many run at a time; None for two where no GPU is used and cores and memory allow it.
        open_page: Open ``index.html`` in the browser at once; it fills as notebooks are done.

    Returns:
        Seconds that each notebook took, its kernel's start included.

    Raises:
        RunError: Nothing to run, or nothing to run it with; a folder that cannot be written or is in use; or
            the failing cell's message.
        ProfileError: The profile is not valid.
        KeyboardInterrupt: Ctrl-C; the kernel is gone by then, and no file half-written.
    """
    from llama_sft_helpers.profiles import load_profile, pick_profile

    check_runner()
    paths = find_notebooks(notebooks, only)
    out = out.expanduser().resolve()
    if any(path.resolve().parent == out for path in paths):
        raise RunError(
            f"{out} holds the originals, which are never written. Choose another folder: --out DIR."
        )
    with _output_folder(out), _terminable():
        picked = pick_profile(profile_name)
        changes = {**environment_settings(), **(settings or {})}
        profile = load_profile(picked, **changes)
        if ("dataset_id" in changes or picked.endswith(".toml")) and profile.epochs is None:
            changes["max_steps"] = profile.max_steps  # which 09's form halves where it names no data
        environment = dict(
            os.environ, SFT_PROFILE=picked, SFT_SETTINGS=json.dumps(changes), SFT_OUTPUT_DIR=str(out)
        )
        environment.pop("MPLBACKEND", None)  # figures belong in the notebooks
        jobs = min(len(paths), jobs or (2 if profile.gpu_gib == 0 and _two_fit() else 1))
        if profile.gpu_gib == 0:  # threads that wait for threads without a core wait long
            environment.setdefault("OMP_NUM_THREADS", str(max(1, cores() // jobs)))
            environment = _GIVE_BACK | environment
        say(f"profile {profile.name}, model {profile.model_id}, data {profile.dataset_id}, into {out}")

        def show(seconds: Mapping[str, float | None], at_work: Collection[str] | None) -> None:
            page = result_page(out, profile.name, profile.model_id, seconds, at_work)
            write(out / "index.html", page)

        write(out / "play.html", play_page(home="index.html"))
        show(dict.fromkeys(path.stem for path in paths), ())
        if open_page:
            webbrowser.open((out / "index.html").as_uri())
        seconds = _execute_all(paths, out, cell_timeout_seconds, environment, jobs=jobs, show=show)
    for folder in [out / RESULTS[path.stem] for path in paths if path.stem in RESULTS]:
        _report(folder)
    say(f"open:          {out / 'index.html'}")
    return seconds


def find_notebooks(folder: Path | None = None, only: str | None = None) -> list[Path]:
    """The notebooks in order: of a folder, or else those of the series in the reader's language.

    The series is that of ``./notebooks`` if it lies there, else what came with this package.

    Raises:
        RunError: No notebook is found, or a number in ``only`` is not among them.
    """
    if folder is None:
        folder = next(filter(_holds_the_series, _PLACES), _PLACES[0])
        translated = folder / reader_language()
        folder = translated if translated.is_dir() else folder
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


def cores() -> int:
    """Physical cores that this process may use."""
    import psutil

    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(psutil.cpu_count(logical=False) or usable, usable)


def _holds_the_series(folder: Path) -> bool:
    """Whether it does; a reader's ``./notebooks`` often holds others."""
    return any((folder / f"{stem}.ipynb").is_file() for stem in _NEEDS)


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


def _two_fit() -> bool:
    import psutil

    return cores() > 1 and psutil.virtual_memory().available > _GIB_FOR_TWO * 2**30


def _execute_all(
    paths: list[Path],
    out: Path,
    timeout: int | None,
    environment: dict[str, str],
    *,
    jobs: int,
    show: _Show,
) -> dict[str, float]:
    """Execute as many notebooks at a time as there are jobs; one that fails, or Ctrl-C, stops them all."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn

    columns = ("{task.description:<18}", BarColumn(), MofNCompleteColumn(), "cells", TimeElapsedColumn())
    bars = Progress(*columns, console=Console(stderr=True), redirect_stdout=False, refresh_per_second=2)
    order = list(_NEEDS) if jobs > 1 else []
    waiting = sorted(paths, key=lambda path: order.index(path.stem) if path.stem in order else len(order))
    stop = threading.Event()
    running: dict[Future[float], Path] = {}
    seconds: dict[str, float | None] = dict.fromkeys(path.stem for path in paths)
    with bars as progress, ThreadPoolExecutor(jobs) as pool:
        shared = Run(out, timeout, environment, progress, stop)
        try:
            while waiting or running:
                for path in _ready(paths, seconds, waiting)[: jobs - len(running)]:
                    waiting.remove(path)
                    running[pool.submit(execute, path, shared)] = path
                    show(seconds, [path.stem for path in running.values()])
                for future in wait(running, timeout=0.2, return_when=FIRST_COMPLETED).done:
                    path = running.pop(future)
                    seconds[path.stem] = took = future.result()
                    tell(f"{path.stem}: done in {clock(took)}")
        finally:
            stop.set()
            show(seconds, None)
    return {stem: took for stem, took in seconds.items() if took is not None}


def _ready(paths: list[Path], seconds: Mapping[str, float | None], waiting: list[Path]) -> list[Path]:
    """Those of the waiting notebooks that need none that is still to be done."""
    stems = [path.stem for path in paths]
    needs = {stem: _NEEDS.get(stem, stems[:place]) for place, stem in enumerate(stems)}
    undone = {stem for stem, took in seconds.items() if took is None}
    return [path for path in waiting if not undone.intersection(needs[path.stem])]


def _report(folder: Path) -> None:
    """Print what a training left in its folder."""
    if not (path := folder / "training_summary.json").is_file():
        return
    try:
        summary = read_training_summary(path)
    except FilesError as error:
        raise RunError(str(error)) from error
    before, after = summary["eval_loss_before"], summary["eval_loss_after"]
    say(f"held-out loss: {before:.4f} before, {after:.4f} after training")
    say(f"adapter:       {folder / 'adapter'}")
