"""Rules for the other files: packaging, requirements, the README's table, results and the shipped rows."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

from check_notebooks import REAL_CALLS
from check_package import STEPS
from packaging.specifiers import SpecifierSet
from repository import Repository, by_name

COLABS_OWN = {"torch", "numpy", "pandas"}
COLABS_TORCH = "2.11.0"
README_ROW = (
    r"\| \*\*\[(\d\d) · .*?\]\(notebooks/(\w+)\.ipynb\).*?\[`([\w./]+)`\]\(llama_sft_helpers/([\w./]+)\)"
)


def wheel_has_every_package(repo: Repository) -> Iterator[str]:
    """``packages`` in pyproject.toml lists the tree's packages, the notebooks and the results."""
    listed = set(repo.project.get("tool", {}).get("setuptools", {}).get("packages", []))
    folders = [path.parent.relative_to(repo.root) for path in repo.modules if path.name == "__init__.py"]
    wanted = {".".join(folder.parts) for folder in folders}
    wanted |= {"llama_sft_helpers.notebooks", "llama_sft_helpers.results"}
    for name in sorted(listed ^ wanted):
        what = "is no package; take it out" if name in listed else "is not listed; add it to packages"
        yield repo.at(repo.root / "pyproject.toml", 1, f"{name} {what}")


def classifiers_are_true(repo: Repository) -> Iterator[str]:
    """The classifiers name the Pythons that ``requires-python`` allows, and a workflow tests each."""
    project = repo.project.get("project", {})
    asked = project.get("requires-python", "")
    wanted = {f"3.{minor}" for minor in range(100) if SpecifierSet(asked).contains(f"3.{minor}")}
    workflow = repo.text(repo.root / ".github" / "workflows" / "tests.yml")
    named = {
        "classifiers": re.findall(r":: Python :: (3\.\d+)", "\n".join(project.get("classifiers", []))),
        "tests.yml": re.findall(r"3\.\d+", "".join(re.findall(r"python: (\[.*\])", workflow))),
    }
    for place, versions in named.items():
        if wanted != set(versions):
            text = f"{place} name Python {sorted(versions)}, requires-python is {asked!r}; make them agree"
            yield repo.at(repo.root / "pyproject.toml", 1, text)


def steps_are_complete(repo: Repository) -> Iterator[str]:
    """A step's word names its notebook, its package, its tests and its row in the README."""
    readme = repo.root / "README.md"
    rows = {}
    for line, text in enumerate(repo.readme.splitlines(), 1):
        if row := re.match(README_ROW, text):
            rows[row[2]] = row
            if row[1] != row[2][:2] or row[3] != row[4] or not (repo.package / row[4]).exists():
                yield repo.at(readme, line, f"the links of {row[2]} do not lead where they say; correct them")
    for stem in REAL_CALLS:
        notebook, step = repo.root / "notebooks" / f"{stem}.ipynb", stem[3:]
        if not notebook.is_file():
            yield repo.at(notebook, 0, "is missing; each step has its notebook")
        if step not in STEPS:  # A notebook that leads through all steps has no helpers of its own.
            continue
        if stem not in rows or rows[stem][4].removesuffix(".py").removesuffix("/") != step:
            yield repo.at(readme, 1, f"has no row for {stem} and its helpers; add one")
        if not list((repo.root / "tests" / step).glob("test_*.py")):
            yield repo.at(repo.root / "tests" / step, 0, "holds no tests; each step has its own")


def one_repository_address(repo: Repository) -> Iterator[str]:
    """Badges, install cells, commands and the site name the repository that pyproject.toml names."""
    address = repo.project.get("project", {}).get("urls", {}).get("Repository", "")
    slug = address.removeprefix("https://github.com/")
    site = repo.root / "mkdocs.yml"
    if f"repo_url: {address}\n" not in repo.text(site):
        yield repo.at(site, 1, f"repo_url is not {address}; run make badges")
    for path in [*repo.notebooks, repo.root / "README.md", repo.root / "docs" / "commands.md"]:
        text = repo.text(path)
        named = set(re.findall(r"colab\.research\.google\.com/github/([\w.-]+/[\w.-]+)/blob", text))
        named |= set(re.findall(r"git\+https://github\.com/([\w.-]+/[\w.-]+)", text))
        if named != {slug}:
            yield repo.at(path, 0, f"names {sorted(named)} instead of {slug}; run make badges")


