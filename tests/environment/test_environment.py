"""Notebook 01's helpers: what is measured, how it is judged, and what the command prints."""

import dataclasses
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import time
import types
from pathlib import Path

import psutil
import pytest
import torch
from fake_hub import Answer, FakeHub
from packaging.requirements import Requirement
from transformers import LlamaConfig
from typer.testing import CliRunner

from llama_sft_helpers.cli import app
from llama_sft_helpers.environment import (
    MUST_FIX,
    PACKAGES,
    EnvironmentCheckError,
    check_environment,
    check_imports,
    checks,
    machine,
    needs,
    same_version,
    summarize_environment,
    versions,
)
from llama_sft_helpers.memory import plan_memory
from llama_sft_helpers.profiles import device_map, read_profile

ROOT = Path(__file__).parents[2]
MODEL = "meta-llama/Meta-Llama-3-8B"
LINES = [
    line.partition("#")[0].strip()
    for file in ("requirements-tested.txt", "requirements-colab.txt")
    for line in (ROOT / file).read_text(encoding="utf-8").splitlines()
]
PINS = [Requirement(line) for line in LINES if line]
TESTED = {pin.name: next(iter(pin.specifier)).version for pin in PINS}
# a machine on which nothing is to be fixed, with the newest libraries too: this one's own versions
INSTALLED = {name: importlib.metadata.version(name) for name in PACKAGES if name != "torchao"}


def card(gib, *capability, name="NVIDIA A100-SXM4-40GB"):
    """The properties of a GPU, as far as torch's are read."""
    major, minor = capability
    return types.SimpleNamespace(name=name, total_memory=gib * 2**30, major=major, minor=minor)


A100 = machine.Machine(
    python="3.13.0",
    on_disk=INSTALLED,
    in_memory={},
    driver_cuda="12.8",
    toolkit_cuda="12.5",
    gpu=card(39.56, 8, 0),
    free_disk_gib=180.0,
    ram_gib=83.5,
    colab=True,
)


@pytest.fixture(autouse=True)
def _silent_hub(monkeypatch):
    """No test asks the real hub what is left to download."""
    monkeypatch.setattr(needs, "_dry_run", lambda model_id: [])


@pytest.fixture
def table(monkeypatch):
    """The table of an A100 on Colab with some facts and (in capitals) variables changed, by component."""

    def build(profile="colab-a100", **changes):
        for name in [name for name in changes if name.isupper()]:
            monkeypatch.setenv(name, changes.pop(name))
        monkeypatch.setattr(checks, "measure", lambda: dataclasses.replace(A100, **changes))
        return summarize_environment(
            read_profile(profile) if isinstance(profile, str) else profile
        ).set_index("component")

    return build


def with_package(**changed):
    """The installed packages, some of them changed or, with None, removed."""
    return {name: version for name, version in {**INSTALLED, **changed}.items() if version}


def problems(summary):
    return summary[summary["status"].isin(MUST_FIX)]


def problem(summary):
    """The only row that must be fixed."""
    (row,) = problems(summary).itertuples()
    return row


def python(code, **variables):
    """What a process of its own prints."""
    command = [sys.executable, "-c", code]
    return subprocess.run(command, env=os.environ | variables, capture_output=True, text=True, check=True)


def test_this_machine():
    summary = summarize_environment().set_index("component")
    assert summary.index.is_unique
    assert set(PACKAGES) < set(summary.index)
    assert summary["installed"]["trl"] == importlib.metadata.version("trl")
    assert summary["installed"]["Python"] == ".".join(map(str, sys.version_info[:3]))
    here = machine.measure()
    assert here.ram_gib == pytest.approx(psutil.virtual_memory().total / 2**30)
    assert here.free_disk_gib == pytest.approx(psutil.disk_usage(str(ROOT)).free / 2**30, rel=0.2)
    check_environment()


def test_tested_comes_from_the_requirement_files(table):
    """A second reading of the same fact: the files themselves, not the installed metadata."""
    tested = table()["tested"]
    pins = [pin for pin in PINS if pin.name in PACKAGES and (not pin.marker or pin.marker.evaluate())]
    assert len(pins) >= 11
    for pin in pins:
        assert Requirement(f"x=={tested[pin.name]}").specifier == pin.specifier


