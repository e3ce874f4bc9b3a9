"""A server on this machine that speaks as much of the Hub's API, and ModelScope's, as is used."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"
NAME = "owner/model"


@dataclass
class FakeHub:
    """What it serves, and how badly.

    Attributes:
        name: the model, owner/name.
        files: contents by name; those ending in .safetensors or .bin are LFS files.
        cuts: for a file, after how many bytes of each coming answer the connection is closed.
        status: answers every request with this status and error code instead.
        sent_as: contents that are sent in place of those announced.
        requests: path and Range header of every request for a file.
    """

    files: dict[str, bytes]
    cuts: dict[str, list[int]] = field(default_factory=dict)
    status: tuple[int, str] | None = None
    sent_as: dict[str, bytes] = field(default_factory=dict)
    announced: dict[str, int] = field(default_factory=dict)
    requests: list[tuple[str, str | None]] = field(default_factory=list)
    name: str = NAME
    address: str = ""

    def model_info(self) -> dict[str, Any]:
        siblings = []
        for name, data in self.files.items():
            size = self.announced.get(name, len(data))
            entry: dict[str, Any] = {"rfilename": name, "size": size}
            entry["blobId"] = hashlib.sha1(f"blob {len(data)}\0".encode() + data).hexdigest()
            if name.endswith((".safetensors", ".bin")):
                digest = hashlib.sha256(data).hexdigest()
                entry["lfs"] = {"sha256": digest, "size": size, "pointerSize": 130}
            siblings.append(entry)
        return {"id": self.name, "sha": COMMIT, "siblings": siblings, "tags": [], "private": False}

    def modelscope_files(self) -> dict[str, Any]:
        listed: list[dict[str, Any]] = [
            {
                "Path": name,
                "Size": len(data),
                "Sha256": hashlib.sha256(data).hexdigest(),
                "Type": "blob",
            }
            for name, data in self.files.items()
        ]
        return {"Code": 200, "Data": {"Files": [*listed, {"Path": "onnx", "Type": "tree"}]}}


@contextmanager
def serve(hub: FakeHub) -> Iterator[FakeHub]:
    """Serve `hub` at `hub.address` while the block runs."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *arguments: object) -> None:
            """Nothing."""

        def do_GET(self) -> None:
            url = urlsplit(self.path)
            query = parse_qs(url.query)
            if hub.status is not None:
                self._answer(hub.status[0], b"{}", {"X-Error-Code": hub.status[1]})
            elif url.path == f"/api/models/{hub.name}/revision/main":
                self._answer(200, json.dumps(hub.model_info()).encode())
            elif url.path.startswith(f"/api/models/{hub.name}/revision/"):
                self._answer(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
            elif url.path == f"/api/v1/models/{hub.name}/repo/files":
                self._answer(200, json.dumps(hub.modelscope_files()).encode())
            elif url.path == f"/api/v1/models/{hub.name}/repo":
                self._send_file(query["FilePath"][0])
            elif url.path.startswith(f"/{hub.name}/resolve/{COMMIT}/"):
                self._send_file(unquote(url.path.rpartition("/")[2]))
            else:
                self._answer(404, b"{}", {"X-Error-Code": "RepoNotFound"})

        def _send_file(self, name: str) -> None:
            asked = self.headers.get("Range")
            hub.requests.append((name, asked))
            data = hub.sent_as.get(name, hub.files[name])
            start = int(asked.removeprefix("bytes=").partition("-")[0]) if asked else 0
            rest = data[start:]
            self.send_response(206 if asked else 200)
            self.send_header("Content-Length", str(len(rest)))
            if asked:
                self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
            self.end_headers()
            if hub.cuts.get(name):
                self.wfile.write(rest[: hub.cuts[name].pop(0)])
                self.wfile.flush()
                self.close_connection = True
                self.connection.close()
            else:
                self.wfile.write(rest)

        def _answer(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
            self.send_response(status)
            for name, value in (headers or {}).items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.address = f"http://127.0.0.1:{server.server_address[1]}"
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
