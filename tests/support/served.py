"""A real `lora-fsdp serve` process, and requests to it by the standard library alone."""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


@dataclass
class Reply:
    """An answer: its status, headers (lower case) and JSON, or text."""

    status: int
    headers: Mapping[str, str]
    body: Any

    @property
    def error(self) -> str:
        """The sentence of a refusal."""
        return str(self.body["error"]["message"])


@dataclass
class Server:
    """A running server, and the lines that it had printed when it was ready."""

    process: subprocess.Popen[str]
    port: int
    lines: list[str]

    def ask(
        self,
        path: str,
        body: Any = None,
        *,
        method: str | None = None,
        headers: Mapping[str, str] | None = None,
        timeout: float = 60,
    ) -> Reply:
        """One request; `body` is JSON unless it is bytes."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout)
        raw = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        try:
            connection.request(
                method or ("GET" if raw is None else "POST"), path, raw, dict(headers or {})
            )
            found = connection.getresponse()
            text = found.read().decode()
        finally:
            connection.close()
        kept = {name.lower(): value for name, value in found.getheaders()}
        is_json = kept.get("content-type", "").startswith("application/json")
        return Reply(found.status, kept, json.loads(text) if is_json else text)

    def stop(self) -> tuple[int, str]:
        """SIGTERM; its exit code, and what it still printed."""
        self.process.send_signal(signal.SIGTERM)
        rest, _ = self.process.communicate(timeout=60)
        return self.process.returncode, rest


@contextmanager
def serving(*words: object, **variables: str) -> Iterator[Server]:
    """The server on a free port, ready."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"} | variables
    environment = {name: value for name, value in environment.items() if value}
    command = [sys.executable, "-m", "lora_fsdp", "serve", "--port", "0", *map(str, words)]
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )  # fmt: skip
    assert process.stdout is not None
    lines = []
    try:
        for line in process.stdout:
            lines.append(line.rstrip())
            if found := re.search(r"Serving .* on http://\S+:(\d+) after", line):
                yield Server(process, int(found[1]), lines)
                break
        else:
            raise AssertionError("\n".join(lines))
    finally:
        if process.poll() is None:
            process.kill()
        process.communicate()
