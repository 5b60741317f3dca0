"""``llama-sft``: the series from a terminal."""

from __future__ import annotations

import importlib.metadata
import json
import signal
import webbrowser
from collections.abc import Generator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from llama_sft_helpers.cli_options import (
    ColumnsOption,
    DataOption,
    LanguageOption,
    ModelOption,
    OpenOption,
    OutOption,
    ProfileOption,
    SetOption,
    TimeoutOption,
)
from llama_sft_helpers.profiles import EXPORTS

if TYPE_CHECKING:
    import pandas as pd

    from llama_sft_helpers.core.llama import ModelConfig
    from llama_sft_helpers.profiles import Profile

app = typer.Typer(
    no_args_is_help=True, add_completion=False, help=__doc__, pretty_exceptions_show_locals=False
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"llama-sft {importlib.metadata.version('llama-sft-helpers')}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
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
def train(
    *,
    data: DataOption = None,
    columns: ColumnsOption = None,
    model: ModelOption = None,
    export: Annotated[
        str | None, typer.Option(help=f"What to make: {' | '.join(map(repr, EXPORTS))}.")
    ] = None,
    changes: SetOption = None,
    profile: ProfileOption = None,
    out: OutOption = Path("outputs"),
    open_page: OpenOption = False,
    language: LanguageOption = None,
    cell_timeout: TimeoutOption = 0,
) -> None:
    """Train on your own data, from a file to an adapter: executes notebook 09 with these settings.

    Each row is seen three times, unless epochs or max_steps are set, or the profile is a file of your own.
    """
    from llama_sft_helpers.profiles import pick_profile

    settings = list(changes or [])
    length_is_set = any(setting.startswith(("epochs=", "max_steps=")) for setting in settings)
    if data and not length_is_set and not pick_profile(profile).endswith(".toml"):
        settings.append("epochs=3")
    named = {"dataset_id": data, "columns": columns, "model_id": model, "export": export}
    _run(
        settings,
        named,
        cell_timeout,
        profile_name=profile,
        only="09",
        out=out,
        open_page=open_page,
    )


@app.command()
def run(
    *,
    profile: ProfileOption = None,
    only: Annotated[str | None, typer.Option(help="Notebook numbers, comma-separated: 03,04.")] = None,
    out: OutOption = Path("outputs"),
    notebooks: Annotated[Path | None, typer.Option(help="Folder of the notebooks.")] = None,
    jobs: Annotated[
        int, typer.Option(min=0, help="Notebooks at a time; 0 for two on a CPU with room for both, else one.")
    ] = 0,
    open_page: OpenOption = False,
    language: LanguageOption = None,
    cell_timeout: TimeoutOption = 0,
    data: DataOption = None,
    columns: ColumnsOption = None,
    model: ModelOption = None,
    changes: SetOption = None,
) -> None:
    """Execute the notebooks in order into a folder (.ipynb and .html); stops at the first failing cell."""
    named = {"dataset_id": data, "columns": columns, "model_id": model}
    where = {"only": only, "out": out, "notebooks": notebooks}
    how = {"profile_name": profile, "jobs": jobs or None, "open_page": open_page}
    _run(changes or [], named, cell_timeout, **where, **how)


@app.command()
def play(
    out: Annotated[Path, typer.Option(help="Folder for the page.")] = Path("outputs"),
    open_page: Annotated[bool, typer.Option("--open", help="Open it in the browser.")] = False,
) -> None:
    """Write play.html: rounding, adapters, tokens, memory and cost to play with; needs no network."""
    from llama_sft_helpers.execution import RunError, write
    from llama_sft_helpers.play import play_page

    try:
        out.mkdir(parents=True, exist_ok=True)
        write(page := out.absolute() / "play.html", play_page())
    except (OSError, RunError) as error:
        _fail(error)
    typer.echo(page)
    if open_page:
        webbrowser.open(page.as_uri())


def _run(changes: list[str], named: Mapping[str, str | None], cell_timeout: int, **choices: Any) -> None:
    from llama_sft_helpers.demo_model import ModelBuildError
    from llama_sft_helpers.execution import RunError
    from llama_sft_helpers.run import run_notebooks
    from llama_sft_helpers.settings import SettingsError, parse_settings

    try:
        settings = parse_settings(changes, **named)
        run_notebooks(settings=settings, cell_timeout_seconds=cell_timeout or None, **choices)
    except (RunError, SettingsError, ModelBuildError) as error:
        _fail(error)
    except KeyboardInterrupt:
        typer.echo(
            "\nInterrupted. Finished notebooks and checkpoints are kept: run again to resume.", err=True
        )
        raise typer.Exit(128 + signal.SIGINT) from None


@app.command()
def check(
    profile: ProfileOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Compare this machine with what the series is tested with; exit code 1 if something must be fixed."""
    from llama_sft_helpers.environment.checks import MUST_FIX, list_problems, summarize_environment
    from llama_sft_helpers.profiles import ProfileError, read_profile

    try:
        summary = summarize_environment(read_profile(profile) if profile else None)
    except ProfileError as error:
        _fail(error)
    problems = list_problems(summary)
    if as_json:
        report = {"ok": not problems, "problems": problems, "components": summary.to_dict(orient="records")}
        typer.echo(json.dumps(report, indent=2))
    else:
        colours = {"ok": "green", **dict.fromkeys(MUST_FIX, "red")}
        _print_table(summary.drop(columns="fix"), "This machine", colours)
        for problem in problems:
            typer.secho(problem, fg="red")
    raise typer.Exit(1 if problems else 0)


def _print_table(frame: pd.DataFrame, title: str, colours: Mapping[str, str] | None = None) -> None:
    """Print a table in the terminal's width; ``colours`` gives some cells of the last column theirs."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(*map(str, frame.columns), title=title)
    for row in frame.itertuples(index=False):
        *cells, last = (f"{cell:.2f}" if isinstance(cell, float) else str(cell) for cell in row)
        table.add_row(*map(Text, cells), Text(last, (colours or {}).get(last, "")))
    Console(highlight=False).print(table)


@app.command()
def plan(
    profile: ProfileOption = None,
    *,
    gpu_gib: Annotated[
        float | None, typer.Option(min=1, help="Your card's GiB; exit code 1 if the plan does not fit it.")
    ] = None,
    quantization: Annotated[str, typer.Option(help="int8, nf4 or 16-bit.")] = "int8",
    model: ModelOption = None,
    max_length: Annotated[int | None, typer.Option(min=1, help="Longest row, in tokens.")] = None,
    batch: Annotated[int | None, typer.Option(min=1, help="Rows in a micro-batch.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """Plan the GPU memory of a training step, component by component, before spending it."""
    from llama_sft_helpers.demo_model import ModelBuildError
    from llama_sft_helpers.profiles import load_profile

    asked: Any = {"model_id": model, "max_length": max_length, "per_device_train_batch_size": batch}
    try:
        chosen = load_profile(profile, **{name: value for name, value in asked.items() if value})
        config = _model_config(chosen.model_id)
        fits = _print_plan(config, chosen, quantization, gpu_gib, as_json)
    except (ValueError, OSError, ModelBuildError) as error:
        _fail(error)
    else:
        raise typer.Exit(0 if fits or gpu_gib is None else 1)


def _print_plan(
    config: ModelConfig, profile: Profile, quantization: str, gpu_gib: float | None, as_json: bool
) -> bool:
    """Print the plan and its verdict on cards; whether it fits every card asked about."""
    from llama_sft_helpers.memory.plan import CARDS_GIB, plan_fit, plan_memory

    plan = plan_memory(config, profile, quantization=quantization)
    cards = {"yours": gpu_gib} if gpu_gib else CARDS_GIB
    fit = plan_fit(config, profile, quantization=quantization, cards_gib=cards)
    if as_json:
        tables = {"plan": plan.to_dict("records"), "fit": fit.to_dict("records")}
        content = {"profile": profile.name, "quantization": quantization, **tables}
        typer.echo(json.dumps(content, indent=1))
    else:
        _print_table(plan, f"{profile.name}, {quantization}: {plan['gib'].sum():.2f} GiB in all")
        _print_table(fit, "On a card")
    return bool((fit["verdict"] != "does not fit").all())


def _model_config(model_id: str) -> ModelConfig:
    """A model's configuration; Llama 3 8B's comes with this package, as the hub's needs a token."""
    from transformers import AutoConfig

    from llama_sft_helpers.core.llama import is_llama3, load_llama3_config

    return load_llama3_config() if is_llama3(model_id, "8B") else AutoConfig.from_pretrained(model_id)


@app.command()
def chat(
    adapter: Annotated[Path, typer.Argument(help="Adapter folder that notebook 06 wrote.")],
    base_model: Annotated[
        str | None, typer.Option(help="Base model; default: what the adapter names.")
    ] = None,
    prompt: Annotated[str | None, typer.Option(help="Answer this one instruction and leave.")] = None,
    base: Annotated[bool, typer.Option("--base", help="Start with the adapter switched off.")] = False,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 256,
) -> None:
    """Talk to a trained adapter on its 8-bit base model; answers stream, and end at EOS."""
    from llama_sft_helpers.data.formats import render_prompt
    from llama_sft_helpers.evaluation.adapter import AdapterError
    from llama_sft_helpers.evaluation.chat import ChatError, run_chat, stream_answer

    def respond(instruction: str, tuned: bool) -> Generator[str, None, None]:
        text = render_prompt(instruction, tokenizer, "chat" if tokenizer.chat_template else "plain")
        return stream_answer(model, tokenizer, text, tuned=tuned, max_new_tokens=max_new_tokens)

    try:
        model, tokenizer = _load_adapter(adapter, base_model)
        run_chat(respond, tuned=not base, prompt=prompt)
    except (AdapterError, ChatError) as error:
        _fail(error)


def _load_adapter(folder: Path, base_model: str | None) -> tuple[Any, Any]:
    """The adapter on a fresh 8-bit base, and the tokenizer with the template that training used."""
    import logging
    import warnings

    # bitsandbytes logs a line for every int8 product and one on import, the hub one for every retry; torch
    # warns of what torchao 0.17 registers, which peft imports where Python is 3.13
    for name in ("bitsandbytes", "huggingface_hub", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)
    # peft 0.21 asks newer versions of transformers by an older name
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")

    import torch
    import transformers
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, GenerationConfig

    from llama_sft_helpers.data.formats import training_template
    from llama_sft_helpers.evaluation.adapter import AdapterError, check_adapter, find_base_model
    from llama_sft_helpers.profiles import device_map

    transformers.utils.logging.disable_progress_bar()
    base_model = base_model or find_base_model(folder)
    try:
        model = AutoModelForCausalLM.from_pretrained(
            base_model,
            quantization_config=BitsAndBytesConfig(load_in_8bit=True),
            device_map=device_map(),
            # the files' type, but float32 on a CPU: many compute 16-bit numbers slowly, and training used it
            dtype="auto" if torch.cuda.is_available() else torch.float32,
        )
        has_tokenizer = (folder / "tokenizer_config.json").is_file()
        tokenizer = AutoTokenizer.from_pretrained(folder if has_tokenizer else base_model)
    except (OSError, ValueError) as error:
        raise AdapterError(f"The base model {base_model!r} cannot be loaded: {error}") from error
    if not has_tokenizer:
        tokenizer.chat_template = training_template(tokenizer, "alpaca")
    model.generation_config = GenerationConfig(eos_token_id=tokenizer.eos_token_id)
    check_adapter(folder, model, base_model)
    return PeftModel.from_pretrained(model, folder), tokenizer


def _fail(error: Exception) -> NoReturn:
    typer.secho(f"error: {error}", fg="red", err=True)
    raise typer.Exit(1)


if __name__ == "__main__":
    app()
