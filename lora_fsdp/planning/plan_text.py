"""A plan as a table, as JSON, and as an accelerate YAML that carries it out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

import yaml

from lora_fsdp.arguments.fsdp import FsdpSettings
from lora_fsdp.planning.candidates import Candidate
from lora_fsdp.planning.links import USUAL_LINKS, megabytes, milliseconds, over_link
from lora_fsdp.planning.plan import Plan
from lora_fsdp.printing import cost_text


def plan_as_json(plan: Plan) -> dict[str, Any]:
    """Everything, in bytes and seconds."""
    best = plan.best
    return {
        "model": plan.model,
        "shape": asdict(plan.shape),
        "work": asdict(plan.work),
        "notes": list(plan.notes),
        "best": None if best is None else candidate_as_json(best, plan),
        "candidates": [candidate_as_json(candidate, plan) for candidate in plan.candidates],
    }


def candidate_as_json(candidate: Candidate, plan: Plan) -> dict[str, Any]:
    """One strategy with its bytes."""
    return {
        "gpu": candidate.gpu.name,
        "count": candidate.count,
        "strategy": candidate.strategy,
        "weights": weights_of(candidate),
        "fits": candidate.fits,
        "spare": candidate.spare,
        "step": str(candidate.placement.step),
        "packing": str(candidate.placement.packing.packing),
        "why_not_packed": candidate.placement.packing.reason,
        "row_tokens": candidate.placement.largest.tokens,
        "max_tokens_per_row": candidate.placement.sequence_length,
        "bytes": {**asdict(candidate.memory), "total": candidate.memory.total},
        "host_bytes": candidate.host_bytes,
        "network_bytes_a_step": asdict(candidate.traffic),
        "seconds": candidate.seconds,
        "seconds_by_part": dict(candidate.seconds_by_part),
        "job_seconds": sum(candidate.seconds_by_part.values()),
        "machine": asdict(plan.machine),
        "cost": candidate.cost,
        "options": options_for(candidate, shipped=plan.shipped),
        "accelerate": accelerate_settings(candidate),
    }


def weights_of(candidate: Candidate) -> str:
    """How the base is stored."""
    layout, shape = candidate.placement.layout, candidate.placement.shape
    return "4-bit" if layout.quantized else {2: "bf16", 4: "fp32"}[shape.itemsize]


def summary_rows(plan: Plan) -> list[tuple[str, ...]]:
    """A line a strategy: GB it needs of each GPU and leaves, whether it fits, time, cost."""
    return [
        (
            f"{one.count} x {one.gpu.name}",
            one.strategy,
            weights_of(one),
            f"{one.memory.total / 1e9:.1f}",
            f"{one.spare / 1e9:+.1f}",
            "yes" if one.fits else "no",
            duration(one.seconds) if one.fits else "",
            "" if one.cost is None or not one.fits else cost_text(one.cost),
        )
        for one in plan.candidates
    ]


def link_rows(plan: Plan) -> list[tuple[str, ...]]:
    """For each layout that fits several hosts: what each host sends, and a step's time by link."""
    rows: dict[tuple[str, ...], None] = {}
    for one in plan.candidates:
        if one.fits:
            times = [milliseconds(over_link(one, link).seconds) for link in USUAL_LINKS]
            several = len({(other.count, other.gpu) for other in plan.candidates}) > 1
            gpus = f"{one.count} x {one.gpu.name}, " if several else ""
            sent = megabytes(one.traffic.total)
            rows[(gpus + one.strategy, weights_of(one), sent, *times)] = None
    return list(rows)


SUMMARY_HEADINGS = ("GPUs", "strategy", "base", "GB", "spare", "fits", "time", "cost")


def part_rows(candidate: Candidate) -> list[tuple[str, str]]:
    """Where a GPU's bytes go."""
    parts = asdict(candidate.memory)
    return [
        (name.replace("_", " "), f"{size / 1e9:.2f}") for name, size in parts.items() if size
    ] + [("in all", f"{candidate.memory.total / 1e9:.2f}")]


