"""The rules of the house, checked on the files themselves."""

import ast
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
MODULES = sorted(PACKAGE.glob("*.py"))

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
SHARED_MODULES = {
    "batches",
    "checksums",
    "demo_model",
    "folders",
    "llama",
    "memory",
    "memory_counts",
    "modes",
    "profiles",
    "summary",
    "tiny_llama",
}
# step -> the further modules that belong to it alone
PARTS = {
    "quantization": {"quantized_layers", "quantization_plots"},
    "lora": {"lora_sweep"},
    "data": {"rows", "packing", "splits"},
    "training": {"checkpoints"},
    "speed": {"compiled_layers", "int8_product", "row_losses", "varlen"},
    "evaluation": {"adapter", "chat", "lora_gguf", "merging", "publishing", "scaling"},
}


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


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.stem)
def test_helpers_do_not_run_the_pipeline(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    used = pipeline_calls(tree) - EXCEPTIONS.get(path.stem, set())
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


@pytest.mark.parametrize("name", list(REAL_CALLS))
def test_step_modules_do_not_import_each_other(name):
    step = name[3:]
    parts = PARTS.get(step, set())
    for module in (step, *sorted(parts)):
        imported = own_imports(ast.parse((PACKAGE / f"{module}.py").read_text(encoding="utf-8")))
        allowed = SHARED_MODULES | parts
        assert imported <= allowed, f"{module} imports {sorted(imported - allowed)}"


def test_every_step_has_its_notebook_module_test_and_readme_row():
    assert [path.stem for path in NOTEBOOKS] == list(REAL_CALLS)
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    rows = re.findall(
        r"^\| \[`(\d\d_\w+)`\]\(notebooks/(\w+)\.ipynb\).*?`(\w+)\.py`", readme, flags=re.MULTILINE
    )
    assert [row[0] for row in rows] == list(REAL_CALLS)
    for notebook, file, module in rows:
        assert notebook == file
        assert notebook[3:] == module
        assert (PACKAGE / f"{module}.py").is_file()
        assert (ROOT / "tests" / f"test_{module}.py").is_file()


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


@pytest.mark.parametrize("path", [*MODULES, *NOTEBOOKS], ids=lambda path: path.stem)
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
