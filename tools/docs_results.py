"""Charts and tables of the benchmark page: ``docs/benchmarks.md`` is a template that calls these functions.

A chart is a table whose cells have bars, so that it reads without its colours and fits every screen.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from html import escape
from typing import Any

import pandas as pd

from llama_sft_helpers.core.llama import load_llama3_config
from llama_sft_helpers.memory import plan_memory, planned_peak_gib
from llama_sft_helpers.profiles import read_profile
from llama_sft_helpers.speed import read_results
from llama_sft_helpers.tables import in_words
from llama_sft_helpers.training import summarize_advice


def bars(
    rows: Iterable[tuple[str, float | None]],
    form: str = "{:,.0f}",
    missing: str = "",
    mark: Mapping[str, float] | None = None,
) -> str:
    """A bar for each name and value, the longest as wide as the table; ``mark`` is a second value by name."""
    rows, marks = list(rows), mark or {}
    longest = max([value or 0 for _, value in rows] + list(marks.values()))
    lines = []
    for name, value in rows:
        shown = missing if value is None else form.format(value)
        bar = f'<span style="width:{max(value or 0, 0) / longest:.1%}"></span>'
        if name in marks:
            bar += f'<i style="left:{marks[name] / longest:.1%}"></i>'
            shown += f" / {form.format(marks[name])}"
        lines.append(f'<tr><th scope="row">{escape(name)}</th><td>{bar}</td><td>{shown}</td></tr>')
    return f'<table class="bars"><tbody>{"".join(lines)}</tbody></table>'


def source(*names: str) -> str:
    """Where the figures of a section come from: card, command and versions of each result, and its file."""
    text = []
    for name in names:
        found = read_results(name)
        versions = ", ".join(f"{package} {version}" for package, version in found["versions"].items())
        link = f"[`{name}.json`](../benchmarks/results/{name}.json)"
        text.append(f"- {link}: {found['card']}; `{found['command']}`; {versions}.")
    listed = "\n".join(text)
    return f'<details markdown="1"><summary>How it was measured</summary>\n\n{listed}\n\n</details>'


def rungs(name: str, before: str = "") -> list[tuple[str, float | None]]:
    """Tokens per second of each rung of a ladder."""
    return [(before + rung["rung"], rung.get("tokens_per_second")) for rung in read_results(name)["rungs"]]


def kernels(tokens: str) -> list[tuple[str, float]]:
    """Milliseconds of each way to multiply."""
    variants = read_results("int8_kernels")["variants"]
    return [(found["variant"], found["step_ms"][tokens]) for found in variants if "step_ms" in found]


def losses(after: str) -> list[tuple[str, float]]:
    """By how many percent each variant's loss is above that of the product in 16 bits."""
    return [
        (name, steps[after]["percent"]) for name, steps in read_results("int8_quality")["summary"].items()
    ]


def memory(*names: str) -> str:
    """Measured peak of each setting as a bar, the planned one as a mark on it."""
    measured, planned = {}, {}
    for name in names:
        for row in read_results(name)["results"]:
            setting = {"gradient_accumulation_steps": 1, **row["setting"]}
            label = _setting(setting)
            quantization = setting.pop("quantization")
            profile = read_profile("colab-a100", fast=False, **setting)
            measured[label] = row["measured_gib"]
            planned[label] = planned_peak_gib(
                plan_memory(load_llama3_config(), profile, quantization=quantization)
            )
    return bars(measured.items(), "{:.1f}", mark=planned)


def _setting(setting: Mapping[str, Any]) -> str:
    """A training's setting in a few words."""
    words = [
        setting["quantization"],
        f"{setting['per_device_train_batch_size']} × {setting['max_length']:,} tokens",
        "packed" if setting["packing"] else "padded",
    ]
    switches = {
        "gradient_checkpointing": "checkpointing", "fast_int8": "fast int8", "compile_layers": "compiled",
    }  # fmt: skip
    words += [word for key, word in switches.items() if setting.get(key)]
    if (budget := setting.get("activation_memory_budget", 1)) < 1:
        words.append(f"budget {budget:g}")
    return ", ".join(words)


def presets() -> list[tuple[str, float]]:
    """The share of its card that each Colab profile fills."""
    rows = read_results("memory_presets_h100")["results"]
    return [(f"{row['preset']}, {row['card_gib']:.0f} GiB", row["share_of_card"]) for row in rows]


def several_gpus() -> list[tuple[str, float]]:
    """Tokens per second of each configuration on one and on two GPUs."""
    words = {
        "ddp-int8": "DDP, int8",
        "fast": "DDP, fast recipe",
        "fsdp-nf4": "FSDP, nf4",
        "70b": "FSDP, 70B's layers",
    }
    runs = [run for run in read_results("several_gpus")["runs"] if run["part"] in words]
    return sorted(
        (f"{words[run['part']]}, GPUs: {run['processes']}", run["tokens_per_second"]) for run in runs
    )


def gguf_files() -> list[tuple[str, float]]:
    """MiB of each format, and how many answers are those of the merged model."""
    rows = []
    for name, file in read_results("gguf_answers")["gguf, llama.cpp"].items():
        (same,) = (value for key, value in file.items() if key.startswith("with the merged model"))
        rows.append((f"{name}: {same['equal']} of {same['prompts']} the same", file["mib"]))
    return rows


def minutes() -> str:
    """Minutes of each notebook by model and profile."""
    runs = pd.DataFrame(read_results("notebooks_on_gpu")["runs"])
    runs["model"] = runs["model"].map({"llama3-8b-shape": "8B's shape", "smollm2": "SmolLM2"})
    runs["run"] = runs["model"] + ", " + runs["profile"].str.removeprefix("colab-").str.upper()
    table = runs.assign(minutes=runs["seconds"] / 60).pivot_table("minutes", "notebook", "run")
    return _markdown(table, 1)


def pair_minutes() -> list[tuple[str, float]]:
    """The median minutes of the demo and of the tests, at the earlier and at the later commit."""
    return [
        (f"{part}, {when}", read_results(f"minutes_{part}")["summary"][part][f"minutes_{key}"])
        for part in ("demo", "tests")
        for key, when in (("old", "before"), ("new", "after"))
    ]


def cpu_shares(part: str, limit: str) -> list[tuple[str, float]]:
    """By cause its share of a part's CPU time, the largest first."""
    seconds = read_results("cpu_profile")["limits"][limit][part]["seconds"]
    whole = sum(seconds.values())
    return sorted(((cause, value / whole) for cause, value in seconds.items()), key=lambda row: -row[1])


def advice() -> str:
    """The best setting for each number of rows."""
    return _markdown(summarize_advice(read_results("advice_sweep")), 2, learning_rate="{:.0e}")


def _markdown(table: pd.DataFrame, decimals: int, **formats: str) -> str:
    shown = in_words(table, decimals, **formats).reset_index()
    lines = [" | ".join(shown.columns), "|".join(["---"] * len(shown.columns))]
    lines += [" | ".join(map(str, row)) for row in shown.itertuples(index=False)]
    return "\n".join(f"| {line} |" for line in lines)
