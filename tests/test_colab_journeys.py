"""Each notebook opened on a Colab machine of its own: an empty home directory and a faked ``google.colab``.

Only the account is shared between the machines: its secret, its Drive, and the hub.
"""

import ast
import contextlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from fake_hub import Account, Answer, FakeHub
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

from llama_sft_helpers.profiles import connect_drive, read_profile

ROOT = Path(__file__).parent.parent
NOTEBOOKS = {path.stem[:2]: path for path in sorted((ROOT / "notebooks").glob("[0-9][0-9]_*.ipynb"))}
MODEL = "meta-llama/Meta-Llama-3-8B"
TOKEN = "hf_PlantedTokenThatMustNeverShow7Qz9"
LOADS_A_MODEL = ["03", "04", "05", "06", "07", "08", "09"]
PASSES_ON = ["06", "07", "09"]

FAKE_COLAB = {
    "google/colab/__init__.py": "",
    "google/colab/errors.py": "class Error(Exception):\n    pass\n",
    "google/colab/userdata.py": """
from pathlib import Path
from google.colab.errors import Error
asked = []
class SecretNotFoundError(Error): pass
class NotebookAccessError(Error): pass
def get(name):
    asked.append(name)
    secret = (Path(__file__).parents[2] / "secret").read_text()
    if secret == "missing":
        raise SecretNotFoundError(name)
    if secret == "refused":
        raise NotebookAccessError(name)
    return secret
""",
    "google/colab/drive.py": """
from pathlib import Path
def mount(mountpoint):
    if (Path(__file__).parents[2] / "drive").read_text() == "refused":
        raise ValueError("mount failed")
    account = Path(__file__).parents[2] / "MyDrive"
    account.mkdir(exist_ok=True)
    Path(mountpoint).mkdir()
    (Path(mountpoint) / "MyDrive").symlink_to(account)
""",
    # Colab's kernel has google.colab in memory before the first cell; /content is no folder of a test's
    "sitecustomize.py": """
import os
from pathlib import Path
import google.colab
import no_garbage  # as tests/startup does, whose place this takes
from llama_sft_helpers import profiles
profiles._DRIVE = Path(os.environ["FAKE_CONTENT"]) / "drive"
""",
}


class Machine:
    """A kernel that runs cells one by one."""

    def __init__(self, client):
        self.client = client

    def run(self, source):
        """Run one cell; its outputs as text."""
        cells = self.client.nb.cells
        cells.append(nbformat.v4.new_code_cell(source))
        self.client.execute_cell(cells[-1], len(cells) - 1)
        return json.dumps(cells[-1].outputs)

    @property
    def text(self):
        """The notebook with everything that was put out."""
        return nbformat.writes(self.client.nb)


class GoogleAccount:
    """A Google account with its secret and its Drive, and the machines that it opens."""

    def __init__(self, folder, hub):
        self.folder, self.hub, self.machines = folder, hub, 0
        for name, text in FAKE_COLAB.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(text, encoding="utf-8")
        self.set(secret="missing", drive="refused")

    def set(self, **answers):
        """What the reader answers in Colab's dialogs."""
        for name, text in answers.items():
            (self.folder / name).write_text(text, encoding="utf-8")

    @contextlib.contextmanager
    def machine(self, profile):
        """A new machine: an empty home directory, and no variable that names a place or a token."""
        self.machines += 1
        home = self.folder / f"machine-{self.machines}"
        home.mkdir()
        places = ("HF_", "HUGGING_FACE", "XDG_", "IPYTHON", "JUPYTER", "SFT_OUTPUT", "SFT_PROFILE")
        kept = {name: value for name, value in os.environ.items() if not name.startswith(places)}
        empty, resources = nbformat.v4.new_notebook(), {"metadata": {"path": str(home)}}
        client = NotebookClient(empty, timeout=170, kernel_name="python3", resources=resources)
        path = os.pathsep.join([str(self.folder), os.environ["PYTHONPATH"]])
        own = {"HOME": str(home), "FAKE_CONTENT": str(home), "PYTHONPATH": path}
        own |= {"HF_ENDPOINT": self.hub.url, "SFT_PROFILE": profile}
        with client.setup_kernel(env=kept | own):
            yield Machine(client)


@pytest.fixture
def account(tmp_path):
    with FakeHub() as hub:
        hub.accounts[TOKEN] = Account("gil", grants={MODEL: "accepted"})
        hub.repos[MODEL] = "gated"
        yield GoogleAccount(tmp_path, hub)


