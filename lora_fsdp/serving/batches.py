"""Requests that wait are scored together: one thread, one model, one pass for many."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from lora_fsdp.errors import LoraFsdpError
from lora_fsdp.evaluation.answering.columns import answer_columns
from lora_fsdp.evaluation.ensemble import Ensemble
from lora_fsdp.evaluation.prediction import Predictor
from lora_fsdp.serving.counters import Counters
from lora_fsdp.serving.limits import Limits, RequestError
from lora_fsdp.tasks import Example

logger = logging.getLogger(__name__)
#: A column for each new column of `lora-fsdp predict`, a value for each row.
Columns = dict[str, list[Any]]


@dataclass
class _Waiting:
    examples: Sequence[Example]
    coverage: float | None
    until: float
    answer: Future[Columns] = field(default_factory=Future)


class Batches:
    """Takes examples from any thread and answers them in one of its own.

    Args:
        predictor: the adapter; no other thread may use it meanwhile.
        limits: how many may wait, and for how long.
        counters: of what was done.
    """

    def __init__(
        self, predictor: Predictor | Ensemble, *, limits: Limits, counters: Counters
    ) -> None:
        self._predictor, self._limits, self._counters = predictor, limits, counters
        self._waiting: deque[_Waiting] = deque()
        self._changed = threading.Condition()
        self._stopping = False
        self._rows = 0
        self._rate = 0.0  # rows a second, of late
        self._thread = threading.Thread(target=self._run, name="scoring", daemon=True)
        self._thread.start()

    @property
    def waiting_rows(self) -> int:
        """Rows that have been taken and not answered."""
        return self._rows

    @property
    def is_alive(self) -> bool:
        """Whether it answers."""
        return self._thread.is_alive()

    def submit(self, examples: Sequence[Example], *, coverage: float | None) -> Future[Columns]:
        """Answer `examples` when it is their turn; at once if the future is cancelled.

        Raises:
            RequestError: too many rows wait already (429), or the server is stopping (503).
        """
        with self._changed:
            if self._stopping:
                raise RequestError(503, "The server is stopping.", retry_after=5)
            if self._rows + len(examples) > self._limits.max_waiting_rows:
                seconds = math.ceil(self._rows / self._rate) if self._rate else 1
                raise RequestError(
                    429,
                    f"{self._rows} rows are waiting and at most {self._limits.max_waiting_rows} "
                    "may: send it again later.",
                    retry_after=min(max(seconds, 1), 60),
                )
            until = time.monotonic() + self._limits.request_seconds
            one = _Waiting(examples, coverage, until)
            self._waiting.append(one)
            self._rows += len(examples)
            self._changed.notify()
        return one.answer

    def stop(self) -> None:
        """Take nothing more; returns when everything that was taken is answered."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        while True:
            with self._changed:
                while not self._waiting and not self._stopping:
                    self._changed.wait()
                if not self._waiting:
                    return
                batch = self._next()
            answered = self._answered(batch)
            with self._changed:
                self._rows -= sum(len(one.examples) for one in batch)
            for one, answer in answered:
                if isinstance(answer, RequestError):
                    one.answer.set_exception(answer)
                else:
                    one.answer.set_result(answer)

    def _next(self) -> list[_Waiting]:
        """The first that waits, and others that are asked likewise, up to a batch."""
        batch = [self._waiting.popleft()]
        rows = len(batch[0].examples)
        while self._waiting and self._waiting[0].coverage == batch[0].coverage:
            rows += len(self._waiting[0].examples)
            if rows > self._limits.batch_rows:
                break
            batch.append(self._waiting.popleft())
        return batch

    def _answered(self, batch: Sequence[_Waiting]) -> list[tuple[_Waiting, Columns | RequestError]]:
        """What is said to each of those that still wait."""
        now = time.monotonic()
        waiting = [one for one in batch if one.answer.set_running_or_notify_cancel()]
        late = [one for one in waiting if now > one.until]
        asked = [one for one in waiting if now <= one.until]
        answers: list[Columns | RequestError] = []
        began = time.perf_counter()
        try:
            answers = self._divided(asked)
        except Exception as error:  # one request's fault must not be another's
            answers = [_as_answer(error)] if len(asked) == 1 else list(map(self._alone, asked))
        if asked:
            seconds = time.perf_counter() - began
            rows = sum(len(one.examples) for one in asked)
            self._rate = rows / max(seconds, 1e-9)
            self._counters.batch(rows, requests=len(asked), seconds=seconds)
        too_late = [_too_late(self._limits) for _ in late]
        return list(zip([*late, *asked], [*too_late, *answers], strict=True))

    def _divided(self, asked: Sequence[_Waiting]) -> list[Columns | RequestError]:
        """The columns of each, scored together."""
        if not asked:
            return []
        examples = [example for one in asked for example in one.examples]
        columns = answer_columns(self._predictor, examples, coverage=asked[0].coverage)
        answers: list[Columns | RequestError] = []
        first = 0
        for one in asked:
            rows = slice(first, first := first + len(one.examples))
            answers.append({name: values[rows] for name, values in columns.items()})
        return answers

    def _alone(self, one: _Waiting) -> Columns | RequestError:
        try:
            return self._divided([one])[0]
        except Exception as error:
            return _as_answer(error)


def _too_late(limits: Limits) -> RequestError:
    return RequestError(
        503,
        f"The request waited longer than {limits.request_seconds:g} s (--request_seconds).",
        retry_after=math.ceil(limits.request_seconds),
    )


def _as_answer(error: Exception) -> RequestError:
    """What a request is told of an error: our own sentence, and of others nothing but that."""
    if isinstance(error, LoraFsdpError):
        return RequestError(400, str(error))
    logger.error("A request could not be answered.", exc_info=error)
    return RequestError(500, "The model failed on this request; the server's log says how.")
