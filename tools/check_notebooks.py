"""Rules for the notebooks: they act in the open, look alike, and show outputs of the code that they hold."""

from __future__ import annotations

import ast
import json
import re
import statistics
from collections.abc import Iterator
from pathlib import Path

import nbformat
import record
from check_package import STEPS
from repository import Repository, cells, own_imports, python

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
    "09_your_run": ["AutoModelForCausalLM.from_pretrained", "LoraConfig", "SFTTrainer", "trainer.train"],
}
# What stands beside the steps, and notebooks import.
BESIDE = ("profiles", "memory", "tables", "sliders", "doctor")
RECIPE = ("r=16", "lora_alpha=16", "lora_dropout=0", 'bias="none"', 'task_type="CAUSAL_LM"')
TARGETS = ("q", "k", "v", "o", "gate", "up", "down")
ONE_DEVICE = 'device_map={"": 0} if torch.cuda.is_available() else {"": "cpu"}'
# Their outputs may be older than their code until `make record` has run again; empty it then.
WAITING: tuple[str, ...] = ()


def real_calls_are_visible(repo: Repository) -> Iterator[str]:
    """A step's notebook makes its real calls itself."""
    for path in repo.notebooks:
        shown = _visible_calls("\n".join(cell.source for _, cell in cells(path)))
        for call in REAL_CALLS.get(path.stem, []):
            if not any(name == call or (call[0] == "." and name.endswith(call)) for name in shown):
                yield repo.at(path, 0, f"does not show {call}; make the call in a cell")


def _visible_calls(code: str) -> set[str]:
    """What a notebook calls, by dotted name, hands over to be called, or runs as a program."""
    names = set(re.findall(r'subprocess\.run\(\["(nvidia-smi|nvcc)"', code))
    for node in ast.walk(ast.parse(python(code))):
        if isinstance(node, ast.Call):
            names.add(ast.unparse(node.func))
            names |= {word.value.id for word in node.keywords if isinstance(word.value, ast.Name)}
    return names


def imports_come_from_packages(repo: Repository) -> Iterator[str]:
    """A notebook imports from steps and from what stands beside them, never from modules in them."""
    for path in repo.notebooks:
        for number, cell in cells(path):
            for _, name in own_imports(python(cell.source)):
                parts = name.split(".")
                if parts[1] not in {*STEPS, *BESIDE} or len(parts) > 3:
                    text = f"imports {name}; import from steps and from {', '.join(BESIDE)}"
                    yield repo.at(path, number, text)


def recipe_is_literal(repo: Repository) -> Iterator[str]:
    """The recipe's settings stand in the notebooks as they are, not behind a profile."""
    for path in repo.notebooks:
        code = "\n".join(cell.source for _, cell in cells(path))
        wanted = ["load_in_8bit=True"] if "BitsAndBytesConfig(" in code else []
        wanted += [ONE_DEVICE] if path.stem == "03_quantization" else []
        if path.stem in ("06_training", "09_your_run"):
            wanted += [*RECIPE, *(f'"{target}_proj"' for target in TARGETS)]
        for setting in wanted:
            if re.sub(r"\s", "", setting) not in re.sub(r"\s", "", code):
                yield repo.at(path, 0, f"lacks {setting}; write the recipe out")


def openings_are_alike(repo: Repository) -> Iterator[str]:
    """Badge, title, what it takes, how the outputs were made, links, one install cell."""
    install = cells(repo.notebooks[0])[0][1].source if repo.notebooks else ""
    for place, path in enumerate(repo.notebooks):
        opening = nbformat.read(path, as_version=4).cells[0].source
        neighbours = repo.notebooks[max(place - 1, 0) : place] + repo.notebooks[place + 1 : place + 2]
        wanted = [
            r"\A\[!\[Open In Colab\]",
            rf"# {path.stem[:2]} · ",
            r"GPU: .* · Time: .* · Memory: .* · Helpers: ",
            r"Outputs: recorded on two CPU cores with a small demo model \(the profile `cpu-demo`",
            *(rf"\({re.escape(other.name)}\)" for other in neighbours),
        ]
        for pattern in wanted:
            if not re.search(pattern, opening):
                yield repo.at(path, 0, f"its opening lacks {pattern!r}; follow the other notebooks")
        if cells(path)[0][1].source != install:
            yield repo.at(path, cells(path)[0][0], "its install cell differs from 01's; copy that one")


