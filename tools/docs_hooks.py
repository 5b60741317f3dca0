"""MkDocs hook: builds the site's pages from the files that already hold their content.

The README becomes the start page, the notebooks are taken as recorded, one API section is made per module,
and the benchmark page is drawn from ``benchmarks/results/*.json``. Nothing is copied into ``docs/``.
"""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.plugins import event_priority
from mkdocs.structure.files import File, Files

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
    for path in sorted((ROOT / "notebooks").glob("[0-9][0-9]_*.ipynb")):
        files.append(
            File.generated(config, f"notebooks/{path.name}", abs_src_path=str(_notebook(path, blob)))
        )
    return files


def _markdown(path: Path, blob: str) -> str:
    """A page of the repository, with links to files outside the site pointing at the repository."""
    text = path.read_text(encoding="utf-8").replace("](docs/", "](").replace('src="docs/', 'src="')
    return re.sub(r"\]\((?!https?://|#|notebooks/|images/|failures\.md)([\w./-]+)\)", rf"]({blob}\1)", text)


def _notebook(path: Path, blob: str) -> Path:
    text = path.read_text(encoding="utf-8").replace("](../", f"]({blob}")
    text = re.sub(r"\]\((\d\d_\w+)\.ipynb\)", r"](../\1/)", text)
    target = SCRATCH / path.name
    target.parent.mkdir(parents=True, exist_ok=True)
    if not target.is_file() or target.read_text(encoding="utf-8") != text:
        target.write_text(text, encoding="utf-8")
    return target


def _api_page() -> str:
    modules = sorted(path.stem for path in (ROOT / "llama_sft_helpers").glob("[a-z]*.py"))
    ordered = [*STEPS, *(name for name in modules if name not in STEPS)]
    sections = [f"## {name}\n\n{_first_line(name)}\n\n::: llama_sft_helpers.{name}\n" for name in ordered]
    return "\n".join(["# API reference\n\nOne module per notebook, then those they share.\n", *sections])


def _first_line(module: str) -> str:
    tree = ast.parse((ROOT / "llama_sft_helpers" / f"{module}.py").read_text(encoding="utf-8"))
    return (ast.get_docstring(tree) or "").partition("\n")[0]


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
        parts.append(_facts(result))
        parts.extend(_table(rows) for rows in _row_lists(result))
    return "\n\n".join(parts)


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
