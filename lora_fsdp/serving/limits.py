"""What a server takes at most, and how it refuses the rest."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any, ClassVar

from lora_fsdp.arguments.option import option
from lora_fsdp.errors import ArgumentError


class RequestError(Exception):
    """A request that is not answered.

    Args:
        status: of HTTP.
        message: one sentence.
        param: the field of the request that is wrong, if it is one.
        retry_after: seconds after which the same request may be answered.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message = status, message
        self.param, self.retry_after = param, retry_after

    def contents(self) -> dict[str, Any]:
        """The body, in OpenAI's form."""
        kinds = {401: "authentication_error", 429: "rate_limit_error"}
        usual = "server_error" if self.status >= 500 else "invalid_request_error"
        kind = kinds.get(self.status, usual)
        error = {"message": self.message, "type": kind, "param": self.param, "code": self.status}
        return {"error": error}


@dataclass
class Limits:
    """What is refused, and when."""

    _argument_group_name: ClassVar[str] = "limits"

    max_body_bytes: int = option(1_000_000, "Largest body of a request; above it: 413.")
    max_rows: int = option(256, "Most rows in a request; above it: 413.")
    max_text_chars: int = option(100_000, "Longest text in a row, in characters; above it: 413.")
    max_waiting_rows: int = option(
        1024, "Rows that may wait for the model, of all requests; above it: 429."
    )
    max_requests: int = option(256, "Requests at a time, whatever they wait for; above it: 503.")
    request_seconds: float = option(
        30.0, "How long a request may wait for its answer; after that: 503."
    )
    body_seconds: float = option(
        10.0, "How long a request's head, and then its body, may take to arrive; after that: 408."
    )
    batch_rows: int = option(64, "Rows of waiting requests that are scored together.")

    def check(self) -> None:
        """Refuse a limit below which nothing is answered.

        Raises:
            ArgumentError: names the option.
        """
        for field in fields(self):
            value = getattr(self, field.name)
            if not math.isfinite(value) or value <= 0:
                raise ArgumentError(f"--{field.name} {value}: give a number above 0.")
        if self.max_rows > self.max_waiting_rows:
            raise ArgumentError(
                f"--max_rows {self.max_rows} is more than --max_waiting_rows "
                f"{self.max_waiting_rows}: a request of so many rows would never be answered."
            )