def closings_are_alike(repo: Repository) -> Iterator[str]:
    """What was measured, exercises with folded answers, references."""
    for path in repo.notebooks:
        all_cells = nbformat.read(path, as_version=4).cells
        markdown = "\n".join(cell.source for cell in all_cells if cell.cell_type == "markdown")
        for heading in ("## Starting point", "## What we measured", "## Exercises", "## References"):
            if heading not in markdown:
                yield repo.at(path, 0, f"lacks {heading!r}; add the section")
        if not 2 <= (count := markdown.count("<details>")) <= 4:
            yield repo.at(path, 0, f"has {count} folded answers; have 2 to 4")


def cells_are_short(repo: Repository) -> Iterator[str]:
    """Few lines a cell, imports in the first cells and folded."""
    for path in repo.notebooks:
        numbered = list(enumerate(cells(path)))
        lengths = [sum(bool(line.strip()) for line in cell.source.splitlines()) for _, (_, cell) in numbered]
        if lengths and statistics.median(lengths) > 8:
            yield repo.at(path, 0, f"its cells have {statistics.median(lengths)} lines; 8 in the median")
        late = [(number, cell) for place, (number, cell) in numbered if place > 2 and _imports(cell.source)]
        # 01 checks the environment first: a broken package must not hide the table that names it.
        for number, _ in late[1:] if path.stem == "01_environment" else late:
            yield repo.at(path, number, "imports late; move the import to the first cells")
        for _, (number, cell) in numbered[1:]:
            if _imports(cell.source) and "cellView" not in cell.metadata:
                yield repo.at(path, number, "imports in the open; fold it, with `# @title Imports` as in 01")
        for length, (_, (number, cell)) in zip(lengths, numbered, strict=True):
            if length > 30 and "cellView" not in cell.metadata:  # a folded cell is not read
                yield repo.at(path, number, f"has {length} lines; split the cell, 30 are the limit")


def _imports(source: str) -> bool:
    """Whether a cell imports something itself; a program in a string, for another process, does not count."""
    return any(isinstance(node, ast.Import | ast.ImportFrom) for node in ast.walk(ast.parse(python(source))))


def files_are_clean(repo: Repository) -> Iterator[str]:
    """Valid, small, and nothing in them belongs to one machine or one run."""
    one_machine = re.compile(
        r"/(?:home|root|tmp|work)/|hf_[A-Za-z0-9]{10}| at 0x[0-9a-f]{6}|\bT_[0-9a-f]{5}\b"
    )
    for path in repo.notebooks:
        notebook = nbformat.read(path, as_version=4)
        try:
            nbformat.validate(notebook)
        except nbformat.ValidationError as error:
            yield repo.at(path, 0, f"is no valid notebook ({error.message}); repair it")
        if path.stat().st_size > 600 * 1024:
            yield repo.at(
                path, 0, f"has {path.stat().st_size >> 10} KiB; 600 are the limit, simplify figures"
            )
        if "widgets" in notebook.metadata:
            yield repo.at(path, 0, "holds widgets, which GitHub does not draw; make record")
        for number, cell in enumerate(notebook.cells, start=1):
            if "execution" in cell.metadata:
                yield repo.at(path, number, "holds the time of its run; run tools/record.py --clean")
            if found := one_machine.search(json.dumps(cell)):
                yield repo.at(path, number, f"{found[0]!r} belongs to one machine; tools/record.py --clean")


def figures_have_words(repo: Repository) -> Iterator[str]:
    """Every recorded figure has a text for those who cannot see it."""
    for path in repo.notebooks:
        for number, cell in cells(path):
            for output in cell.outputs:
                words = output.get("metadata", {}).get("image/png", {}).get("alt", "")
                if "image/png" in output.get("data", {}) and len(words) <= 40:
                    text = "its figure has no alternative text; set `alt` in the cell's metadata, make record"
                    yield repo.at(path, number, text)


