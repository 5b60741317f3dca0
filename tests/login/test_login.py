"""Notebook 02's helpers: every reason through the real client, the widget, and the hunt for the token."""

import json
import logging
import os
import socket
import subprocess
import sys
import threading
import time
import traceback
import types
import warnings
from pathlib import Path

import huggingface_hub
import nbformat
import pytest
from fake_hub import Account, Answer, FakeHub
from huggingface_hub import constants, hf_api
from huggingface_hub.errors import HTTPError
from nbclient import NotebookClient

from llama_sft_helpers import login
from llama_sft_helpers.login import (
    AccessError,
    access,
    check_access,
    check_token,
    find_token,
    login_widget,
    mask,
    tokens,
)

NOTEBOOK = Path(__file__).parents[2] / "notebooks" / "02_login.ipynb"
MODEL = "meta-llama/Meta-Llama-3-8B"
TOKEN = "hf_PlantedTokenThatMustNeverShow7Qz9"
ACCOUNTS = {
    "hf_accepted_0000000001": Account("ada", grants={MODEL: "accepted"}),
    "hf_stranger_0000000002": Account("bob"),
    "hf_waiting__0000000003": Account("cleo", grants={MODEL: "pending"}),
    "hf_refused__0000000004": Account("dan", grants={MODEL: "rejected"}),
    "hf_fine_____0000000005": Account("eve", role="fineGrained", gated_permission=False),
    "hf_expired__0000000006": Account("fay", token_error="expired"),
    TOKEN: Account("gil", grants={MODEL: "accepted"}),
}
GOOD, STRANGER, WAITING, REFUSED, FINE, EXPIRED = list(ACCOUNTS)[:6]


@pytest.fixture
def no_token(tmp_path, monkeypatch):
    """No token anywhere, and a cache of the test's own."""
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_ENDPOINT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setattr(constants, "HF_STORED_TOKENS_PATH", str(tmp_path / "stored_tokens"))
    monkeypatch.setattr(tokens, "colab_refused", False)
    return tmp_path


@pytest.fixture
def hub(no_token, monkeypatch):
    with FakeHub() as hub:
        hub.accounts.update(ACCOUNTS)
        hub.repos.update({MODEL: "gated", "org/open": "open", "ada/private": "private:ada"})
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(hf_api.api, "endpoint", hub.url)
        yield hub
    huggingface_hub.close_session()


def reason_of(repo_id=MODEL, token=None):
    with pytest.raises(AccessError) as caught:
        check_access(repo_id, token)
    assert token is None or token not in str(caught.value)
    return caught.value.reason