def test_packages_that_cannot_be_imported_do_not_hide_the_table(tmp_path):
    for module, error in (("torch", "OSError('no libcudart.so.13')"), ("huggingface_hub", "ImportError()")):
        (tmp_path / f"{module}.py").write_text(f"raise {error}", encoding="utf-8")
    code = "from llama_sft_helpers.environment import summarize_environment as table\n"
    code += "print(*table().query('component == \"torch\"').iloc[0], sep='; ')"
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    printed = python(code, PYTHONPATH=path, SFT_PROFILE="").stdout
    assert "OSError: no libcudart.so.13; " in printed
    assert "; broken; pip install -q --force-reinstall --no-deps torch==" in printed


def test_a_demo_model_that_cannot_be_built_is_missing_with_its_command(table, monkeypatch):
    assert table("cpu-demo").loc["demo model", "status"] == "ok"
    monkeypatch.setattr(checks, "demo_model_fix", lambda: "pip install it")
    assert table("cpu-demo").loc["demo model", ["status", "fix"]].tolist() == ["missing", "pip install it"]
    assert "demo model" not in table().index  # the hub's model


NO_GPU = {"gpu": None, "driver_cuda": None}
HIDDEN = {"gpu": None, "driver_cuda": "13.0", "on_disk": with_package(torch="2.13.0+cu130")}
NO_TORCH = {**HIDDEN, "torch_error": "ModuleNotFoundError: No module named 'torch'"}
TORCH = TESTED["torch"]
T4 = card(14.74, 7, 5, name="Tesla T4")
# what is changed -> (component, status, words of the fix)
PROBLEMS = [
    ({"python": "3.9.1"}, "Python", "unsupported", "use a Python <3."),
    *(
        ({"on_disk": with_package(**{name: None})}, name, "missing", f'"{name}=={TESTED[name]}"')
        for name in ("trl", "bitsandbytes", "transformers")
    ),
    # Colab's own datasets, which trl 1.x refuses; transformers has an upper bound on tokenizers
    ({"on_disk": with_package(datasets="4.0.0")}, "datasets", "too old", TESTED["datasets"]),
    ({"on_disk": with_package(tokenizers="0.99.0")}, "tokenizers", "too new", "tokenizers"),
    ({"on_disk": with_package(ipywidgets="7.6.5")}, "ipywidgets", "too old", "ipywidgets=="),
    ({"on_disk": with_package(torchao="0.10.0")}, "torchao", "too old", '--no-deps -U "torchao'),
    ({"in_memory": {"pyarrow": "18.1.0"}}, "pyarrow", "restart", "Restart session"),
    ({**NO_GPU, "colab": False}, "GPU", "no GPU", "SFT_PROFILE=cpu-demo"),
    ({**HIDDEN, "on_disk": with_package(torch="2.13.0+cpu")}, "GPU", "GPU hidden", "--force-reinstall"),
    ({**HIDDEN, "driver_cuda": "11.4"}, "GPU", "GPU hidden", "driver: it runs CUDA up to 11.4"),
    *(
        ({**HIDDEN, "CUDA_VISIBLE_DEVICES": ids}, "GPU", "GPU hidden", f"='{ids}' hides it: unset")
        for ids in ("", "-1", "7")
    ),
    # where torch is not there, or a driver hangs it, nothing is said of the GPU
    ({**NO_TORCH, "on_disk": with_package(torch=None)}, "torch", "missing", 'install -q "torch=='),
    (NO_TORCH, "torch", "broken", "--no-deps torch==2.13.0"),
    ({**HIDDEN, "driver_cuda": machine.NO_ANSWER}, "CUDA driver", "GPU hidden", "driver hangs"),
    # colab-l4's plan needs 19.7 GiB
    ({"gpu": card(14.74, 8, 0)}, "GPU memory", "too little", "export SFT_PROFILE=colab-t4"),
    ({"gpu": card(23.0, 7, 5), "profile": "colab-l4"}, "bf16", "unsupported", "export SFT_PROFILE=colab-t4"),
    ({"gpu": card(14.74, 7, 0), "profile": "colab-t4"}, "compute capability", "unsupported", "T4, L4, A100"),
    ({"ram_gib": 4.0}, "RAM", "too little", "more memory"),
]