def code_cells(number):
    cells = nbformat.read(NOTEBOOKS[number], as_version=4).cells
    return {cell.id[3:]: cell.source for cell in cells if cell.cell_type == "code"}


def starting_point(number):
    """The first cell, the form, those that look for Drive, profile, token and adapter, and their imports."""
    cells = list(code_cells(number).values())
    wanted = r"^# @title Your run|\b(connect_drive|load_profile|use_token|find_base_model)\("
    acting = [source for source in cells[1:] if re.search(wanted, source)]
    acting = [re.sub(r"^pd\.set_option.*$", "", source, flags=re.MULTILINE) for source in acting]
    used = {n.id for source in acting for n in ast.walk(ast.parse(source)) if isinstance(n, ast.Name)}
    return [cells[0], "\n".join(needed_imports("\n".join(cells[1:4]), used)), *acting]


def needed_imports(source, used):
    """The import statements that bind one of the names: without torch and trl a test takes seconds."""
    tree = ast.parse(re.sub(r"^(\s*)[%!].*$", r"\1pass", source, flags=re.MULTILINE))
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            node.names = [a for a in node.names if (a.asname or a.name.partition(".")[0]) in used]
            if node.names:
                yield ast.unparse(node)


def run_starting_point(machine, number, skip=()):
    return [machine.run(source) for source in starting_point(number) if not any(s in source for s in skip)]


class TestToken:
    @pytest.mark.parametrize("number", LOADS_A_MODEL)
    def test_every_notebook_finds_the_secret_on_a_machine_of_its_own(self, account, number):
        """Missing first: the widget. Then the reader stores the secret, and runs the same cell again."""
        with account.machine("colab-t4") as machine:
            answers = run_starting_point(machine, number, skip=["find_base_model(", "connect_drive()"])
            assert "widget-view" in answers[-1], answers[-1]
            assert {user for *_, user in account.hub.requests} == {None}
            account.set(secret=TOKEN)
            assert f"{MODEL} is open" in machine.run("use_token(profile.model_id)")
            machine.run(f"from huggingface_hub import auth_check; auth_check({MODEL!r})")
            assert account.hub.requests[-1][2] == "gil"
            assert TOKEN not in machine.text
            assert TOKEN[3:-4] not in machine.text

    @pytest.mark.parametrize("number", LOADS_A_MODEL)
    def test_a_local_model_asks_neither_colab_nor_the_hub(self, account, number, tiny_model_dir):
        account.set(secret=TOKEN)
        with account.machine("ci-tiny") as machine:
            *_, answer = run_starting_point(machine, number, skip=["find_base_model(", "connect_drive()"])
            assert "no token is needed" in answer
            assert account.hub.requests == []
            assert "[]" in machine.run("from google.colab import userdata; print(userdata.asked)")

    def test_a_refusal_says_how_to_grant_access(self, account):
        account.set(secret="refused")
        with account.machine("colab-t4") as machine:
            run_starting_point(machine, "04")
            shown = machine.run("print(use_token(profile.model_id).children[-1].value)")
        assert "Notebook access" in shown
        assert "no-token" in shown

    def test_02_shows_where_the_secret_is_and_that_it_opens_the_model(self, account):
        account.set(secret=TOKEN)
        with account.machine("colab-t4") as machine:
            answers = {name: machine.run(source) for name, source in code_cells("02").items()}
            assert "colab-secret" in answers["007"]
            assert "can be downloaded" in answers["013"]
            assert f"{MODEL} is open" in answers["019b"]
            assert TOKEN not in machine.text

    def test_01_runs_to_its_end(self, account, tiny_model_dir):
        with account.machine("ci-tiny") as machine:
            answers = {name: machine.run(source) for name, source in code_cells("01").items()}
        assert answers["001"] == "[]"  # installed, and nothing to restart: the first cell says nothing
        assert "2.7" in answers["031b"]  # 16.06 GB at 100 MB/s are 161 s