class TestAccess:
    @pytest.mark.parametrize(
        ("repo_id", "token", "reason"),
        [
            (MODEL, None, "no-token"),
            (MODEL, "hf_nobody___0000000009", "invalid-token"),
            (MODEL, EXPIRED, "invalid-token"),
            (MODEL, STRANGER, "gated-not-accepted"),
            (MODEL, WAITING, "gated-pending"),
            (MODEL, REFUSED, "gated-rejected"),
            (MODEL, FINE, "token-lacks-gated-permission"),
            ("org/mispelled", None, "not-found"),
            ("org/mispelled", GOOD, "not-found"),
            ("ada/private", STRANGER, "not-found"),
            ("one/two/three", GOOD, "not-found"),
        ],
    )
    def test_the_hub_s_answers(self, hub, repo_id, token, reason):
        assert reason_of(repo_id, token) == reason
        assert hub.requests[-1][1] == f"/api/models/{repo_id}/auth-check"

    @pytest.mark.parametrize(
        "token", ["hf_with space_0000000", "hf_bell\x07_0000000000", "hf_ümlaut_0000000000"]
    )
    def test_text_that_is_no_token_is_not_sent(self, hub, token):
        assert reason_of(token=token) == "invalid-token"
        assert hub.requests == []

    def test_open(self, hub, tmp_path):
        check_access(MODEL, GOOD)
        check_access("org/open")
        check_access("ada/private", GOOD)
        asked = len(hub.requests)
        check_access(str(tmp_path))  # a folder needs no hub
        assert len(hub.requests) == asked == 3

    @pytest.mark.parametrize("status", [500, 502, 503, 429])
    def test_broken_hub(self, hub, status):
        hub.fail_status = status
        assert reason_of(token=GOOD) == "hub-unreachable"

    def test_disabled_repository(self, hub):
        refusal = Answer(403, {}, {"X-Error-Message": "Access to this resource is disabled."})
        hub.route("GET", r"/api/models/org/disabled/auth-check")(lambda _request: refusal)
        assert reason_of("org/disabled", GOOD) == "forbidden"

    def test_slow_hub_is_given_up(self, hub, monkeypatch):
        monkeypatch.setattr(access, "HUB_SECONDS", 0.3)
        hub.delay_seconds = 30
        started = time.monotonic()
        assert reason_of(token=GOOD) == "hub-unreachable"
        with pytest.raises(AccessError, match="hub-unreachable"):
            check_token(GOOD)
        assert time.monotonic() - started < 5

    def test_dead_port(self, hub, monkeypatch):
        with socket.socket() as held:
            held.bind(("127.0.0.1", 0))
            monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{held.getsockname()[1]}")
            assert reason_of(token=GOOD) == "hub-unreachable"

    def test_an_address_that_is_none(self, hub, monkeypatch):
        monkeypatch.setenv("HF_ENDPOINT", "http://localhost:port")
        with pytest.raises(AccessError, match=r"(?s)hub-unreachable.*InvalidURL"):
            check_access(MODEL, GOOD)

    def test_offline_mode(self, hub, monkeypatch):
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        with pytest.raises(AccessError, match="HF_HUB_OFFLINE is set"):
            check_access(MODEL, GOOD)

    def test_a_page_that_is_no_hub(self, hub):
        hub.route("GET", r"/api/whoami-v2")(lambda _request: Answer(200, "<html>Wi-Fi log-in</html>"))
        with pytest.raises(AccessError, match="hub-unreachable"):
            check_token(GOOD)

    def test_expired_token_over_https(self, no_token, monkeypatch):
        """Over https the client calls an expired token RepositoryNotFoundError; the reason stays right."""

        client = sys.modules[HTTPError.__module__]  # the HTTP library that this huggingface_hub brings

        def expired(request):
            headers = {"X-Error-Message": 'User Access Token "laptop" is expired'}
            return client.Response(401, headers=headers, request=request)

        monkeypatch.setenv("HF_ENDPOINT", "https://hub.test")
        transport = client.MockTransport(expired)
        huggingface_hub.set_client_factory(lambda: client.Client(transport=transport))
        try:
            api = huggingface_hub.HfApi(endpoint="https://hub.test")
            with pytest.raises(huggingface_hub.errors.RepositoryNotFoundError):
                api.auth_check(MODEL, token=EXPIRED)
            assert reason_of(token=EXPIRED) == "invalid-token"
        finally:
            from huggingface_hub.utils._http import default_client_factory

            huggingface_hub.set_client_factory(default_client_factory)

    @pytest.mark.parametrize("reason", login.REASONS)
    def test_every_reason_names_page_and_action(self, reason):
        error = AccessError(reason, MODEL, "detail")
        assert error.page.startswith("https://")
        assert error.page in str(error)
        assert error.action in str(error)
        assert "{" not in str(error)
        row = login.summarize_reasons(MODEL).set_index("reason").loc[reason]
        assert row["page"] == error.page


class TestFindToken:
    def test_none(self, no_token):
        assert tuple(find_token()) == (None, "none")

    def test_order_is_the_client_s(self, no_token, monkeypatch):
        (no_token / "token").write_text("hf_from_the_cache_0000\n")
        assert tuple(find_token()) == ("hf_from_the_cache_0000", "cache")
        assert huggingface_hub.get_token() == "hf_from_the_cache_0000"
        monkeypatch.setenv("HF_TOKEN", " hf_from_the_env__0000\n")
        assert tuple(find_token()) == ("hf_from_the_env__0000", "env")
        assert huggingface_hub.get_token() == "hf_from_the_env__0000"

    def test_older_variable(self, no_token, monkeypatch):
        monkeypatch.setenv("HUGGING_FACE_HUB_TOKEN", TOKEN)
        assert tuple(find_token()) == (TOKEN, "env")

    def test_representation_hides_the_token(self, no_token, monkeypatch):
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        found = find_token()
        for text in (
            repr(found),
            str(found),
            f"{found}",
            mask(TOKEN),
            login.summarize_token_sources().to_html(),
        ):
            assert TOKEN not in text
            assert TOKEN[-4:] in text
            assert TOKEN[-6:] not in text

    def test_short_token_is_not_shown_at_all(self):
        assert mask("hf_short") == "present"
        assert mask(None) == "none"