@pytest.mark.parametrize(("changes", "component", "status", "fix"), PROBLEMS)
def test_one_thing_to_fix(table, changes, component, status, fix):
    row = problem(table(**changes))
    assert (row.Index, row.status) == (component, status)
    assert fix in row.fix


@pytest.mark.parametrize(
    ("changes", "component", "status"),
    [
        ({}, "torchao", "not there"),
        ({"profile": "colab-t4", "gpu": T4}, "bf16", "ok"),
        ({"profile": "ci-tiny", "free_disk_gib": 2.0}, "free disk", "ok"),
        ({"on_disk": with_package(torch="2.11.0+cu128")}, "torch", "other version"),
        ({"on_disk": with_package(ipywidgets="7.7.1")}, "ipywidgets", "other version"),
        ({"on_disk": with_package(torch=f"{TORCH}+cu128"), "in_memory": {"torch": TORCH}}, "torch", "ok"),
        ({"profile": "ci-tiny", "CUDA_VISIBLE_DEVICES": "", **HIDDEN}, "GPU", "not there"),
        ({"profile": None, "SFT_PROFILE": "cpu-demo", **NO_GPU}, "GPU", "not there"),
    ],
)
def test_nothing_to_fix(table, changes, component, status):
    summary = table(**changes)
    assert problems(summary).empty, summary.to_string()
    assert summary["status"][component] == status
    check_environment(summary.reset_index())


@pytest.mark.parametrize(
    ("dtype", "times", "row"),
    [
        (
            "bfloat16",
            9.04,
            ["bfloat16 takes 9.0 x float32's time", "slow", 'set dtype = "float32" in the profile'],
        ),
        ("float16", 0.42, ["float16 takes 0.4 x float32's time", "ok", ""]),
        ("float32", 9.04, ["", "not there", ""]),
    ],
)
def test_a_cpu_that_computes_16_bit_numbers_slowly_is_told_and_does_not_stop(
    table, monkeypatch, dtype, times, row
):
    monkeypatch.setattr(checks, "cpu_slowdown", lambda name: times if name == dtype else pytest.fail(name))
    summary = table(read_profile("cpu-demo", dtype=dtype), **NO_GPU)
    assert summary.loc["bf16", ["installed", "status", "fix"]].tolist() == row
    assert problems(summary).empty


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="the limits are those of x86-64")
def test_a_cpu_without_vector_units_is_slow_in_bfloat16():
    code = "from llama_sft_helpers.environment.machine import cpu_slowdown; print(cpu_slowdown('bfloat16'))"
    limits = {"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41"}
    assert float(python(code, **limits).stdout) > 3 * checks._SLOW


def test_a_profile_is_set_as_windows_does_it(table, monkeypatch):
    monkeypatch.setattr("sys.platform", "win32")
    fix = problem(table(gpu=card(14.74, 8, 0))).fix
    assert fix == '$env:SFT_PROFILE = "colab-t4" in PowerShell, set SFT_PROFILE=colab-t4 in cmd'


