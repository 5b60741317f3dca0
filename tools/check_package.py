"""Rules for the package: helpers look, steps stand apart, each public name has one home."""

from __future__ import annotations

import ast
import functools
import importlib.metadata
import re
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path

from packaging.utils import canonicalize_name
from repository import Repository, called, code, own_imports

STEPS = ("environment", "login", "quantization", "lora", "data", "training", "evaluation", "speed")
# Steps act in notebooks; a helper that runs one of these hides the lesson.
PIPELINE_CALLS = {"from_pretrained", "get_peft_model", "SFTTrainer", "train", "merge_and_unload"}
# What a module may run after all, and why.
EXCEPTIONS = {
    "demo_model": {"from_pretrained"},  # The builder reads the GGUF.
    "cli": {"from_pretrained"},  # `chat` loads the adapter it talks to.
}
# What is imported only where it is there, and why none of it is a requirement.
NOT_REQUIRED = {
    "google": "google.colab is Colab's own",
    "gguf": "builds the demo model; its error names the command that installs it",
    "xllamacpp": "llama.cpp for the program that notebook 07 runs; 07 installs it into a folder of its own",
    "triton": "torch brings it where there is a GPU",
}
# What nothing here imports by name, and who needs it.
NOT_IMPORTED = {
    "accelerate": "transformers places a model's layers and trains with it",
    "ipykernel": "nbclient runs the notebooks in it",
    "jinja2": "transformers renders chat templates with it, and pandas coloured tables",
}
MOST_LINES = 350
FORBIDDEN_CALLS = ("pickle.load", "pickle.loads", "eval", "exec", "os.system")


def helpers_look(repo: Repository) -> Iterator[str]:
    """No helper runs a step of the pipeline; each call is judged by itself."""
    for path in repo.modules:
        allowed = EXCEPTIONS.get(repo.module_name(path), set())
        for node in ast.walk(ast.parse(repo.text(path))):
            if not isinstance(node, ast.Call) or _switches_a_mode(node):
                continue
            if called(node) in PIPELINE_CALLS - allowed:
                yield repo.at(path, node.lineno, f"calls {called(node)}; that call belongs in a notebook")


def _switches_a_mode(call: ast.Call) -> bool:
    """``model.train()`` and ``.train(mode)`` switch a module's mode; only a trainer's ``train`` trains."""
    function = call.func
    if not isinstance(function, ast.Attribute) or function.attr != "train":
        return False
    return "trainer" not in ast.unparse(function.value).lower()


def _imports(repo: Repository) -> dict[str, set[str]]:
    """Room -> the other rooms that its modules import."""
    graph: dict[str, set[str]] = {repo.room(path): set() for path in repo.modules}
    graph.pop("__init__", None)
    for path in repo.modules:
        if path != repo.package / "__init__.py":
            names = [name.split(".")[1] for _, name in own_imports(repo.text(path))]
            graph[repo.room(path)] |= set(names) & set(graph) - {repo.room(path)}
    return graph


def _reached(graph: dict[str, set[str]], start: str) -> set[str]:
    """All that ``start`` imports, and what that imports in turn."""
    found: set[str] = set()
    waiting = set(graph[start])
    while waiting:
        found.add(name := waiting.pop())
        waiting |= graph[name] - found
    return found


def dependencies_point_one_way(repo: Repository) -> Iterator[str]:
    """No step reaches another, nothing reaches itself, and ``core`` imports nothing of the package."""
    graph = _imports(repo)
    for room in graph:
        forbidden = {room, *(STEPS if room in STEPS else ()), *(graph if room == "core" else ())}
        if found := sorted(_reached(graph, room) & forbidden):
            yield f"llama_sft_helpers/{room}:1: reaches {', '.join(found)}; move what both need to core"


def _defined(text: str) -> set[str]:
    """Names that a module defines itself, imports left out."""
    names = set()
    for node in ast.parse(text).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        targets = node.targets if isinstance(node, ast.Assign) else []
        for target in [node.target] if isinstance(node, ast.AnnAssign) else targets:
            names |= {word.id for word in ast.walk(target) if isinstance(word, ast.Name)}
    return names


def _file_of(repo: Repository, package: str, module: str) -> Path:
    """The file of a module as a table of contents names it."""
    start = repo.package if module.startswith("core.") else repo.package / package
    return start.joinpath(*module.split(".")).with_suffix(".py")


def contents_are_true(repo: Repository) -> Iterator[str]:
    """A table of contents names what its modules define, with a line that says what it is."""
    for package, table in repo.contents.items():
        path = repo.package / package / "__init__.py"
        lines = repo.text(path).splitlines()
        for name, module in table.items():
            place = next(i for i, line in enumerate(lines, 1) if f'"{name}":' in line)
            if name not in _defined(repo.text(_file_of(repo, package, module))):
                yield repo.at(path, place, f"{module} does not define {name}; correct the table")
            if not re.search(r"  # .{10,}", lines[place - 1]):
                yield repo.at(path, place, f"{name} has no remark; say in one line what it is")


def names_have_one_path(repo: Repository) -> Iterator[str]:
    """Each public name is offered once, and no module hides it by carrying the same name."""
    names = Counter(name for table in repo.contents.values() for name in table)
    for path in [*repo.package.glob("*.py")]:
        if path.stem in (*STEPS, "profiles", "tables", "sliders"):
            names.update(name for name in _defined(repo.text(path)) if not name.startswith("_"))
    for package, table in repo.contents.items():
        path = repo.package / package / "__init__.py"
        for name in table:
            if names[name] > 1:
                yield repo.at(path, 1, f"{name} is offered in {names[name]} places; keep one")
            if (repo.package / package / f"{name}.py").exists():
                yield repo.at(path, 1, f"the module {name} hides the function; rename the module")