class ColabSecret:
    """``google.colab.userdata`` as Colab has it: a secret that is granted, refused or missing."""

    @pytest.fixture
    def secret(self, no_token, monkeypatch):
        asked = []

        class NotebookAccessError(Exception):
            pass

        class SecretNotFoundError(Exception):
            pass

        def install(state):
            def get(name):
                asked.append(name)
                if state == "refused":
                    raise NotebookAccessError(name)
                if state == "missing":
                    raise SecretNotFoundError(name)
                return f"{TOKEN}\n"

            userdata = types.ModuleType("google.colab.userdata")
            userdata.get = get
            userdata.NotebookAccessError = NotebookAccessError
            userdata.SecretNotFoundError = SecretNotFoundError
            colab = types.ModuleType("google.colab")
            colab.userdata = userdata
            monkeypatch.setitem(sys.modules, "google", types.ModuleType("google"))
            monkeypatch.setitem(sys.modules, "google.colab", colab)
            monkeypatch.setitem(sys.modules, "google.colab.userdata", userdata)
            return asked

        return install


class TestColabSecret(ColabSecret):
    def colab_row(self):
        return login.summarize_token_sources().set_index("source").loc["colab-secret"]

    def test_granted(self, secret):
        asked = secret("granted")
        assert tuple(find_token()) == (TOKEN, "colab-secret")
        assert set(asked) == {"HF_TOKEN"}
        assert self.colab_row()["used"] == "yes"
        assert TOKEN not in " ".join(self.colab_row())

    def test_refused_is_asked_once(self, secret):
        asked = secret("refused")
        assert find_token().source == "none"
        assert find_token().source == "none"
        assert "refused" in self.colab_row()["token"]
        assert asked == ["HF_TOKEN"]

    def test_missing(self, secret):
        secret("missing")
        assert find_token().source == "none"
        assert self.colab_row()["token"] == "none"

    def test_not_asked_when_another_token_is_there(self, secret, monkeypatch):
        asked = secret("granted")
        monkeypatch.setenv("HF_TOKEN", GOOD)
        assert find_token().source == "env"
        assert self.colab_row()["token"] == "not asked"
        assert asked == []


class TestUseToken(ColabSecret):
    """The one call of notebooks 03 to 08, with the real client against the fake hub."""

    def client_token(self):
        """What the hub's client would send now, Colab's secrets apart."""
        return huggingface_hub.get_token()

    def text_of(self, widget):
        return widget.children[-1].value

    def test_the_secret_reaches_the_client(self, secret, hub, monkeypatch):
        monkeypatch.setenv("HF_TOKEN", "")  # so that what is set here is taken back after the test
        secret("granted")
        answer = login.use_token(MODEL)
        assert answer == f"Token from Colab's secrets (ends in …7Qz9): {MODEL} is open."
        assert self.client_token() == TOKEN
        assert not Path(constants.HF_TOKEN_PATH).exists()  # for this session only
        assert [user for *_, user in hub.requests] == ["gil"]

    def test_refused_shows_the_widget_and_the_next_call_asks_again(self, secret, hub, monkeypatch):
        monkeypatch.setenv("HF_TOKEN", "")
        asked = secret("refused")
        widget = login.use_token(MODEL)
        assert "may not read the secret" in self.text_of(widget)
        assert "Notebook access" in self.text_of(widget)
        assert "no-token" in self.text_of(widget)
        assert asked == ["HF_TOKEN"]
        secret("granted")
        assert "is open" in login.use_token(MODEL)

    def test_missing_shows_the_widget_and_its_log_in_counts(self, secret, hub):
        secret("missing")
        widget = login.use_token(MODEL)
        assert "No token found" in self.text_of(widget)
        assert self.client_token() is None
        field, button = widget.children[1].children
        field.value = GOOD
        button.click()
        assert "is open" in self.text_of(widget)
        assert self.client_token() == GOOD

    @pytest.mark.parametrize(
        ("token", "reason"), [(STRANGER, "gated-not-accepted"), ("hf_no", "invalid-token")]
    )
    def test_a_token_that_does_not_open_the_model(self, hub, monkeypatch, token, reason):
        monkeypatch.setenv("HF_TOKEN", token)
        assert reason in self.text_of(login.use_token(MODEL))

    def test_an_open_model_needs_no_token(self, hub):
        assert login.use_token("org/open") == "No token found: org/open is open."

    def test_without_an_answer_a_token_is_good_enough(self, hub, monkeypatch):
        hub.fail_status = 503
        monkeypatch.setenv("HF_TOKEN", GOOD)
        assert "hub-unreachable" in login.use_token(MODEL)
        monkeypatch.delenv("HF_TOKEN")
        assert "hub-unreachable" in self.text_of(login.use_token(MODEL))

    @pytest.mark.parametrize("model", ["local:tiny-llama", str(Path(__file__).parent)])
    def test_a_folder_asks_nobody(self, secret, hub, model):
        asked = secret("granted")
        assert "no token is needed" in login.use_token(model)
        assert asked == []
        assert hub.requests == []
        assert "HF_TOKEN" not in os.environ


