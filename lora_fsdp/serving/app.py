"""The server's paths, as an ASGI application; needs starlette (extra `serve`)."""

from __future__ import annotations

import asyncio
import hmac
import json
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route

from lora_fsdp import __version__
from lora_fsdp.errors import ArgumentError
from lora_fsdp.evaluation.answering.columns import check_confidence, leave_out_unsure
from lora_fsdp.serving.batches import Batches, Columns
from lora_fsdp.serving.bodies import Asked, parse_object, parse_rows
from lora_fsdp.serving.chat import completion, models, parse_chat
from lora_fsdp.serving.counters import CONTENT_TYPE, Counters
from lora_fsdp.serving.limits import Limits, RequestError
from lora_fsdp.serving.served import Served

_OPEN_TO_ALL = "/health"
#: Bytes of a body beyond the largest that are still read before it is refused.
_FORGOTTEN = 64 * 2**20
_PATHS = ("/predict", "/v1/chat/completions", "/v1/models", "/health", "/metrics")
Answer = Callable[[Request], Awaitable[Response]]


class Application:
    """What a request is answered with.

    Args:
        served: the adapter.
        batches: score for it.
        limits: what is refused.
        counters: of what was done.
        api_key: that requests must bring; `None` = none.
    """

    def __init__(
        self,
        served: Served,
        batches: Batches,
        *,
        limits: Limits,
        counters: Counters,
        api_key: str | None,
    ) -> None:
        self.served, self.batches = served, batches
        self.limits, self.counters, self.api_key = limits, counters, api_key
        self.open_requests = 0

    def asgi(self) -> Starlette:
        """The application."""
        answers: dict[str, tuple[str, Answer]] = {
            "/predict": ("POST", self.predict),
            "/v1/chat/completions": ("POST", self.chat),
            "/v1/models": ("GET", self.models),
            "/health": ("GET", self.health),
            "/metrics": ("GET", self.metrics),
        }
        routes = [
            Route(path, self._guarded(answer), methods=[method])
            for path, (method, answer) in answers.items()
        ]
        return Starlette(routes=routes, exception_handlers={HTTPException: self._no_such_path})

    async def predict(self, request: Request) -> Response:
        """Rows in; for each the columns of `lora-fsdp predict` out."""
        body = parse_object(await self._body(request))
        asked = parse_rows(body, self.served.task, self.limits)
        columns = await self._answered(request, asked)
        rows = [
            {name: values[place] for name, values in columns.items()}
            for place in range(len(asked.examples))
        ]
        calibrated = self.served.predictor.calibration is not None
        return _json({"model": self.served.name, "calibrated": calibrated, "answers": rows})

    async def chat(self, request: Request) -> Response:
        """One answer in OpenAI's form."""
        body = parse_object(await self._body(request))
        asked = parse_chat(body, self.served, self.limits)
        columns = await self._answered(request, asked.asked)
        return _json(completion(asked, columns, self.served))

    async def models(self, request: Request) -> Response:
        """The one model."""
        return _json(models(self.served.name))

    async def health(self, request: Request) -> Response:
        """Whether it answers."""
        alive = self.batches.is_alive
        facts = {
            "status": "ok" if alive else "failed",
            "model": self.served.name,
            "task": self.served.task.name,
            "version": __version__,
            "waiting_rows": self.batches.waiting_rows,
        }
        return _json(facts, status=200 if alive else 503)

    async def metrics(self, request: Request) -> Response:
        """For Prometheus."""
        text = self.counters.text(
            waiting_rows=self.batches.waiting_rows, open_requests=self.open_requests
        )
        return Response(text, media_type=CONTENT_TYPE)

    async def _answered(self, request: Request, asked: Asked) -> Columns:
        """The columns for what was asked, when the model has scored it."""
        try:
            check_confidence(self.served.predictor, asked.confidence)
        except ArgumentError as error:
            raise RequestError(400, str(error)) from error
        future = self.batches.submit(asked.examples, coverage=asked.confidence.coverage)
        waiting = asyncio.wrap_future(future)
        gone = asyncio.ensure_future(_disconnected(request))
        try:
            both: list[asyncio.Future[Any]] = [waiting, gone]
            await asyncio.wait(
                both,
                timeout=self.limits.request_seconds,
                return_when=asyncio.FIRST_COMPLETED,
            )
            if gone.done() and not waiting.done():
                raise ClientDisconnect
            if not waiting.done():
                seconds = f"{self.limits.request_seconds:g} s (--request_seconds)"
                raise RequestError(
                    503,
                    f"There was no answer within {seconds}.",
                    retry_after=round(self.limits.request_seconds) or 1,
                )
            columns = waiting.result()
        finally:
            gone.cancel()
            waiting.cancel()  # what is not being scored yet never is
            with suppress(asyncio.CancelledError):
                await gone
        if (least := asked.confidence.least) is not None:
            column = self.served.task.answer_kind.answer_column
            leave_out_unsure(columns, column=column, least=least)
        return columns

    async def _body(self, request: Request) -> bytes:
        """The request's body, if it is small enough and arrives in time.

        One that is too large is read to its end, within bounds, and forgotten: a client that is
        still sending would see a broken connection and not the answer.
        """
        limits, parts, size = self.limits, list[bytes](), 0
        try:
            async with asyncio.timeout(limits.body_seconds):
                async for part in request.stream():
                    size += len(part)
                    if size > limits.max_body_bytes:
                        parts.clear()
                    else:
                        parts.append(part)
                    if size > limits.max_body_bytes + _FORGOTTEN:
                        break
        except TimeoutError as error:
            if size <= limits.max_body_bytes:
                raise RequestError(
                    408,
                    f"The body did not arrive within {limits.body_seconds:g} s (--body_seconds).",
                ) from error
        if size > limits.max_body_bytes:
            raise RequestError(
                413, f"The body is larger than {limits.max_body_bytes:,} bytes (--max_body_bytes)."
            )
        return b"".join(parts)

    def _guarded(self, answer: Answer) -> Answer:
        """Count it, ask for the key, and make every refusal a sentence."""

        async def guarded(request: Request) -> Response:
            began = time.perf_counter()
            self.open_requests += 1
            try:
                response = await self._or_refused(answer, request)
            except ClientDisconnect:
                response = Response(status_code=499)  # nobody reads it; counted as nginx does
            finally:
                self.open_requests -= 1
            seconds = time.perf_counter() - began
            self.counters.request(request.url.path, response.status_code, seconds=seconds)
            return response

        return guarded

    async def _or_refused(self, answer: Answer, request: Request) -> Response:
        try:
            self._check_key(request)
            watched = request.method != "POST"  # whoever looks after the server gets through
            if self.open_requests > self.limits.max_requests and not watched:
                raise RequestError(
                    503,
                    f"{self.limits.max_requests} requests are open (--max_requests).",
                    retry_after=1,
                )
            return await answer(request)
        except RequestError as error:
            return _refusal(error)

    def _check_key(self, request: Request) -> None:
        if self.api_key is None or request.url.path == _OPEN_TO_ALL:
            return
        scheme, _, key = request.headers.get("authorization", "").partition(" ")
        right = hmac.compare_digest(key.strip().encode(), self.api_key.encode())
        if scheme.lower() != "bearer" or not right:
            raise RequestError(401, "The header Authorization must bring the right bearer token.")

    async def _no_such_path(self, request: Request, error: Exception) -> Response:
        status = error.status_code if isinstance(error, HTTPException) else 500
        path = request.url.path[:80]
        words = f"There is no path {path!r}; there are {', '.join(_PATHS)}."
        if status == 405:
            words = f"{request.method} is not done at {path!r}."
        self.counters.request("other", status, seconds=0.0)
        return _refusal(RequestError(status, words))


async def _disconnected(request: Request) -> None:
    """Returns when the client has left."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _refusal(error: RequestError) -> Response:
    headers = {}
    if error.retry_after is not None:
        headers["Retry-After"] = str(error.retry_after)
    if error.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    if error.status in (408, 413):  # what is left of the body is not read
        headers["Connection"] = "close"
    return _json(error.contents(), status=error.status, headers=headers)


def _json(value: Any, *, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    return Response(
        text.encode(), status_code=status, headers=headers, media_type="application/json"
    )