def test_only_a_cpu_runtime_of_colab_that_nobody_chose_is_a_mistake(table, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("SFT_PROFILE")
    monkeypatch.setattr("llama_sft_helpers.profiles._gpu_gib", lambda: 0.0)
    row = problem(table(None, **NO_GPU))
    assert (row.status, row.fix.partition(" > ")[2][:19]) == ("no GPU", "Change runtime type")
    assert problems(table(None, colab=False, **NO_GPU)).empty  # a laptop
    (tmp_path / "llama-sft.toml").write_text('profile = "cpu-demo"', encoding="utf-8")
    assert problems(table(None, **NO_GPU)).empty


def test_notebooks_get_the_magic(table, monkeypatch):
    monkeypatch.setattr("IPython.get_ipython", object)
    assert problem(table(on_disk=with_package(trl=None))).fix.startswith("%pip install")


def test_torchao_bound_is_the_one_peft_has(monkeypatch):
    """peft itself, on a pretended version, refuses below the bound and accepts it."""
    from peft import import_utils

    ask, pretended = import_utils.is_torchao_available, versions._UNDECLARED["torchao"].removeprefix(">=")
    monkeypatch.setattr(import_utils.importlib.util, "find_spec", lambda _name: object())
    monkeypatch.setattr(import_utils.importlib_metadata, "version", lambda _name: pretended)
    ask.cache_clear()
    assert ask()
    ask.cache_clear()
    pretended = "0.15.9"
    with pytest.raises(ImportError, match="torchao"):
        ask()
    ask.cache_clear()


def stale_import_cell():
    """What the code under "A stale import" in notebook 01 finds of torch."""
    cells = json.loads((ROOT / "notebooks" / "01_environment.ipynb").read_text(encoding="utf-8"))["cells"]
    names = {"PACKAGES": ["torch"], "sys": sys, "importlib": importlib, "same_version": same_version}
    exec("".join(next(cell["source"] for cell in cells if cell["id"] == "01-017")), names)
    return names["stale"]


class TestVersions:
    @pytest.mark.parametrize(
        ("one", "other", "equal"),
        [
            ("2.11.0", "2.11.0+cu130", True),
            ("2.11.0+cu128", "2.11.0+cu130", True),
            ("2.11", "2.11.0", True),
            ("2.11.0", "2.11.1", False),
            ("2.11.0", "2.11.0rc1", False),
            ("18.1.0", "26.0.1", False),
        ],
    )
    def test_the_local_part_is_no_difference(self, one, other, equal):
        assert same_version(one, other) is same_version(other, one) is equal

    def test_torch_from_pypi_needs_no_restart_and_a_newer_one_does(self, monkeypatch):
        """Torch's wheel on PyPI: 2.11.0 in its metadata, 2.11.0+cu130 in the module."""
        real, on_pypi = importlib.metadata.version, {"torch": "2.11.0"}
        monkeypatch.setattr(importlib.metadata, "version", lambda name: on_pypi.get(name) or real(name))
        monkeypatch.setattr(torch, "__version__", "2.11.0+cu130")
        assert versions.version_in_memory("torch") == "2.11.0+cu130"
        assert stale_import_cell() == []
        check_imports()
        on_pypi["torch"] = "2.12.0"
        with pytest.raises(AssertionError, match="Restart the session: torch"):
            stale_import_cell()
        with pytest.raises(EnvironmentCheckError, match=r"torch 2.11.0\+cu130 \(now 2.12.0 on disk\)"):
            check_imports()

    def test_a_replaced_import_is_named_with_both_versions_and_the_way_out(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "peft", types.SimpleNamespace(__version__="0.1"))
        on_disk = importlib.metadata.version("peft")
        with pytest.raises(EnvironmentCheckError, match="Restart session") as caught:
            check_imports()
        assert f"had imported peft 0.1 (now {on_disk} on disk) before" in str(caught.value)
        row = problem(summarize_environment().set_index("component"))
        assert (row.status, row.installed) == ("restart", f"{on_disk} on disk, 0.1 in memory")

    def test_what_is_not_imported_or_not_installed_needs_no_restart(self, monkeypatch):
        for name in PACKAGES:
            monkeypatch.delitem(sys.modules, name, raising=False)
        monkeypatch.setitem(sys.modules, "torchao", types.SimpleNamespace(__version__="0.10.0"))
        monkeypatch.setattr(versions, "version_on_disk", lambda name: None if name == "torchao" else "9")
        check_imports()


LEFT = """
from llama_sft_helpers.environment import needs
needs._HUB_SECONDS = 60  # a busy machine may be slow
print(needs._left_to_download_gib("meta-llama/Meta-Llama-3-8B"))
print(needs._left_to_download_gib("meta-llama/gated"))
"""


class TestSizes:
    def test_memory_needed_is_the_plan(self, table):
        shape = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32}
        config = LlamaConfig(**shape, num_attention_heads=32, num_key_value_heads=8, vocab_size=128256)
        planned = plan_memory(config, read_profile("colab-a100"))["gib"].sum()
        assert table()["tested"]["GPU memory"].startswith(f"{planned:.1f} GiB")

    def test_the_gpu_is_torchs_first(self, monkeypatch):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        assert (machine.measure().gpu, device_map()) == (None, {"": "cpu"})
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: [T4][index])
        assert (machine.measure().gpu, device_map()) == (T4, {"": 0})

    def test_what_is_left_is_what_the_hub_says(self, table, monkeypatch):
        files = [
            types.SimpleNamespace(file_size=n * 2**30, will_download=new)
            for n, new in ((3, True), (9, False))
        ]
        monkeypatch.setattr(needs, "_dry_run", lambda model_id: files)
        assert table(free_disk_gib=15.0)["tested"]["free disk"].startswith("4.0 GiB")

    def test_the_client_asks_a_hub_for_the_files_that_from_pretrained_reads(self, tmp_path):
        sizes = {
            "model-00001-of-00002.safetensors": 5 * 2**30,
            "model-00002-of-00002.safetensors": 2**30,
            "config.json": 2**20,
            "original/consolidated.00.pth": 16 * 2**30,
            "original/params.json": 2**30,
            "README.md": 2**30,
        }
        commit = "0" * 40
        files = [{"type": "file", "path": n, "size": s, "oid": "1" * 40} for n, s in sizes.items()]

        def head(request, name):
            known = {"X-Repo-Commit": commit, "ETag": f'"{name}"', "X-Linked-Size": str(sizes[name])}
            return Answer(200, "", known)

        with FakeHub() as hub:
            info = Answer(200, {"id": MODEL, "sha": commit, "siblings": []})
            hub.route("GET", rf"/api/models/{MODEL}/revision/main")(lambda request: info)
            hub.route("GET", rf"/api/models/{MODEL}/tree/{commit}")(lambda request: Answer(200, files))
            hub.route("HEAD", rf"/{MODEL}/resolve/{commit}/(.+)")(head)
            done = python(LEFT, HF_ENDPOINT=hub.url, HF_HOME=str(tmp_path), HF_HUB_OFFLINE="0")
        left, unknown = done.stdout.split()
        assert float(left) == pytest.approx(6 + 2**-10)  # the shards and config.json
        assert unknown == "None"
        assert "%|" not in done.stderr  # no progress bars

    def test_colab_is_not_asked_for_its_secret(self, monkeypatch):
        """Its dialog works in the main thread only, and notebook 01 needs no token."""
        monkeypatch.undo()  # the hub is silent here as well
        given = []
        monkeypatch.setattr(
            "huggingface_hub.snapshot_download", lambda model_id, token, **_: given.append(token)
        )
        needs._dry_run(MODEL)
        monkeypatch.setitem(sys.modules, "google.colab", types.ModuleType("google.colab"))
        needs._dry_run(MODEL)
        assert given == [None, False]

    def test_a_hub_that_refuses_or_hangs_leaves_the_plan(self, monkeypatch):
        monkeypatch.setattr(needs, "_dry_run", lambda model_id: 1 / 0)
        assert needs._left_to_download_gib(MODEL) is None
        monkeypatch.setattr(needs, "_HUB_SECONDS", 0.2)
        monkeypatch.setattr(needs, "_dry_run", lambda model_id: time.sleep(5))
        started = time.monotonic()
        assert needs._left_to_download_gib(MODEL) is None
        assert time.monotonic() - started < 2

    def test_a_model_in_a_folder_is_not_downloaded(self, tmp_path):
        folder = tmp_path / "Meta-Llama-3-8B"
        folder.mkdir()
        assert needs.needed_disk_gib(read_profile("colab-a100", model_id=str(folder))) == 1.0

    def test_too_little_disk_for_the_download_less_what_is_in_the_clients_cache(
        self, table, monkeypatch, tmp_path
    ):
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
        row = problem(table(free_disk_gib=15.0))
        assert (row.Index, row.status) == ("free disk", "too little")
        assert row.tested.startswith("16.0 GiB")  # 8,030,261,248 x 2 bytes = 14.96 GiB, and results
        assert str(tmp_path) in row.fix
        blobs = tmp_path / "hub" / "models--meta-llama--Meta-Llama-3-8B" / "blobs"
        blobs.mkdir(parents=True)
        with (blobs / "shard").open("wb") as file:
            file.truncate(10 * 2**30)  # sparse: takes no space
        assert table(free_disk_gib=15.0)["tested"]["free disk"].startswith("6.0 GiB")


