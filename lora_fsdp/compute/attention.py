"""Who attends to whom in a packed sequence, and the kernels that compute it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch.nn import functional
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from lora_fsdp.data.packing import SHARED, PackedSequence

#: From this length on a sequence's attention is computed by blocks instead of by one dense mask.
BLOCKS_FROM_TOKENS = 2048


def avoid_kernels_planned_by_shape() -> None:
    """Keep SDPA from cuDNN's attention, which plans a kernel for every new length.

    Packed sequences have a new length at nearly every step, and planning takes longer than
    computing: without it the shape of a 7B on an H100 trains at 50.8 examples/s instead of 31.8
    (8 a step, `tests/gpu`).
    """
    torch.backends.cuda.enable_cudnn_sdp(False)


@dataclass(frozen=True)
class Window:
    """What a layer's tokens see of the path to them.

    Attributes:
        size: the last so many tokens, each itself included.
        chunked: instead, those of its chunk of so many.
    """

    size: int
    chunked: bool = False

    def sees(self, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        """Whether tokens at positions `query` see those at `key`, which stand before them."""
        if self.chunked:
            return query // self.size == key // self.size
        return query - key < self.size


def sequence_mask(
    sequence: PackedSequence, *, dtype: torch.dtype, by_blocks: bool, window: Window | None = None
) -> torch.Tensor | BlockMask:
    """The sequence's mask, which transformers hands to its attention as it is (`masking_utils`).

    Args:
        sequence: the packed sequence.
        dtype: the dtype in which attention runs.
        by_blocks: whether the model's attention takes a `BlockMask` (`attend` does). Long sequences
            then skip what is masked; short ones have a dense mask all the same.
        window: of the layers that the mask is for; `None` = they see all that stands before.
    """
    if not by_blocks or len(sequence) < BLOCKS_FROM_TOKENS:
        return dense_mask(sequence, dtype=dtype, window=window)
    if sequence.is_one_sequence and window is None:
        return _block_mask(causal, len(sequence), sequence.example_ids.device)
    example, answer = sequence.example_ids, sequence.answer_ids
    positions = sequence.position_ids

    def on_path(
        batch: torch.Tensor, head: torch.Tensor, query: torch.Tensor, key: torch.Tensor
    ) -> torch.Tensor:
        same_path = (answer[key] == 0) | (answer[query] == answer[key])
        same_example = (example[query] == example[key]) & same_path
        seen = (query >= key) & ((example[key] == SHARED) | same_example)
        return seen if window is None else seen & window.sees(positions[query], positions[key])

    return _block_mask(on_path, len(sequence), sequence.example_ids.device)


def dense_mask(
    sequence: PackedSequence, *, dtype: torch.dtype, window: Window | None = None
) -> torch.Tensor:
    """Additive mask of a packed sequence, [1, 1, T, T], 0 where allowed and -inf elsewhere.

    A token sees itself and what comes before it in the sequence, if that is the shared prefix, its
    own example's prompt, or its own answer; and, where there is a window, what that lets it see of
    its path. transformers hands a 4-D mask to SDPA and eager attention as it is (`masking_utils`),
    which is what makes packing work without our own kernel.
    """
    parts = (sequence.example_ids, sequence.answer_ids, sequence.position_ids)
    return dense_masks(*(part[None] for part in parts), dtype=dtype, window=window)


def dense_masks(
    example: torch.Tensor,
    answer: torch.Tensor,
    positions: torch.Tensor,
    *,
    dtype: torch.dtype,
    window: Window | None = None,
) -> torch.Tensor:
    """`dense_mask` of N sequences of T tokens, of which each row is one, [N, 1, T, T]."""
    index = torch.arange(example.shape[1], device=example.device)
    same_example = example[:, :, None] == example[:, None, :]
    same_path = (answer[:, None, :] == 0) | (answer[:, :, None] == answer[:, None, :])
    allowed = (example[:, None, :] == SHARED) | (same_example & same_path)
    allowed &= index[:, None] >= index[None, :]
    if window is not None:
        allowed &= window.sees(positions[:, :, None], positions[:, None, :])
    mask = torch.zeros(allowed.shape, dtype=dtype, device=example.device)
    return mask.masked_fill_(~allowed, float("-inf"))[:, None]


def causal(
    batch: torch.Tensor, head: torch.Tensor, query: torch.Tensor, key: torch.Tensor
) -> torch.Tensor:
    """The mask of what is one sequence; `attend` knows it by its identity."""
    return query >= key


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | BlockMask,
    *,
    scaling: float,
) -> torch.Tensor:
    """Attention of a packed sequence: SDPA, or flex attention where the mask has blocks.

    Args:
        query: [1, query heads, T, D].
        key, value: [1, key heads, T, D].
        mask: of `sequence_mask`.
        scaling: of the scores.

    Returns:
        [1, query heads, T, D].
    """
    grouped = query.shape[1] != key.shape[1]
    if isinstance(mask, torch.Tensor):
        if grouped:  # with a mask, SDPA's fast kernels want a key for every query head
            repeats = query.shape[1] // key.shape[1]
            key, value = (part.repeat_interleave(repeats, dim=1) for part in (key, value))
        return functional.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, scale=scaling
        )
    if mask.mask_mod is causal:
        return functional.scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=scaling, enable_gqa=grouped
        )
    attention: Callable[..., torch.Tensor] = flex_attention
    if query.is_cuda:
        attention = _compiled_flex_attention()
    return attention(query, key, value, block_mask=mask, scale=scaling, enable_gqa=grouped)


def _block_mask(mask_mod: object, length: int, device: torch.device) -> BlockMask:
    return create_block_mask(mask_mod, None, None, length, length, device=device)  # type: ignore[arg-type]


@cache
def _compiled_flex_attention() -> Callable[..., torch.Tensor]:
    """Compiled once, for every length: uncompiled flex attention writes out all scores."""
    return torch.compile(flex_attention, dynamic=True)
