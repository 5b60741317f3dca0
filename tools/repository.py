"""The repository's files as the rules of ``check_repo.py`` read them."""

from __future__ import annotations

import ast
import functools
import re
import tomllib
from functools import cached_property
from pathlib import Path
from typing import Any

import nbformat
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name


class Repository:
    """One tree of files. What is missing reads as empty, so that each rule can be tried on a small tree."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.package = root / "llama_sft_helpers"

    def at(self, path: Path, place: int | str, text: str) -> str:
        """A finding: ``path:line: what, and what to do``; in a notebook the place is its cell."""
        place = f"cell {place}" if path.suffix == ".ipynb" and place else place or 1
        return f"{path.relative_to(self.root)}:{place}: {text}"

    def text(self, path: Path) -> str:
        """A file's text."""
        return path.read_text(encoding="utf-8") if path.is_file() else ""

    @cached_property
    def modules(self) -> list[Path]:
        """The package's Python files."""
        return sorted(self.package.rglob("*.py"))

    @cached_property
    def notebooks(self) -> list[Path]:
        """The series."""
        return sorted((self.root / "notebooks").glob("[0-9][0-9]_*.ipynb"))

    @cached_property
    def readme(self) -> str:
        """The text of README.md."""
        return self.text(self.root / "README.md")

    @cached_property
    def project(self) -> dict[str, Any]:
        """What pyproject.toml holds."""
        return tomllib.loads(self.text(self.root / "pyproject.toml"))

    def requirements(self, name: str) -> dict[str, Requirement]:
        """A requirements file: normalized name -> requirement."""
        lines = [line.partition("#")[0].strip() for line in self.text(self.root / name).splitlines()]
        return by_name([line for line in lines if line])

    @cached_property
    def dependencies(self) -> dict[str, Requirement]:
        """What the package itself requires: normalized name -> requirement."""
        return by_name(self.project.get("project", {}).get("dependencies", []))

    def of_extra(self, name: str) -> dict[str, Requirement]:
        """What an extra of the package requires beside that, from its requirements files."""
        settings = self.project.get("tool", {}).get("setuptools", {}).get("dynamic", {})
        files = settings.get("optional-dependencies", {}).get(name, {}).get("file", [])
        return {name: item for file in files for name, item in self.requirements(file).items()}

    def module_name(self, path: Path) -> str:
        """A module's dotted name below the package."""
        return ".".join(path.relative_to(self.package).with_suffix("").parts)

    def room(self, path: Path) -> str:
        """The package or module directly under ``llama_sft_helpers`` that a file belongs to."""
        return path.relative_to(self.package).parts[0].removesuffix(".py")

    @cached_property
    def contents(self) -> dict[str, dict[str, str]]:
        """Package -> its table of contents: public name -> module."""
        tables = {path.parent.name: _table(self.text(path)) for path in self.package.glob("*/__init__.py")}
        return {name: table for name, table in sorted(tables.items()) if table}


def by_name(lines: list[str]) -> dict[str, Requirement]:
    """Requirements by their normalized names."""
    return {canonicalize_name(item.name): item for item in map(Requirement, lines)}


def _table(code: str) -> dict[str, str]:
    for node in ast.parse(code).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "CONTENTS":
            return dict(ast.literal_eval(node.value))
    return {}


def cells(path: Path) -> list[tuple[int, Any]]:
    """A notebook's code cells, each with its number among all cells, from 1."""
    all_cells = nbformat.read(path, as_version=4).cells
    return [(number, cell) for number, cell in enumerate(all_cells, start=1) if cell.cell_type == "code"]


def python(source: str) -> str:
    """A cell's source with its magic and shell lines passed over, so that it parses and lines stay."""
    return re.sub(r"^(\s*)[%!].*$", r"\1pass", source, flags=re.MULTILINE)


def code(path: Path) -> list[tuple[int, ast.AST]]:
    """Trees of a module, or of a notebook's code cells with their numbers; 0 stands for a whole file."""
    if path.suffix == ".py":
        return [(0, ast.parse(path.read_text(encoding="utf-8")))]
    return [(number, ast.parse(python(cell.source))) for number, cell in cells(path)]


def called(call: ast.Call) -> str:
    """The name that is called: ``f(...)`` gives f, ``a.b.f(...)`` gives f."""
    function = call.func
    if isinstance(function, ast.Attribute):
        return function.attr
    return function.id if isinstance(function, ast.Name) else ""


@functools.cache  # several rules ask for the same files
def own_imports(source: str) -> list[tuple[int, str]]:
    """Line and dotted name of what is imported from this package, functions included."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("llama_sft_helpers"):
            found += [(node.lineno, f"{node.module}.{alias.name}") for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names if alias.name.startswith("llama_sft_helpers.")]
            found += [(node.lineno, name) for name in names]
    return found
