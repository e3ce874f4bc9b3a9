"""What a server has done so far, in Prometheus' text form.

Source: https://prometheus.io/docs/instrumenting/exposition_formats/ (text format 0.0.4).
"""

from __future__ import annotations

import threading
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator

import psutil

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_PREFIX = "lora_fsdp"
_BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)


class Counters:
    """Counts from any thread. As many numbers as there are paths, statuses and buckets."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._requests: Counter[tuple[str, int]] = Counter()
        self._seconds = 0.0
        self._buckets = [0] * (len(_BUCKETS) + 1)
        self._batches = self._batched_requests = self._rows = 0
        self._scoring = 0.0
        self._process = psutil.Process()

    def request(self, path: str, status: int, *, seconds: float) -> None:
        """A request was answered."""
        with self._lock:
            self._requests[path, status] += 1
            self._seconds += seconds
            self._buckets[bisect_left(_BUCKETS, seconds)] += 1

    def batch(self, rows: int, *, requests: int, seconds: float) -> None:
        """Rows of so many requests were scored together."""
        with self._lock:
            self._batches += 1
            self._batched_requests += requests
            self._rows += rows
            self._scoring += seconds

    def text(self, *, waiting_rows: int, open_requests: int) -> str:
        """Everything, a line a number."""
        with self._lock:
            lines = list(self._lines(waiting_rows, open_requests))
        return "\n".join(lines) + "\n"

    def _lines(self, waiting_rows: int, open_requests: int) -> Iterator[str]:
        name = f"{_PREFIX}_requests_total"
        yield from _head(name, "counter", "Requests answered, by path and status.")
        for (path, status), count in sorted(self._requests.items()):
            yield f'{name}{{path="{path}",status="{status}"}} {count}'
        name = f"{_PREFIX}_request_seconds"
        yield from _head(name, "histogram", "From a request's head to its answer.")
        below = 0
        for bound, count in zip((*_BUCKETS, "+Inf"), self._buckets, strict=True):
            below += count
            yield f'{name}_bucket{{le="{bound}"}} {below}'
        yield f"{name}_sum {self._seconds:.6f}"
        yield f"{name}_count {below}"
        for short, kind, text, value in (
            ("rows_total", "counter", "Rows scored.", self._rows),
            ("batches_total", "counter", "Passes over waiting rows.", self._batches),
            ("batched_requests_total", "counter", "Requests in them.", self._batched_requests),
            ("scoring_seconds_total", "counter", "Time in the model.", round(self._scoring, 6)),
            ("waiting_rows", "gauge", "Rows that wait or are scored.", waiting_rows),
            ("open_requests", "gauge", "Requests that are not answered yet.", open_requests),
            ("resident_bytes", "gauge", "Memory of the process.", self._process.memory_info().rss),
        ):
            yield from _head(f"{_PREFIX}_{short}", kind, text)
            yield f"{_PREFIX}_{short} {value}"


def _head(name: str, kind: str, text: str) -> Iterator[str]:
    yield f"# HELP {name} {text}"
    yield f"# TYPE {name} {kind}"
