"""What the doctor's tests share: the register of provoked failures, a hub on loopback, other processes."""

import contextlib
import functools
import inspect
import json
import os
import subprocess
import sys
import types
from collections import defaultdict

import ledger
import pytest
from fake_hub import Account, Answer, FakeHub

from llama_sft_helpers.doctor import explain

PROVOKED: dict[str, list[str]] = defaultdict(list)  # failure -> tests that provoke it


def provokes(*keys):
    """Mark a test that provokes a failure: it returns the exceptions; each must be explained as the key.

    With several keys the test has a parameter ``key``, which names the one that is provoked.
    """

    def decorate(function):
        for one in keys:
            PROVOKED[one].append(function.__name__)

        @functools.wraps(function)
        def test(*arguments, **keywords):
            key = keywords.get("key", keys[0])
            exceptions = function(*arguments, **keywords)
            assert exceptions, "nothing was provoked"
            for exception in exceptions:
                ledger.record("failures", key, provoked=1)
                explanation = exception if isinstance(exception, dict) else explain(exception)
                assert explanation, f"not explained: {type(exception).__name__}: {exception}"
                found = explanation["key"] if isinstance(explanation, dict) else explanation.key
                assert found == key, f"{found} instead, for {exception!r}"
                assert "?" not in str(explanation).replace("models?search", ""), "a placeholder is not filled"
                ledger.record("failures", key, explained=1)

        test.__signature__ = inspect.signature(function)
        return test

    return decorate


def raised(function, *arguments, **keywords):
    """The exception that a call raises."""
    with pytest.raises(BaseException) as caught:  # noqa: PT011 (its kind is the library's to choose)
        function(*arguments, **keywords)
    assert not isinstance(caught.value, KeyboardInterrupt)
    return caught.value


_PRELUDE = """
import dataclasses, json, sys
from importlib.machinery import PathFinder
from llama_sft_helpers.doctor import explain

class Hidden(PathFinder):
    names = set()
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in cls.names else PathFinder.find_spec(name, path, target)

def hide(*names):
    Hidden.names = set(names)
    sys.meta_path[:] = [Hidden if finder is PathFinder else finder for finder in sys.meta_path]

def provoke(function):
    try:
        function()
    except BaseException as error:
        found = explain(error)
        print("DOCTOR" + json.dumps(
            {"raised": type(error).__name__, "message": str(error)}
            | (dataclasses.asdict(found) if found else {"key": None})))
    else:
        print("DOCTOR" + json.dumps({"key": "nothing was raised"}))
"""


def in_another_process(code, **environment):
    """Run code that calls ``provoke(function)``; returns what the doctor said there, in order."""
    command, env = [sys.executable, "-c", _PRELUDE + code], os.environ | environment
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, env=env)
    lines = [line.removeprefix("DOCTOR") for line in result.stdout.splitlines() if line.startswith("DOCTOR")]
    assert lines, result.stderr[-3000:]
    return [json.loads(line) for line in lines]


class DownloadHub(FakeHub):
    """The fake hub with downloads: ``/{repo}/resolve/main/{file}`` passes the gates of ``auth_check``."""

    def __init__(self, monkeypatch):
        super().__init__()
        self._monkeypatch = monkeypatch
        for method in ("HEAD", "GET"):
            self.route(method, r"/(.+)/resolve/main/.+")(self._auth_check)
        self.accounts["good"] = Account(
            "ada", grants={"org/pending": "pending", "org/rejected": "rejected", "org/licence": ""}
        )
        self.accounts["narrow"] = Account("bob", gated_permission=False)
        self.accounts["old"] = Account("eve", token_error="expired")
        self.repos = {f"org/{name}": "gated" for name in ("pending", "rejected", "licence", "gated")}

    def __enter__(self):
        super().__enter__()
        point_client_at(self.url, self._monkeypatch)
        return self


@contextlib.contextmanager
def file_server(monkeypatch):
    """A hub whose files have 500,000 bytes; half are sent where the repository's name holds ``cut``."""
    headers = {"Content-Length": "500000", "ETag": '"e"', "X-Repo-Commit": "a" * 40}
    with FakeHub() as hub:
        for method in ("HEAD", "GET"):
            hub.route(method, r"/(.+)/resolve/.+")(
                lambda _, repo: Answer(200, b"x" * (250_000 if "cut" in repo else 500_000), headers)
            )
        point_client_at(hub.url, monkeypatch)
        yield


def point_client_at(endpoint, monkeypatch):
    """Let the real client talk to ``endpoint``, without the pauses between its retries."""
    from huggingface_hub import constants, file_download
    from huggingface_hub.utils import _http

    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    template = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    without_pauses = types.SimpleNamespace(sleep=lambda seconds: None)
    for module in (_http, file_download):
        monkeypatch.setattr(module, "time", without_pauses)


@contextlib.contextmanager
def small_disk(folder, kib):
    """A tmpfs of some KiB."""
    folder.mkdir(exist_ok=True)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={kib}k", "tmpfs", str(folder)]
    if (
        sys.platform == "win32"
        or os.geteuid() != 0
        or subprocess.run(mount, capture_output=True).returncode != 0
    ):
        pytest.skip("needs root to mount a small tmpfs")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def read_only(folder):
    """Let nothing be written to a small disk any more."""
    subprocess.run(["mount", "-o", "remount,ro", str(folder)], check=True)
