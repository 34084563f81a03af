"""A server that speaks as much of the Hugging Face hub's API as a download needs."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub:
    """The one repository ``org/tiny`` with its branch ``main``, and the gated ``org/gated``.

    Attributes:
        files: contents by name.
        requests: the headers of each request, with names as in ``Content-Length``.
        cut_after: end the connection after this many bytes of a longer body; this happens once.
    """

    def __init__(self, files: dict[str, bytes]) -> None:
        self.files = files
        self.requests: list[dict[str, str]] = []
        self.cut_after: int | None = None
        self.url = ""


@contextmanager
def running_hub(files: dict[str, bytes]) -> Iterator[Hub]:
    """Run a hub on a free port."""
    hub = Hub(files)

    class Handler(_Handler):
        pass

    Handler.hub = hub
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub

    def do_GET(self) -> None:
        hub, path = self.hub, self.path.partition("?")[0]
        hub.requests.append({name.title(): value for name, value in self.headers.items()})
        if path.startswith(("/api/models/org/gated", "/org/gated/")):
            self._answer(403, b"{}", {"X-Error-Code": "GatedRepo"})
        elif path == "/api/models/org/tiny/revision/lost":
            self._answer(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        elif path.startswith("/api/models/org/tiny/revision/"):
            siblings = [{"rfilename": name} for name in hub.files]
            self._json({"_id": "0", "id": "org/tiny", "modelId": "org/tiny", "sha": COMMIT, "siblings": siblings})
        elif path.startswith("/api/models/org/tiny/tree/"):
            self._json([_entry(name, data) for name, data in hub.files.items()])
        elif path.startswith("/org/tiny/resolve/") and path.split("/", 5)[5] in hub.files:
            self._file(hub.files[path.split("/", 5)[5]])
        else:
            self._answer(404, b"{}", {"X-Error-Code": "RepoNotFound"})

    do_HEAD = do_GET

    def _json(self, value: Any) -> None:
        self._answer(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _file(self, data: bytes) -> None:
        headers = {"ETag": f'"{hashlib.sha1(data).hexdigest()}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        given = self.headers.get("Range")
        if given is None:
            self._answer(200, data, headers)
            return
        begin = int(given.removeprefix("bytes=").partition("-")[0])
        headers["Content-Range"] = f"bytes {begin}-{len(data) - 1}/{len(data)}"
        self._answer(206, data[begin:], headers)

    def _answer(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "HEAD":
            return
        cut = self.hub.cut_after
        if cut is not None and len(body) > cut:
            self.hub.cut_after = None
            self.wfile.write(body[:cut])
            self.close_connection = True
            return
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Keep quiet."""


def _entry(name: str, data: bytes) -> dict[str, Any]:
    return {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
