"""The tools that keep badges, recorded outputs and the site true."""

import base64
import importlib.util
import io
import os
import re
import shutil
import subprocess
import sys
import zipfile
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from unittest.mock import Mock

import badges
import nbformat
import pytest
import record
import torch_index
import translation
import yaml
from PIL import Image

ROOT = Path(__file__).parent.parent


def run(*command, **options):
    """What a command prints; it must succeed."""
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, **options).stdout


def test_badges_restamps_every_place_and_refuses_a_bad_name(tmp_path, monkeypatch):
    (tmp_path / "docs").mkdir()
    for name in ("pyproject.toml", "README.md", "docs/commands.md"):
        shutil.copy(ROOT / name, tmp_path / name)
    for name in ("notebooks", "translations"):
        shutil.copytree(ROOT / name, tmp_path / name)
    assert translation.main(["--build"], tmp_path) == 0
    monkeypatch.setattr(badges, "ROOT", tmp_path)
    changed = badges.restamp("someone/fork")
    notebooks = list((ROOT / "notebooks").rglob("*_*.ipynb"))
    assert {path.relative_to(tmp_path) for path in changed} >= {path.relative_to(ROOT) for path in notebooks}
    assert translation.main(["--check"], tmp_path) == 0, "a translation is stale, or names the old repository"
    assert badges.current_repository() == "someone/fork"
    for name in ("README.md", "docs/commands.md"):
        assert "llama-sft/llama-sft-notebooks" not in (tmp_path / name).read_text(encoding="utf-8")
    with pytest.raises(ValueError, match="REPO='': expected owner/name"):
        badges.restamp("")


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A small package: ``plots`` is reached through ``step``, ``other`` by nobody."""
    files = {
        "__init__.py": "def load():\n    from llama_sft_helpers.doctor import attach\n",
        "doctor.py": "",
        "step.py": "from typing import TYPE_CHECKING\n"
        "if TYPE_CHECKING:\n    from llama_sft_helpers import typed\n"
        "def draw():\n    from llama_sft_helpers.plots import figure\n    return figure()\n",
        "plots.py": "from llama_sft_helpers import step, colours\n",
        "colours.py": "TITLE = 'Loss'\n",
        "typed.py": "",
        "other.py": "",
        "data/__init__.py": "",
        "data/rows.py": "from .shapes import x\nfrom ..colours import TITLE\n",
        "data/shapes.py": "",
        "login/__init__.py": "CONTENTS = {'hash_files': 'core.files'}\n",
        "core/__init__.py": "",
        "core/files.py": "",
        "core/modes.py": "",
        "profiles/cpu-demo.toml": "",
    }
    for name, content in files.items():
        path = tmp_path / "llama_sft_helpers" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content, encoding="utf-8")
    monkeypatch.setattr(record, "PACKAGE", tmp_path / "llama_sft_helpers")
    return tmp_path / "llama_sft_helpers"


@pytest.mark.parametrize(
    ("code", "reached"),
    [
        ("%load_ext llama_sft_helpers\nimport torch", set()),
        ("from llama_sft_helpers.step import draw", {"step.py", "plots.py", "colours.py"}),
        ("import llama_sft_helpers.step as s", {"step.py", "plots.py", "colours.py"}),
        ("from llama_sft_helpers import other", {"other.py"}),
        ("if x:\n    %pip install y\n!ls\nimport llama_sft_helpers.other", {"other.py"}),
        (
            "from llama_sft_helpers.data import summarize",
            {"data/__init__.py", "data/rows.py", "data/shapes.py", "colours.py"},
        ),
        ("from llama_sft_helpers.login import hash_files", {"login/__init__.py", "core/files.py"}),
    ],
)
def test_the_helpers_that_a_notebook_reaches(package, code, reached):
    assert {file.relative_to(package).as_posix() for file in record.helper_files(code)} == reached


def test_the_hash_follows_the_code_and_the_helpers_that_it_reaches_and_no_others(package):
    prose = nbformat.v4.new_markdown_cell("text")
    notebook = nbformat.v4.new_notebook(
        cells=[nbformat.v4.new_code_cell("import llama_sft_helpers.step"), prose]
    )
    recorded = record.stamp(notebook)
    for name in ("other.py", "doctor.py"):
        (package / name).write_text("changed = 1", encoding="utf-8")
    prose.source = "other text"
    assert record.stamp(notebook) == recorded
    for name in ("colours.py", "plots.py", "step.py", "profiles/cpu-demo.toml"):
        before = (package / name).read_text(encoding="utf-8")
        (package / name).write_text(f"{before}# another title", encoding="utf-8")
        assert record.stamp(notebook) != recorded, name
        (package / name).write_text(before, encoding="utf-8")
    assert record.stamp(notebook) == recorded
    notebook.cells[0].source += "\n1 + 1"
    assert record.stamp(notebook) != recorded


def test_the_real_notebooks_reach_the_module_of_their_name():
    for path in sorted((ROOT / "notebooks").glob("0[1-8]_*.ipynb")):
        cells = nbformat.read(path, as_version=4).cells
        code = "\n".join(cell.source for cell in cells if cell.cell_type == "code")
        found = [file.relative_to(ROOT / "llama_sft_helpers") for file in record.helper_files(code)]
        files = {file.parts[0].removesuffix(".py") for file in found}
        assert {path.stem[3:], "profiles"} <= files or path.stem == "02_login", files
        assert "cli" not in files
        assert "record" not in files


def test_cleaning_drops_what_differs_for_no_reason_and_keeps_results():
    figure = io.BytesIO()
    Image.linear_gradient("L").convert("RGB").save(figure, "PNG")
    png = base64.b64encode(figure.getvalue()).decode()
    cell = nbformat.v4.new_code_cell(
        "f()", execution_count=17, metadata={"execution": {"shell.execute_reply": "12:00"}, "alt": "Two bars"}
    )
    cell.outputs = [
        nbformat.v4.new_output("stream", name="stderr", text="Loading: 100%|####| 3/3\n"),
        nbformat.v4.new_output(
            "stream", name="stdout", text="saved to /home/me/out/adapter <X at 0x7f00ab>\n"
        ),
        nbformat.v4.new_output(
            "display_data", data={"image/png": png, "application/vnd.jupyter.widget-view+json": {}}
        ),
    ]
    notebook = nbformat.v4.new_notebook(cells=[cell], metadata={"widgets": {"no": "state"}})
    record.clean(notebook, {"/home/me/out": "outputs"})
    assert cell.execution_count == 1
    assert "execution" not in cell.metadata
    assert [output.output_type for output in cell.outputs] == ["stream", "display_data"]
    assert cell.outputs[0].text == "saved to outputs/adapter <X>\n"
    assert set(cell.outputs[1].data) == {"image/png", "text/plain"}
    assert cell.outputs[1].data["text/plain"].startswith("A widget")
    assert cell.outputs[1].metadata["image/png"]["alt"] == "Two bars"
    smaller = cell.outputs[1].data["image/png"]
    assert len(Image.open(io.BytesIO(base64.b64decode(smaller))).getcolors()) == 128
    record.clean(notebook, {})
    assert cell.outputs[1].data["image/png"] == smaller
    assert "widgets" not in notebook.metadata


@pytest.mark.parametrize(
    ("target", "limits"),
    [
        (
            "test-avx2",
            {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"},
        ),
        ("test-default", {"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41"}),
        ("test-one-thread", {"OMP_NUM_THREADS": "1"}),
    ],
)
def test_the_tests_of_other_cpus_run_under_their_limits_and_in_a_fresh_models_folder(
    tmp_path, target, limits
):
    """``make`` runs a stand-in for Python that writes its environment down."""
    bin_folder = tmp_path / "bin"
    bin_folder.mkdir()
    python = bin_folder / "python"
    python.write_text(
        f'#!/bin/sh\nenv > {tmp_path}/seen\nls -A "$SFT_MODELS_DIR" > {tmp_path}/models\n', encoding="utf-8"
    )
    python.chmod(0o755)
    (tmp_path / ".installed").touch()
    names = ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS", "OMP_NUM_THREADS")
    outside = {name: value for name, value in os.environ.items() if name not in names}
    run("make", "-C", ROOT, target, f"VENV={tmp_path}", f"BIN={bin_folder}", env=outside)
    lines = (tmp_path / "seen").read_text(encoding="utf-8").splitlines()
    seen = dict(line.split("=", 1) for line in lines if "=" in line)
    assert {name: seen[name] for name in names if name in seen} == limits
    assert (tmp_path / "models").read_text(encoding="utf-8") == ""
    assert seen["SFT_MODELS_DIR"] != os.environ["SFT_MODELS_DIR"]
    assert not Path(seen["SFT_MODELS_DIR"]).exists()  # taken away again


def test_each_instruction_set_has_a_compile_cache_of_its_own():
    """One shared cache gives C++ code for AVX2 to a run without it, where it does not compile."""
    code = "import os, conftest; print(os.environ.get('TORCHINDUCTOR_CACHE_DIR'))"
    names = ("ATEN_CPU_CAPABILITY", "TORCHINDUCTOR_CACHE_DIR")
    outside = {name: value for name, value in os.environ.items() if name not in names}
    ours, default, avx2 = (
        run(sys.executable, "-c", code, cwd=ROOT / "tests", env=outside | limit).strip()
        for limit in ({}, {"ATEN_CPU_CAPABILITY": "default"}, {"ATEN_CPU_CAPABILITY": "avx2"})
    )
    assert ours == "None"  # torch's own choice
    assert default.endswith("inductor-default")
    assert avx2.endswith("inductor-avx2")


def test_processes_of_the_tests_share_out_physical_cores():
    """Two processes on four cores, which the system counts as eight CPUs, get two threads each."""
    code = "import os, psutil; os.sched_getaffinity = lambda process: range(8); "
    code += "psutil.cpu_count = lambda logical=True: 8 if logical else 4; "
    code += "import conftest; print(os.environ['OMP_NUM_THREADS'])"
    outside = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    said = run(
        sys.executable, "-c", code, cwd=ROOT / "tests", env=outside | {"PYTEST_XDIST_WORKER_COUNT": "2"}
    )
    assert said == "2\n"


@pytest.mark.slow
def test_the_wheel_runs_in_a_clean_venv_without_the_checkout(tmp_path):
    run(sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", tmp_path, ROOT)
    wheel = next(tmp_path.glob("*.whl"))
    names = zipfile.ZipFile(wheel).namelist()
    carried = (
        "datasets/alpaca_mini.jsonl", "profiles/colab-a100.toml", "configs/llama3_8b.json",
        "templates/model_card.md", "results/speed_h200_40gib.json", "models/tiny-llama/model.safetensors",
        "notebooks/01_environment.ipynb", "notebooks/ko/09_your_run.ipynb",
    )  # fmt: skip
    assert {f"llama_sft_helpers/{name}" for name in carried} <= set(names)
    assert not [name for name in names if name.startswith(("tests", "tools", "notebooks"))]
    run(sys.executable, "-m", "venv", tmp_path / "venv")
    python = tmp_path / "venv" / "bin" / "python"
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "SFT_"))}
    kept |= {"SFT_MODELS_DIR": "models", "JUPYTER_PATH": str(Path(sys.prefix, "share", "jupyter"))}
    run(python, "-m", "pip", "install", "-q", "--no-deps", wheel, env=kept)
    own = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    packages = Path(importlib.util.find_spec("filelock").origin).parents[1]  # what the wheel needs is here
    (own / "borrowed.pth").write_text(str(packages))  # so a .pth file there, as of this checkout, counts not
    empty = tmp_path / "empty"
    empty.mkdir()

    def llama_sft(*words):
        return run(python.parent / "llama-sft", *words, cwd=empty, env=kept)

    assert str(own) in run(
        python, "-c", "print(__import__('llama_sft_helpers').__file__)", cwd=empty, env=kept
    )
    assert llama_sft("--version").startswith("llama-sft 0.")
    assert "colab-a100, int8: " in llama_sft("plan", "--profile", "colab-a100")
    assert "01_environment: done in" in llama_sft("run", "--profile", "ci-tiny", "--only", "01")
    assert "09_your_run: done in" in llama_sft("train", "--profile", "ci-tiny", "--lang", "ko")
    assert (empty / "outputs" / "your_run" / "adapter" / "adapter_model.safetensors").is_file()
    opening = nbformat.read(empty / "outputs" / "09_your_run.ipynb", as_version=4).cells[0].source
    assert re.search("[가-힣]", opening)
    shipped = ROOT / "llama_sft_helpers" / "models" / "tiny-llama"
    built, theirs = (
        {path.name: path.read_bytes() for path in folder.iterdir()}
        for folder in (empty / "models" / "tiny-llama", shipped)
    )
    assert built == theirs


# YAML takes the key `on` of a workflow for true.
WORKFLOWS = {
    path.stem: yaml.safe_load(path.read_text(encoding="utf-8"))
    for path in (ROOT / ".github" / "workflows").glob("*.yml")
}


def commands(job):
    """What a job's steps run in the shell."""
    return "\n".join(step.get("run", "") for step in job.get("steps", ()))


