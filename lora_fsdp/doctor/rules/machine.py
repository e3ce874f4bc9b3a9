"""Rules over the machine and what is installed on it."""

from __future__ import annotations

import time
import tomllib
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path

import torch
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from lora_fsdp.base.loading import resolve_dtype
from lora_fsdp.doctor.case import Case
from lora_fsdp.doctor.finding import Problem, Rules

_PACKAGE = "lora-fsdp"
_PYTHON = SpecifierSet(">=3.11")
_MEBIBYTE = 2**20
# Docker gives 64 MB; NCCL takes some ten for every pair of GPUs that shares memory this way.
_LEAST_SHARED = 512 * _MEBIBYTE
_BFLOAT16_FROM = (8, 0)
_FIRST_YEAR = 2025
_CLOCK_SLACK = 3600.0


RULES = Rules()


def requirements() -> list[Requirement]:
    """What this package needs, as `pyproject.toml` says it."""
    # Of a checkout its own file: another version may be installed beside it.
    project = Path(__file__).resolve().parents[3] / "pyproject.toml"
    if project.is_file():
        written = tomllib.loads(project.read_text(encoding="utf-8"))["project"]["dependencies"]
    else:
        try:
            written = requires(_PACKAGE) or []
        except PackageNotFoundError:  # copied rather than installed
            written = []
    found = map(Requirement, dict.fromkeys(written))
    return [one for one in found if one.marker is None or one.marker.evaluate({"extra": ""})]


@RULES.error(
    "versions",
    "Python or a package is missing, or in a version that is not supported.",
    "Install the version that is named.",
)
def _versions(case: Case) -> Iterator[Problem]:
    if not _PYTHON.contains(case.machine.python, prereleases=True):
        yield Problem(f"Python {case.machine.python} is not {_PYTHON}.", "Use a newer Python.")
    for needed in requirements():
        installed = case.machine.packages.get(needed.name.lower().replace("_", "-"))
        installed = installed or case.machine.packages.get(needed.name.lower())
        wanted = f"{needed.name}{needed.specifier}"
        if installed is None:
            yield Problem(f"{needed.name} is not installed.", f"pip install '{wanted}'")
        elif not needed.specifier.contains(installed, prereleases=True):
            yield Problem(
                f"{needed.name} {installed} is installed, and {needed.specifier} is supported.",
                f"pip install '{wanted}'",
            )


@RULES.warning(
    "bfloat16",
    "The base is in bfloat16, and a GPU is older than Ampere (compute capability 8.0).",
    "Set --dtype float32, or use a newer GPU.",
)
def _bfloat16(case: Case) -> Iterator[Problem]:
    if not case.gpus_used:
        return
    dtype = resolve_dtype(case.model_args.dtype, device=case.device)
    old = [gpu.name for gpu in case.machine.gpus if gpu.capability < _BFLOAT16_FROM]
    if old and dtype == torch.bfloat16:
        yield Problem(
            f"{old[0]} has no bfloat16 arithmetic: it is emulated there, many times slower, or "
            "fails."
        )


@RULES.warning(
    "no-peer-access",
    "GPUs that do not reach each other's memory (RTX 4090 and other consumer boards).",
    "Set NCCL_P2P_DISABLE=1; where the base fits one GPU, accelerate_configs/ddp.yaml is faster.",
)
def _peer_access(case: Case) -> Iterator[Problem]:
    launch, machine = case.launch.value, case.machine
    several = case.gpus_used and min(launch.processes_here, len(machine.gpus)) > 1
    if several and not machine.peer_access and not _peers_are_off(case):
        yield Problem(
            f"The GPUs ({machine.gpus[0].name}) do not reach each other's memory: what the ranks "
            "exchange goes through host memory, and NCCL may hang where it expects otherwise."
        )


def _peers_are_off(case: Case) -> bool:
    return case.launch.value.environment.get("NCCL_P2P_DISABLE", "0") == "1"


@RULES.error(
    "driver",
    "There are NVIDIA GPUs that torch cannot use: built for CPUs or for a newer CUDA.",
    "Install a torch built for this driver's CUDA (https://pytorch.org).",
)
def _driver(case: Case) -> Iterator[Problem]:
    machine = case.machine
    if machine.driver_gpus == 0:
        return
    if machine.torch_cuda is None:
        yield Problem(
            f"This machine has {machine.driver_gpus} NVIDIA GPU(s), and torch was built for CPUs."
        )
    elif machine.driver_cuda and machine.driver_cuda[0] < int(machine.torch_cuda.split(".")[0]):
        newest = ".".join(map(str, machine.driver_cuda))
        yield Problem(
            f"The NVIDIA driver runs CUDA up to {newest}, and torch was built for CUDA "
            f"{machine.torch_cuda}.",
            "Update the driver, or install a torch built for an older CUDA.",
        )
    elif not machine.gpus and not case.launch.value.use_cpu:
        yield Problem(
            f"The NVIDIA driver shows {machine.driver_gpus} GPU(s), and torch can use none.",
            "Check CUDA_VISIBLE_DEVICES, and that driver and torch fit each other (nvidia-smi).",
        )


@RULES.warning(
    "clock",
    f"The clock is before {_FIRST_YEAR}, or files of the run are from its future.",
    "Set the clock: certificates, file times and run records depend on it.",
)
def _clock(case: Case) -> Iterator[Problem]:
    clock = case.machine.clock
    if (year := time.gmtime(clock).tm_year) < _FIRST_YEAR:
        yield Problem(f"The system's clock says {year}.")
        return
    named = [case.accelerate_config, case.data_args.data_file, case.model_args.model_name_or_path]
    files = [Path(name) for name in named if name]
    ahead = {file: file.stat().st_mtime - clock for file in files if file.exists()}
    if ahead and max(ahead.values()) > _CLOCK_SLACK:
        file = max(ahead, key=lambda one: ahead[one])
        hours = ahead[file] / 3600
        yield Problem(f"{file} was written {hours:.0f} hours ahead of the system's clock.")


@RULES.warning(
    "shared-memory",
    "Less than 512 MiB of /dev/shm and several GPUs.",
    "Start the container with --shm-size=1g or --ipc=host.",
)
def _shared_memory(case: Case) -> Iterator[Problem]:
    size = case.machine.shared_memory
    several = case.gpus_used and case.launch.value.processes_here > 1
    if several and size is not None and size < _LEAST_SHARED:
        yield Problem(
            f"/dev/shm has {size // _MEBIBYTE} MiB: NCCL may fail there with several GPUs."
        )