class TestDrive:
    def write_adapter(self, machine):
        """What 06 leaves behind, as far as the start of 07 reads it."""
        numbers = ["eval_loss_before", "eval_loss_after", "train_seconds", "train_tokens", "peak_gib"]
        keys = [*numbers, "adapter_sha256"]
        summary = {**dict.fromkeys(keys, 1), "profile": "ci-tiny", "versions": {"trl": "1"}}
        adapter = {"peft_type": "LORA", "base_model_name_or_path": "tiny-llama"}
        machine.run(
            "import json\n(profile.output_dir / 'adapter').mkdir(parents=True)\n"
            f"(profile.output_dir / 'training_summary.json').write_text(json.dumps({summary}))\n"
            f"(profile.output_dir / 'adapter' / 'adapter_config.json').write_text(json.dumps({adapter}))"
        )

    def test_07_finds_on_its_own_machine_what_06_wrote_to_drive(self, account, tiny_model_dir):
        account.set(drive="mounted")
        with account.machine("ci-tiny") as machine:
            assert "Google Drive is mounted" in "".join(run_starting_point(machine, "06"))
            self.write_adapter(machine)
        assert (account.folder / "MyDrive" / "llama-sft" / "ci-tiny" / "adapter").is_dir()
        with account.machine("ci-tiny") as machine:
            assert "held-out loss after" in run_starting_point(machine, "07")[-1]

    def test_after_a_refusal_06_says_that_results_are_lost_and_07_names_the_ways_to_an_adapter(
        self, account, tiny_model_dir
    ):
        with account.machine("ci-tiny") as machine:
            shown = "".join(run_starting_point(machine, "06"))
            assert "ValueError: mount failed" in shown
            assert "will be lost with it" in shown
            self.write_adapter(machine)
        with account.machine("ci-tiny") as machine, pytest.raises(CellExecutionError) as caught:
            run_starting_point(machine, "07")
        for way in ("Run notebook 06 first", "mount Google Drive in 06 and in 07", 'adapter = "owner/name"'):
            assert way in str(caught.value)

    def test_an_adapter_of_another_profile_is_named(self, account, tiny_model_dir):
        account.set(drive="mounted")
        with account.machine("ci-tiny") as machine:
            run_starting_point(machine, "06")
            machine.run("profile = __import__('dataclasses').replace(profile, name='colab-a100')")
            self.write_adapter(machine)
        with account.machine("ci-tiny") as machine, pytest.raises(CellExecutionError) as caught:
            run_starting_point(machine, "07")
        assert "load_profile('colab-a100')" in str(caught.value)

    @pytest.mark.parametrize("number", PASSES_ON)
    def test_drive_is_asked_for_before_anything_reads_the_folder(self, number):
        code = "\n".join(code_cells(number).values())
        assert code.index("connect_drive()") < code.index("load_profile(") < code.index(".output_dir")

    def test_elsewhere_nothing_is_asked(self, monkeypatch):
        monkeypatch.delitem(sys.modules, "google.colab", raising=False)
        monkeypatch.delenv("SFT_OUTPUT_DIR", raising=False)
        assert "not Colab" in connect_drive()
        monkeypatch.setenv("SFT_OUTPUT_DIR", "/somewhere")
        assert "SFT_OUTPUT_DIR" in connect_drive()
        assert read_profile("ci-tiny").output_dir == Path("/somewhere")


class TestPublishedAdapter:
    NAME = "ada/tiny-alpaca-lora"

    def publish(self, hub, files):
        """Serve files as the hub serves those of a model."""
        commit, siblings = "0" * 39 + "1", [{"rfilename": name} for name in files]
        listing = {"id": self.NAME, "modelId": self.NAME, "sha": commit, "siblings": siblings}
        hub.route("GET", rf"/api/models/{self.NAME}(/revision/\w+)?")(lambda *_: Answer(200, listing))
        tree = [{"type": "file", "path": n, "size": len(b), "oid": f"{n}-1"} for n, b in files.items()]
        hub.route("GET", rf"/api/models/{self.NAME}/tree/\w+")(lambda *_: Answer(200, tree))

        def serve(request, name):
            headers = {"ETag": f'"{name}-1"', "X-Repo-Commit": commit}
            return Answer(200, files[name], headers | {"Content-Type": "application/octet-stream"})

        for method in ("GET", "HEAD"):
            hub.route(method, rf"/{self.NAME}/resolve/\w+/(.+)")(serve)

    def test_07_takes_it_by_its_name_without_a_summary(self, account, tiny_model_dir):
        config = {"peft_type": "LORA", "base_model_name_or_path": "tiny-llama"}
        self.publish(account.hub, {"adapter_config.json": json.dumps(config).encode(), "README.md": b"card"})
        with account.machine("ci-tiny") as machine:
            cells = starting_point("07")
            assert cells[-1].count('adapter = ""') == 1
            for source in cells:
                machine.run(source.replace('adapter = ""', f'adapter = "{self.NAME}"'))
            found = machine.run(
                "print(sorted(p.name for p in adapter_folder.iterdir()), "
                "evaluation.find_base_model(adapter_folder), training, profile.output_dir.is_dir())"
            )
        assert "['adapter_config.json'] tiny-llama {} True" in found

    @pytest.mark.slow
    def test_07_runs_to_its_end_with_one(self, account, tiny_model_dir, tmp_path):
        """06 trains it, the hub serves it, and 07 runs on a machine without anything of 06."""
        command = [sys.executable, "-m", "llama_sft_helpers.cli", "run", "--only", "06"]
        places = {"SFT_OUTPUT_DIR": str(tmp_path / "out")}
        subprocess.run([*command, "--out", tmp_path / "demo"], check=True, env=os.environ | places)
        trained = next((tmp_path).rglob("adapter/adapter_model.safetensors")).parent
        self.publish(account.hub, {path.name: path.read_bytes() for path in trained.glob("adapter_*")})
        with account.machine("ci-tiny") as machine:
            answers = {
                name: machine.run(source.replace('adapter = ""', f'adapter = "{self.NAME}"'))
                for name, source in code_cells("07").items()
            }
        assert "nan (06)" in answers["063a"]
        assert f"lies beside it on the hub: {self.NAME}" in answers["040"]


