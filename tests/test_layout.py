"""The rules of the house, checked on the files themselves."""

import ast
import importlib
import importlib.metadata
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import nbformat
import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "llama_sft_helpers"
NOTEBOOKS = sorted((ROOT / "notebooks").glob("[0-9][0-9]_*.ipynb"))
MODULES = sorted(PACKAGE.rglob("*.py"))

# A step's notebook -> the real calls that stand visible in it.
REAL_CALLS = {
    "01_environment": ["nvidia-smi", "nvcc"],
    "02_login": ["login", "auth_check"],
    "03_quantization": ["BitsAndBytesConfig", "AutoModelForCausalLM.from_pretrained"],
    "04_lora": ["LoraConfig", "get_peft_model"],
    "05_data": ["AutoTokenizer.from_pretrained", "load_dataset", ".map"],
    "06_training": ["SFTConfig", "SFTTrainer", "trainer.train", "trainer.save_model"],
    "07_evaluation": ["PeftModel.from_pretrained", ".generate", ".merge_and_unload", ".push_to_hub"],
    "08_speed": ["SFTTrainer"],
}
# Steps act in notebooks; a helper that runs one of these hides the lesson.
PIPELINE_CALLS = {"from_pretrained", "get_peft_model", "SFTTrainer", "train", "merge_and_unload"}
# module -> what it may run after all, and why
EXCEPTIONS = {
    "demo_model": {"from_pretrained"},  # the builder reads the GGUF
    "tiny_llama": {"train"},  # the recipe of the tests' model
    "cli": {"from_pretrained"},  # `chat` loads the adapter it talks to
}
STEPS = [name[3:] for name in REAL_CALLS]


def room(path: Path) -> str:
    """The package or module directly under ``llama_sft_helpers`` that a file belongs to."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def module_name(path: Path) -> str:
    return path.relative_to(PACKAGE).with_suffix("").as_posix()


def contents(package: str) -> dict[str, str]:
    """A package's table of contents: public name -> module; empty for one that has none."""
    file = PACKAGE / package / "__init__.py"
    for node in ast.parse(file.read_text(encoding="utf-8")).body if file.is_file() else []:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "CONTENTS":
            return ast.literal_eval(node.value)
    return {}


ROOMS = sorted({room(path) for path in MODULES} - {"__init__"})
CONTENTS = {name: contents(name) for name in ROOMS if contents(name)}


def notebook_code(path: Path) -> str:
    cells = nbformat.read(path, as_version=4).cells
    return "\n".join(cell.source for cell in cells if cell.cell_type == "code")


def visible_calls(code: str) -> set[str]:
    """What a notebook calls, by dotted name, hands over to be called, or runs in the shell."""
    tools = set(re.findall(r"^\s*!\S* ?\d* ?(nvidia-smi|nvcc)", code, flags=re.MULTILINE))
    python = re.sub(r"^(\s*)[%!].*$", r"\1pass", code, flags=re.MULTILINE)
    names = set()
    for node in ast.walk(ast.parse(python)):
        if isinstance(node, ast.Call):
            names.add(ast.unparse(node.func))
            names |= {word.value.id for word in node.keywords if isinstance(word.value, ast.Name)}
    return names | tools


def called(call: ast.Call) -> str:
    """The name that is called: ``f(...)`` gives f, ``a.b.f(...)`` gives f."""
    function = call.func
    if isinstance(function, ast.Attribute):
        return function.attr
    return function.id if isinstance(function, ast.Name) else ""


def switches_a_mode(call: ast.Call) -> bool:
    """``model.train()`` and ``.train(mode)`` switch a module's mode; only a trainer's ``train`` trains."""
    function = call.func
    if not isinstance(function, ast.Attribute) or function.attr != "train":
        return False
    return "trainer" not in ast.unparse(function.value).lower()


def pipeline_calls(tree: ast.AST) -> set[str]:
    """The pipeline's steps that are run, each call judged by itself."""
    found = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and not switches_a_mode(node)]
    return PIPELINE_CALLS & {called(call) for call in found}


def own_imports(tree: ast.AST) -> set[str]:
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("llama_sft_helpers"):
            parts = (node.module or "").split(".")
            found |= {parts[1]} if len(parts) > 1 else {alias.name for alias in node.names}
        if isinstance(node, ast.Import):
            found |= {a.name.split(".")[1] for a in node.names if a.name.startswith("llama_sft_helpers.")}
    return found