@pytest.fixture
def tool(tmp_path, monkeypatch):
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))

    def write(name, script):
        (folder / name).write_text(f"#!/bin/sh\n{script}\n", encoding="utf-8")
        (folder / name).chmod(0o755)

    return write


def cuda_versions():
    here = machine.measure()
    return here.driver_cuda, here.toolkit_cuda


class TestTools:
    @pytest.mark.parametrize("heading", ["CUDA Version: 12.4", "CUDA UMD Version: 12.4"])
    def test_tools_that_answer(self, tool, heading):
        tool("nvidia-smi", f"echo '| NVIDIA-SMI 550.54  Driver Version: 550.54  {heading} |'")
        tool("nvcc", "echo 'Cuda compilation tools, release 12.5, V12.5.82'")
        assert cuda_versions() == ("12.4", "12.5")

    def test_tools_that_are_missing_or_broken(self, tool):
        assert cuda_versions() == (None, None)
        tool("nvidia-smi", "echo 'NVIDIA-SMI has failed because it could not talk to the driver'; exit 9")
        assert cuda_versions() == (None, None)
        status = summarize_environment().set_index("component")["status"]
        assert status[["CUDA driver", "CUDA toolkit"]].tolist() == ["not there"] * 2

    def test_tools_that_hang(self, tool, monkeypatch):
        monkeypatch.setattr(machine, "_TOOL_SECONDS", 0.3)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: pytest.fail("this would hang as well"))
        for name in ("nvidia-smi", "nvcc"):
            tool(name, "exec /bin/sleep 60")
        monkeypatch.delenv("SFT_PROFILE")
        started = time.monotonic()
        summary = summarize_environment().set_index("component")
        assert time.monotonic() - started < 5
        assert summary["installed"]["CUDA driver"] == "no answer"
        assert summary["status"][["CUDA driver", "CUDA toolkit"]].tolist() == ["GPU hidden", "not there"]