def test_the_jobs_that_may_write_run_neither_the_repository_nor_pull_requests():
    """Code of a pull request, npm and the build get a token that reads."""
    assert all(workflow["permissions"] == {"contents": "read"} for workflow in WORKFLOWS.values())
    jobs = {(name, job): body for name in WORKFLOWS for job, body in WORKFLOWS[name]["jobs"].items()}
    writing = {key for key, job in jobs.items() if "write" in job.get("permissions", {}).values()}
    assert writing == {("docs", "deploy"), ("release", "publish"), ("tell", "tell")}
    for key in writing:
        assert not re.search(r"\b(make|npm|mkdocs|build)\b", commands(jobs[key])), key
    deploy = jobs["docs", "deploy"]
    assert (deploy["if"], deploy["needs"]) == ("github.event_name == 'push'", "build")


def test_a_release_is_tested_before_it_is_built_and_built_before_it_is_published():
    jobs = WORKFLOWS["release"]["jobs"]
    assert jobs["test"] == {"uses": "./.github/workflows/tests.yml"}
    assert "workflow_call" in WORKFLOWS["tests"][True]
    assert (jobs["build"]["needs"], jobs["publish"]["needs"]) == ("test", "build")


def test_a_newer_push_ends_older_runs_but_no_weekly_one():
    pushed = {
        name for name, workflow in WORKFLOWS.items() if "branches" in (workflow[True].get("push") or {})
    }
    assert pushed == {"tests", "docs", "colab-lookalike"}
    for name in pushed:
        concurrency = WORKFLOWS[name]["concurrency"]
        assert concurrency["cancel-in-progress"] is True
        assert concurrency["group"].startswith("${{ github.workflow }}-${{ github.ref }}")
        if "schedule" in WORKFLOWS[name][True]:
            assert concurrency["group"].endswith("-${{ github.event_name }}")


