"""MkDocs hook: builds the site's pages from the files that already hold their content.

The README becomes the start page, the notebooks are taken as recorded, one API section is made per
module or package, and the benchmark page is drawn from ``benchmarks/results/*.json``. Nothing is
copied into ``docs/``.
"""

from __future__ import annotations

import json
import re
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import nbformat
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.plugins import event_priority
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from llama_sft_helpers.memory import plan_memory, planned_peak_gib
from llama_sft_helpers.notebook_page import describe_figures
from llama_sft_helpers.profiles import read_profile
from llama_sft_helpers.speed import plot_ladder, summarize_ladder
from llama_sft_helpers.training import summarize_advice

with warnings.catch_warnings():  # mkdocs shows every deprecation, those between two libraries too
    warnings.simplefilter("ignore")
    import matplotlib.pyplot as plt

ROOT = Path(__file__).parent.parent
SCRATCH = ROOT / ".cache" / "docs"
STEPS = ("environment", "login", "quantization", "lora", "data", "training", "evaluation", "speed")


@event_priority(100)  # before mkdocs-jupyter, which looks for notebooks among the files
def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated pages."""
    blob = f"{config.repo_url}/blob/main/"
    pages = {
        "index.md": _markdown(ROOT / "README.md", blob),
        "CONTRIBUTING.md": _markdown(ROOT / "CONTRIBUTING.md", blob),
        "CHANGELOG.md": _markdown(ROOT / "CHANGELOG.md", blob),
        "api.md": _api_page(),
        "benchmarks.md": _benchmarks_page(blob),
    }
    for uri, content in pages.items():
        files.append(File.generated(config, uri, content=content))
    for path in _figures():
        files.append(File.generated(config, f"figures/{path.name}", abs_src_path=str(path)))
    for path in sorted((ROOT / "notebooks").glob("[0-9][0-9]_*.ipynb")):
        _notebook(path, blob)
        folders = {"src_dir": str(SCRATCH), "dest_dir": config.site_dir}
        # not File.generated: mkdocs-jupyter wraps the file and would lose a generated one's path
        files.append(File(f"notebooks/{path.name}", use_directory_urls=config.use_directory_urls, **folders))
    return files


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Give the notebooks' figures their text alternatives."""
    if not page.file.src_uri.endswith(".ipynb"):
        return html
    return describe_figures(html, nbformat.read(SCRATCH / page.file.src_uri, as_version=4))


def _markdown(path: Path, blob: str) -> str:
    """A page of the repository, with links to files outside the site pointing at the repository."""
    text = path.read_text(encoding="utf-8").replace("](docs/", "](").replace('src="docs/', 'src="')
    return re.sub(r"\]\((?!https?://|#|notebooks/|images/|failures\.md)([\w./-]+)\)", rf"]({blob}\1)", text)


def _notebook(path: Path, blob: str) -> None:
    """A copy of a notebook whose links lead into the site or the repository."""
    text = path.read_text(encoding="utf-8").replace("](../", f"]({blob}")
    text = re.sub(r"\]\((\d\d_\w+)\.ipynb\)", r"](../\1/)", text)
    target = SCRATCH / "notebooks" / path.name
    target.parent.mkdir(parents=True, exist_ok=True)
    if not target.is_file() or target.read_text(encoding="utf-8") != text:
        target.write_text(text, encoding="utf-8")


def _api_page() -> str:
    package = ROOT / "llama_sft_helpers"
    modules = {path.stem: [path.stem] for path in sorted(package.glob("[a-z]*.py"))}
    for contents in sorted(package.glob("*/__init__.py")):
        name = contents.parent.name
        modules[name] = [f"{name}.{path.stem}" for path in sorted(contents.parent.glob("[a-z]*.py"))]
    ordered = [*STEPS, *(name for name in modules if name not in STEPS)]
    lines = ["# API reference", "One module or package per notebook, then those they share."]
    for name in ordered:
        lines += [f"## {name}", *(f"::: llama_sft_helpers.{module}" for module in modules[name])]
    return "\n\n".join(lines) + "\n"


