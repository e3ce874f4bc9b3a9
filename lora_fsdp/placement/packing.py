"""Whether examples share a sequence: many in one, or each alone in its own."""

from __future__ import annotations

from dataclasses import dataclass

from lora_fsdp.data.packing import Packing
from lora_fsdp.errors import ArgumentError


@dataclass(frozen=True)
class PackingChoice:
    """How examples are laid into sequences, and why not packed, in words; empty if they are."""

    packing: Packing
    reason: str = ""

    def __str__(self) -> str:
        alone = "one by one" if self.packing is Packing.SINGLE else "in right-padded batches"
        return f"one example a sequence, {alone} ({self.reason})"


def choose_packing(asked: str, *, why_apart: str | None) -> PackingChoice:
    """What is chosen before the model computes anything.

    Args:
        asked: `auto`, `always` or `never`.
        why_apart: why the architecture keeps no examples apart within a sequence; `None` = it does,
            as far as its settings tell.

    Raises:
        ArgumentError: packing was asked for, and cannot be.
    """
    if asked == "never":
        return PackingChoice(Packing.BATCHED, "--packing never")
    if why_apart is None:
        return PackingChoice(Packing.PACKED)
    if asked == "always":
        raise ArgumentError(
            f"--packing always: {why_apart}, and no mask can keep examples apart within a sequence "
            "then. Use --packing auto, which gives each example a sequence of its own."
        )
    return PackingChoice(Packing.BATCHED, why_apart)


def after_live_check(
    choice: PackingChoice, *, why_not_packed: str | None, why_not_batched: str | None
) -> PackingChoice:
    """What is chosen when the model itself was asked.

    Args:
        choice: of before.
        why_not_packed: what packed examples did to the model; `None` = nothing, or not asked.
        why_not_batched: what filling sequences up to one length did to it; `None` = nothing.
    """
    if not choice.packing.is_apart and why_not_packed is None:
        return choice
    reason = choice.reason or str(why_not_packed)
    if why_not_batched is not None:
        return PackingChoice(Packing.SINGLE, f"{reason}; {why_not_batched}")
    return PackingChoice(Packing.BATCHED, reason)