class TestWidget:
    def parts(self, **arguments):
        box = login_widget(MODEL, **arguments)
        _, row, status = box.children
        return *row.children, status

    def submit(self, token, **arguments):
        field, button, status = self.parts(**arguments)
        field.value = token
        button.click()
        return field, button, status

    def test_good_token_is_kept(self, hub, no_token):
        field, button, status = self.submit(f" {GOOD} ")
        assert 'data-state="ok"' in status.value
        assert "Logged in as ada" in status.value
        assert field.value == ""
        assert not field.disabled
        assert not button.disabled
        assert (no_token / "token").read_text() == GOOD
        assert (no_token / "token").stat().st_mode & 0o077 == 0

    def test_enter_submits(self, hub):
        field, _, status = self.parts()
        field.value = GOOD
        field._handle_msg(
            {"content": {"data": {"method": "custom", "content": {"event": "submit"}}}, "buffers": []}
        )
        assert "Logged in as ada" in status.value

    def test_field_is_empty_and_disabled_while_the_hub_is_asked(self, hub):
        seen = []
        field, button, status = self.parts()
        hub.route("GET", r"/api/whoami-v2")(
            lambda _request: (
                seen.append((field.value, field.disabled, button.disabled, status.value)),
                Answer(500),
            )[1]
        )
        field.value = GOOD
        button.click()
        value, field_disabled, button_disabled, text = seen[0]
        assert (value, field_disabled, button_disabled) == ("", True, True)
        assert 'data-state="busy"' in text
        assert 'data-state="error"' in status.value
        assert not button.disabled

    def test_wrong_token_is_not_kept(self, hub, no_token):
        *_, status = self.submit("hf_nobody___0000000009")
        assert "invalid-token" in status.value
        assert 'data-state="error"' in status.value
        assert not (no_token / "token").exists()

    def test_valid_token_without_access_is_kept_and_explained(self, hub, no_token):
        *_, status = self.submit(STRANGER)
        assert "Logged in as bob" in status.value
        assert "gated-not-accepted" in status.value
        assert (no_token / "token").read_text() == STRANGER

    def test_nothing_typed(self, hub):
        *_, status = self.submit("  ")
        assert "Paste a token first" in status.value
        assert hub.requests == []

    def test_variable_does_not_hide_the_new_token(self, hub, monkeypatch):
        monkeypatch.setenv("HF_TOKEN", EXPIRED)
        *_, status = self.submit(GOOD)
        assert "Logged in as ada" in status.value
        assert huggingface_hub.get_token() == GOOD
        assert tuple(find_token()) == (GOOD, "cache")

    def test_variable_stays_if_the_token_cannot_be_kept(self, hub, monkeypatch):
        monkeypatch.setenv("HF_TOKEN", STRANGER)

        def full_disk(token):
            raise OSError(f"cannot write {token}")

        *_, status = self.submit(GOOD, login=full_disk)
        assert "could not be kept" in status.value
        assert GOOD not in status.value
        assert os.environ["HF_TOKEN"] == STRANGER

    def test_source_of_a_found_token(self, hub, monkeypatch):
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        *_, status = self.parts()
        assert "the environment" in status.value
        assert TOKEN[-4:] in status.value
        assert TOKEN not in status.value

    def test_name_from_the_hub_is_escaped(self, hub):
        hub.accounts[GOOD] = Account("<img src=x onerror=alert(1)>", grants={MODEL: "accepted"})
        *_, status = self.submit(GOOD)
        assert "<img" not in status.value
        assert "&lt;img" in status.value

    def test_no_deprecated_call(self, hub):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            self.submit(GOOD)


# --- The notebook as a reader runs it ---


@pytest.fixture(scope="session")
def processes():
    """Command lines of every process, sampled while the test that asks for it runs."""
    import psutil

    seen, stop = set(), threading.Event()

    def sample():
        while not stop.wait(0.02):
            for process in psutil.process_iter(["cmdline"]):
                seen.update(process.info["cmdline"] or ())

    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    yield seen
    stop.set()
    thread.join()


def run_notebook(folder, monkeypatch, extra_cell="", **environment):
    """Execute 02 with nbclient in a folder of its own; the executed notebook, as text and as object."""
    monkeypatch.setenv("HF_HOME", str(folder / "hf"))
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    if extra_cell:
        notebook.cells.append(nbformat.v4.new_code_cell(extra_cell))
    client = NotebookClient(
        notebook, timeout=60, kernel_name="python3", resources={"metadata": {"path": folder}}
    )
    client.execute()
    saved = folder / "executed.ipynb"
    nbformat.write(notebook, saved)
    return saved.read_text(encoding="utf-8"), notebook