def test_tools_that_workflows_and_make_fetch_have_a_version():
    run_by = [commands(job) for workflow in WORKFLOWS.values() for job in workflow["jobs"].values()]
    lines = [*"\n".join(run_by).splitlines(), *(ROOT / "Makefile").read_text(encoding="utf-8").splitlines()]
    installs = [re.split(r"\b(?:npm|pip) install\b", line.split("&&")[0])[1:] for line in lines]
    words = [word for parts in installs for word in " ".join(parts).split()]
    named = {
        word
        for word in words
        if re.match(r"(build|twine|pip-audit|ghp-import|axe|vnu|jupyterlab|playw)", word)
    }
    assert len({re.split("[=@]", word)[0] for word in named}) == 8
    assert not [word for word in named if not re.search(r"(==|@)\d", word)]


def test_dependabot_renews_actions_and_python_packages_but_no_copy_of_colabs_image():
    updates = yaml.safe_load((ROOT / ".github" / "dependabot.yml").read_text(encoding="utf-8"))["updates"]
    by_kind = {update["package-ecosystem"]: update for update in updates}
    assert set(by_kind) == {"github-actions", "pip"}
    excluded = by_kind["pip"]["exclude-paths"]
    assert "constraints-colab.txt" in excluded
    assert all((ROOT / name).is_file() for name in excluded)


