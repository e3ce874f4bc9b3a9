"""The machine that a run is to start on, as far as rules ask for it."""

from __future__ import annotations

import os
import platform
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import distributions
from pathlib import Path

import psutil
import torch

_SHARED_MEMORY = Path("/dev/shm")
_CGROUP = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class MachineGpu:
    """A GPU.

    Attributes:
        name: as its driver says it.
        memory, free: bytes.
        capability: its CUDA compute capability.
    """

    name: str
    memory: int
    free: int
    capability: tuple[int, int]


@dataclass(frozen=True)
class Machine:
    """The machine.

    Attributes:
        gpus: those that torch can use.
        peer_access: whether every GPU reaches the memory of every other one.
        driver_gpus: GPUs that the NVIDIA driver shows, whether torch can use them or not.
        driver_cuda: newest CUDA version that the driver can run; `None` = no driver.
        torch_cuda: CUDA version that torch was built for; `None` = a build for CPUs.
        host_memory: bytes that can be allocated now, within the limit of the container.
        disk_free: bytes on the disk of the output folder.
        shared_memory: bytes of /dev/shm; `None` = there is none.
        clock: seconds since 1970.
        python: its version.
        packages: version by name (in lower case) of what is installed.
    """

    gpus: tuple[MachineGpu, ...]
    peer_access: bool
    driver_gpus: int
    driver_cuda: tuple[int, int] | None
    torch_cuda: str | None
    host_memory: int
    disk_free: int
    shared_memory: int | None
    clock: float
    python: str
    packages: Mapping[str, str] = field(repr=False)

    @classmethod
    def here(cls, *, output_dir: Path) -> Machine:
        """This machine; no GPU memory is allocated but the CUDA context's."""
        driver_gpus, driver_cuda = _driver()
        return cls(
            gpus=tuple(map(_gpu, range(torch.cuda.device_count()))),
            peer_access=_peer_access(),
            driver_gpus=driver_gpus,
            driver_cuda=driver_cuda,
            torch_cuda=torch.version.cuda,
            host_memory=_host_memory(),
            disk_free=shutil.disk_usage(existing_parent(output_dir)).free,
            shared_memory=_shared_memory(),
            clock=time.time(),
            python=platform.python_version(),
            packages=installed_packages(),
        )


def existing_parent(folder: Path) -> Path:
    """The folder, or the nearest one above it that exists."""
    folder = folder.absolute()
    return next(place for place in (folder, *folder.parents) if place.is_dir())


def installed_packages() -> dict[str, str]:
    """Version by name, in lower case, of every installed package."""
    found: dict[str, str] = {}
    for one in distributions():
        if one.name:  # what is left of a broken installation has none
            found.setdefault(one.name.lower(), one.version)
    return found


def _gpu(index: int) -> MachineGpu:
    properties = torch.cuda.get_device_properties(index)
    free, total = torch.cuda.mem_get_info(index)
    return MachineGpu(properties.name, total, free, (properties.major, properties.minor))


def _peer_access() -> bool:
    count = torch.cuda.device_count()
    pairs = [(a, b) for a in range(count) for b in range(count) if a != b]
    return all(torch.cuda.can_device_access_peer(a, b) for a, b in pairs)


def _driver() -> tuple[int, tuple[int, int] | None]:
    """Number of GPUs and CUDA version, as the NVIDIA driver says them."""
    try:
        import pynvml
    except ImportError:
        return torch.cuda.device_count(), None
    try:
        pynvml.nvmlInit()
        version = pynvml.nvmlSystemGetCudaDriverVersion_v2()
        return pynvml.nvmlDeviceGetCount(), (version // 1000, version % 1000 // 10)
    except pynvml.NVMLError:  # no driver
        return 0, None


def _host_memory() -> int:
    """What the system can give; a container's own limit is not in the system's figure."""
    available = int(psutil.virtual_memory().available)
    try:
        limit = (_CGROUP / "memory.max").read_text().strip()
        used = int((_CGROUP / "memory.current").read_text())
    except (OSError, ValueError):
        return available
    return available if limit == "max" else min(available, max(int(limit) - used, 0))


def _shared_memory() -> int | None:
    if not os.access(_SHARED_MEMORY, os.W_OK):
        return None
    return shutil.disk_usage(_SHARED_MEMORY).total