def output_of(notebook):
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    return json.dumps(outputs)


class TestNotebook:
    def test_without_token_and_hub(self, no_token, tmp_path, monkeypatch):
        started = time.monotonic()
        _, notebook = run_notebook(tmp_path, monkeypatch, HF_ENDPOINT="http://127.0.0.1:9")
        assert time.monotonic() - started < 20
        assert "hub-unreachable" in output_of(notebook)

    def test_hub_that_never_answers(self, hub, tmp_path, monkeypatch):
        hub.delay_seconds = 60
        started = time.monotonic()
        _, notebook = run_notebook(tmp_path, monkeypatch)
        assert time.monotonic() - started < 20
        assert "hub-unreachable" in output_of(notebook)

    def test_without_token_with_hub(self, hub, tmp_path, monkeypatch):
        _, notebook = run_notebook(tmp_path, monkeypatch)
        assert "no-token" in output_of(notebook)
        assert "GatedRepoError" in output_of(notebook)

    def test_token_shows_nowhere(self, hub, no_token, monkeypatch, processes, caplog, capfd):  # noqa: PLR0917
        """Plant a token, run 02 and log in with it once more; then hunt for its text."""
        tmp_path = no_token
        caplog.set_level(logging.DEBUG)
        log_in = (
            "import logging\n"
            "logging.basicConfig(level=logging.DEBUG, filename='kernel.log')\n"
            "field, button = widget.children[1].children\n"
            "typed = {'method': 'update', 'state': {'value': find_token().token}, 'buffer_paths': []}\n"
            "field._handle_msg({'content': {'data': typed}, 'buffers': []})  # as the browser sends it\n"
            "button.click()\n"
            "check_access(MODEL_ID)\n"
            "print(widget.children[2].value)\n"
        )
        saved, notebook = run_notebook(tmp_path, monkeypatch, log_in, HF_TOKEN=TOKEN, HF_DEBUG="1")
        assert "Logged in as gil" in output_of(notebook)
        assert {user for *_, user in hub.requests} == {"gil"}
        assert (tmp_path / "hf" / "token").read_text() == TOKEN  # the one place where it belongs
        log = (tmp_path / "kernel.log").read_text()
        assert "auth-check" in log
        streams = "".join(capfd.readouterr())
        for name, text in {
            "outputs and saved notebook": saved,
            "kernel log": log,
            "log of this process": caplog.text,
            "streams": streams,
            "process list": "\0".join(processes),
        }.items():
            assert TOKEN not in text, f"the token shows in: {name}"
            assert TOKEN[3:-4] not in text, f"the token's middle shows in: {name}"
        assert any("ipykernel" in argument for argument in processes), "the process list was sampled"

    @pytest.mark.parametrize("grant", ["accepted", "pending", ""])
    def test_token_in_no_exception(self, hub, grant, capfd):
        """Every exception that the helpers let out, printed with its whole chain and with locals."""
        hub.accounts[TOKEN] = Account("gil", grants={MODEL: grant})
        texts = []
        for call in (
            lambda: check_access(MODEL, TOKEN),
            lambda: check_access("org/missing", TOKEN),
            lambda: check_access(MODEL, TOKEN + "\x07"),
            lambda: check_token(TOKEN + "x"),
        ):
            try:
                call()
            except AccessError as error:
                texts.append("".join(traceback.format_exception(error)) + repr(error) + repr(vars(error)))
        assert len(texts) >= 3
        assert all(TOKEN not in text for text in texts)
        assert TOKEN not in "".join(capfd.readouterr())


def test_import_is_light():
    heavy = ("torch", "pandas", "ipywidgets", "huggingface_hub")
    code = f"import llama_sft_helpers.login, sys; print([m for m in {heavy} if m in sys.modules])"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "[]"


def test_the_shell_s_variables_do_not_reach_the_tests():
    code = "import conftest; from huggingface_hub import constants as c; print(c.HF_HUB_OFFLINE, c.HF_HOME)"
    shell = {"HF_HUB_OFFLINE": "1", "HF_HOME": "/elsewhere", "PYTHONPATH": str(Path(__file__).parents[1])}
    command = [sys.executable, "-c", code]
    answer = subprocess.run(command, env=os.environ | shell, capture_output=True, text=True, check=True)
    assert answer.stdout.startswith("False ")
    assert "elsewhere" not in answer.stdout
