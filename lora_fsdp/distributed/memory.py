"""Bytes a run needs on a device besides the base, and the row length they allow."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

#: Rows longer than this gain nothing: the matrix products are as fast as they get.
LONGEST_ROW = 8192
#: Rows at least this long where no memory is known, or where little is free.
USUAL_ROW = 2048
#: CUDA context, libraries' workspaces, allocator slack.
OVERHEAD = 2_000_000_000


@dataclass(frozen=True)
class RowMemory:
    """What a packed row costs.

    Attributes:
        bytes_per_token: activations that forward keeps for backward.
        adapter_bytes: adapter, gradients and AdamW's two moments, float32.
    """

    bytes_per_token: int
    adapter_bytes: int

    def besides(self, tokens: int) -> int:
        """Bytes that training with rows of `tokens` tokens needs besides the base."""
        return self.adapter_bytes + self.bytes_per_token * tokens + OVERHEAD


def row_memory(
    base: PreTrainedModel, *, adapter_parameters: int, fused: bool, checkpointing: bool
) -> RowMemory:
    """Estimate a row's cost from the model's shape.

    Counted in activations of the hidden size H and the MLP's size I that a layer keeps: fused, the
    two residuals, the normed input, joined and rotated projections, attention's output, and gate
    and up (about 9 H + 2 I, and I more if the MLP is adapted); by transformers' and PEFT's modules
    about 16 H + 5 I; with checkpointing, H a layer and one layer whole.
    """
    config = base.config.get_text_config()
    hidden, inner = config.hidden_size, getattr(config, "intermediate_size", 4 * config.hidden_size)
    size = torch.finfo(base.dtype).bits // 8
    layer = (9 * hidden + 3 * inner if fused else 16 * hidden + 5 * inner) * size
    layers = config.num_hidden_layers
    kept = hidden * size * layers + layer if checkpointing else layer * layers
    return RowMemory(bytes_per_token=kept, adapter_bytes=16 * adapter_parameters)


def longest_row(memory: RowMemory, *, free: int | None, longest_example: int) -> int:
    """Row length in tokens that fits half of `free` bytes; `None` = unknown (a CPU)."""
    if free is None:
        return max(USUAL_ROW, longest_example)
    fits = (free - memory.adapter_bytes - OVERHEAD) // (2 * memory.bytes_per_token)
    return max(longest_example, min(LONGEST_ROW, max(USUAL_ROW, fits)))
