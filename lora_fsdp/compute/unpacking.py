"""When packed weights are turned back into numbers: where a matmul needs them, or ahead of it.

Unpacking is bound by memory and takes few registers. Matmuls are bound by arithmetic and leave some
multiprocessors free; norms, rotations and attention between them leave most. So the next matmul's
weights are unpacked on a stream of their own while the present one's are used.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from itertools import pairwise

import torch

from lora_fsdp.base.quantized_layers import QuantizedLayer

#: Layers at the end of the decoder where two blocks must not take more memory than the largest one
#: does: the activations of later layers, which are still to come there, make up for it elsewhere.
_NARROW_LAYERS = 3


@dataclass(eq=False)
class QuantizedBlock:
    """Layers whose weights are unpacked together, one below the other, for one matmul."""

    layers: Sequence[QuantizedLayer]

    @property
    def bytes_unpacked(self) -> int:
        """What `unpack` takes."""
        numbers = sum(layer.out_features * layer.in_features for layer in self.layers)
        return numbers * self.layers[0].compute_dtype.itemsize

    def empty(self) -> torch.Tensor:
        """Room for the numbers: [sum of out_features, in_features]."""
        first = self.layers[0]
        return torch.empty(
            sum(layer.out_features for layer in self.layers),
            first.in_features,
            dtype=first.compute_dtype,
            device=first.weight.device,
        )

    def unpack(self, out: torch.Tensor | None = None) -> torch.Tensor:
        """The numbers, in `out` or in memory of their own."""
        return self.layers[0].unpack_all(self.layers, self.empty() if out is None else out)


class UnpackAtUse:
    """Unpacks a block where it is used."""

    def in_forward(self, block: QuantizedBlock, *, has_backward: bool) -> torch.Tensor:
        """The numbers for a matmul; `has_backward`: its backward will need them again."""
        return block.unpack()

    def in_backward(self, block: QuantizedBlock) -> torch.Tensor:
        """The numbers for a matmul's gradient."""
        return block.unpack()


class UnpackAhead(UnpackAtUse):
    """Unpacks a block while the one before it is used. For unsharded weights; faster on a GPU.

    What comes next is a guess, from the layers' order: where another block is asked for, that one
    is unpacked at once.

    Args:
        layers: the blocks of every decoder layer, in the order of their use.
        recomputed: backward computes each layer's forward again.
    """

    def __init__(self, layers: Sequence[Sequence[QuantizedBlock]], *, recomputed: bool) -> None:
        # Where a layer is recomputed, what comes after its last matmul is not always the same.
        chains = layers if recomputed else [[block for layer in layers for block in layer]]
        self._following = {now: then for chain in chains for now, then in pairwise(chain)}
        self._preceding = {
            now: then
            for chain in chains
            for then, now in pairwise(chain[:-1] if recomputed else chain)
        }
        self._first = layers[0][0]
        # Where layers are recomputed, there are no activations to come.
        narrow = layers if recomputed else layers[-_NARROW_LAYERS:]
        self._narrow = {block for layer in narrow for block in layer}
        self._largest = max(block.bytes_unpacked for layer in layers for block in layer)
        self._has_backward: set[QuantizedBlock] = set()
        self._begun: tuple[QuantizedBlock, torch.Tensor] | None = None

    def in_forward(self, block: QuantizedBlock, *, has_backward: bool) -> torch.Tensor:
        """The numbers for a matmul; `has_backward`: its backward will need them again."""
        if block is self._first:
            self._drop()  # what a computation that was broken off had begun
        if has_backward:
            self._has_backward.add(block)
        else:
            self._has_backward.discard(block)
        # A forward without backward keeps no activations that could make up for a second block.
        return self._take(block, self._following.get(block), is_wide=has_backward)

    def in_backward(self, block: QuantizedBlock) -> torch.Tensor:
        """The numbers for a matmul's gradient."""
        then = self._preceding.get(block)
        return self._take(block, then if then in self._has_backward else None, is_wide=True)

    def _take(
        self, block: QuantizedBlock, then: QuantizedBlock | None, *, is_wide: bool
    ) -> torch.Tensor:
        begun = self._drop()
        numbers = begun[1] if begun is not None and begun[0] is block else block.unpack()
        if then is not None and self._has_room(block, then, is_wide=is_wide):
            # In memory of the computing stream, which waits before it uses or frees it.
            self._begun = (then, then.empty())
            with _beside_computation(numbers.device):
                then.unpack(self._begun[1])
        return numbers

    def _drop(self) -> tuple[QuantizedBlock, torch.Tensor] | None:
        """What was begun, finished; asked for or not, it must not be freed before."""
        begun, self._begun = self._begun, None
        if begun is not None:
            _wait_for_unpacking(begun[1].device)
        return begun

    def _has_room(self, now: QuantizedBlock, then: QuantizedBlock, *, is_wide: bool) -> bool:
        if is_wide and not {now, then} & self._narrow:
            return True
        return now.bytes_unpacked + then.bytes_unpacked <= self._largest


@contextmanager
def _beside_computation(device: torch.device) -> Iterator[None]:
    """After what was launched so far, and beside what follows; on a CPU in turn."""
    if device.type != "cuda":
        yield
        return
    stream = _stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        yield


def _wait_for_unpacking(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.current_stream(device).wait_stream(_stream(device))


@cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    """Of the lowest priority: matmuls, where they are captured with a higher one, go first."""
    return torch.cuda.Stream(device)
