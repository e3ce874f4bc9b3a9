"""What `accelerate launch` makes of a YAML, worked out by accelerate itself; nothing is started."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import DistributedType, clear_environment
from accelerate.utils.launch import prepare_multi_gpu_env, prepare_simple_launcher_cmd_env

from lora_fsdp.distributed.launch import check_environment, check_mesh, processes_dropped
from lora_fsdp.errors import LaunchError

#: Values of `distributed_type` that this library trains under, and the others that accelerate has.
TYPES = {"NO", "FSDP", "MULTI_GPU", "MULTI_CPU"}
OTHER_TYPES = {kind.value for kind in DistributedType} - TYPES

#: What a YAML becomes in the environment of a process begins with these.
OF_YAML = ("FSDP_", "PARALLELISM_CONFIG_", "ACCELERATE_")
_OF_MESH = "parallelism_config_"
# Who has them is a rank of a launch, and would join the others.
_OF_RANKS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
# An AssertionError is how accelerate refuses an address that is missing.
_REFUSALS = (
    AssertionError, AttributeError, LookupError, OSError, RuntimeError, TypeError, ValueError,
)  # fmt: skip
_OF_MPI = ("PMI_", "OMPI_COMM_", "MV2_COMM_", "TORCHELASTIC_")


@dataclass(frozen=True)
class Launch:
    """The processes that a launch would start.

    Attributes:
        environment: what each would find in its environment, but for its rank.
        processes: their number, on all machines together.
        asked: how many were asked for.
        machines: how many machines.
        use_cpu: whether GPUs are left alone.
    """

    environment: Mapping[str, str]
    processes: int
    asked: int
    machines: int
    use_cpu: bool

    @property
    def settings(self) -> str:
        """What of the YAML must be the same on every machine, as text."""
        return str(sorted((k, v) for k, v in self.environment.items() if k.startswith(OF_YAML)))

    @property
    def processes_here(self) -> int:
        """Processes on each machine."""
        return max(1, self.processes // max(1, self.machines))


def read_launch_yaml(file: Path) -> dict[str, Any]:
    """The YAML as it is written.

    Raises:
        LaunchError: it is no YAML, or no mapping.
    """
    try:
        contents = yaml.safe_load(file.read_bytes())
    except (OSError, yaml.YAMLError, ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())[:300]
        raise LaunchError(f"The accelerate YAML {file} cannot be read: {reason}") from error
    if not isinstance(contents, dict):
        raise LaunchError(f"The accelerate YAML {file} must hold settings (key: value).")
    return contents


def launch_words(file: Path, *, processes: int | None, machines: int | None = None) -> list[str]:
    """The options that give `accelerate launch` a YAML with other numbers in it.

    A YAML that has a copy of the base for each machine has one for each of so many, too.
    """
    words = ["--config_file", str(file)]
    if processes is not None:
        words += ["--num_processes", str(processes)]
    if machines is not None:
        words += ["--num_machines", str(machines)]
    contents = read_launch_yaml(file)
    sizes = contents.get("parallelism_config")
    if not isinstance(sizes, dict) or (processes, machines) == (None, None):
        return words
    copies = f"{_OF_MESH}dp_replicate_size"
    usual = contents.get("num_machines", 1)
    count = machines if machines is not None else usual
    total = processes if processes is not None else contents.get("num_processes", 1)
    if sizes.get(copies) == usual and isinstance(count, int) and isinstance(total, int):
        shared = str(max(1, total // max(1, count)))
        words += [f"--{copies}", str(count), f"--{_OF_MESH}dp_shard_size", shared]
    return words


def read_launch(file: Path, *, processes: int | None, machines: int | None = None) -> Launch:
    """What `accelerate launch --config_file` would start.

    Args:
        file: the YAML.
        processes: `--num_processes`, if that is given.
        machines: `--num_machines`, if that is given.

    Raises:
        LaunchError: accelerate refuses the YAML.
    """
    # Port 0 = any free one, so that none is asked for whether it is in use.
    words = launch_words(file, processes=processes, machines=machines)
    words += ["--main_process_port", "0"]
    with _environment(_without_ranks()):
        try:
            asked, _, _ = _validate_launch_command(
                launch_command_parser().parse_args([*words, "--module", "training"])
            )
            joined = (asked.use_fsdp or asked.multi_gpu or asked.use_megatron_lm) and not asked.cpu
            environment = (
                prepare_multi_gpu_env(asked)
                if joined
                else prepare_simple_launcher_cmd_env(asked)[1]
            )
            return Launch(
                environment=dict(environment),
                processes=int(asked.num_processes or 1) if joined or asked.mpirun_hostfile else 1,
                asked=int(asked.num_processes or 1),
                machines=int(asked.num_machines or 1),
                use_cpu=bool(asked.cpu or asked.use_cpu),
            )
        except _REFUSALS as error:
            reason = " ".join(str(error).split())[:500] or type(error).__name__
            raise LaunchError(f"accelerate refuses {file}: {reason}") from error


def check_can_start(file: Path, *, processes: int | None, machines: int | None = None) -> Launch:
    """Refuse a YAML of which a launch would leave something out without a word.

    Args:
        file: the YAML.
        processes: `--num_processes`, if that is given.
        machines: `--num_machines`, if that is given.

    Returns:
        what it would start.

    Raises:
        LaunchError: names the key.
    """
    check_kind_of_launch(read_launch_yaml(file))
    launch = read_launch(file, processes=processes, machines=machines)
    check_all_start(launch)
    with as_launched(launch):
        check_environment()
        check_mesh(launch.processes)
    return launch


def check_kind_of_launch(contents: Mapping[str, Any]) -> None:
    """Refuse a `distributed_type` that this library does not train under, and sections beside it.

    Raises:
        LaunchError: names the key and its value.
    """
    kind = contents.get("distributed_type", "NO")
    if isinstance(kind, str) and kind in OTHER_TYPES:
        raise LaunchError(
            f"distributed_type: {kind} is not one that this library trains under: the base is "
            "complete on each GPU, or in FSDP2 shards. Set distributed_type: FSDP, or MULTI_GPU."
        )
    place = contents.get("compute_environment", "LOCAL_MACHINE")
    if place != "LOCAL_MACHINE":
        raise LaunchError(
            f"compute_environment: {place} is not supported: set it to LOCAL_MACHINE and start the "
            "run on the machine that has the GPUs."
        )
    for section in ("fsdp_config", "deepspeed_config", "megatron_lm_config"):
        if contents.get(section) and (section, kind) != ("fsdp_config", "FSDP"):
            raise LaunchError(
                f"The accelerate YAML has a {section}, which distributed_type: {kind} leaves out: "
                "set distributed_type: FSDP for an fsdp_config, or remove the section."
            )


def check_all_start(launch: Launch) -> None:
    """Refuse a launch that would start fewer processes than it was asked for.

    Raises:
        FsdpDroppedError: there are fewer.
    """
    if launch.processes < launch.asked:
        raise processes_dropped(asked=str(launch.asked))


@contextmanager
def as_launched(launch: Launch) -> Iterator[None]:
    """The environment of a process of the launch, without a rank."""
    with _environment(launch.environment):
        yield


def _without_ranks() -> dict[str, str]:
    return {
        name: value
        for name, value in os.environ.items()
        if name not in _OF_RANKS and not name.startswith(_OF_MPI)
    }


@contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    with clear_environment():
        os.environ.update(variables)
        yield
