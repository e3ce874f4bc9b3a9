"""Whether a run fits the GPUs, by the plan's own count."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch

from lora_fsdp.base.loading import resolve_dtype
from lora_fsdp.data.workload import longest_example
from lora_fsdp.doctor.case import Case
from lora_fsdp.doctor.fact import UnknownFactError
from lora_fsdp.doctor.finding import Problem, Rule, Severity
from lora_fsdp.doctor.numbers import impossible_numbers
from lora_fsdp.errors import ModelError
from lora_fsdp.placement.counting import build_on_meta, shape_of
from lora_fsdp.placement.memory import (
    DeviceMemory,
    device_memory,
    largest_sequence,
    with_head_placed,
)
from lora_fsdp.training.place import least_placement
from lora_fsdp.training.setup import shares_prefix, work_of_run
from lora_fsdp.training.step.choice import why_run_not_fused
from lora_fsdp.training.step.objectives.supervised import Supervised

_GB = 1e9


def least_device_memory(case: Case) -> DeviceMemory:
    """What the run takes of each GPU at the least: it keeps no more layers whole than it was told
    to, recomputes activations, and takes one example at a time.

    Raises:
        UnknownFactError: the base is not in bfloat16, which is what the plan counts in, or nothing
            can be trained.
    """
    arguments, settings, model = case.arguments.value, case.fsdp.value, case.adapted.value
    dtype = resolve_dtype(case.model_args.dtype, device=case.device)
    if dtype != torch.bfloat16 or any(impossible_numbers(arguments)):
        raise UnknownFactError
    encoded, trained = case.encoded.value, len(case.sample.value.train)
    work = work_of_run(
        arguments,
        encoded[:trained],
        encoded[trained:],
        share_prefix=shares_prefix(arguments, model),
        objective=Supervised(),
    )
    if work is None:
        raise UnknownFactError
    autocast = arguments.mixed_precision != "no"
    fuse = why_run_not_fused(model, arguments, autocast=autocast) is None
    try:
        shape = shape_of(build_on_meta(case.skeleton.value.config), case.lora.value, fuse=fuse)
    except ModelError as error:  # other rules say what is wrong with the model
        raise UnknownFactError from error
    placement = least_placement(
        arguments,
        settings,
        layers=shape.layers,
        ranks=case.launch.value.processes,
        quantized=case.model_args.load_in_4bit,
    )
    # As training does where memory is short.
    row = max(longest_example(encoded), arguments.max_tokens_per_row or 0)
    placement = replace(placement, recomputed=True, captured=False)
    rows = largest_sequence(work, row)
    return device_memory(shape, with_head_placed(shape, placement, rows), rows)


def _gpu_memory(case: Case) -> Iterator[Problem]:
    if not case.gpus_used:
        return
    used = case.machine.gpus[: case.launch.value.processes_here]
    smallest = min(used, key=lambda gpu: gpu.free)
    needed = least_device_memory(case)
    # The context is on the GPU when free memory is read, and so is not in it.
    if needed.allocated > smallest.free:
        base = needed.base_shard + needed.resident + needed.in_flight + needed.communication
        yield Problem(
            f"The run takes {needed.allocated / _GB:.1f} GB of each GPU ({base / _GB:.1f} GB for "
            f"the base, {needed.activations / _GB:.1f} GB for activations), and {smallest.name} "
            f"has {smallest.free / _GB:.1f} GB free."
        )


RULES = (
    Rule(
        "gpu-memory-too-small",
        Severity.ERROR,
        "The run does not fit the GPUs, by the count that `lora-fsdp plan` makes.",
        "Ask lora-fsdp plan: FSDP over more GPUs, --load_in_4bit, fsdp_offload_params or a smaller "
        "--max_length take less.",
        _gpu_memory,
    ),
)