class TestMessages:
    def test_every_problem_in_one_message_most_important_first(self, table):
        on_disk = with_package(bitsandbytes=None, datasets="4.0.0")
        summary = table(on_disk=on_disk, in_memory={"peft": "0.1"}, free_disk_gib=3.0, **NO_GPU)
        with pytest.raises(EnvironmentCheckError, match=r"^5 things to fix") as caught:
            check_environment(summary=summary.reset_index())
        message = str(caught.value)
        order = ["GPU: no GPU", "free disk:", "bitsandbytes: missing", "datasets: too old", "peft: restart"]
        positions = [message.index(start) for start in order]
        assert positions == sorted(positions)
        assert all(fix in message for fix in problems(summary)["fix"])

    def test_the_commands_json_on_a_machine_without_a_gpu(self):
        """The command in a process of its own: only JSON on standard output."""
        command = [sys.executable, "-m", "llama_sft_helpers.cli", "check", "--json"]
        environ = os.environ | {"SFT_PROFILE": "", "CUDA_VISIBLE_DEVICES": ""}
        answer = subprocess.run(command, capture_output=True, text=True, env=environ)
        report = json.loads(answer.stdout)
        assert answer.returncode == (0 if report["ok"] else 1)
        # without the packages of requirements-models.txt, as on Colab, the demo model is one thing to fix
        assert all(problem.startswith("demo model: missing") for problem in report["problems"])
        assert {row["component"] for row in report["components"]} > set(PACKAGES)
        assert all(list(row) == checks.COLUMNS for row in report["components"])

    def test_the_command_prints_a_table(self):
        result = CliRunner().invoke(app, ["check"], env={"COLUMNS": "200"})
        assert result.exit_code == 0
        assert all(name in result.output for name in PACKAGES)

    @pytest.mark.parametrize(
        ("arguments", "says"),
        [
            (["colab-a100"], "trl: missing"),
            (["colab-a100", "--json"], '"ok": false'),
            (["colab-a1000"], "Valid profiles: ci-tiny, colab-a100"),
        ],
    )
    def test_the_commands_exit_code_when_something_must_be_fixed(self, table, arguments, says):
        table(on_disk=with_package(trl=None))
        result = CliRunner().invoke(app, ["check", "--profile", *arguments])
        assert result.exit_code == 1
        assert says in result.output
