"""Whether this machine's NCCL can gather within a CUDA graph, found out by doing it."""

from __future__ import annotations

import torch
import torch.distributed as dist

from lora_fsdp.ranks import from_every_rank, has_others, rank, world_size

_ELEMENTS = 1 << 20
_REPLAYS = 3


def why_gathers_not_captured(device: torch.device) -> str | None:
    """Why no CUDA graph holds a gather over all ranks, in words; `None` = one did, on every rank.

    A collective call, on GPUs. Replays a small gather with new numbers each time and looks at what
    arrives.
    """
    if not has_others():
        return None  # FSDP2 copies then
    if "nccl" not in dist.get_backend():
        return f"{dist.get_backend()} gathers outside CUDA graphs"
    reasons = [reason for reason in from_every_rank(_try_on_this_rank(device)) if reason]
    return reasons[0] if reasons else None


def _try_on_this_rank(device: torch.device) -> str | None:
    ranks = world_size()
    shard = torch.zeros(_ELEMENTS, dtype=torch.int32, device=device)
    whole = torch.zeros(ranks * _ELEMENTS, dtype=torch.int32, device=device)
    dist.all_gather_into_tensor(whole, shard)  # connects the ranks before the capture
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream(device)
    failure = None
    try:
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            dist.all_gather_into_tensor(whole, shard)
    except RuntimeError as error:
        failure = f"a gather cannot be captured here: {str(error).splitlines()[0]}"
    # A rank that replays waits for the others.
    if any(from_every_rank(failure)):
        return failure
    for replay in range(_REPLAYS):
        shard.fill_(_REPLAYS * rank() + replay)
        graph.replay()
        sent = _REPLAYS * torch.arange(ranks, dtype=torch.int32, device=device) + replay
        if not torch.equal(whole, sent.repeat_interleave(_ELEMENTS)):
            failure = failure or "a captured gather gave other numbers than were sent"
    return failure
