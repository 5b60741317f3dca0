"""The doctor in a notebook: ``%load_ext llama_sft_helpers`` shows cause and fix under a known traceback."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING

from llama_sft_helpers.doctor.explanation import explain

if TYPE_CHECKING:
    from IPython.core.interactiveshell import ExecutionResult, InteractiveShell

_showwarning_before: Callable[..., None] | None = None


def attach(shell: InteractiveShell) -> None:
    """Show cause and fix under tracebacks and warnings that are known; the traceback itself stays.

    Args:
        shell: The IPython shell. See https://ipython.readthedocs.io/en/stable/config/callbacks.html.
    """
    global _showwarning_before  # noqa: PLW0603 (warnings has one hook for the process)
    detach(shell)
    shell.events.register("post_run_cell", _after_cell)
    _showwarning_before = warnings.showwarning
    warnings.showwarning = _show_warning  # type: ignore[assignment]


def detach(shell: InteractiveShell) -> None:
    """Undo ``attach``."""
    global _showwarning_before  # noqa: PLW0603
    with contextlib.suppress(ValueError):  # not registered
        shell.events.unregister("post_run_cell", _after_cell)
    if _showwarning_before and warnings.showwarning is _show_warning:
        warnings.showwarning = _showwarning_before
    _showwarning_before = None


def _after_cell(result: ExecutionResult) -> None:
    _show(getattr(result, "error_in_exec", None) or getattr(result, "error_before_exec", None))


def _show_warning(message: Warning | str, *arguments: object, **keywords: object) -> None:
    if _showwarning_before:
        _showwarning_before(message, *arguments, **keywords)
    _show(message)


def _show(exception: object) -> None:
    if explanation := explain(exception):
        from IPython.display import display

        display(explanation)
