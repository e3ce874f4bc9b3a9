"""Tensors copied out of mapped files by several threads at once, a piece at a time.

One thread copies one to three gigabytes a second out of a mapped file, page by page, which is less
than a page cache or a fast disk gives. To a GPU each thread copies through a page-locked buffer of
one piece, which the GPU fetches while the other threads fill theirs.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from math import prod

import torch

#: Bytes that a thread copies at a time, and that it keeps page-locked for a GPU.
PIECE_BYTES = 16 * 2**20
_MOST_THREADS = 8
# Less is not worth a thread.
_BYTES_OF_A_THREAD = 64 * 2**20

Slices = tuple[slice, ...]


@dataclass(frozen=True)
class Piece:
    """Some rows of a tensor that are to be read.

    Attributes:
        target: memory for them, on any device.
        read: gives their numbers on the CPU, mapped or not; called by the thread that copies them.
    """

    target: torch.Tensor
    read: Callable[[], torch.Tensor]


def pieces_of(
    target: torch.Tensor,
    own: Slices,
    reader: Callable[[], Callable[[Slices], torch.Tensor]],
) -> Iterator[Piece]:
    """A tensor in pieces of whole rows.

    Args:
        target: memory for it, not sharded.
        own: which part of the stored tensor it is, a slice with a begin and an end for each
            dimension, one at least.
        reader: gives what reads parts of the stored tensor, to the thread that reads.
    """
    first, others = own[0], own[1:]
    row = max(1, target.itemsize * prod(target.shape[1:]))
    step = max(1, PIECE_BYTES // row)
    for begin in range(0, target.shape[0], step):
        end = min(begin + step, target.shape[0])
        rows = slice(first.start + begin, first.start + end)

        def read(part: Slices = (rows, *others)) -> torch.Tensor:
            return reader()(part)

        yield Piece(target[begin:end], read)


def read_pieces(pieces: Sequence[Piece], *, ranks_here: int) -> None:
    """Copy all of them. What one raises, this raises, once no thread copies any more.

    Args:
        pieces: in the order of their files.
        ranks_here: processes of this host that do the same.
    """
    threads = _threads(sum(piece.target.nbytes for piece in pieces), ranks_here=ranks_here)
    copy = _Copy()
    if threads == 1:
        for piece in pieces:
            copy(piece)
        return
    pool = ThreadPoolExecutor(threads, thread_name_prefix="weights")
    try:
        for _ in pool.map(copy, pieces):
            pass
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _threads(size: int, *, ranks_here: int) -> int:
    # torch copies with its own threads on a CPU, where it has been given several.
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    own = (cores or 1) // max(1, ranks_here) // torch.get_num_threads()
    return max(1, min(_MOST_THREADS, own, size // _BYTES_OF_A_THREAD))


class _Copy(threading.local):
    """Copies a piece; each thread has a page-locked buffer of its own, once it needs one."""

    buffer: torch.Tensor | None = None

    def __call__(self, piece: Piece) -> None:
        numbers = piece.read()
        if piece.target.device.type == "cuda" and numbers.nbytes <= 2 * PIECE_BYTES:
            self._through_buffer(piece.target, numbers)
        else:
            piece.target.copy_(numbers)

    def _through_buffer(self, target: torch.Tensor, numbers: torch.Tensor) -> None:
        if self.buffer is None:  # numbers may be twice as wide in the files
            self.buffer = torch.empty(2 * PIECE_BYTES, dtype=torch.uint8, pin_memory=True)
        staged = self.buffer[: numbers.nbytes].view(numbers.dtype).view(numbers.shape)
        staged.copy_(numbers)
        with torch.cuda.device(target.device):
            target.copy_(staged, non_blocking=True)
            fetched = torch.cuda.Event()
            fetched.record()
            fetched.synchronize()
