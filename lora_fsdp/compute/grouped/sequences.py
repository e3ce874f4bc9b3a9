"""Packed sequences of one padded size, one after the other, in memory that stays where it is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch

from lora_fsdp.compute.attention import Window, dense_masks
from lora_fsdp.compute.captured_sizes import padded_labels, padded_tokens
from lora_fsdp.compute.grouped.layers import Rows
from lora_fsdp.data.packing import PackedSequence, empty_sequence

# Rows are a multiple of so many: few sizes, and little that only fills up.
_ROWS = 128


class StackedSize(NamedTuple):
    """What sequences of one size have.

    Attributes:
        tokens, labels: of each one.
        rows: of all together without what fills them up (`Rows`); 0 = it is not left out.
    """

    tokens: int
    labels: int
    rows: int


def size_of_all(sequences: Sequence[PackedSequence | None], *, with_rows: bool) -> StackedSize:
    """The least that all of them can be padded to, by a token each at least."""
    sizes = [(empty_sequence() if one is None else one).size for one in sequences]
    tokens = padded_tokens(max(size.tokens for size in sizes) + 1)
    rows = -(-sum(size.tokens + 1 for size in sizes) // _ROWS) * _ROWS
    saves = with_rows and rows < tokens * len(sizes)
    labels = padded_labels(max(size.labels for size in sizes))
    return StackedSize(tokens, labels, rows if saves else 0)


class StackedSequences:
    """Memory for so many sequences of one size.

    Attributes:
        count: sequences.
        size: each one's.
        whole: all of them as one. Label positions count from its beginning.
        parts: each of them, a view; their label positions are those of the whole.
        rows: where their tokens are without what fills up; `None` = it is not left out.
    """

    def __init__(self, count: int, size: StackedSize, *, device: torch.device) -> None:
        self.count, self.size = count, size
        nothing: list[PackedSequence | None] = [None] * count
        self.whole = self._joined(nothing).to(device)
        self.parts = [self._part(place) for place in range(count)]
        self._index = self._rows(nothing).to(device)
        self.rows = (
            Rows(*self._index.split([size.rows, count * size.tokens])) if size.rows else None
        )

    def load(self, sequences: Sequence[PackedSequence | None]) -> None:
        """Put these there, on the CPU, each padded; `None` = nothing but padding."""
        whole = self._joined(sequences)
        on_gpu = self.whole.tokens.is_cuda
        self.whole.copy_(whole.pin_memory() if on_gpu else whole)
        if self.rows is not None:
            index = self._rows(sequences)
            self._index.copy_(index.pin_memory() if on_gpu else index, non_blocking=True)

    def masks(
        self, *, dtype: torch.dtype, windows: Mapping[str, Window | None]
    ) -> torch.Tensor | dict[str, torch.Tensor]:
        """Each one's mask, [count, 1, T, T]: of all layers, or for each kind of layer."""
        example, answer, positions = (
            row.view(self.count, -1)
            for row in (self.whole.example_ids, self.whole.answer_ids, self.whole.position_ids)
        )
        made = {
            kind: dense_masks(example, answer, positions, dtype=dtype, window=window)
            for kind, window in (windows or {"": None}).items()
        }
        return made if len(made) > 1 else next(iter(made.values()))

    def _joined(self, sequences: Sequence[PackedSequence | None]) -> PackedSequence:
        size = {"tokens": self.size.tokens, "labels": self.size.labels}
        padded = [(empty_sequence() if one is None else one).padded(**size) for one in sequences]
        labels = torch.stack([one.labels for one in padded])
        labels[:, 0] += torch.arange(len(padded))[:, None] * self.size.tokens
        return replace(
            padded[0],
            tokens=torch.cat([one.tokens for one in padded], 1),
            labels=labels.transpose(0, 1).flatten(1),
            answer_examples=torch.cat([one.answer_examples for one in padded]),
            answer_targets=torch.cat([one.answer_targets for one in padded]),
            is_one_sequence=False,
            segments=(),
        )

    def _rows(self, sequences: Sequence[PackedSequence | None]) -> torch.Tensor:
        """`Rows.kept` and `Rows.places`, one after the other."""
        lengths = [len(empty_sequence() if one is None else one) for one in sequences]
        kept, places, start = [], [], 0
        for part, length in enumerate(lengths):
            kept.append(torch.arange(length + 1) + part * self.size.tokens)
            places.append(torch.arange(self.size.tokens).clamp(max=length) + start)
            start += length + 1
        more = torch.full((max(0, self.size.rows - start),), lengths[0])
        return torch.cat([*kept, more, *places])

    def _part(self, place: int) -> PackedSequence:
        tokens, labels = (
            slice(place * one, (place + 1) * one) for one in (self.size.tokens, self.size.labels)
        )
        return replace(
            self.whole,
            tokens=self.whole.tokens[:, tokens],
            labels=self.whole.labels[:, labels],
            answer_examples=self.whole.answer_examples[labels],
            answer_targets=self.whole.answer_targets[labels],
        )