def requirements_leave_colab_alone(repo: Repository) -> Iterator[str]:
    """No requirement moves what Colab's image has, and each line says why it is there."""
    path = repo.root / "requirements-colab.txt"
    for number, line in enumerate(repo.text(path).splitlines(), 1):
        if line and not line.startswith("#"):
            if re.split(r"[=<>;! ]", line)[0] in COLABS_OWN:
                yield repo.at(path, number, f"{line!r} would move Colab's own version; leave it out")
            if not re.search(r"  # .{20,}", line):
                yield repo.at(path, number, f"{line!r} does not say why it is there; add a remark")


def bounds_are_met_by_colab(repo: Repository) -> Iterator[str]:
    """The package's bounds are lower bounds, and Colab's image satisfies each."""
    image = {
        name: next(iter(pin.specifier)).version
        for name, pin in repo.requirements("constraints-colab.txt").items()
    }
    image["torch"] = COLABS_TORCH
    for name, item in (repo.dependencies | repo.of_extra("run") | repo.of_extra("widgets")).items():
        lower_only = all(bound.operator == ">=" for bound in item.specifier)
        if not lower_only or not item.specifier.contains(image.get(name, "0")):
            text = f"{item} moves Colab's {name} {image.get(name, '(none)')}; loosen the bound"
            yield repo.at(repo.root / "pyproject.toml", 1, text)


def lock_holds_every_requirement(repo: Repository) -> Iterator[str]:
    """The full set of tested versions has each requirement, in a version that the requirement allows."""
    names = [f"requirements-{name}.txt" for name in ("colab", "models", "run", "test", "tested", "widgets")]
    required = [repo.dependencies, *map(repo.requirements, names)]
    lock = repo.requirements("constraints-tested.txt")
    for name, item in [pair for group in required for pair in group.items() if not pair[1].marker]:
        pins = list(lock[name].specifier) if name in lock else []
        if not pins or not item.specifier.contains(pins[0].version):
            yield repo.at(repo.root / "constraints-tested.txt", 1, f"does not meet {item}; run make lock")


def hashes_follow_the_lock(repo: Repository) -> Iterator[str]:
    """The file with hashes has the versions of the lock, but torch, and at least a hash for each."""
    path = repo.root / "requirements-hashed.txt"
    pins = re.findall(r"^(\S+==\S+) \\\n    --hash=sha256:[0-9a-f]{64}\b", repo.text(path), re.MULTILINE)
    tables = repo.requirements("constraints-tested.txt"), by_name(pins)
    locked, hashed = ({f"{name}{item.specifier}" for name, item in table.items()} for table in tables)
    for pin in sorted(locked ^ hashed):
        if not pin.startswith("torch=="):
            yield repo.at(
                path, 1, f"{pin} is not in both this file and constraints-tested.txt; run make hashes"
            )


def dependencies_are_audited(repo: Repository) -> Iterator[str]:
    """A workflow looks the requirements up among the known vulnerabilities."""
    workflows = repo.root / ".github" / "workflows"
    text = "".join(repo.text(path) for path in workflows.glob("*.yml"))
    if not re.search(r"pip-audit .*--requirement constraints-tested\.txt", text):
        yield repo.at(workflows, 1, "no workflow runs pip-audit on constraints-tested.txt; add the job")


def actions_are_pinned(repo: Repository) -> Iterator[str]:
    """A workflow names each action of others by its commit, as a tag can be moved to other code."""
    for path in sorted((repo.root / ".github" / "workflows").glob("*.yml")):
        for number, line in enumerate(repo.text(path).splitlines(), 1):
            used = re.search(r"uses: (?!\./)(\S+)", line)
            if used and not re.search(r"@[0-9a-f]{40}$", used[1]):
                text = f"{used[1]} is no commit; name its 40 digits, and the tag in a remark"
                yield repo.at(path, number, text)


