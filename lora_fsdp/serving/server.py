"""The server's process: its socket, its signals, its start and its end; needs uvicorn."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import logging
import signal
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from lora_fsdp.errors import ArgumentError
from lora_fsdp.printing import say
from lora_fsdp.serving.app import Application
from lora_fsdp.serving.batches import Batches
from lora_fsdp.serving.counters import Counters
from lora_fsdp.serving.limits import Limits
from lora_fsdp.serving.served import Served

_LEAST_KEY = 16
#: Connections that may wait to be accepted.
BACKLOG = 2048


def bound_socket(host: str, port: int) -> socket.socket:
    """An address of our own before a weight is read; nobody is let in before it listens.

    Raises:
        ArgumentError: it cannot be had.
    """
    if not 0 <= port <= 65535:
        raise ArgumentError(f"--port {port}: give a number from 0 (any free one) to 65535.")
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, protocol, _, address = found[0]
        bound = socket.socket(family, kind, protocol)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            bound.bind(address)
        except OSError:
            bound.close()
            raise
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ArgumentError(
            f"--host {host} --port {port} cannot be listened on ({reason}): name another."
        ) from error
    bound.set_inheritable(False)
    return bound


def read_api_key(file: str | None) -> str | None:
    """The key in a file of one line.

    Raises:
        ArgumentError: there is no such file, or no key of 16 characters or more in it.
    """
    if file is None:
        return None
    try:
        key = Path(file).expanduser().read_text(encoding="ascii").strip()
    except (OSError, UnicodeError) as error:
        raise ArgumentError(f"--api_key_file {file} cannot be read: {error}.") from error
    if len(key) < _LEAST_KEY or not key.isprintable() or " " in key:
        raise ArgumentError(
            f"--api_key_file {file} must hold one key of {_LEAST_KEY} characters or more without "
            'blanks: python -c "import secrets; print(secrets.token_urlsafe(32))".'
        )
    return key


def exposure(host: str, *, api_key: str | None) -> str | None:
    """What others can do with the server, in a line; `None` where it is this machine's alone."""
    try:
        if ipaddress.ip_address(host.partition("%")[0]).is_loopback:
            return None
    except ValueError:
        if host == "localhost":
            return None
    who = "whoever has the key" if api_key else "everyone"
    keyless = "" if api_key else " No key is asked for: give --api_key_file."
    return (
        f"Exposed: {who} who reaches this machine can send texts to the adapter and read "
        f"/metrics; /health is open; nothing is encrypted (put a TLS proxy before it).{keyless}"
    )


def serve(
    served: Served,
    bound: socket.socket,
    *,
    limits: Limits,
    api_key: str | None,
) -> None:
    """Answer requests until SIGTERM or SIGINT; what was taken is answered first."""
    counters = Counters()
    batches = Batches(served.predictor, limits=limits, counters=counters)
    application = Application(served, batches, limits=limits, counters=counters, api_key=api_key)
    config = uvicorn.Config(
        application.asgi(),
        http=_protocol(limits),
        ws="none",
        loop="asyncio",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        backlog=BACKLOG,
        timeout_keep_alive=15,
        # Whoever is still sending or waiting then has had all the time that a request may take.
        timeout_graceful_shutdown=int(limits.request_seconds + limits.body_seconds) + 1,
    )
    logging.getLogger("uvicorn").setLevel(logging.ERROR)
    with bound:
        _Server(config).run(sockets=[bound])
    batches.stop()
    say("Stopped: everything that was taken has been answered.", flush=True)


class _Server(uvicorn.Server):
    """uvicorn's, which ends with 0 after a graceful stop and not by the signal again."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        earlier = {
            one: signal.signal(one, self.handle_exit) for one in (signal.SIGINT, signal.SIGTERM)
        }
        try:
            yield
        finally:
            for one, handler in earlier.items():
                signal.signal(one, handler)


def _protocol(limits: Limits) -> type[H11Protocol]:
    """HTTP/1.1 that does not wait for ever for a request's head."""

    class Protocol(H11Protocol):
        _patience: asyncio.TimerHandle | None = None

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self._expect()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            reading_head = self.cycle is None or self.cycle.response_complete
            if not reading_head and self._patience is not None:
                self._patience.cancel()
                self._patience = None

        def on_response_complete(self) -> None:
            super().on_response_complete()
            self._expect()

        def connection_lost(self, exc: Exception | None) -> None:
            if self._patience is not None:
                self._patience.cancel()
            super().connection_lost(exc)

        def _expect(self) -> None:
            if self._patience is None:
                seconds = limits.body_seconds + 15  # after an answer, as long as it may be idle
                self._patience = self.loop.call_later(seconds, self._give_up)

        def _give_up(self) -> None:
            self._patience = None
            idle = self.cycle is None or self.cycle.response_complete
            if idle and not self.transport.is_closing():
                self.transport.close()

    return Protocol
