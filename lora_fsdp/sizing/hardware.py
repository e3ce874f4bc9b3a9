"""What this run's processes and GPUs have, measured."""

from __future__ import annotations

import torch
from torch import nn

from lora_fsdp.placement.hardware import Hardware, usable_memory
from lora_fsdp.ranks import host_count, least_of_ranks, world_size


def hardware_here(device: torch.device, *, base: nn.Module) -> Hardware:
    """This run's; a collective call, the same answer on every rank.

    Args:
        device: where the run computes.
        base: whose weights may be on the device already: what they take is theirs to keep.
    """
    if device.type != "cuda":
        return Hardware.without_gpu(world_size(), hosts=host_count())
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(device)
    free += sum(p.nbytes for p in base.parameters() if p.device == device)
    # A process may be told to take a part of the GPU only.
    allowed = usable_memory(int(torch.cuda.get_per_process_memory_fraction(device) * total))
    return Hardware(
        ranks=world_size(),
        has_gpu=True,
        free=least_of_ranks(min(free, allowed), device=device),
        hosts=host_count(),
    )