def results_name_their_source(repo: Repository) -> Iterator[str]:
    """A kept result says on which card, with which versions and by which command it came to be."""
    for path in sorted((repo.root / "benchmarks" / "results").glob("*.json")):
        result = json.loads(repo.text(path))
        if not result.get("card") or not result.get("versions"):
            yield repo.at(path, 1, "names no card or no versions; measure again with its script")
        if not str(result.get("command", "")).startswith(("python benchmarks/", "make record")):
            yield repo.at(path, 1, f"its command is {result.get('command')!r}; name the script that made it")


def ladder_is_the_recorded_one(repo: Repository) -> Iterator[str]:
    """Speed, memory, versions and command in the ladder of docs/speed.md are those that were recorded."""
    page = repo.root / "docs" / "speed.md"
    path = repo.root / "benchmarks" / "results" / "speed_h200_40gib.json"
    results = json.loads(repo.text(path) or '{"rungs": []}')
    rungs = {rung["rung"]: rung for rung in results["rungs"] if "tokens_per_second" in rung}
    wanted = [
        f"| {name} | {rung['tokens_per_second']:,.0f} | {rung['peak_reserved_gib']:.1f} |"
        for name, rung in rungs.items()
    ]
    if rungs:
        times = rungs["fast"]["tokens_per_second"] / rungs["plain"]["tokens_per_second"]
        versions = [f"{package} {version}" for package, version in results["versions"].items()]
        wanted += [f"{times:.1f} times `plain`", results["command"], *versions]
    for text in wanted:
        if text not in repo.text(page):
            yield repo.at(page, 1, f"lacks {text!r} of {path.name}; correct the ladder")


def rows_are_well_formed(repo: Repository) -> Iterator[str]:
    """The shipped rows: Alpaca's columns, one object a line, nothing stray, nothing twice."""
    path = repo.package / "datasets" / "alpaca_mini.jsonl"
    seen: dict[str, int] = {}
    for number, line in enumerate(repo.text(path).splitlines(), 1):
        row = json.loads(line)
        if fault := _row_fault(row):
            yield repo.at(path, number, f"{fault}; correct the row")
        key = re.sub(r"\W+", " ", f"{row.get('instruction')} {row.get('input')}".lower())
        if (first := seen.setdefault(key, number)) != number:
            yield repo.at(path, number, f"asks what line {first} asks; take one out")


def _row_fault(row: dict[str, object]) -> str:
    """What is wrong with a row; empty where nothing is."""
    if list(row) != ["instruction", "input", "output"]:
        return f"has the columns {list(row)}"
    for name, cell in row.items():
        if not isinstance(cell, str) or (name != "input" and not cell):
            return f"{name} is {cell!r}, not a text"
        if cell != cell.strip() or re.search(r"[\x00-\x08\x0b-\x1f\x7f\u200b\ufeff\ufffd]", cell):
            return f"{name} carries white space or control characters"
    return ""


def rows_are_of_many_kinds(repo: Repository) -> Iterator[str]:
    """The shipped rows suffice for the profiles: short and long answers, with and without input, scripts."""
    path = repo.package / "datasets" / "alpaca_mini.jsonl"
    rows = [json.loads(line) for line in repo.text(path).splitlines()]
    texts = [" ".join(row.values()) for row in rows]
    least = {
        "rows": (len(rows), 320),
        "rows with an input": (sum(bool(row["input"]) for row in rows), 64),
        "answers of a word": (sum(len(row["output"]) < 20 for row in rows), 30),
        "answers over 600 characters": (sum(len(row["output"]) > 600 for row in rows), 10),
        "Korean rows": (sum(bool(re.search("[가-힣]", text)) for text in texts), 10),
        "other scripts": (
            sum(any(re.search(s, t) for t in texts) for s in ("[ぁ-ん]", "[一-鿿]", "[ء-ي]")),
            2,
        ),
    }
    for what, (count, wanted) in least.items():
        if count < wanted:
            yield repo.at(path, 1, f"{count} {what}; have {wanted} at least")


RULES = (
    wheel_has_every_package,
    classifiers_are_true,
    steps_are_complete,
    one_repository_address,
    requirements_leave_colab_alone,
    bounds_are_met_by_colab,
    lock_holds_every_requirement,
    hashes_follow_the_lock,
    dependencies_are_audited,
    actions_are_pinned,
    results_name_their_source,
    ladder_is_the_recorded_one,
    rows_are_well_formed,
    rows_are_of_many_kinds,
)