def _recorded(repo: Repository) -> list[Path]:
    return [path for path in repo.notebooks if path.stem not in WAITING]


def outputs_are_current(repo: Repository) -> Iterator[str]:
    """Outputs are those of this code on the tested versions, every cell ran in order, none failed."""
    tested = repo.requirements("requirements-tested.txt") | repo.requirements("requirements-colab.txt")
    exact = {name: str(item.specifier).removeprefix("==") for name, item in tested.items()}
    pins = {name: exact.get(name.replace("_", "-")) for name in record.VERSIONS_OF}
    for path in _recorded(repo):
        notebook = nbformat.read(path, as_version=4)
        valid_for = {"profile": "cpu-demo", "code_sha256": record.code_sha256(notebook), "versions": pins}
        if notebook.metadata.get(record.KEY) != valid_for:
            yield repo.at(path, 0, "its outputs are of other code or versions; make record")
        counts = [cell.execution_count for _, cell in cells(path)]
        if counts != list(range(1, len(counts) + 1)):
            yield repo.at(path, 0, "its cells did not run once each and in order; make record")
        for number, cell in cells(path):
            if any(output.output_type == "error" for output in cell.outputs):
                yield repo.at(path, number, "its output is an error; fix the cell, make record")


def pictures_are_recorded_figures(repo: Repository) -> Iterator[str]:
    """The README's pictures are figures of the notebooks, to the byte."""
    images = repo.root / "docs" / "images"
    recorded: dict[str, bytes] = {}
    for path in repo.notebooks:
        recorded |= record.pictures(nbformat.read(path, as_version=4))
    names = {path.stem: path for path in images.glob("*.png")} if not WAITING else {}
    for name in sorted({*recorded, *names} if not WAITING else ()):
        if name not in names or recorded.get(name) != names[name].read_bytes():
            yield repo.at(images / f"{name}.png", 0, "is not the recorded figure; make record")
    for line, text in enumerate(repo.readme.splitlines(), 1):
        for name in re.findall(r"docs/images/([\w-]+)\.png", text):
            if not (images / f"{name}.png").is_file():
                yield repo.at(repo.root / "README.md", line, f"shows {name}, which no notebook draws")


def minutes_are_measured(repo: Repository) -> Iterator[str]:
    """The README's minutes of a notebook are those that `make record` and `notebooks_on_gpu.py` measured."""
    results = repo.root / "benchmarks" / "results"
    on_cpu = json.loads(repo.text(results / "cpu_demo.json") or "{}").get("seconds", {})
    on_gpu = {
        run["notebook"]: run["seconds"]
        for run in json.loads(repo.text(results / "notebooks_on_gpu.json") or "{}").get("runs", [])
        if (run["model"], run["profile"]) == ("llama3-8b-shape", "colab-a100")
    }
    for path in _recorded(repo):
        if path.stem not in on_cpu:
            yield repo.at(path, 0, "was never timed; make record")
    for line, text in enumerate(repo.readme.splitlines(), 1):
        for kind, seconds in (("CPU demo", on_cpu), ("8B", on_gpu)):
            told = rf"<sub>.*?{kind}: (under )?(\d+(?:\.\d)?) min"
            row = re.match(rf"\| .*?/(\d\d_\w+)\.ipynb\).*?{told}", text)
            if row and row[1] in seconds:
                at_most = float(row[3]) * 60
                if not (0 if row[2] else at_most - 30) <= seconds[row[1]] <= at_most + 15:
                    measured = f"{row[1]} took {seconds[row[1]]} s ({kind}); correct its minutes"
                    yield repo.at(repo.root / "README.md", line, measured)


RULES = (
    real_calls_are_visible,
    imports_come_from_packages,
    recipe_is_literal,
    openings_are_alike,
    closings_are_alike,
    cells_are_short,
    files_are_clean,
    figures_have_words,
    outputs_are_current,
    pictures_are_recorded_figures,
    minutes_are_measured,
)
