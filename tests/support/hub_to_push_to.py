"""A server on this machine that takes what huggingface_hub uploads, as the Hub's HTTP API does.

It answers the calls that `HfApi.create_repo` and `HfApi.upload_folder` make without Xet: the
repository, which files go to LFS, the LFS batch, the uploads, their verification, the card's
metadata, the commit.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any
from urllib.parse import urlsplit

TOKEN = "hf_" + "t" * 34


@dataclass
class PushedHub:
    """What has been pushed.

    Attributes:
        files: contents by name, of the last commit and those before it.
        commits: the message of each.
        created: the repositories asked for, with their visibility.
        refused: answers every commit with this status instead.
        complaints: requests that the Hub would not have understood.
    """

    files: dict[str, bytes] = field(default_factory=dict)
    commits: list[str] = field(default_factory=list)
    created: list[dict[str, Any]] = field(default_factory=list)
    refused: int | None = None
    complaints: list[str] = field(default_factory=list)
    stored: dict[str, bytes] = field(default_factory=dict)
    address: str = ""

    def answer(self, method: str, path: str, body: bytes) -> tuple[int, dict[str, Any]]:
        """The status and JSON with which the Hub answers."""
        if method == "PUT" and path.startswith("/lfs/"):
            self.stored[hashlib.sha256(body).hexdigest()] = body
            return 200, {}
        if path.startswith("/lfs/verify"):
            known = json.loads(body)
            fits = len(self.stored.get(known["oid"], b"")) == known["size"]
            return (200, {}) if fits else (404, {"error": "no such object"})
        if path == "/api/repos/create":
            asked = json.loads(body)
            self.created.append(asked)
            name = f"{asked.get('organization') or 'me'}/{asked['name']}"
            return 200, {"url": f"{self.address}/{name}", "name": name}
        if path == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}
        if "/preupload/" in path:
            return 200, {"files": [self._mode(one) for one in json.loads(body)["files"]]}
        if path.endswith(".git/info/lfs/objects/batch"):
            objects = [self._place(one) for one in json.loads(body)["objects"]]
            return 200, {"transfer": "basic", "objects": objects}
        if "/commit/" in path:
            return self._commit(body)
        self.complaints.append(f"{method} {path}")
        return 404, {"error": "not found"}

    def _mode(self, file: dict[str, Any]) -> dict[str, Any]:
        is_large = file["path"].endswith((".safetensors", ".bin"))
        mode = "lfs" if is_large else "regular"
        return {"path": file["path"], "uploadMode": mode, "shouldIgnore": False}

    def _place(self, one: dict[str, Any]) -> dict[str, Any]:
        if one["oid"] in self.stored:
            return one
        actions = {
            "upload": {"href": f"{self.address}/lfs/{one['oid']}"},
            "verify": {"href": f"{self.address}/lfs/verify"},
        }
        return {**one, "actions": actions}

    def _commit(self, body: bytes) -> tuple[int, dict[str, Any]]:
        if self.refused is not None:
            return self.refused, {"error": "refused"}
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "header":
                self.commits.append(value["summary"])
            elif line["key"] == "file":
                self.files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                self.files[value["path"]] = self.stored[value["oid"]]
            else:
                self.complaints.append(f"commit: {line['key']}")
        oid = hashlib.sha1(body).hexdigest()
        return 200, {"commitUrl": f"{self.address}/me/x/commit/{oid}", "commitOid": oid}


@contextmanager
def serve(hub: PushedHub) -> Iterator[PushedHub]:
    """Serve `hub` at `hub.address` while the block runs."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *arguments: object) -> None:
            """Nothing."""

        def do_POST(self) -> None:
            self._take()

        def do_PUT(self) -> None:
            self._take()

        def do_GET(self) -> None:
            self._take()

        def _take(self) -> None:
            path = urlsplit(self.path).path
            body = self._body()
            status, answer = 401, {"error": "who is it?"}
            # Storage knows who it is by the address that the batch gave out.
            is_storage = path.startswith("/lfs/")
            if is_storage or self.headers.get("Authorization") == f"Bearer {TOKEN}":
                status, answer = hub.answer(self.command, path, body)
            data = json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def _body(self) -> bytes:
            if self.headers.get("Transfer-Encoding") != "chunked":
                return self.rfile.read(int(self.headers.get("Content-Length") or 0))
            body = b""
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return body

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.address = f"http://127.0.0.1:{server.server_port}"
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join(timeout=10)
