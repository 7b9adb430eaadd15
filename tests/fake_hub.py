"""A model hub on the loopback address: the few routes a download uses, with the files of one model."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest


class Hub(ThreadingHTTPServer):
    """Serves `files` of `model` at `commit`, under the branch main; remembers what was asked for."""

    daemon_threads = True

    def __init__(self, model: str, commit: str, files: dict[str, bytes]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.model, self.commit, self.files = model, commit, files
        self.asked: list[str] = []

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    @property
    def downloaded(self) -> set[str]:
        marker = f"/resolve/{self.commit}/"
        return {line.split(marker)[1] for line in self.asked if line.startswith("GET") and marker in line}


class _Handler(BaseHTTPRequestHandler):
    server: Hub

    def do_HEAD(self) -> None:  # the base class's name
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def log_message(self, *args: object) -> None:
        pass

    def _answer(self, *, body: bool) -> None:
        hub, path = self.server, self.path.split("?")[0]
        hub.asked.append(f"{self.command} {path}")
        api = f"/api/models/{hub.model}"
        files = f"/{hub.model}/resolve/{hub.commit}/"
        if path in (f"{api}/revision/main", f"{api}/revision/{hub.commit}"):
            self._send(json.dumps({"id": hub.model, "sha": hub.commit, "siblings": []}).encode(), body=body)
        elif path == f"{api}/tree/{hub.commit}":
            self._send(json.dumps([_entry(*item) for item in hub.files.items()]).encode(), body=body)
        elif path.startswith(files) and path.removeprefix(files) in hub.files:
            self._send(hub.files[path.removeprefix(files)], body=body)
        else:
            code = "RevisionNotFound" if path.startswith(f"{api}/revision/") else "RepoNotFound"
            self._send(b"{}", body=body, status=404, error=code)

    def _send(self, content: bytes, *, body: bool, status: int = 200, error: str | None = None) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Content-Type", "application/json")
        self.send_header("ETag", f'"{_digest(content)}"')
        self.send_header("X-Repo-Commit", self.server.commit)
        if error:
            self.send_header("X-Error-Code", error)
        self.end_headers()
        if body:
            self.wfile.write(content)


def _entry(name: str, content: bytes) -> dict[str, object]:
    return {"type": "file", "path": name, "size": len(content), "oid": _digest(content)}


def _digest(content: bytes) -> str:
    return hashlib.sha1(content, usedforsecurity=False).hexdigest()


@contextmanager
def hub_at(endpoint: str) -> Iterator[None]:
    """Make the hub's library use this address, as HF_ENDPOINT does when the library is imported."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("huggingface_hub.constants.ENDPOINT", endpoint)
        template = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        patch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
        yield


@contextmanager
def serve(model: str, commit: str, files: dict[str, bytes]) -> Iterator[Hub]:
    """Serve a model to the hub's library in this process."""
    hub = Hub(model, commit, files)
    thread = threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        with hub_at(hub.endpoint):
            yield hub
    finally:
        hub.shutdown()
        thread.join()
        hub.server_close()