@pytest.mark.parametrize("path", MODULES, ids=module_name)
def test_helpers_do_not_run_the_pipeline(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    used = pipeline_calls(tree) - EXCEPTIONS.get(module_name(path), set())
    # Reading a config or a processor is no pipeline step, loading a model is.
    assert not used, f"{path.name} calls {sorted(used)}; those calls belong into a notebook"


@pytest.mark.parametrize(
    ("code", "run"),
    [
        ("trainer = SFTTrainer(model)", {"SFTTrainer"}),
        ("M.from_pretrained('x')", {"from_pretrained"}),
        ("trainer.train()", {"train"}),
        ("model.train()\ntrainer.train()", {"train"}),  # one must not excuse the other
        ("trainer.train()\nmodel.train(mode)", {"train"}),
        ("self.trainer.train(resume_from_checkpoint=x)\nmodel.train()", {"train"}),
        ("SFTTrainer(model).train()", {"SFTTrainer", "train"}),
        ("train()", {"train"}),
        ("model.train()\nmodel.train(False)\nlayer.mlp.train(mode)", set()),
    ],
)
def test_the_pipeline_rule_can_fail(code, run):
    assert pipeline_calls(ast.parse(code)) == run


def reached(graph: dict[str, set[str]], start: str) -> set[str]:
    """All that ``start`` imports, and what that imports in turn."""
    found, waiting = set(), set(graph[start])
    while waiting:
        found.add(name := waiting.pop())
        waiting |= graph.get(name, set()) - found
    return found


@pytest.fixture(scope="module")
def imports() -> dict[str, set[str]]:
    """Room -> the other rooms that its modules import."""
    graph: dict[str, set[str]] = {name: set() for name in ROOMS}
    for path in MODULES:
        if path.parent != PACKAGE or path.stem != "__init__":
            graph[room(path)] |= own_imports(ast.parse(path.read_text(encoding="utf-8"))) - {room(path)}
    return graph


@pytest.mark.parametrize("step", STEPS)
def test_no_step_reaches_another(imports, step):
    others = reached(imports, step) & set(STEPS)
    assert not others, f"{step} reaches {sorted(others)}: move what both need to core"


def test_dependencies_point_one_way(imports):
    assert [name for name in ROOMS if name in reached(imports, name)] == []
    assert imports["core"] == set()


def test_what_is_reached_includes_detours_and_circles():
    graph = {"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": set()}
    assert reached(graph, "a") == {"b", "c"}
    assert "b" in reached(graph, "b")
    assert reached(graph, "d") == set()


# --- Tables of contents ---


def defined(path: Path) -> set[str]:
    """Names that a module defines itself, imports left out."""
    names = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        targets = node.targets if isinstance(node, ast.Assign) else []
        for target in [node.target] if isinstance(node, ast.AnnAssign) else targets:
            names |= {word.id for word in ast.walk(target) if isinstance(word, ast.Name)}
    return names


@pytest.mark.parametrize("package", CONTENTS)
def test_a_table_of_contents_names_what_its_modules_define(package):
    for name, module in CONTENTS[package].items():
        path = ROOT.joinpath(*module_of(package, module).split(".")).with_suffix(".py")
        assert name in defined(path), f"{name}: {module}"
    imported = importlib.import_module(f"llama_sft_helpers.{package}")
    assert dir(imported) == sorted(imported.__all__) == sorted(CONTENTS[package])
    assert all(getattr(imported, name) is not None for name in CONTENTS[package])
    with pytest.raises(AttributeError, match=f"llama_sft_helpers.{package} has no 'nothing'; it offers "):
        imported.nothing  # noqa: B018


@pytest.mark.parametrize("package", CONTENTS)
def test_each_line_of_a_table_of_contents_says_what_the_name_is(package):
    lines = (PACKAGE / package / "__init__.py").read_text(encoding="utf-8").splitlines()
    lines = [line for line in lines if re.match(r'    "\w+": "[\w.]+",', line)]
    assert len(lines) == len(CONTENTS[package])
    assert all(re.search(r"  # .{10,}", line) for line in lines)


def test_each_public_name_has_one_import_path():
    names = [name for table in CONTENTS.values() for name in table]
    names += [
        name
        for path in MODULES
        if path.parent == PACKAGE and room(path) in [*STEPS, "profiles"]
        for name in defined(path)
        if not name.startswith("_")
    ]
    assert sorted(names) == sorted(set(names))
    for package, table in CONTENTS.items():
        # Python sets a package's attribute to the module of that name, which would hide the function.
        assert not set(table) & {path.stem for path in (PACKAGE / package).glob("*.py")}


def module_of(package: str, module: str) -> str:
    """The dotted name of a module as a table of contents names it."""
    return (
        f"llama_sft_helpers.{module}"
        if module.startswith("core.")
        else f"llama_sft_helpers.{package}.{module}"
    )


def detours(code: str) -> list[str]:
    """Public names that are imported from their module instead of from the package that offers them."""
    offered = {
        (module_of(package, table[name]), name) for package, table in CONTENTS.items() for name in table
    }
    imported = [node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.ImportFrom)]
    names = [(node.module or "", alias.name) for node in imported for alias in node.names]
    return [f"{module}.{name}" for module, name in names if (module, name) in offered]