GH = """#!/usr/bin/env python3
import os, sys
from pathlib import Path
issues = Path("issues")
words = sys.argv[1:3]
if words == ["issue", "list"]:
    titles = issues.read_text().splitlines() if issues.exists() else []
    print(titles.count(os.environ["TITLE"]))
elif words == ["run", "view"] and "--jq" in sys.argv:
    print("11 newest\\n12 systems (windows-latest)")
elif words == ["run", "view"]:
    print("FAILED in job", sys.argv[sys.argv.index("--job") + 1])
else:
    assert words == ["issue", "create"], sys.argv
    given = dict(zip(sys.argv[3::2], sys.argv[4::2]))
    issues.open("a").write(given["--title"] + "\\n")
    print(Path(given["--body-file"]).read_text())
"""


def test_each_red_weekly_job_opens_one_issue(tmp_path):
    """The step's own script, run twice with a stand-in for `gh`: the second time its issues are open."""
    tell = WORKFLOWS["tell"]
    scheduled = {workflow["name"] for workflow in WORKFLOWS.values() if "schedule" in workflow[True]}
    assert set(tell[True]["workflow_run"]["workflows"]) == scheduled
    (tmp_path / "gh").write_text(GH, encoding="utf-8")
    (tmp_path / "gh").chmod(0o755)
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "RUN": "1", "ADDRESS": "https://run/1"}
    script = ["bash", "-e", "-c", tell["jobs"]["tell"]["steps"][0]["run"]]
    said = [run(*script, cwd=tmp_path, env=environment) for _ in range(2)]
    for part in ("https://run/1", "FAILED in job 11", "FAILED in job 12"):
        assert part in said[0]
    assert said[1] == ""
    titles = ["newest", "systems (windows-latest)"]
    assert (tmp_path / "issues").read_text(encoding="utf-8").splitlines() == [
        f"Weekly job is red: {name}" for name in titles
    ]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["UV="], ".none/bin/python -m pip install"),
        (["UV=/x/uv"], "/x/uv pip install --python .none/bin/python"),
        (["UV="], "$(.none/bin/python tools/torch_index.py ) torch"),
        (["UV=/x/uv", "TORCH_INDEX=https://x/cpu"], "tools/torch_index.py https://x/cpu) torch"),
    ],
)
def test_make_installs_the_locked_versions_and_says_each_step(given, expected):
    plan = run("make", "-n", "install", "VENV=.none", *given, cwd=ROOT).splitlines()
    first = next(i for i, line in enumerate(plan) if line.startswith('echo "installing torch'))
    told, done = plan[first : first + 6 : 2], plan[first + 1 : first + 6 : 2]
    assert all(line.startswith('echo "installing ') for line in told)
    assert all(" --quiet --constraint constraints-tested.txt " in line for line in done)
    assert expected in done[0]
    assert not any("torch_index" in line for line in done[1:])  # the other packages come from PyPI