def _benchmarks_page(blob: str) -> str:
    parts = [
        "# Benchmarks",
        "Every figure here is read from a JSON file that a script in `benchmarks/` wrote; "
        "each names its card, versions and command.",
    ]
    for path in sorted((ROOT / "benchmarks" / "results").glob("*.json")):
        result = json.loads(path.read_text(encoding="utf-8"))
        parts.append(
            f"## {path.stem.replace('_', ' ')}\n\n[`{path.name}`]({blob}benchmarks/results/{path.name})"
        )
        if _draw(path.stem, result):
            parts.append(f"![{path.stem.replace('_', ' ')}](figures/{path.stem}.svg)")
        parts.append(_facts(result))
        if path.stem == "advice_sweep":
            parts.append(_table(summarize_advice(result).reset_index().to_dict("records")))
        parts.extend(_table(rows) for rows in _row_lists(result))
    return "\n\n".join(parts)


def _figures() -> list[Path]:
    """Every result that can be drawn, as an SVG."""
    SCRATCH.mkdir(parents=True, exist_ok=True)
    drawn = []
    for path in sorted((ROOT / "benchmarks" / "results").glob("*.json")):
        figure = _draw(path.stem, json.loads(path.read_text(encoding="utf-8")))
        if figure:
            target = SCRATCH / f"{path.stem}.svg"
            figure.savefig(target, bbox_inches="tight")
            plt.close(figure)
            drawn.append(target)
    return drawn


def _draw(name: str, result: Any) -> Any:
    """The figure of a result, or None for a kind that is shown as a table only."""
    if name.startswith("speed_h200"):
        ladder = summarize_ladder(result, epoch_tokens=1, price_per_hour=0)
        return plot_ladder(ladder, "tokens_per_second").figure
    if name.startswith("memory_"):
        return _draw_memory(result["results"]).figure
    if name == "cpu_demo":
        bars = plt.subplots(figsize=(7, 3))[1]
        bars.barh(list(result["seconds"]), list(result["seconds"].values()), color="#0072B2")
        bars.invert_yaxis()
        bars.set(title=f"make record: {result['card']}", xlabel="seconds")
        return bars.figure
    return None


def _draw_memory(results: list[dict[str, Any]]) -> Any:
    """Planned against measured peak, a dot for each setting; on the line they are equal."""
    config = json.loads((ROOT / "llama_sft_helpers/configs/llama3_8b.json").read_text(encoding="utf-8"))
    planned = []
    for row in results:
        setting = {"gradient_accumulation_steps": 1, **row["setting"]}
        quantization = setting.pop("quantization")
        profile = read_profile("colab-a100", fast=False, **setting)
        plan = plan_memory(SimpleNamespace(**config), profile, quantization=quantization)
        planned.append(planned_peak_gib(plan))
    measured = [row["measured_gib"] for row in results]
    axes = plt.subplots(figsize=(4.5, 4))[1]
    axes.plot([0, max(measured)], [0, max(measured)], color="0.6", linewidth=1)
    axes.plot(measured, planned, "o", color="#0072B2", alpha=0.7)
    axes.set(title="Planned against measured", xlabel="measured peak, GiB", ylabel="planned peak, GiB")
    return axes


def _facts(result: Any) -> str:
    if not isinstance(result, dict):
        return ""
    lines = []
    for key, value in result.items():
        if isinstance(value, str | int | float):
            lines.append(f"- {key}: {_text(value)}")
        elif isinstance(value, dict) and all(isinstance(v, str | int | float | None) for v in value.values()):
            lines.append(f"- {key}: " + ", ".join(f"{k} {_text(v)}" for k, v in value.items()))
    return "\n".join(lines)


def _row_lists(result: Any) -> list[list[dict[str, Any]]]:
    values = result.values() if isinstance(result, dict) else [result]
    return [v for v in values if isinstance(v, list) and v and all(isinstance(row, dict) for row in v)]


def _table(rows: list[dict[str, Any]]) -> str:
    columns = [key for key, value in rows[0].items() if isinstance(value, str | int | float | bool | None)]
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    lines += ["| " + " | ".join(_text(row.get(column)) for column in columns) + " |" for row in rows]
    return "\n".join(lines)


def _text(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return "" if value is None else str(value).lower()
    if isinstance(value, float):
        return f"{value:,.4g}" if abs(value) < 1000 else f"{value:,.0f}"
    return str(value).replace("|", "\\|").replace("\n", " ")
