"""Rules over what a run needs of disk and host memory."""

from __future__ import annotations

import math
from collections.abc import Iterator

from lora_fsdp.adapter.ownership import trainable_parameters
from lora_fsdp.arguments import FineTuningArguments
from lora_fsdp.base.loading import resolve_dtype
from lora_fsdp.data.schedule import Schedule
from lora_fsdp.doctor.case import Case
from lora_fsdp.doctor.fact import UnknownFactError
from lora_fsdp.doctor.finding import Problem, Rules
from lora_fsdp.doctor.numbers import impossible_numbers

_GB = 1e9
# float32, and AdamW's two moments of each value.
_ADAPTER_BYTES = 4
_WITH_OPTIMIZER = 3


RULES = Rules()


def host_bytes_to_load(
    base_bytes: int, largest: int, *, processes: int, stays: bool, sharded: bool
) -> int:
    """Host memory that the processes of a machine need to load the base, in bytes.

    Weights are read tensor by tensor to where they stay.

    Args:
        base_bytes: of the whole base.
        largest: of its largest tensor.
        processes: on this machine.
        stays: whether the weights stay in host memory (on a CPU, or offloaded).
        sharded: whether the processes share one base.
    """
    read = largest * processes
    if not stays:
        return read
    return read + base_bytes * (1 if sharded else processes)


def checkpoints_on_disk(arguments: FineTuningArguments, *, examples: int, processes: int) -> int:
    """How many checkpoints lie on the disk at the same time at most."""
    schedule = Schedule.of(vars(arguments), rows=examples, ranks=processes)
    steps, per_epoch = schedule.steps, schedule.steps_per_epoch
    strategy = str(getattr(arguments.save_strategy, "value", arguments.save_strategy))
    if strategy == "no":
        return 0
    if strategy == "steps":
        every = arguments.save_steps
        every = max(1, math.ceil(every * steps) if every < 1 else int(every))
        written = steps // every
    else:
        written = math.ceil(steps / max(1, per_epoch))
    if arguments.save_total_limit is None:
        return max(1, written)
    # A new one is complete before the oldest goes, and the best one may stay beside the newest.
    besides = 1 + bool(arguments.load_best_model_at_end)
    return max(1, min(written, arguments.save_total_limit + besides))


@RULES.error(
    "disk-too-small",
    "The checkpoints (adapter and optimizer) do not fit the disk of `--output_dir`.",
    "Set --save_total_limit, lower --lora_r, or choose another disk.",
)
def _disk(case: Case) -> Iterator[Problem]:
    if any(impossible_numbers(case.arguments.value)):
        raise UnknownFactError
    parameters = sum(p.numel() for p in trainable_parameters(case.adapted.value).values())
    adapter = _ADAPTER_BYTES * parameters
    count = checkpoints_on_disk(
        case.arguments.value,
        examples=len(case.rows.value.train),
        processes=case.launch.value.processes,
    )
    needed = adapter * (1 + _WITH_OPTIMIZER * count)
    if needed > case.machine.disk_free:
        yield Problem(
            f"{count} checkpoints and the final adapter take {needed / _GB:.2f} GB, and the disk "
            f"of {case.output_dir} has {case.machine.disk_free / _GB:.2f} GB free."
        )


@RULES.error(
    "host-memory-too-small",
    "Loading the base needs more host memory than can be had.",
    "Use fewer processes on this machine, --dtype bfloat16, or a machine with more memory.",
)
def _host_memory(case: Case) -> Iterator[Problem]:
    dtype = resolve_dtype(case.model_args.dtype, device=case.device)
    sizes = [parameter.numel() for parameter in case.skeleton.value.parameters()]
    processes, settings = case.launch.value.processes_here, case.fsdp.value
    needed = host_bytes_to_load(
        sum(sizes) * dtype.itemsize,
        max(sizes) * dtype.itemsize,
        processes=processes,
        stays=not case.gpus_used or bool(settings and settings.offload),
        sharded=settings is not None,
    )
    if needed > case.machine.host_memory:
        yield Problem(
            f"Loading the base in {str(dtype).removeprefix('torch.')} takes "
            f"{needed / _GB:.1f} GB of host memory for {processes} process(es), and "
            f"{case.machine.host_memory / _GB:.1f} GB can be had."
        )
