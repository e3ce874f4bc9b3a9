"""Whether the ranks still hold the same adapter, by one small all-gather.

Each rank sums the bits of every parameter as integers, on its device. Sums of integers do not
depend on the order, and ranks that did the same steps hold the same bits.
"""

from __future__ import annotations

from collections import Counter

import torch

from lora_fsdp.adapter.adapter_set import AdapterSet
from lora_fsdp.errors import RankDriftError
from lora_fsdp.ranks import gather_tensors, has_others


def check_no_drift(adapters: AdapterSet, *, step: int, last_equal: int | None) -> None:
    """Compare the adapter across ranks. Waits for the device; a collective call.

    Args:
        adapters: this rank's.
        step: optimizer steps made, for the message.
        last_equal: after which step the ranks were last found equal.

    Raises:
        RankDriftError: on every rank; names the ranks that differ and a parameter.
    """
    if not has_others():
        return
    everyone = gather_tensors(adapters.checksums())
    sums = [tuple(values) for values in torch.stack(everyone).tolist()]
    if len(set(sums)) == 1:
        return
    usual = Counter(sums).most_common(1)[0][0]
    others = [rank for rank, values in enumerate(sums) if values != usual]
    place = next(i for i, values in enumerate(zip(*sums, strict=True)) if len(set(values)) > 1)
    alike = [rank for rank, values in enumerate(sums) if values == usual]
    who = f"{_ranks(others)} {'differ' if len(others) > 1 else 'differs'} from {_ranks(alike)}"
    since = "" if last_equal is None else f", and was equal after step {last_equal}"
    raise RankDriftError(
        f"After step {step} the adapter is not the same on every rank{since}: {who}, first in "
        f"{list(adapters.parameters)[place]}. Something changed it on one rank only (a callback, "
        "a faulty GPU): remove it, then continue with --resume_from_checkpoint true."
    )


def _ranks(ranks: list[int]) -> str:
    return f"{'rank' if len(ranks) == 1 else 'ranks'} {', '.join(map(str, ranks))}"