TESTED_TORCH = re.search(r"^torch==(\S+)", torch_index.TESTED.read_text(encoding="utf-8"), re.MULTILINE)[1]


@pytest.mark.parametrize(
    ("given", "here", "expected"),  # here: machine, driver, torch in the venv
    [
        ("", ("x86_64", None, None), torch_index.CPU_WHEELS),
        ("", ("x86_64", None, "2.0.0+cpu"), torch_index.CPU_WHEELS),  # not the tested one
        ("", ("x86_64", None, TESTED_TORCH), ""),
        ("", ("x86_64", None, f"{TESTED_TORCH}+cu130"), ""),
        ("", ("x86_64", "/usr/bin/nvidia-smi", None), ""),
        ("", ("aarch64", None, None), ""),
        ("https://x/cpu", ("x86_64", None, None), "https://x/cpu"),
    ],
)
def test_torch_comes_without_cuda_where_no_driver_is(monkeypatch, capsys, given, here, expected):
    machine, driver, installed = here
    version = Mock(return_value=installed, side_effect=None if installed else PackageNotFoundError)
    page = Mock(return_value=io.BytesIO())
    monkeypatch.setattr(torch_index, "version", version)
    monkeypatch.setattr(torch_index.platform, "system", lambda: "Linux")
    monkeypatch.setattr(torch_index.platform, "machine", lambda: machine)
    monkeypatch.setattr(torch_index.shutil, "which", lambda name: driver)
    monkeypatch.setattr(torch_index.urllib.request, "urlopen", page)
    assert torch_index.index_options(given) == (f"--no-deps --index-url {expected}" if expected else "")
    asks = expected == torch_index.CPU_WHEELS
    assert page.call_count == asks
    page.side_effect = OSError("no route")
    assert torch_index.index_options(given) == (f"--no-deps --index-url {given}" if given else "")
    assert ("did not answer (no route), so torch comes from PyPI" in capsys.readouterr().err) == asks
    assert page.call_count == 2 * asks  # asked once a time


