"""What placement knows of the processes and GPUs that a run has."""

from __future__ import annotations

from dataclasses import dataclass

from lora_fsdp.placement.gpus import Gpu

#: Of a GPU's memory, what a run may plan with: the allocator cannot fill every gap.
USABLE = 0.97
#: Bytes that the CUDA context and the libraries' kernels take, outside torch's allocator.
CONTEXT = 600_000_000


@dataclass(frozen=True)
class Hardware:
    """Where a run computes: as a data sheet says, or as it was measured.

    Attributes:
        ranks: processes, with a GPU each if there are GPUs.
        hosts: machines that they are on, evenly.
        has_gpu: whether they compute on GPUs.
        free: bytes that torch's allocator can have on the rank that has the least; `None` = no
            memory is planned with, as on a CPU.
        why_gathers_not_captured: why a CUDA graph cannot hold a gather here; `None` = it can, or it
            was not tried.
    """

    ranks: int
    has_gpu: bool
    free: int | None
    why_gathers_not_captured: str | None = None
    hosts: int = 1

    @classmethod
    def of(cls, gpu: Gpu, count: int, *, hosts: int = 1) -> Hardware:
        """`count` GPUs of a kind with nothing else on them, one rank each, on so many machines."""
        return cls(ranks=count, has_gpu=True, free=usable_memory(gpu.memory), hosts=hosts)

    @classmethod
    def without_gpu(cls, ranks: int, *, hosts: int = 1) -> Hardware:
        """So many processes on CPUs."""
        return cls(ranks=ranks, has_gpu=False, free=None, hosts=hosts)


def usable_memory(memory: int) -> int:
    """Of a GPU with `memory` bytes, those that torch's allocator can have."""
    return int(memory * USABLE) - CONTEXT