def test_outside_the_package_public_names_come_from_their_package():
    files = [path for folder in ("tests", "benchmarks", "tools") for path in (ROOT / folder).rglob("*.py")]
    found = {path.name: detours(path.read_text(encoding="utf-8")) for path in files}
    assert {name: names for name, names in found.items() if names} == {}
    assert detours("from llama_sft_helpers.lora.tables import plan_adapters, _rows") == [
        "llama_sft_helpers.lora.tables.plan_adapters"
    ]
    assert detours("from llama_sft_helpers.lora import plan_adapters") == []


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_import_from_packages_only(path):
    code = re.sub(r"^(\s*)[%!].*$", r"\1pass", notebook_code(path), flags=re.MULTILINE)
    tree = ast.parse(code)
    assert own_imports(tree) <= {*STEPS, "profiles", "memory", "doctor"}
    modules = [node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    assert [name for name in modules if name.startswith("llama_sft_helpers.") and name.count(".") > 1] == []


@pytest.mark.parametrize("name", [*STEPS, "memory", "doctor", "profiles"])
def test_importing_a_step_imports_nothing_heavy_and_is_quick(name):
    code = (
        "import sys, time; start = time.perf_counter(); "
        f"import llama_sft_helpers.{name}; print(time.perf_counter() - start, *sys.modules)"
    )
    command = [sys.executable, "-c", code]
    runs = [subprocess.run(command, capture_output=True, text=True, check=True).stdout for _ in range(3)]
    assert min(float(run.split()[0]) for run in runs) < 0.2
    assert not {"torch", "transformers", "pandas", "matplotlib", "peft", "trl"} & set(runs[0].split())


def test_the_wheel_has_every_package():
    packages = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"][
        "packages"
    ]
    folders = [path.parent.relative_to(ROOT) for path in MODULES if path.name == "__init__.py"]
    assert sorted(packages) == sorted(
        [".".join(folder.parts) for folder in folders] + ["llama_sft_helpers.results"]
    )