def no_detours(repo: Repository) -> Iterator[str]:
    """Outside the package a public name comes from the package that offers it, not from its module."""
    offered = {
        f"llama_sft_helpers.{repo.module_name(_file_of(repo, package, module))}.{name}": package
        for package, table in repo.contents.items()
        for name, module in table.items()
    }
    folders = [repo.root / name for name in ("tests", "benchmarks", "tools")]
    for path in sorted(path for folder in folders for path in folder.rglob("*.py")):
        for line, name in own_imports(repo.text(path)):
            if name in offered:
                yield repo.at(path, line, f"{name}: import it from llama_sft_helpers.{offered[name]}")


def imports_are_declared(repo: Repository) -> Iterator[str]:
    """What is imported is a requirement: huggingface_hub 2 came without httpx, and notebook 02 stopped."""
    declared = repo.dependencies.keys() | repo.of_extra("colab").keys()
    for path, place, name, owners in _imports_of_others(repo):
        if not owners & declared:
            yield repo.at(path, place, f"imports {name}, which nothing declares; add it to pyproject.toml")


def extras_are_imported_late(repo: Repository) -> Iterator[str]:
    """A module can be imported without the extras: what only they bring is imported in functions."""
    brought = repo.of_extra("colab").keys() - repo.dependencies.keys()
    for path in repo.modules:
        for statement in ast.parse(repo.text(path)).body:
            imports = _third_party(statement) if isinstance(statement, ast.Import | ast.ImportFrom) else ()
            for line, name in imports:
                if _owners(name) & brought:
                    yield repo.at(
                        path, line, f"imports {name}, an extra's; do so in the function that needs it"
                    )


def requirements_are_used(repo: Repository) -> Iterator[str]:
    """What is required is imported, or ``NOT_IMPORTED`` says who needs it."""
    imported = {owner for *_, owners in _imports_of_others(repo) for owner in owners}
    required = repo.dependencies | repo.of_extra("run") | repo.of_extra("widgets")
    for name in sorted(required.keys() - imported - NOT_IMPORTED.keys()):
        yield repo.at(repo.root / "pyproject.toml", 1, f"requires {name}, which nothing imports; take it out")


@functools.cache  # two rules ask
def _imports_of_others(repo: Repository) -> list[tuple[Path, int, str, set[str]]]:
    """File, place and name of each import of another project, and the distributions that bring it."""
    return [
        (path, place or line, name, _owners(name))
        for path in [*repo.modules, *repo.notebooks]
        for place, tree in code(path)
        for line, name in _third_party(tree)
    ]


def _owners(package: str) -> set[str]:
    """Normalized names of the distributions that bring a package."""
    return {canonicalize_name(owner) for owner in _distributions().get(package, [package])}


@functools.cache
def _distributions() -> Mapping[str, list[str]]:
    return importlib.metadata.packages_distributions()


def _third_party(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and package of each import that comes neither with Python nor from here."""
    known = {*sys.stdlib_module_names, *NOT_REQUIRED, "llama_sft_helpers"}
    for node in ast.walk(tree):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and not node.level:
            names = [node.module or ""]
        yield from ((node.lineno, top) for name in names if (top := name.partition(".")[0]) not in known)


def modules_are_short(repo: Repository) -> Iterator[str]:
    """A module can be read in one go."""
    for path in [*repo.modules, *(repo.root / "tools").glob("*.py")]:
        lines = len(repo.text(path).splitlines())
        if lines > MOST_LINES:
            yield repo.at(path, MOST_LINES, f"has {lines} lines; split it, {MOST_LINES} are the limit")


def nothing_runs_foreign_code(repo: Repository) -> Iterator[str]:
    """No pickle, no remote code, no shell, no star import, no code that never runs."""
    benchmarks = (repo.root / "benchmarks").glob("*.py")
    for path in [*repo.modules, *benchmarks, *repo.notebooks]:
        for place, tree in code(path):
            for node in ast.walk(tree):
                if fault := _fault(node):
                    yield repo.at(path, place or node.lineno, f"{fault}; find a way without")


def _fault(node: ast.AST) -> str:
    """What is wrong with one node of a syntax tree; empty where nothing is."""
    if isinstance(node, ast.keyword) and node.arg in ("trust_remote_code", "weights_only"):
        safe = isinstance(node.value, ast.Constant) and node.value.value is (node.arg == "weights_only")
        return "" if safe else f"passes {node.arg}={ast.unparse(node.value)}"
    if isinstance(node, ast.Constant) and node.value == "trust_remote_code":
        return "names trust_remote_code in a string"
    if isinstance(node, ast.Call):
        return _call_fault(ast.unparse(node.func), [word.arg for word in node.keywords])
    if isinstance(node, ast.ImportFrom) and node.names[0].name == "*":
        return "imports a star"
    never = isinstance(node, ast.If) and ast.unparse(node.test) == "False"
    return "has a block under `if False`" if never else ""


def _call_fault(function: str, keywords: list[str | None]) -> str:
    if function in FORBIDDEN_CALLS:
        return f"calls {function}"
    if function == "torch.load" and "weights_only" not in keywords:
        return "calls torch.load without weights_only=True"
    return "passes shell=" if "shell" in keywords else ""


RULES = (
    helpers_look,
    dependencies_point_one_way,
    contents_are_true,
    names_have_one_path,
    no_detours,
    imports_are_declared,
    extras_are_imported_late,
    requirements_are_used,
    modules_are_short,
    nothing_runs_foreign_code,
)