def duration(seconds: float) -> str:
    """In the largest fitting unit."""
    if seconds < 120:
        return f"{seconds:.0f} s" if seconds >= 1 else "< 1 s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def whole_job(candidate: Candidate, plan: Plan) -> str:
    """The whole job's time, part by part, and where the machine's rates come from."""
    parts = candidate.seconds_by_part
    named = [f"{part} {duration(seconds)}" for part, seconds in parts.items() if seconds]
    unknown = "" if candidate.work.rows else "; no rows are known, so none are scored"
    return (
        f"the whole job: {', '.join(named)}, together {duration(sum(parts.values()))}; its "
        f"machine is {plan.machine.source}{unknown}"
    )


def options_for(candidate: Candidate, *, shipped: Mapping[str, FsdpSettings | None]) -> list[str]:
    """What `lora-fsdp train` is to be given beside the recipe, so that it decides the same.

    Args:
        candidate: a strategy.
        shipped: the accelerate YAMLs that have a name, by it.
    """
    request, options = candidate.request, []
    if not candidate.yaml_is_default:
        named = [name for name, settings in shipped.items() if settings == request.fsdp]
        options += ["--accelerate_config", named[0] if named else "plan.yaml"]
    if request.fsdp is not None and candidate.count == 1:
        options += ["--num_processes", "1", "--allow_fsdp_on_one_process", "true"]
    if request.resident_layers != "auto":
        options += ["--resident_layers", request.resident_layers]
    if request.quantized:
        options += ["--load_in_4bit", "true"]
    return options


def accelerate_settings(candidate: Candidate) -> dict[str, Any]:
    """The accelerate YAML of a strategy, as a mapping."""
    settings: dict[str, Any] = {
        "compute_environment": "LOCAL_MACHINE",
        "distributed_type": "NO" if candidate.count == 1 else "MULTI_GPU",
        "num_machines": candidate.placement.layout.hosts,
        "num_processes": candidate.count,
        "main_process_port": 0 if candidate.placement.layout.hosts == 1 else 29500,
        "mixed_precision": "no",
    }
    fsdp = candidate.request.fsdp
    if candidate.gpu.is_cpu:
        settings |= {"use_cpu": True}
        settings["distributed_type"] = "NO" if candidate.count == 1 else "MULTI_CPU"
    if fsdp is not None:
        settings["distributed_type"] = "FSDP"
        settings["fsdp_config"] = {
            "fsdp_version": 2,
            "fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP" if fsdp.wrap_layers else "NO_WRAP",
            "fsdp_reshard_after_forward": fsdp.reshard_after_forward,
            "fsdp_activation_checkpointing": fsdp.activation_checkpointing,
            "fsdp_offload_params": fsdp.offload,
            "fsdp_cpu_ram_efficient_loading": False,
        }
        if fsdp.layer_classes is not None:
            classes = ",".join(fsdp.layer_classes)
            settings["fsdp_config"]["fsdp_transformer_layer_cls_to_wrap"] = classes
        if fsdp.replicas > 1:
            sizes = {"dp_replicate": fsdp.replicas, "dp_shard": candidate.count // fsdp.replicas}
            sizes |= {"tp": 1, "cp": 1, "sp": 1}
            named = {f"parallelism_config_{name}_size": size for name, size in sizes.items()}
            settings["parallelism_config"] = named
    return settings


def accelerate_yaml(plan: Plan, candidate: Candidate) -> str:
    """The accelerate YAML of a strategy; its first lines say the options that go with it."""
    options = options_for(replace(candidate, yaml_is_default=True), shipped={})
    command = ["lora-fsdp train --accelerate_config THIS_FILE", *options, "..."]
    heading = (
        f"# {plan.model} on {candidate.count} x {candidate.gpu.name}: {candidate.strategy}, "
        f"{weights_of(candidate)}, {candidate.memory.total / 1e9:.1f} GB a GPU.\n"
        f"# {' '.join(command)}\n"
    )
    return heading + yaml.safe_dump(accelerate_settings(candidate), sort_keys=False)