def test_make_newest_turns_our_own_deprecations_into_errors(tmp_path):
    """The filter as make hands it to the shell, on a submodule of ours that warns, and on another module."""
    plan = run("make", "-n", "newest", "ARGS=", "PARALLEL=", cwd=ROOT).splitlines()
    command = next(line for line in plan if " -m pytest " in line)
    option = command[command.index('-o "') :]
    package = tmp_path / "llama_sft_helpers"
    package.mkdir()
    (package / "__init__.py").write_text("", encoding="utf-8")
    warn = "import warnings\ndef f(kind):\n    warnings.warn('old', kind)\n"
    (package / "lora.py").write_text(warn, encoding="utf-8")
    (tmp_path / "other.py").write_text(warn, encoding="utf-8")
    (tmp_path / "test_it.py").write_text(
        "import pytest, other\nfrom llama_sft_helpers import lora\n"
        "@pytest.mark.parametrize('kind', [DeprecationWarning, FutureWarning])\n"
        "@pytest.mark.parametrize('module', [lora, other])\n"
        "def test_it(module, kind):\n    module.f(kind)\n",
        encoding="utf-8",
    )
    (tmp_path / "pytest.ini").write_text("[pytest]\n", encoding="utf-8")
    lean = {"PYTHONPATH": str(tmp_path), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}  # plugins take seconds
    done = subprocess.run(
        ["bash", "-c", f"{sys.executable} -m pytest -q -p no:cacheprovider {option}"],
        cwd=tmp_path, env={**os.environ, **lean}, capture_output=True, text=True,
    )  # fmt: skip
    assert "2 failed, 2 passed" in done.stdout, done.stdout + done.stderr
    assert done.stdout.count("FAILED test_it.py::test_it[llama_sft_helpers.lora-") == 2
