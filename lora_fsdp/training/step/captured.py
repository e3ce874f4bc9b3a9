"""Forward and backward of one optimizer step's packed sequences as captured CUDA graphs.

A sequence of a few hundred tokens is some 10 ms of work for a GPU and many times that for the CPU
that launches it kernel by kernel. A graph is launched at once. It has fixed shapes and addresses:
sequences are padded to one of a few sizes, inputs are copied to where the graph reads them, and
gradients add up in the adapter's one block (`AdapterSet.zero_gradients`).
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import cast

import torch

from lora_fsdp.compute.captured_sizes import captured_size
from lora_fsdp.data.packing import PackedSequence, SequenceSize, empty_sequence
from lora_fsdp.distributed.sharding import forget_broken_off_step
from lora_fsdp.errors import CaptureError
from lora_fsdp.placement.memory import LargestSequence
from lora_fsdp.ranks import from_every_rank, world_size
from lora_fsdp.training.logging.time_spent import spent_on
from lora_fsdp.training.step.eager import EagerStep
from lora_fsdp.training.step.graph_recording import GraphRecorder

logger = logging.getLogger(__name__)

_MOST_GRAPHS = 32
_UNKNOWN = LargestSequence(tokens=0, labels=0)


@dataclass(eq=False, kw_only=True)
class CapturedStep(EagerStep):
    """Computes packed sequences by CUDA graphs, one a size; eagerly where a sequence is too long or
    capture fails.

    All graphs share their memory: one runs at a time. Where layers are gathered within the step,
    all ranks must capture, replay or launch the same at once, as NCCL asks: sequences that run at
    once are padded to one size, and where one rank's capture fails, none replays.

    Attributes:
        largest: what the largest sequence is expected to have. That is captured first, if it can
            be, so that the others' tensors find room in its memory, and what does not fit fails at
            once.
        gathers: whether forward and backward gather layers.
        captured: the sizes that were captured, in their order; kept when they are released.
        failed: why nothing is captured any more.
    """

    largest: LargestSequence = _UNKNOWN
    gathers: bool = False
    captured: list[SequenceSize] = field(default_factory=list, init=False)
    failed: str | None = field(default=None, init=False)
    _graphs: dict[SequenceSize, _CapturedSequence] = field(default_factory=dict, init=False)
    _recorder: GraphRecorder = field(default_factory=GraphRecorder, init=False)

    def run(
        self,
        sequence: PackedSequence,
        *,
        denominator: float,
        sizes_of_ranks: Sequence[SequenceSize],
    ) -> torch.Tensor:
        """Add one sequence's gradients; its part of the loss.

        Raises:
            CaptureError: layers are gathered, and what is to be captured cannot be computed here
                while other ranks do; or this torch cannot take up FSDP after a capture that failed.
        """
        graph = self._graph_for(_common(sizes_of_ranks) if self.gathers else sequence.size)
        if graph is None:
            return super().run(sequence, denominator=denominator, sizes_of_ranks=sizes_of_ranks)
        graph.load(sequence, scale=1.0 / denominator)
        graph.graph.replay()
        return graph.loss

    def release(self) -> None:
        """Let go of the graphs: of their memory, and of NCCL's communicator, which a process could
        not close while one holds it.

        Waits for nothing, as another rank may be gone: CUDA destroys a graph when it has run.
        """
        self._graphs.clear()
        self._recorder.release_memory()

    def _graph_for(self, size: SequenceSize) -> _CapturedSequence | None:
        """For sequences of `size`, captured if there is none yet; `None` if none can be."""
        padded = captured_size(size)
        if padded is None or self.failed:
            return None
        if not self._graphs:
            self.captured.clear()
        if padded not in self._graphs and len(self._graphs) < _MOST_GRAPHS:
            # The largest one comes before all others.
            for new in dict.fromkeys((padded if self._graphs else self._first(size), padded)):
                self._add_graph(new)
        return self._graphs.get(padded)

    def _first(self, size: SequenceSize) -> SequenceSize:
        """What is captured first, where sequences of `size` come first."""
        largest = size._replace(
            tokens=max(self.largest.tokens, size.tokens),
            labels=max(self.largest.labels, size.labels),
        )
        return captured_size(largest) or cast(SequenceSize, captured_size(size))

    def _add_graph(self, size: SequenceSize) -> None:
        """Capture `size`, unless a capture has failed, as this one may, too.

        A collective call where layers are gathered.
        """
        if self.failed:
            return
        graph, failure = None, None
        try:
            with spent_on("capture"):
                graph = self._capture(size)
        except CaptureError:
            raise
        except RuntimeError as error:
            # Ending a capture that was broken off is an error of its own.
            broken_off_by = error.__context__
            if broken_off_by is not None and not isinstance(broken_off_by, Exception):
                raise
            cause = broken_off_by if isinstance(broken_off_by, RuntimeError) else error
            failure = str(cause).splitlines()[0]
        if self.gathers:  # capturing waits for no other rank, so all arrive here
            failure = next((one for one in from_every_rank(failure) if one), None)
        if graph is not None and failure is None:
            self._graphs[size] = graph
            self.captured.append(size)
            return
        self.failed = failure
        self._graphs.clear()  # their memory is free for the eager step
        if self.gathers and not forget_broken_off_step(self.packed.model):
            raise CaptureError(
                f"A packed sequence of {size.tokens} tokens cannot be captured with the gathers in "
                f"it: {failure}. Run with --step fused, or --step eager."
            )
        logger.warning("The step cannot be captured and runs eagerly: %s", failure)

    def _capture(self, size: SequenceSize) -> _CapturedSequence:
        """Capture sequences of `size`; gradients and random numbers are left as they were.

        Raises:
            CaptureError: layers are gathered, and nothing could be captured yet.
            RuntimeError: the capture failed.
        """
        static = _CapturedSequence(size, device=self.device)
        gradients = self.adapter.copy_gradients()
        random_state = torch.cuda.get_rng_state(self.device)
        try:
            with self._recorder.launching():
                self._warm_up(static)
            with self._recorder.recording(static.graph):
                static.loss = self._forward_backward(static.sequence, scale=static.scale)
        finally:
            torch.cuda.synchronize()
            torch.cuda.set_rng_state(random_state, self.device)
            self.adapter.set_gradients(gradients)
        return static

    def _warm_up(self, static: _CapturedSequence) -> None:
        """Compute what will be captured: kernels are compiled and workspaces allocated before."""
        try:
            for _ in range(1 if self._graphs else 2):
                self._forward_backward(static.sequence, scale=static.scale)
        except RuntimeError as error:
            if not self.gathers:
                raise
            raise CaptureError(  # the other ranks wait for this one's gathers
                f"A packed sequence of {static.size.tokens} tokens, which a graph is to hold, "
                f"cannot be computed: {str(error).splitlines()[0]}. Lower --max_tokens_per_row."
            ) from error


def _common(sizes: Sequence[SequenceSize]) -> SequenceSize:
    """The least that sequences of all `sizes`, one of each rank, can be padded to."""
    if len(sizes) != world_size():
        raise ValueError(f"Sizes of {len(sizes)} ranks were given, and there are {world_size()}.")
    return SequenceSize(
        tokens=max(size.tokens for size in sizes),
        labels=max(size.labels for size in sizes),
        is_one_sequence=all(size.is_one_sequence for size in sizes),
    )


class _CapturedSequence:
    """A captured forward and backward, and the memory it reads and writes."""

    def __init__(self, size: SequenceSize, *, device: torch.device) -> None:
        self.size = size
        empty = replace(empty_sequence(), is_one_sequence=size.is_one_sequence)
        self.sequence = empty.padded(tokens=size.tokens, labels=size.labels).to(device)
        self.scale = torch.zeros((), device=device)
        self.graph = torch.cuda.CUDAGraph()
        self.loss = torch.zeros((), device=device)

    def load(self, sequence: PackedSequence, *, scale: float) -> None:
        """Put `sequence` where the graph reads it."""
        padded = sequence.padded(tokens=self.size.tokens, labels=self.size.labels)
        self.sequence.copy_(padded.pin_memory())
        self.scale.fill_(scale)
