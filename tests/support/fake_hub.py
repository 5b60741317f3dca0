"""A small hub on loopback for the tests: the real client talks to it through ``HF_ENDPOINT``.

Answers carry the status codes and the headers ``X-Error-Code`` and ``X-Error-Message`` of the real hub.
Other routes are added with ``hub.route(method, pattern)``; a handler gets the request and the groups of the
pattern and returns an ``Answer``. No token is kept: ``hub.requests`` records only whose was sent.
"""

from __future__ import annotations

import contextlib
import json
import re
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Answer:
    """What the hub sends back."""

    status: int = 200
    body: Any = None
    headers: dict[str, str] = field(default_factory=dict)


@dataclass
class Request:
    """What a route's handler is given. ``user`` is None without a token and "?" with an unknown one."""

    method: str
    path: str
    user: str | None
    token_kind: str
    body: bytes
    headers: dict[str, str]


@dataclass
class Account:
    """A token's owner: its role (read, write, fineGrained) and its state on each gated repository."""

    name: str
    role: str = "read"
    gated_permission: bool = True
    grants: dict[str, str] = field(default_factory=dict)  # repo_id -> accepted, pending, rejected
    token_error: str = ""  # "expired"


Handler = Callable[..., Answer]


def error(status: int, code: str, message: str) -> Answer:
    """An error as the hub words it: in its headers and in its body."""
    headers = {"X-Error-Message": message, "X-Request-Id": "Root=1-test"}
    if code:
        headers["X-Error-Code"] = code
    return Answer(status, {"error": message}, headers)


class FakeHub:
    """The hub. Use as a context manager; ``hub.url`` is what ``HF_ENDPOINT`` must hold.

    Attributes:
        accounts: Token -> its owner.
        repos: repo_id -> "open", "gated" or "private:<name>" (seen by that user only).
        fail_status: A status that every answer has while it is set, as from a broken hub.
        delay_seconds: How long every answer takes.
        requests: (method, path, user) of every request.
    """

    def __init__(self) -> None:
        self.accounts: dict[str, Account] = {}
        self.repos: dict[str, str] = {}
        self.fail_status = 0
        self.delay_seconds = 0.0
        self.requests: list[tuple[str, str, str | None]] = []
        self._routes: list[tuple[str, re.Pattern[str], Handler]] = []
        self._stopped = threading.Event()
        self.route("GET", r"/api/whoami-v2")(self._whoami)
        self.route("GET", r"/api/models/(.+)/auth-check")(self._auth_check)

    def route(self, method: str, pattern: str) -> Callable[[Handler], Handler]:
        """Register a handler for a method and a pattern that the whole path must match."""

        def register(handler: Handler) -> Handler:
            self._routes.insert(0, (method, re.compile(pattern), handler))
            return handler

        return register

    def __enter__(self) -> FakeHub:
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler_class())
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(
            target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True
        ).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        self._server.shutdown()
        self._server.server_close()

    # --- The two routes that the login needs ---

    def _whoami(self, request: Request) -> Answer:
        account = self._account(request)
        if isinstance(account, Answer):
            return account
        if account is None:
            return error(401, "", "Invalid username or password.")
        token = {"displayName": f"{account.name}-token", "role": account.role}
        auth = {"type": "access_token", "accessToken": token}
        return Answer(200, {"type": "user", "name": account.name, "auth": auth})

    def _auth_check(self, request: Request, repo_id: str) -> Answer:
        account = self._account(request)
        if isinstance(account, Answer):
            return account
        kind = self.repos.get(repo_id, "")
        owner = kind.removeprefix("private:")
        if not kind or (kind.startswith("private:") and (account is None or account.name != owner)):
            return error(404 if account else 401, "RepoNotFound", "Repository not found")
        return self._gate(repo_id, account) if kind == "gated" else Answer(200, {})

    def _gate(self, repo_id: str, account: Account | None) -> Answer:
        name = f"model {repo_id}"
        if account is None:
            text = "You must have access to it and be authenticated to access it. Please log in."
            return error(401, "GatedRepo", f"Access to {name} is restricted. {text}")
        if not account.gated_permission:
            text = "Please enable access to public gated repositories in your fine-grained token settings"
            return error(403, "", f"{text} to view this repository.")
        texts = {
            "pending": f"Your request to access {name} is awaiting a review from the repo authors.",
            "rejected": f"Your request to access {name} has been rejected by the repo's authors.",
            "": f"Access to {name} is restricted and you are not in the authorized list. "
            f"Visit https://huggingface.co/{repo_id} to ask for access.",
        }
        grant = account.grants.get(repo_id, "")
        return Answer(200, {}) if grant == "accepted" else error(403, "GatedRepo", texts[grant])

    def _account(self, request: Request) -> Account | Answer | None:
        """The owner of the token that was sent, None without a token, or the refusal."""
        if request.user is None:
            return None
        if request.token_kind == "expired":
            return error(401, "", 'User Access Token "laptop" is expired')
        account = next((item for item in self.accounts.values() if item.name == request.user), None)
        return account or error(401, "", "Invalid credentials in Authorization header")

    # --- HTTP ---

    def _answer(self, request: Request) -> Answer:
        if self.delay_seconds:
            self._stopped.wait(self.delay_seconds)
        if self.fail_status:
            return Answer(self.fail_status, "<html>upstream</html>", {"Content-Type": "text/html"})
        for method, pattern, handler in self._routes:
            if method == request.method and (found := pattern.fullmatch(request.path)):
                return handler(request, *found.groups())
        return error(404, "", f"The fake hub has no route {request.method} {request.path}")

    def _handler_class(self) -> type[BaseHTTPRequestHandler]:
        hub = self

        class _Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def _serve(self) -> None:
                length = int(self.headers.get("Content-Length") or 0)
                token = self.headers.get("Authorization", "").removeprefix("Bearer ")
                account = hub.accounts.get(token)
                user = None if not token else account.name if account else "?"
                path = self.path.split("?")[0]
                hub.requests.append((self.command, path, user))
                kind = account.token_error if account else ""
                body = self.rfile.read(length)
                self._send(hub._answer(Request(self.command, path, user, kind, body, dict(self.headers))))

            def _send(self, answer: Answer) -> None:
                text = answer.body if isinstance(answer.body, str | bytes) else json.dumps(answer.body)
                data = text if isinstance(text, bytes) else text.encode()
                self.send_response(answer.status)
                for name, value in {"Content-Type": "application/json", **answer.headers}.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(data)

            do_GET = do_POST = do_HEAD = do_PUT = do_DELETE = _serve  # noqa: N815

            def handle(self) -> None:
                with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # a client gave up
                    super().handle()

            def log_message(self, *_: object) -> None:
                """Log nothing."""

        return _Handler


def wait_for(condition: Callable[[], bool], seconds: float = 5.0) -> bool:
    """Wait until a condition holds; whether it did in time."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.02)
    return True
