"""The fake hub with the routes of an upload: create a repository, preupload, commit, check a card."""

from __future__ import annotations

import base64
import json

from fake_hub import Answer, FakeHub, Request, error


class UploadHub(FakeHub):
    """Takes small files as the hub does, into ``files``: (repo_id, path) -> bytes.

    Accounts may write to repositories under their own name if their role is ``write``.
    """

    def __init__(self) -> None:
        super().__init__()
        self.files: dict[tuple[str, str], bytes] = {}
        self.route("POST", r"/api/repos/create")(self._create)
        self.route("POST", r"/api/validate-yaml")(self._validate)
        self.route("POST", r"/api/models/([^/]+/[^/]+)/preupload/main")(self._preupload)
        self.route("POST", r"/api/models/([^/]+/[^/]+)/commit/main")(self._commit)

    def _create(self, request: Request) -> Answer:
        wanted = json.loads(request.body)
        owner = wanted.get("organization") or (request.account and request.account.name)
        repo_id = f"{owner}/{wanted['name']}"
        if refusal := self._may_write(request, repo_id):
            return refusal
        url = f"{self.url}/{repo_id}"
        if repo_id in self.repos:
            return Answer(409, {"error": "You already created this model repo", "url": url})
        private = wanted.get("private") or wanted.get("visibility") == "private"
        self.repos[repo_id] = f"private:{owner}" if private else "open"
        return Answer(200, {"url": url, "name": repo_id, "id": repo_id})

    def _may_write(self, request: Request, repo_id: str) -> Answer | None:
        account, owner = request.account, repo_id.partition("/")[0]
        if account is None:
            return error(401, "", "Invalid username or password.")
        if account.role == "write" and account.name == owner:
            return None
        return error(403, "", f"You don't have the rights to create a model under the namespace {owner}")

    def _validate(self, request: Request) -> Answer:
        wrong = "base_model: /" in json.loads(request.body)["content"]
        errors = [{"message": '"base_model" must be a model id'}] if wrong else []
        return Answer(400 if wrong else 200, {"errors": errors, "warnings": []})

    def _preupload(self, request: Request, repo_id: str) -> Answer:
        if refusal := self._may_write(request, repo_id):
            return refusal
        paths = [file["path"] for file in json.loads(request.body)["files"]]
        files = [{"path": path, "uploadMode": "regular", "shouldIgnore": False} for path in paths]
        return Answer(200, {"files": files})

    def _commit(self, request: Request, repo_id: str) -> Answer:
        if refusal := self._may_write(request, repo_id):
            return refusal
        for line in request.body.splitlines():
            item = json.loads(line)
            if item["key"] == "file":
                self.files[repo_id, item["value"]["path"]] = base64.b64decode(item["value"]["content"])
        commit = "0" * 40
        url = f"{self.url}/{repo_id}/commit/{commit}"
        return Answer(200, {"success": True, "commitOid": commit, "commitUrl": url, "hookOutput": ""})