# --- The first cell, where Colab's kernel has imported something that the installation replaces ---

COLAB_HAS = ["pyarrow==18.1.0", "pandas==2.2.3", "numpy==2.1.3", "packaging", "psutil", "ipykernel"]
PROBE = """
import contextlib, importlib.metadata, io, json, sys, types
sys.modules["google.colab"] = types.ModuleType("google.colab")
{before}
first_cell, rounds = sys.argv[1], int(sys.argv[2])
for _ in range(rounds):
    from IPython.core.interactiveshell import InteractiveShell
    result = InteractiveShell.instance().run_cell(first_cell)
    print("RESULT", type(result.error_in_exec).__name__, result.error_in_exec)
print("ON DISK", importlib.metadata.version("pyarrow"))
{after}
"""


@pytest.fixture(scope="module")
def image_venv(tmp_path_factory):
    venv = tmp_path_factory.mktemp("image") / "venv"
    subprocess.run([sys.executable, "-m", "venv", venv], check=True)
    return venv / "bin" / "python"


@pytest.fixture
def colab_image(image_venv):
    """The Python of a light environment with the image's pyarrow and pandas, and without this package."""
    pip = [image_venv, "-m", "pip", "-q"]
    subprocess.run([*pip, "install", *COLAB_HAS], check=True)
    subprocess.run([*pip, "uninstall", "-y", "llama-sft-helpers"], check=True)
    return image_venv


def light_first_cell():
    """The first cell; its installation takes only this checkout and the pyarrow that it requires."""
    lines = (ROOT / "requirements-colab.txt").read_text(encoding="utf-8").splitlines()
    pyarrow = next(line.split()[0] for line in lines if line.startswith("pyarrow=="))
    cell, replaced = re.subn(
        r"%pip install -q .*", f"%pip install -q --no-deps {ROOT} {pyarrow}", code_cells("01")["001"]
    )
    assert replaced == 1
    return cell, pyarrow.partition("==")[2]


def probe(python, before="", after="", rounds=1):
    cell, _ = light_first_cell()
    program = PROBE.format(before=before, after=after)
    command = [python, "-c", program, cell, str(rounds)]
    # elsewhere, as this checkout's folder would count as installed
    answer = subprocess.run(command, capture_output=True, text=True, cwd=python.parent)
    return answer.stdout + answer.stderr


@pytest.mark.slow
def test_a_real_upgrade_under_an_import_asks_for_a_restart_and_after_it_for_nothing(colab_image):
    python, new = colab_image, light_first_cell()[1]
    stale = f"pyarrow 18.1.0 (now {new} on disk)"
    # pandas brings pyarrow into memory; running the cell again without a restart says so again
    first = probe(python, before="import pandas", after="import pyarrow.dataset", rounds=2)
    assert first.count(f"RESULT EnvironmentCheckError This session had imported {stale}") == 2, first
    assert f"ON DISK {new}" in first
    # without a restart the old pyarrow in memory meets the new one's files
    assert "may indicate binary incompatibility" in first.partition("ON DISK")[2], first
    again = probe(python, before="import pandas, pyarrow", after="import pyarrow.dataset")
    assert "RESULT NoneType None" in again, again
    assert "Error" not in again


@pytest.mark.slow
def test_without_such_an_import_a_real_upgrade_asks_for_no_restart(colab_image):
    python, new = colab_image, light_first_cell()[1]
    answer = probe(python, before="import numpy", after="import pandas, pyarrow.dataset")
    assert "RESULT NoneType None" in answer, answer
    assert f"ON DISK {new}" in answer
    assert "Error" not in answer
