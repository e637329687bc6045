"""The few routes of the Hugging Face Hub that uploading and downloading a model use, on this machine."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote

TOKEN = "hf_token_of_the_test"


class FakeHub:
    """Repositories as files by revision; every commit is a revision, ``main`` the last one."""

    def __init__(self) -> None:
        self.url = ""
        self.repositories: dict[str, dict[str, dict[str, bytes]]] = {}
        self.messages: list[str] = []
        self.downloads: list[str] = []

    def commit(self, repo_id: str, files: dict[str, bytes], revision: str = "main", message: str = "") -> str:
        """Adds files to a revision, and returns the commit's id."""
        revisions = self.repositories[repo_id]
        content = {**revisions.get(revision, {}), **files}
        sha = hashlib.sha1(repr(sorted(content.items())).encode()).hexdigest()
        revisions[revision] = revisions[sha] = content
        self.messages.append(message)
        return sha

    def post(self, path: str, body: bytes, authorization: str | None) -> tuple[int, Any]:
        if authorization != f"Bearer {TOKEN}":
            return 401, {"error": "no token"}
        if path == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}
        if path == "/api/repos/create":
            asked = json.loads(body)
            repo_id = f"{asked['organization']}/{asked['name']}"
            self.repositories.setdefault(repo_id, {"main": {}})
            return 200, {"url": f"{self.url}/{repo_id}", "name": repo_id, "id": "1"}
        _, _, _, user, name, action, revision = path.split("/")
        if action == "preupload":
            names = [file["path"] for file in json.loads(body)["files"]]
            return 200, {
                "files": [{"path": n, "uploadMode": "regular", "shouldIgnore": False, "oid": None} for n in names]
            }
        entries = [json.loads(line) for line in body.splitlines()]
        files = {e["value"]["path"]: base64.b64decode(e["value"]["content"]) for e in entries if e["key"] == "file"}
        sha = self.commit(f"{user}/{name}", files, unquote(revision), entries[0]["value"]["summary"])
        return 200, {"success": True, "commitOid": sha, "commitUrl": f"{self.url}/{user}/{name}/commit/{sha}"}

    def get(self, path: str) -> tuple[int, bytes, dict[str, str]]:
        """Status, content and headers of ``/user/name/resolve/revision/file``."""
        parts = path.split("?")[0].strip("/").split("/", 4)
        revisions = self.repositories.get("/".join(parts[:2]))
        if len(parts) != 5 or revisions is None:
            return 404, b"", {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"}
        files = revisions.get(unquote(parts[3]))
        if files is None:
            return 404, b"", {"X-Error-Code": "RevisionNotFound", "X-Error-Message": "Invalid rev id"}
        sha = next(revision for revision, content in revisions.items() if content == files and len(revision) == 40)
        if parts[4] not in files:
            headers = {"X-Error-Code": "EntryNotFound", "X-Error-Message": "Entry not found", "X-Repo-Commit": sha}
            return 404, b"", headers
        content = files[parts[4]]
        self.downloads.append(parts[4])
        return 200, content, {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "X-Repo-Commit": sha}


@contextlib.contextmanager
def serve() -> Iterator[FakeHub]:
    hub = FakeHub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            status, answer = hub.post(self.path.split("?")[0], body, self.headers.get("Authorization"))
            self.answer(status, json.dumps(answer).encode(), {"Content-Type": "application/json"})

        def do_GET(self) -> None:
            self.answer(*hub.get(self.path))

        do_HEAD = do_GET

        def answer(self, status: int, content: bytes, headers: dict[str, str]) -> None:
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(content))}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

        def log_message(self, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
