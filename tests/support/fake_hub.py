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
    """What a route's handler is given; ``account`` is None without a token."""

    account: Account | None
    body: bytes


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
    return Answer(status, {"error": message}, {"X-Error-Message": message, "X-Error-Code": code})


class FakeHub:
    """The hub. Use as a context manager; ``hub.url`` is what ``HF_ENDPOINT`` must hold.

    Attributes:
        accounts: Token -> its owner.
        repos: repo_id -> "open", "gated" or "private:<name>" (seen by that user only).
        fail_status: A status that every answer has while it is set, as from a broken hub.
        delay_seconds: How long every answer takes.
        requests: (method, path, user) of every request: None without a token, "?" with an unknown one.
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
        threading.Thread(target=self._server.serve_forever, args=[0.02], daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        self._server.shutdown()
        self._server.server_close()

    def _whoami(self, request: Request) -> Answer:
        if request.account is None:
            return error(401, "", "Invalid username or password.")
        auth = {"type": "access_token", "accessToken": {"role": request.account.role}}
        return Answer(200, {"type": "user", "name": request.account.name, "auth": auth})

    def _auth_check(self, request: Request, repo_id: str) -> Answer:
        account, kind = request.account, self.repos.get(repo_id, "")
        if kind == "gated":
            return self._gate(repo_id, account)
        if kind == "open" or (account and kind == f"private:{account.name}"):
            return Answer(200, {})
        return error(404 if account else 401, "RepoNotFound", "Repository not found")

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

    def _answer(self, method: str, path: str, token: str, body: bytes) -> Answer:
        account = self.accounts.get(token)
        self.requests.append((method, path, account.name if account else "?" if token else None))
        self._stopped.wait(self.delay_seconds)
        if self.fail_status:
            return Answer(self.fail_status, "<html>upstream</html>", {"Content-Type": "text/html"})
        if token and not account:
            return error(401, "", "Invalid credentials in Authorization header")
        if account and account.token_error == "expired":
            return error(401, "", 'User Access Token "laptop" is expired')
        for known, pattern, handler in self._routes:
            if known == method and (found := pattern.fullmatch(path)):
                return handler(Request(account, body), *found.groups())
        return error(404, "", f"The fake hub has no route {method} {path}")

    def _handler_class(self) -> type[BaseHTTPRequestHandler]:
        hub = self

        class _Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def _serve(self) -> None:
                token = self.headers.get("Authorization", "").removeprefix("Bearer ")
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                answer = hub._answer(self.command, self.path.partition("?")[0], token, body)
                text = answer.body if isinstance(answer.body, str | bytes) else json.dumps(answer.body)
                data = text if isinstance(text, bytes) else text.encode()
                self.send_response(answer.status)
                announced = {"Content-Type": "application/json", "Content-Length": str(len(data))}
                for name, value in (announced | answer.headers).items():
                    self.send_header(name, value)
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(data)
                    self.close_connection |= "Content-Length" in answer.headers  # more was announced

            do_GET = do_POST = do_HEAD = do_PUT = do_DELETE = _serve  # noqa: N815

            def handle(self) -> None:
                with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # a client gave up
                    super().handle()

            def log_message(self, *_: object) -> None:
                """Log nothing."""

        return _Handler
