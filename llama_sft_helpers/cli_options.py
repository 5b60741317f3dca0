"""Options that several commands of ``llama-sft`` take."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Literal

import typer

ProfileOption = Annotated[
    str | None,
    typer.Option(help="Profile name or TOML file of your own; default: by the GPU that is there."),
]
OutOption = Annotated[Path, typer.Option(help="Folder for executed notebooks, pages and the adapter.")]
TimeoutOption = Annotated[int, typer.Option(min=0, help="Seconds a cell may take; 0 for no limit.")]
OpenOption = Annotated[
    bool, typer.Option("--open", help="Open the result page in the browser; it fills while notebooks run.")
]
DataOption = Annotated[
    str | None, typer.Option(help="CSV, JSONL, JSON or Parquet file, folder, or data set of the hub.")
]
ColumnsOption = Annotated[
    str | None, typer.Option(help="Your columns and what they are: question=instruction,answer=output.")
]


def _speak(language: str | None) -> None:
    """Set the variable by which this process and its kernels know the language; commands read no other."""
    if language:
        os.environ["SFT_LANG"] = language


LanguageOption = Annotated[
    Literal["en", "ko"] | None,
    typer.Option("--lang", callback=_speak, help="Of notebooks, pages and advice; default: the system's."),
]
ModelOption = Annotated[str | None, typer.Option(help="Hub id or folder of the base model.")]
SetOption = Annotated[
    list[str] | None, typer.Option("--set", help="A setting of the profile, key=value; repeatable.")
]
