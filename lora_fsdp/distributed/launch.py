"""What the launcher was asked for, read once and compared with what the ranks got.

`accelerate launch` hands its YAML to the ranks as environment variables, and accelerate's own
plugin class reads them. From there on the base is sharded by `lora_fsdp.distributed.sharding` and
not by accelerate's `prepare`, which drops FSDP on CPUs without an error, shards only when training
starts, and whose checkpoints gather the whole base. So the same YAML, script and code run on GPUs
over NCCL and, as a rehearsal, on a laptop's CPU over gloo.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import psutil
import torch
import yaml
from accelerate.commands.to_fsdp2 import convert_config_to_fsdp2
from accelerate.utils import FullyShardedDataParallelPlugin

from lora_fsdp.arguments.fsdp import FsdpSettings
from lora_fsdp.errors import (
    Fsdp1ConfigError,
    FsdpDroppedError,
    FsdpOnOneProcessError,
    FsdpSettingError,
    LaunchError,
)

if TYPE_CHECKING:
    from transformers import TrainingArguments

logger = logging.getLogger(__name__)

# Who has one of them was started by `mpirun`, which says how many there are.
_OF_MPI = ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")


def fsdp_requested() -> bool:
    """Whether this process was started from an accelerate YAML that asks for FSDP."""
    return os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"


def read_fsdp_settings() -> FsdpSettings | None:
    """The FSDP settings this process was launched with, or `None` if FSDP was not asked for.

    Raises:
        Fsdp1ConfigError: the YAML is for FSDP1.
        FsdpSettingError: a setting that cannot work here.
    """
    if not fsdp_requested():
        return None
    if os.environ.get("FSDP_VERSION", "1") != "2":
        raise Fsdp1ConfigError(
            "The accelerate YAML asks for FSDP1, whose flat parameters cannot mix a frozen base "
            f"with a trained adapter. The FSDP2 equivalent:\n\n{_fsdp2_equivalent()}"
        )
    # Imported here: the launcher reads YAMLs before its first line, most of them without FSDP.
    from torch.distributed.fsdp import CPUOffloadPolicy

    plugin = read_plugin()
    for reason in unsupported_settings(plugin).values():
        raise FsdpSettingError(reason)
    names = plugin.transformer_cls_names_to_wrap
    return FsdpSettings(
        reshard_after_forward=bool(plugin.reshard_after_forward),
        offload=isinstance(plugin.cpu_offload, CPUOffloadPolicy),
        activation_checkpointing=bool(plugin.activation_checkpointing),
        layer_classes=tuple(names) if names else None,
        wrap_layers=plugin.auto_wrap_policy is not None,
        activation_offload=bool(plugin.activation_checkpointing_offload),
        replicas=_size_of_mesh("DP_REPLICATE_SIZE") if parallelism_requested() else 1,
    )


def parallelism_requested() -> bool:
    """Whether the YAML has a `parallelism_config`."""
    return os.environ.get("ACCELERATE_USE_PARALLELISM_CONFIG", "false").lower() == "true"


def check_mesh(world_size: int) -> None:
    """Refuse a `parallelism_config` that is not hybrid sharding of all processes.

    Raises:
        FsdpSettingError: names the key and its value.
    """
    if not parallelism_requested():
        return
    copies, shards = _size_of_mesh("DP_REPLICATE_SIZE"), _size_of_mesh("DP_SHARD_SIZE")
    if copies * shards != world_size:
        raise FsdpSettingError(
            f"parallelism_config: {copies} copies of the base (dp_replicate_size) x {shards} "
            f"processes that share one (dp_shard_size) are {copies * shards}, but there are "
            f"{world_size} processes: set dp_shard_size to the GPUs of a machine and "
            "dp_replicate_size to the number of machines."
        )


def read_plugin() -> FullyShardedDataParallelPlugin:
    """accelerate's own reading of the FSDP settings in the environment.

    Raises:
        FsdpSettingError: it refuses a value.
    """
    try:
        return FullyShardedDataParallelPlugin()
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise FsdpSettingError(
            f"accelerate refuses a value in the YAML's fsdp_config: {error}. Compare it with "
            "accelerate_configs/fsdp2.yaml."
        ) from error


def check_launch(
    arguments: TrainingArguments, settings: FsdpSettings | None, *, allow_one_process: bool
) -> None:
    """Stop a run whose ranks did not get what the launcher was asked for.

    Raises:
        FsdpDroppedError: the ranks are not joined.
        FsdpOnOneProcessError: FSDP over one process, unless that is allowed.
        LaunchError: more processes than GPUs, or a setting that nobody carries out.
    """
    check_environment()
    check_not_left_alone()
    check_mesh(int(os.environ.get("WORLD_SIZE", "1")))
    asked = int(os.environ.get("WORLD_SIZE", "1"))
    if asked != arguments.world_size:
        raise FsdpDroppedError(
            f"{asked} processes were started, but this one is alone (world size "
            f"{arguments.world_size}): each would train its own adapter. Without GPUs start from "
            "accelerate_configs/fsdp2_cpu.yaml."
        )
    if arguments.device.type == "cuda":
        local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        check_gpus_suffice(local, torch.cuda.device_count())
    if settings is None:
        return
    if not allow_one_process:
        check_sharding_has_ranks(arguments.world_size)
    if arguments.device.type == "cpu" and arguments.process_index == 0:
        logger.warning(
            "Rehearsal: FSDP2 really shards over %d CPU processes (gloo), for correctness and not "
            "for speed.",
            arguments.world_size,
        )


def check_environment() -> None:
    """Refuse what the launcher was asked for and neither it nor a run carries out.

    Raises:
        LaunchError: names the key of the YAML and its value.
    """
    backend = os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no")
    if backend.lower() not in ("no", ""):
        raise LaunchError(
            f"dynamo_backend {backend} (the YAML's dynamo_config, or an option of accelerate "
            "launch) has no effect on packed sequences: remove it. --step compiled lets torch "
            "compile the layers."
        )
    if os.environ.get("ACCELERATE_MIXED_PRECISION", "no").lower() == "fp8":
        raise LaunchError(
            "mixed_precision: fp8 is not supported: set it to 'no'; --dtype says what the base is "
            "computed in."
        )


def check_not_left_alone() -> None:
    """Refuse to be the only process of a launch that was asked for several.

    accelerate starts one process, with the address at which several would meet, where its type of
    launch has no way to start them. An address that the launcher itself was started with (a
    cluster's shell exports one) says nothing.

    Raises:
        FsdpDroppedError: this process is the only one.
    """
    launched = "ACCELERATE_DYNAMO_BACKEND" in os.environ
    joined = any(name in os.environ for name in ("WORLD_SIZE", "RANK", *_OF_MPI))
    if launched and not joined and "MASTER_ADDR" in os.environ and not _meeting_is_exported():
        raise processes_dropped(asked="Several")


def _meeting_is_exported() -> bool:
    """Whether the launcher was started with the address and port that this process has."""
    try:
        exported = psutil.Process(os.getppid()).environ()
    except psutil.Error:  # it is gone, or another user's
        return False
    return all(
        os.environ.get(name) == exported.get(name) for name in ("MASTER_ADDR", "MASTER_PORT")
    )


def processes_dropped(*, asked: str) -> FsdpDroppedError:
    """The error of a launch that starts one process where several were asked for."""
    return FsdpDroppedError(
        f"{asked} processes were asked for (num_processes), but accelerate starts one: "
        "distributed_type NO and MULTI_CPU, and --cpu, start no others. Set num_processes: 1, or "
        "distributed_type: MULTI_GPU (on a CPU with use_cpu: true, without --cpu), or start from "
        "accelerate_configs/fsdp2_cpu.yaml."
    )


def check_gpus_suffice(processes: int, gpus: int) -> None:
    """Refuse more processes than GPUs on a machine.

    Raises:
        LaunchError: there are more.
    """
    if processes > gpus:
        raise LaunchError(
            f"{processes} processes for {gpus} GPU(s) on this machine: start accelerate launch "
            f"with --num_processes {gpus}."
        )


def check_sharding_has_ranks(world_size: int) -> None:
    """Refuse FSDP over one process.

    Raises:
        FsdpOnOneProcessError: there is one.
    """
    if world_size == 1:
        raise FsdpOnOneProcessError(
            "The accelerate YAML asks for FSDP, but there is one process, where it shards "
            "nothing: use accelerate_configs/single.yaml, raise --num_processes, or pass "
            "--allow_fsdp_on_one_process true."
        )


@contextmanager
def accelerate_without_fsdp() -> Iterator[None]:
    """Let accelerate build its state as if no FSDP had been asked for (the module says why)."""
    names = ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_PARALLELISM_CONFIG")
    asked = {name: os.environ.pop(name) for name in names if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(asked)


def launch_fingerprint() -> str:
    """The FSDP settings in this rank's environment, as one string."""
    of_yaml = ("FSDP_", "PARALLELISM_CONFIG_")
    settings = {key: value for key, value in os.environ.items() if key.startswith(of_yaml)}
    return str(sorted({**settings, "ACCELERATE_USE_FSDP": str(fsdp_requested())}.items()))


def unsupported_settings(plugin: FullyShardedDataParallelPlugin) -> dict[str, str]:
    """For each key of the YAML whose value cannot work here: what is wrong, and what to do."""
    from torch.distributed.fsdp.wrap import size_based_auto_wrap_policy

    found = {}
    if plugin.auto_wrap_policy is size_based_auto_wrap_policy:
        found["fsdp_auto_wrap_policy"] = (
            "fsdp_auto_wrap_policy: SIZE_BASED_WRAP would cut through layers: set it to "
            "TRANSFORMER_BASED_WRAP."
        )
    if plugin.ignored_modules:
        found["fsdp_ignored_modules"] = (
            "fsdp_ignored_modules is set by this library (the adapter): remove it from the YAML."
        )
    if (reason := _unsupported_mesh()) is not None:
        found["parallelism_config"] = reason
    return found


def _unsupported_mesh() -> str | None:
    """Why the YAML's `parallelism_config` cannot be carried out; `None` = it can, or is not there.

    Of its sizes two are: copies of the base, and processes that share one.
    """
    if not parallelism_requested():
        return None
    for name in ("TP_SIZE", "CP_SIZE", "SP_SIZE"):
        if (size := _size_of_mesh(name)) != 1:
            return (
                f"parallelism_config_{name.lower()}: {size} is not supported: only "
                "dp_replicate_size and dp_shard_size are; set it to 1."
            )
    for name in ("DP_REPLICATE_SIZE", "DP_SHARD_SIZE"):
        if (size := _size_of_mesh(name)) < 1:
            return f"parallelism_config_{name.lower()}: {size} must be 1 or more."
    return None


def _size_of_mesh(name: str) -> int:
    text = os.environ.get(f"PARALLELISM_CONFIG_{name}", "1")
    try:
        return int(text)
    except ValueError as error:
        raise FsdpSettingError(
            f"parallelism_config_{name.lower()}: {text} is no whole number: give the number of "
            "processes."
        ) from error


def _fsdp2_equivalent() -> str:
    """The `fsdp_config` section that the environment came from, converted by accelerate."""
    names = {
        "SHARDING_STRATEGY": "fsdp_sharding_strategy",
        "AUTO_WRAP_POLICY": "fsdp_auto_wrap_policy",
        "TRANSFORMER_CLS_TO_WRAP": "fsdp_transformer_layer_cls_to_wrap",
        "OFFLOAD_PARAMS": "fsdp_offload_params",
        "STATE_DICT_TYPE": "fsdp_state_dict_type",
        "ACTIVATION_CHECKPOINTING": "fsdp_activation_checkpointing",
    }
    section: dict[str, object] = {"fsdp_cpu_ram_efficient_loading": False}
    for variable, key in names.items():
        value = os.environ.get(f"FSDP_{variable}")
        if value not in (None, "", "None"):
            section[key] = {"true": True, "false": False}.get(str(value).lower(), value)
    strategies = ("FULL_SHARD", "SHARD_GRAD_OP", "NO_SHARD", "HYBRID_SHARD", "HYBRID_SHARD_ZERO2")
    strategy = str(section.get("fsdp_sharding_strategy", "FULL_SHARD"))
    if strategy in ("1", "2", "3", "4", "5"):  # FSDP1 YAMLs may number their strategies from 1
        strategy = strategies[int(strategy) - 1]
    section["fsdp_sharding_strategy"] = strategy
    return yaml.safe_dump(
        {
            "distributed_type": "FSDP",
            "fsdp_config": convert_config_to_fsdp2({"fsdp_config": section})["fsdp_config"],
        }
    )
