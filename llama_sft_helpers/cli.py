"""``llama-sft``: the series from a terminal."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    no_args_is_help=True, add_completion=False, help=__doc__, pretty_exceptions_show_locals=False
)


@app.callback()
def _main() -> None:
    """Fine-tune Llama 3 8B step by step, and see what every step does."""


@app.command("demo-model")
def demo_model(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder to build it in.")],
    name: Annotated[str, typer.Option(help="smollm2-135m-instruct or tiny-llama.")] = "smollm2-135m-instruct",
) -> None:
    """Build the demo model as an ordinary Hugging Face folder; does nothing if it is there."""
    from llama_sft_helpers.demo_model import ModelBuildError, ensure_model

    try:
        typer.echo(ensure_model(name, folder))
    except ModelBuildError as error:
        _fail(error)


@app.command()
def run(
    profile: Annotated[
        str | None, typer.Option(help="Profile name; default: by the GPU that is there.")
    ] = None,
    only: Annotated[str | None, typer.Option(help="Notebook numbers, comma-separated: 03,04.")] = None,
    out: Annotated[Path, typer.Option(help="Folder for executed notebooks, pages and the adapter.")] = Path(
        "outputs"
    ),
    notebooks: Annotated[Path | None, typer.Option(help="Folder of the notebooks.")] = None,
    cell_timeout: Annotated[int, typer.Option(help="Seconds a cell may take; 0 for no limit.")] = 0,
) -> None:
    """Execute the notebooks in order into a folder (.ipynb and .html); stops at the first failing cell."""
    from llama_sft_helpers.profiles import ProfileError
    from llama_sft_helpers.run import RunError, run_notebooks

    try:
        run_notebooks(
            profile, only=only, out=out, notebooks=notebooks, cell_timeout_seconds=cell_timeout or None
        )
    except (RunError, ProfileError) as error:
        _fail(error)


@app.command()
def check(
    profile: Annotated[
        str | None, typer.Option(help="Profile name; default: by the GPU that is there.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Compare this machine with what the series is tested with; exit code 1 if something must be mended."""
    from llama_sft_helpers.environment import print_environment
    from llama_sft_helpers.profiles import ProfileError, read_profile

    try:
        fits = print_environment(read_profile(profile) if profile else None, as_json=as_json)
    except ProfileError as error:
        _fail(error)
    else:
        raise typer.Exit(0 if fits else 1)


def _fail(error: Exception) -> None:
    from rich.console import Console
    from rich.text import Text

    Console(stderr=True).print(Text(f"error: {error}", style="red"), soft_wrap=True)
    raise typer.Exit(1)


if __name__ == "__main__":
    app()