def test_every_step_has_its_notebook_package_tests_and_readme_row():
    assert [path.stem for path in NOTEBOOKS] == list(REAL_CALLS)
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    pattern = (
        r"^\| \[`(\d\d_\w+)`\]\(notebooks/(\w+)\.ipynb\).*?\[`([\w./]+)`\]\(llama_sft_helpers/([\w./]+)\)"
    )
    rows = re.findall(pattern, readme, flags=re.MULTILINE)
    assert [row[0] for row in rows] == list(REAL_CALLS)
    for notebook, file, shown, linked in rows:
        assert notebook == file
        assert shown == linked
        assert re.fullmatch(rf"{notebook[3:]}(\.py|/)", linked)
        assert (PACKAGE / linked).exists()
        assert list((ROOT / "tests" / notebook[3:]).glob("test_*.py"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_show_the_real_calls(path):
    shown = visible_calls(notebook_code(path))
    missing = [
        call
        for call in REAL_CALLS[path.stem]
        if not any(name == call or (call[0] == "." and name.endswith(call)) for name in shown)
    ]
    assert not missing, f"{path.name} does not show {missing}"


def test_an_import_or_another_name_is_no_visible_call():
    code = (
        "from trl import SFTTrainer\nrows.train_test_split(1)\nlogin_widget()\n!timeout 10 nvidia-smi || echo"
    )
    assert visible_calls(code) == {"rows.train_test_split", "login_widget", "nvidia-smi"}
    assert visible_calls("widget(login=login)\nAuto.from_pretrained(1)") == {
        "widget",
        "login",
        "Auto.from_pretrained",
    }


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_keep_the_recipe_literal(path):
    code = notebook_code(path)
    if "LoraConfig(" in code and path.stem == "06_training":
        recipe = re.sub(r"\s+", "", code)
        for setting in ("r=16", "lora_alpha=16", "lora_dropout=0", 'bias="none"', 'task_type="CAUSAL_LM"'):
            assert setting.replace(" ", "") in recipe
        for target in ("q", "k", "v", "o", "gate", "up", "down"):
            assert f'"{target}_proj"' in recipe
    if "BitsAndBytesConfig(" in code:
        assert "load_in_8bit=True" in code
    if path.stem == "03_quantization":
        assert 'device_map={"": 0} if torch.cuda.is_available() else {"": "cpu"}' in code


def test_importing_the_package_imports_nothing_heavy():
    code = "import sys, llama_sft_helpers; print(*sys.modules)"
    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.split()
    assert not {"torch", "transformers", "pandas", "matplotlib", "peft", "trl", "datasets"} & set(loaded)


def test_no_remote_code_and_no_star_imports_anywhere():
    for path in [*MODULES, *NOTEBOOKS, *(ROOT / "benchmarks").glob("*.py")]:
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"trust_remote_code\s*=\s*True", text), path
        assert not re.search(r"^\s*\"?from \S+ import \*", text, flags=re.MULTILINE), path
        assert "if False:" not in text, path


def test_one_version_and_one_repository_address():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    repository = project["urls"]["Repository"]
    slug = repository.removeprefix("https://github.com/")
    assert f"repo_url: {repository}\n" in (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    for path in [*NOTEBOOKS, ROOT / "README.md"]:
        text = path.read_text(encoding="utf-8")
        named = set(re.findall(r"colab\.research\.google\.com/github/([\w.-]+/[\w.-]+)/blob", text))
        named |= set(re.findall(r"git\+https://github\.com/([\w.-]+/[\w.-]+)", text))
        assert named == {slug}, f"{path.name} names {named}"


def test_colab_requirements_leave_torch_numpy_and_pandas_alone():
    lines = (ROOT / "requirements-colab.txt").read_text(encoding="utf-8").splitlines()
    required = [line for line in lines if line and not line.startswith("#")]
    assert {re.split(r"[=<>;! ]", line)[0] for line in required}.isdisjoint({"torch", "numpy", "pandas"})
    assert all(re.search(r"  # .{20,}", line) for line in required), "each line says why it is there"


def third_party_imports(code: str) -> set[str]:
    """The packages that are imported, wherever in the code, that come neither with Python nor from here."""
    python = re.sub(r"^(\s*)[%!].*$", r"\1pass", code, flags=re.MULTILINE)
    names = set()
    for node in ast.walk(ast.parse(python)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom) and not node.level:
            names.add(node.module or "")
    return {name.partition(".")[0] for name in names} - sys.stdlib_module_names - {"llama_sft_helpers"}


def declared() -> dict[str, Requirement]:
    """What installing the package with the notebooks' requirements brings for sure, by normalized name."""
    lines = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["dependencies"]
    lines += (ROOT / "requirements-colab.txt").read_text(encoding="utf-8").splitlines()
    found = [Requirement(line.partition("#")[0]) for line in lines if line.partition("#")[0].strip()]
    return {canonicalize_name(item.name): item for item in found}


# imported where they are there only, and why none of them is a requirement
NOT_REQUIRED = {
    "google": "google.colab is Colab's own",
    "gguf": "builds the demo model; its error names the command that installs it",
    "triton": "torch brings it where there is a GPU",
}


@pytest.mark.parametrize("path", [*MODULES, *NOTEBOOKS], ids=lambda path: path.relative_to(ROOT).as_posix())
def test_what_is_imported_is_declared(path):
    """Another package may stop bringing it: huggingface_hub 2 came without httpx, and 02 stopped."""
    code = notebook_code(path) if path.suffix == ".ipynb" else path.read_text(encoding="utf-8")
    owners = importlib.metadata.packages_distributions()
    for name in sorted(third_party_imports(code) - NOT_REQUIRED.keys()):
        distributions = {canonicalize_name(owner) for owner in owners.get(name, [name])}
        assert distributions & declared().keys(), f"{path.name} imports {name}, which nothing declares"


def test_an_undeclared_import_is_seen():
    magic = "%pip install x\n"
    code = magic + "def f():\n    import httpx\nfrom yaml.nodes import Node\nimport re\nfrom . import a"
    assert third_party_imports(code) == {"httpx", "yaml"}
    assert "httpx" not in declared()
    assert "pyyaml" in declared()


def test_the_package_s_bounds_are_met_by_colabs_image():
    lines = (ROOT / "constraints-colab.txt").read_text(encoding="utf-8").splitlines()
    pins = [Requirement(line.partition("#")[0]) for line in lines if line.partition("#")[0].strip()]
    image = {canonicalize_name(pin.name): next(iter(pin.specifier)).version for pin in pins}
    image["torch"] = "2.11.0"
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    for item in map(Requirement, project["dependencies"]):
        bounds = list(item.specifier)
        assert all(bound.operator == ">=" for bound in bounds), f"{item}: lower bounds only"
        assert item.specifier.contains(image[canonicalize_name(item.name)]), f"{item} moves Colab's version"
