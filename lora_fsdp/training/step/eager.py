"""Forward and backward of one optimizer step's packed sequences, launched kernel by kernel."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

import torch
from torch import nn

from lora_fsdp.adapter.adapter_set import AdapterSet
from lora_fsdp.compute.label_head import RowComputation, label_log_probs
from lora_fsdp.data.packing import PADDING, PackedSequence, SequenceSize


class EagerStep:
    """Computes rows as they are.

    Args:
        model: the model with its adapter.
        computation: how it computes rows.
        adapter: where the gradients go.
        device: where rows are computed.
        autocast: the context of the forward.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        computation: RowComputation,
        adapter: AdapterSet,
        device: torch.device,
        autocast: Callable[[], AbstractContextManager[object]],
    ) -> None:
        self.model = model
        self.computation = computation
        self.adapter = adapter
        self.device = device
        self.autocast = autocast

    def __call__(
        self,
        rows: Sequence[PackedSequence],
        *,
        label_tokens: int,
        sizes_of_ranks: Sequence[Sequence[SequenceSize]] | None = None,
    ) -> torch.Tensor:
        """Gradients of the rows' loss, divided by `label_tokens`, into the adapter's block.

        Args:
            rows: this rank's; as many on every rank where the base is sharded.
            label_tokens: of the step, over all ranks.
            sizes_of_ranks: for each of `rows`, the size that its like has on every rank; `None` =
                there is one rank.

        Returns:
            this rank's part of the loss.
        """
        self.adapter.zero_gradients()
        total = torch.zeros((), device=self.device)
        for row, sizes in zip(rows, sizes_of_ranks or [[row.size] for row in rows], strict=True):
            total += self.run(row, label_tokens=label_tokens, sizes_of_ranks=sizes)
        return total

    def run(
        self, row: PackedSequence, *, label_tokens: int, sizes_of_ranks: Sequence[SequenceSize]
    ) -> torch.Tensor:
        """Add one row's gradients; its loss."""
        return self._forward_backward(
            row.to(self.device, non_blocking=True), scale=1.0 / label_tokens
        )

    def release(self) -> None:
        """Let go of what the next rows would make anew."""

    def _forward_backward(
        self, row: PackedSequence, *, scale: float | torch.Tensor
    ) -> torch.Tensor:
        with self.autocast():
            log_probs = label_log_probs(self.model, row, computation=self.computation)
        counted = row.label_answers != PADDING
        loss = -log_probs.where(counted, 0.0).sum() * scale
        loss.backward()
        return loss.detach()
