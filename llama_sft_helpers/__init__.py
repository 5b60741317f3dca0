"""Look inside 8-bit quantization, LoRA and supervised fine-tuning while you run them.

A module or package per notebook: ``environment``, ``login``, ``quantization``, ``lora``, ``data``,
``training``, ``evaluation``, ``speed``; and ``memory``, ``profiles``, ``tables``, ``sliders``,
``demo_model``, ``doctor`` and ``cli`` beside them. Importing this package imports nothing heavy; import from
the one that carries the name of your notebook.
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from IPython.core.interactiveshell import InteractiveShell

try:
    __version__ = version("llama-sft-helpers")
except PackageNotFoundError:  # a source tree that was never installed
    __version__ = "0+unknown"


def load_ipython_extension(shell: InteractiveShell) -> None:
    """``%load_ext llama_sft_helpers``: cause and fix under every traceback that the doctor knows."""
    from llama_sft_helpers.doctor.notebook import attach

    attach(shell)


def unload_ipython_extension(shell: InteractiveShell) -> None:
    """``%unload_ext llama_sft_helpers``: tracebacks alone again."""
    from llama_sft_helpers.doctor.notebook import detach

    detach(shell)
