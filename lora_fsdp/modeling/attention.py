"""The block mask of a packed row: who may attend to whom."""

from __future__ import annotations

import torch

from lora_fsdp.data.packing import SHARED, Row


def avoid_kernels_planned_by_shape() -> None:
    """Keep SDPA from cuDNN's attention, which plans a kernel for every new row length.

    Packed rows have a new length at nearly every step, and planning takes longer than computing:
    without it the shape of a 7B on an H100 trains at 50.8 examples/s instead of 31.8 (8 a step,
    `tests/gpu`).
    """
    torch.backends.cuda.enable_cudnn_sdp(False)


def block_mask(row: Row, *, dtype: torch.dtype) -> torch.Tensor:
    """Additive attention mask of a packed row, [1, 1, T, T], 0 where allowed and -inf elsewhere.

    A token sees itself and what comes before it in the row, if that is the shared prefix, its own
    example's prompt, or its own answer. transformers hands a 4-D mask to SDPA and eager attention
    as it is (`masking_utils`), which is what makes packing work without a kernel of our own.
    """
    example, answer = row.example_ids, row.answer_ids
    index = torch.arange(len(row), device=example.device)
    same_example = example[:, None] == example[None, :]
    same_path = (answer[None, :] == 0) | (answer[:, None] == answer[None, :])
    allowed = (example[None, :] == SHARED) | (same_example & same_path)
    allowed &= index[:, None] >= index[None, :]
    mask = torch.zeros(allowed.shape, dtype=dtype, device=example.device)
    return mask.masked_fill_(~allowed, float("-inf"))[None, None]
