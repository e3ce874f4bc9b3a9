"""Whether a run fits the GPUs, by the plan's own count."""

from __future__ import annotations

from collections.abc import Iterator

from lora_fsdp.base.loading import resolve_dtype
from lora_fsdp.compute.architectures import why_apart
from lora_fsdp.data.workload import measure_work
from lora_fsdp.doctor.case import Case
from lora_fsdp.doctor.fact import UnknownFactError
from lora_fsdp.doctor.finding import Problem, Rules
from lora_fsdp.doctor.numbers import impossible_numbers
from lora_fsdp.errors import ArgumentError, ModelError
from lora_fsdp.placement.decide import least_layout
from lora_fsdp.placement.hardware import Hardware
from lora_fsdp.placement.memory import DeviceMemory, device_memory
from lora_fsdp.placement.request import Request
from lora_fsdp.placement.residency import with_head_placed
from lora_fsdp.placement.sequences import largest_sequence
from lora_fsdp.sizing.counting import build_on_meta, shape_of

_GB = 1e9


RULES = Rules()


def least_device_memory(case: Case) -> DeviceMemory:
    """What the run takes of each GPU at the least: it keeps no more layers resident than it was
    told to, recomputes activations, and takes one example at a time.

    Raises:
        UnknownFactError: nothing can be trained.
    """
    arguments, lora = case.arguments.value, case.lora.value
    if any(impossible_numbers(arguments)) or not case.sample.value.train:
        raise UnknownFactError
    dtype = resolve_dtype(case.model_args.dtype, device=case.device)
    try:
        skeleton = build_on_meta(case.skeleton.value.config, dtype=dtype)
        request = Request.of(
            vars(arguments),
            fsdp=case.fsdp.value,
            quantized=case.model_args.load_in_4bit,
            autocast=arguments.mixed_precision != "no",
            config=skeleton.config,
            lora_dropout=bool(lora.lora_dropout),
            why_apart=why_apart(skeleton),
        )
        packing = request.packing_choice.packing
        packed = not packing.is_apart
        shape = shape_of(skeleton, lora, stay=request.why_not_fused, packed=packed)
    except (ArgumentError, ModelError) as error:  # other rules say what is wrong
        raise UnknownFactError from error
    encoded, trained = case.encoded.value, len(case.sample.value.train)
    processes = case.launch.value.processes
    work = measure_work(
        vars(arguments),
        encoded[:trained],
        encoded[trained:],
        ranks=processes,
        share_prefix=request.shares_prefix,
        packing=packing,
        tree_of=case.objective.value.tree,
    )
    hardware = Hardware(ranks=processes, has_gpu=True, free=None)
    # As training does where memory is short.
    longest = max(work.longest_example, arguments.max_tokens_per_row or 0)
    largest = largest_sequence(work, longest)
    layout = least_layout(shape, hardware, request)
    return device_memory(shape, with_head_placed(shape, layout, largest), largest)


@RULES.error(
    "gpu-memory-too-small",
    "The run does not fit the GPUs, by the count that `lora-fsdp plan` makes.",
    "Ask lora-fsdp plan: FSDP over more GPUs, --load_in_4bit, fsdp_offload_params or a smaller "
    "--max_length take less.",
)
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
