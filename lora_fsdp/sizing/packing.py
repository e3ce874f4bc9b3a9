"""Whether examples share sequences, measured on the live model."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from lora_fsdp.compute.packed_model import PackedModel
from lora_fsdp.compute.packing_check import check_packing, why_not_batched, why_not_packed
from lora_fsdp.data.packing import Tree
from lora_fsdp.placement.packing import PackingChoice, after_live_check
from lora_fsdp.ranks import on_first_rank


def checked_packing(
    packed: PackedModel,
    choice: PackingChoice,
    *,
    asked: str = "auto",
    device: torch.device,
    sample: Sequence[Tree] = (),
) -> PackingChoice:
    """The choice once the model was asked, which is also told to it. A collective call.

    Every rank goes by what the first one found: where ranks round differently, they must not
    choose differently.

    Args:
        packed: the model, where it stays.
        choice: of before.
        asked: `auto`, `always` or `never`.
        device: where sequences are computed.
        sample: examples that fill a packed sequence as the run's will be filled.

    Raises:
        UnsupportedModelError: packing was asked for, and changes what the model computes; or that
            is not finite.
    """
    not_packed = not_batched = None
    if not choice.packing.is_apart:
        if asked == "always":
            check_packing(packed, device=device, sample=sample)
        else:
            found = why_not_packed(packed, device=device, sample=sample)
            not_packed = on_first_rank(lambda: found)
    if choice.packing.is_apart or not_packed is not None:
        packed.undo()  # fused layers compute nothing without a mask
        filled = why_not_batched(packed, device=device, sample=sample)
        not_batched = on_first_rank(lambda: filled)
    choice = after_live_check(choice, why_not_packed=not_packed, why_not_batched=not_batched)
    packed.packing = choice.packing
    return choice
