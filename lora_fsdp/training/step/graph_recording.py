"""Recording what a GPU is to do as CUDA graphs that share their memory."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any, cast

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from lora_fsdp.ranks import is_joined
from lora_fsdp.training.logging.time_spent import spent_on

logger = logging.getLogger(__name__)

# cuDNN's attention is the fastest, and a captured size is planned only once.
_ATTENTION = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]


class GraphRecorder:
    """Records CUDA graphs of which one runs at a time, so that all share their memory.

    Attributes:
        recorded: how many were recorded (`Replayed`).
        failed: why nothing is recorded any more.
    """

    def __init__(self) -> None:
        self.recorded = 0
        self.failed: str | None = None

    @cached_property
    def pool(self) -> Any:
        """The memory."""
        return torch.cuda.graph_pool_handle()

    @cached_property
    def stream(self) -> torch.cuda.Stream:
        """One for all captures: memory is used again by the stream that it was allocated for only.

        Of a high priority: what the step does on other streams meanwhile (unpacking weights) takes
        what this one leaves.
        """
        return torch.cuda.Stream(priority=-1)

    @contextmanager
    def launching(self) -> Iterator[None]:
        """What runs in the block is launched on the recorder's stream, as it will be recorded:
        kernels are compiled and workspaces allocated.
        """
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream), sdpa_kernel(_ATTENTION, set_priority=True):
            yield
        torch.cuda.current_stream().wait_stream(self.stream)

    @contextmanager
    def recording(self, graph: torch.cuda.CUDAGraph) -> Iterator[None]:
        """What runs in the block goes into `graph` instead."""
        with (
            torch.cuda.graph(
                graph,
                pool=self.pool,
                stream=self.stream,
                # A thread of NCCL's watches over its kernels meanwhile.
                capture_error_mode="thread_local" if is_joined() else "global",
            ),
            sdpa_kernel(_ATTENTION, set_priority=True),
        ):
            yield

    def release_memory(self) -> None:
        """Once all graphs are gone: torch opens no pool again whose graphs are."""
        self.__dict__.pop("pool", None)


class Replayed:
    """A computation on memory that stays where it is: launched the first time, then recorded, and
    from then on replayed.

    Args:
        compute: returns nothing, and waits for nothing.
        recorder: `None` = it is always launched, as on a CPU. Where it cannot record, that is said
            once, and everything is launched.
    """

    def __init__(self, compute: Callable[[], None], recorder: GraphRecorder | None) -> None:
        self._compute, self._recorder = compute, recorder
        self._launched = False
        self._graph: torch.cuda.CUDAGraph | None = None

    def __call__(self) -> None:
        """Compute."""
        recorder = self._recorder
        if recorder is None or recorder.failed is not None:
            self._compute()
            return
        if not self._launched:
            self._launched = True
            with recorder.launching():
                self._compute()
            return
        if self._graph is None and not self._record(recorder):
            self._compute()
            return
        cast(torch.cuda.CUDAGraph, self._graph).replay()

    def _record(self, recorder: GraphRecorder) -> bool:
        graph = torch.cuda.CUDAGraph()
        try:
            with spent_on("capture"), recorder.recording(graph):
                self._compute()
        except RuntimeError as error:
            # Ending a capture that was broken off is an error of its own.
            broken_off_by = error.__context__
            if broken_off_by is not None and not isinstance(broken_off_by, Exception):
                raise
            cause = broken_off_by if isinstance(broken_off_by, RuntimeError) else error
            recorder.failed = str(cause).splitlines()[0]
            logger.warning("The step cannot be captured and runs eagerly: %s", recorder.failed)
            return False
        self._graph = graph
        recorder.recorded += 1
        return True
