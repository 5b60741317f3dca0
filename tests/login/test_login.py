"""Notebook 02's helpers: every reason through the real client, the widget, and the hunt for the token."""

import json
import logging
import os
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
import psutil
import pytest
from fake_hub import Account, Answer, FakeHub
from huggingface_hub import constants, hf_api
from huggingface_hub.errors import HTTPError
from huggingface_hub.utils._http import default_client_factory
from nbclient import NotebookClient

from llama_sft_helpers.login import (
    AccessError,
    access,
    check_access,
    find_token,
    login_widget,
    mask,
    summarize_reasons,
    summarize_token_sources,
    tokens,
    use_token,
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
NOBODY = "hf_nobody___0000000009"


@pytest.fixture
def no_token(tmp_path, monkeypatch):
    """No token anywhere, and a cache of the test's own."""
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_ENDPOINT"):
        monkeypatch.setenv(name, "")  # set, so that what a test puts there is taken back after it
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


@pytest.fixture
def secret(no_token, monkeypatch):
    """Makes this Colab: its secret is a token, refused or missing; returns the names that were asked for."""
    asked = []

    def install(state):
        def get(name):
            asked.append(name)
            if state in ("refused", "missing"):
                kind = {"refused": "NotebookAccessError", "missing": "SecretNotFoundError"}[state]
                raise type(kind, (Exception,), {})(name)
            return f"{state}\n"

        userdata = types.SimpleNamespace(get=get)
        monkeypatch.setitem(sys.modules, "google.colab", types.SimpleNamespace(userdata=userdata))
        return asked

    return install


def reason_of(repo_id=MODEL, token=None):
    with pytest.raises(AccessError) as caught:
        check_access(repo_id, token)
    assert token is None or token not in str(caught.value)
    return caught.value.reason


def _slow(hub, patch):
    patch.setattr(access, "HUB_SECONDS", 0.3)
    hub.delay_seconds = 30


class TestAccess:
    @pytest.mark.parametrize(
        ("repo_id", "token", "reason"),
        [
            (MODEL, None, "no-token"),
            (MODEL, NOBODY, "invalid-token"),
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

    @pytest.mark.parametrize("text", ["with space", "bell\x07", "ümlaut"])
    def test_text_that_is_no_token_is_not_sent(self, hub, text):
        assert reason_of(token=f"hf_{text}_0000000000") == "invalid-token"
        assert hub.requests == []

    def test_open(self, hub, tmp_path):
        check_access(MODEL, GOOD)
        check_access("org/open")
        check_access("ada/private", GOOD)
        asked = len(hub.requests)
        check_access(str(tmp_path))  # a folder needs no hub
        assert len(hub.requests) == asked == 3

    @pytest.mark.parametrize(
        ("change", "says"),
        [
            (lambda hub, _: setattr(hub, "fail_status", 503), "HTTP 503"),
            (lambda hub, _: setattr(hub, "fail_status", 429), "HTTP 429"),
            (_slow, r"no answer in 0\.3 s"),
            (lambda _, patch: patch.setenv("HF_ENDPOINT", "http://127.0.0.1:9"), "ConnectError"),
            (lambda _, patch: patch.setenv("HF_ENDPOINT", "http://localhost:port"), "InvalidURL"),
            (lambda _, patch: patch.setattr(constants, "HF_HUB_OFFLINE", True), "HF_HUB_OFFLINE is set"),
        ],
    )
    def test_no_useful_answer(self, hub, monkeypatch, change, says):
        change(hub, monkeypatch)
        started = time.monotonic()
        for call in (lambda: check_access(MODEL, GOOD), lambda: access.check_token(GOOD, MODEL)):
            with pytest.raises(AccessError, match=f"hub-unreachable: .*{says}"):
                call()
        assert time.monotonic() - started < 5

    def test_disabled_repository(self, hub):
        refusal = Answer(403, {}, {"X-Error-Message": "Access to this resource is disabled."})
        hub.route("GET", r"/api/models/org/disabled/auth-check")(lambda _request: refusal)
        assert reason_of("org/disabled", GOOD) == "forbidden"

    def test_a_page_that_is_no_hub(self, hub):
        hub.route("GET", r"/api/whoami-v2")(lambda _request: Answer(200, "<html>Wi-Fi log-in</html>"))
        with pytest.raises(AccessError, match="hub-unreachable"):
            access.check_token(GOOD, MODEL)

    def test_expired_token_over_https(self, no_token, monkeypatch):
        """Over https the client calls an expired token RepositoryNotFoundError; the reason stays right."""
        client = sys.modules[HTTPError.__module__]  # the HTTP library that this huggingface_hub brings
        headers = {"X-Error-Message": 'User Access Token "laptop" is expired'}
        transport = client.MockTransport(
            lambda request: client.Response(401, headers=headers, request=request)
        )
        monkeypatch.setenv("HF_ENDPOINT", "https://hub.test")
        huggingface_hub.set_client_factory(lambda: client.Client(transport=transport))
        try:
            with pytest.raises(huggingface_hub.errors.RepositoryNotFoundError):
                huggingface_hub.HfApi(endpoint="https://hub.test").auth_check(MODEL, token=EXPIRED)
            assert reason_of(token=EXPIRED) == "invalid-token"
        finally:
            huggingface_hub.set_client_factory(default_client_factory)

    def test_every_reason_names_page_and_action(self):
        for row in summarize_reasons(MODEL).itertuples():
            assert row.page.startswith("https://")
            error = str(AccessError(row.reason, MODEL, "… the hub's message …"))
            assert error == f"{row.reason}: {row.case}.\nPage: {row.page}\nNext: {row.action}."
            assert "{" not in error


class TestFindToken:
    def test_order_is_the_client_s(self, no_token, monkeypatch):
        assert tuple(find_token()) == (None, "none")
        (no_token / "token").write_text(f"{GOOD}\n", encoding="utf-8")
        assert tuple(find_token()) == (GOOD, "cache")
        assert huggingface_hub.get_token() == GOOD
        for name, token in (("HUGGING_FACE_HUB_TOKEN", FINE), ("HF_TOKEN", TOKEN)):
            monkeypatch.setenv(name, f" {token}\n")
            assert tuple(find_token()) == (token, "env")
            assert huggingface_hub.get_token() == token

    def test_representation_hides_the_token(self, no_token, monkeypatch):
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        found = find_token()
        for text in (repr(found), str(found), f"{found}", mask(TOKEN), summarize_token_sources().to_html()):
            assert TOKEN not in text
            assert TOKEN[-4:] in text
            assert TOKEN[-6:] not in text
        assert mask("hf_short") == "present"
        assert mask(None) == "none"

    @pytest.mark.parametrize(
        ("state", "variable", "found", "shown", "looks"),
        [
            (TOKEN, "", (TOKEN, "colab-secret"), f"ends in …{TOKEN[-4:]}", 4),
            ("missing", "", (None, "none"), "none", 4),
            ("refused", "", (None, "none"), "refused: allow it", 1),  # asked for once
            (TOKEN, GOOD, (GOOD, "env"), "not asked", 0),
        ],
    )
    def test_colabs_secret(self, secret, monkeypatch, state, variable, found, shown, looks):  # noqa: PLR0917
        monkeypatch.setenv("HF_TOKEN", variable)
        asked = secret(state)
        assert tuple(find_token()) == tuple(find_token()) == found
        row = summarize_token_sources().set_index("source").loc["colab-secret"]
        assert row["token"].startswith(shown)
        assert (row["used"] == "yes") is (found[1] == "colab-secret")
        assert TOKEN not in " ".join(row)
        assert asked == ["HF_TOKEN"] * looks


def text_of(widget):
    return widget.children[-1].value


class TestUseToken:
    def test_the_secret_reaches_the_client(self, secret, hub):
        secret(TOKEN)
        assert use_token(MODEL) == f"Token from Colab's secrets (ends in …7Qz9): {MODEL} is open."
        assert huggingface_hub.get_token() == TOKEN
        assert not Path(constants.HF_TOKEN_PATH).exists()  # for this session only
        assert [user for *_, user in hub.requests] == ["gil"]

    @pytest.mark.parametrize(
        ("first", "reason"), [("refused", "Notebook access"), (STRANGER, "not-accepted")]
    )
    def test_a_secret_that_does_not_open_the_model_is_asked_for_again(self, secret, hub, first, reason):
        secret(first)
        assert reason in text_of(use_token(MODEL))
        secret(TOKEN)
        assert "is open" in use_token(MODEL)

    def test_missing_shows_the_widget_and_its_log_in_counts(self, secret, hub):
        secret("missing")
        widget = use_token(MODEL)
        assert "No token found" in text_of(widget)
        assert huggingface_hub.get_token() is None
        field, button = widget.children[1].children
        field.value = GOOD
        button.click()
        assert "is open" in text_of(widget)
        assert huggingface_hub.get_token() == GOOD

    def test_an_open_model_needs_no_token(self, hub):
        assert use_token("org/open") == "No token found: org/open is open."

    def test_without_an_answer_a_token_is_good_enough(self, hub, monkeypatch):
        hub.fail_status = 503
        assert "hub-unreachable" in text_of(use_token(MODEL))
        monkeypatch.setenv("HF_TOKEN", GOOD)
        assert "hub-unreachable" in use_token(MODEL)

    @pytest.mark.parametrize(
        ("model", "what"),
        [
            ("local:tiny-llama", "built on this machine"),
            (str(Path(__file__).parent), "a folder on this machine"),
        ],
    )
    def test_a_folder_asks_nobody(self, secret, hub, model, what):
        asked = secret(TOKEN)
        assert use_token(model) == f"The model is {what}: no token is needed."
        assert asked == hub.requests == []
        assert not os.environ["HF_TOKEN"]


def parts(**arguments):
    _, row, status = login_widget(MODEL, **arguments).children
    return *row.children, status


def submit(token, **arguments):
    """The field, the button and the status line's text after a token was typed and the button pressed."""
    field, button, status = parts(**arguments)
    field.value = token
    button.click()
    return field, button, status.value


class TestWidget:
    def test_good_token_is_kept(self, hub, no_token):
        with warnings.catch_warnings():  # no deprecated call
            warnings.simplefilter("error")
            field, button, text = submit(f" {GOOD} ")
        assert 'data-state="ok"' in text
        assert "Logged in as ada" in text
        assert (field.value, field.disabled, button.disabled) == ("", False, False)
        assert (no_token / "token").read_text(encoding="utf-8") == GOOD
        assert (no_token / "token").stat().st_mode & 0o077 == 0

    def test_enter_submits(self, hub):
        field, _, status = parts()
        field.value = GOOD
        data = {"method": "custom", "content": {"event": "submit"}}
        field._handle_msg({"content": {"data": data}, "buffers": []})
        assert "Logged in as ada" in status.value

    def test_field_is_empty_and_disabled_while_the_hub_is_asked(self, hub):
        seen = []
        field, button, status = parts()

        def whoami(_request):
            seen.extend([field.value, field.disabled, button.disabled, 'data-state="busy"' in status.value])
            return Answer(500)

        hub.route("GET", r"/api/whoami-v2")(whoami)
        field.value = GOOD
        button.click()
        assert seen == ["", True, True, True]
        assert 'data-state="error"' in status.value
        assert not button.disabled

    @pytest.mark.parametrize(
        ("typed", "says", "kept"),
        [
            (NOBODY, ["invalid-token"], False),
            (STRANGER, ["Logged in as bob", "gated-not-accepted"], True),
            ("  ", ["Paste a token first"], False),
        ],
    )
    def test_a_token_that_opens_nothing_is_explained(self, hub, no_token, typed, says, kept):
        *_, text = submit(typed)
        assert all(word in text for word in (*says, 'data-state="error"'))
        assert (no_token / "token").exists() is kept
        assert bool(hub.requests) is bool(typed.strip())

    def test_variable_does_not_hide_the_new_token(self, hub, monkeypatch):
        monkeypatch.setenv("HF_TOKEN", EXPIRED)
        *_, text = submit(GOOD)
        assert "Logged in as ada" in text
        assert huggingface_hub.get_token() == GOOD
        assert tuple(find_token()) == (GOOD, "cache")

    def test_variable_stays_if_the_token_cannot_be_kept(self, hub, monkeypatch):
        monkeypatch.setenv("HF_TOKEN", STRANGER)

        def full_disk(token):
            raise OSError(f"cannot write {token}")

        *_, text = submit(GOOD, login=full_disk)
        assert "could not be kept" in text
        assert GOOD not in text
        assert os.environ["HF_TOKEN"] == STRANGER

    def test_source_of_a_found_token(self, hub, monkeypatch):
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        text = parts()[-1].value
        assert "the environment" in text
        assert TOKEN[-4:] in text
        assert TOKEN not in text

    def test_name_from_the_hub_is_escaped(self, hub):
        hub.accounts[GOOD] = Account("<img src=x onerror=alert(1)>", grants={MODEL: "accepted"})
        *_, text = submit(GOOD)
        assert "<img" not in text
        assert "&lt;img" in text


@pytest.fixture(scope="session")
def processes():
    """Command lines of every process, sampled while the test that asks for it runs."""
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


@pytest.fixture
def run_notebook(tmp_path, monkeypatch):
    """Execute 02 with nbclient in a folder of its own; its text as saved, outputs apart as well."""

    def run(extra_cell="", **environment):
        for name, value in {"HF_HOME": str(tmp_path / "hf"), **environment}.items():
            monkeypatch.setenv(name, value)
        notebook = nbformat.read(NOTEBOOK, as_version=4)
        notebook.cells.append(nbformat.v4.new_code_cell(extra_cell))
        resources = {"metadata": {"path": tmp_path}}
        NotebookClient(notebook, timeout=60, kernel_name="python3", resources=resources).execute()
        outputs = [cell.outputs for cell in notebook.cells if cell.cell_type == "code"]
        return nbformat.writes(notebook), json.dumps(outputs)

    return run


class TestNotebook:
    @pytest.mark.parametrize(
        ("endpoint", "delay_seconds", "shown"),
        [
            ("http://127.0.0.1:9", 0, ["hub-unreachable"]),
            ("", 60, ["hub-unreachable"]),
            ("", 0, ["no-token", "GatedRepoError"]),
        ],
    )
    def test_without_a_token_02_runs_to_its_end(self, hub, run_notebook, endpoint, delay_seconds, shown):
        hub.delay_seconds = delay_seconds
        started = time.monotonic()
        _, outputs = run_notebook(HF_ENDPOINT=endpoint or hub.url)
        assert time.monotonic() - started < 50  # less than one answer of the slow hub
        assert all(text in outputs for text in shown)

    def test_token_shows_nowhere(self, hub, no_token, run_notebook, processes, caplog, capfd):  # noqa: PLR0917
        """Plant a token, run 02 and log in with it once more; then hunt for its text."""
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
        saved, outputs = run_notebook(log_in, HF_TOKEN=TOKEN, HF_DEBUG="1")
        assert "Logged in as gil" in outputs
        assert {user for *_, user in hub.requests} == {"gil"}
        assert (no_token / "hf" / "token").read_text(
            encoding="utf-8"
        ) == TOKEN  # the one place where it belongs
        log = (no_token / "kernel.log").read_text(encoding="utf-8")
        assert "auth-check" in log
        for name, text in {
            "outputs and saved notebook": saved,
            "kernel log": log,
            "log of this process": caplog.text,
            "streams": "".join(capfd.readouterr()),
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
            lambda: access.check_token(TOKEN + "x", MODEL),
        ):
            try:
                call()
            except AccessError as error:
                texts.append("".join(traceback.format_exception(error)) + repr(error) + repr(vars(error)))
        assert len(texts) >= 3
        assert all(TOKEN not in text for text in texts)
        assert TOKEN not in "".join(capfd.readouterr())

    def test_the_shell_s_variables_do_not_reach_the_tests(self):
        code = (
            "import conftest; from huggingface_hub import constants as c; print(c.HF_HUB_OFFLINE, c.HF_HOME)"
        )
        shell = {"HF_HUB_OFFLINE": "1", "HF_HOME": "/elsewhere", "PYTHONPATH": str(Path(__file__).parents[1])}
        command = [sys.executable, "-c", code]
        answer = subprocess.run(command, env=os.environ | shell, capture_output=True, text=True, check=True)
        assert answer.stdout.startswith("False ")
        assert "elsewhere" not in answer.stdout
