"""A plan as a table, as JSON, and as an accelerate YAML that carries it out."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import yaml

from lora_fsdp.planning.candidates import Candidate
from lora_fsdp.planning.plan import Plan


def plan_as_json(plan: Plan) -> dict[str, Any]:
    """Everything, in bytes and seconds."""
    best = plan.best
    return {
        "model": plan.model,
        "shape": asdict(plan.shape),
        "work": asdict(plan.work),
        "notes": list(plan.notes),
        "best": None if best is None else candidate_as_json(best),
        "candidates": [candidate_as_json(candidate) for candidate in plan.candidates],
    }


def candidate_as_json(candidate: Candidate) -> dict[str, Any]:
    """One strategy with its bytes."""
    return {
        "gpu": candidate.gpu.name,
        "count": candidate.count,
        "strategy": candidate.strategy,
        "weights": weights_of(candidate),
        "fits": candidate.fits,
        "spare": candidate.spare,
        "row_tokens": candidate.rows.tokens,
        "bytes": {**asdict(candidate.memory), "total": candidate.memory.total},
        "host_bytes": candidate.host_bytes,
        "seconds": candidate.seconds,
        "cost": candidate.cost,
        "options": options_for(candidate),
    }


def weights_of(candidate: Candidate) -> str:
    """How the base is stored."""
    return "4-bit" if candidate.placement.quantized else "bf16"


def summary_rows(plan: Plan) -> list[tuple[str, ...]]:
    """A line a strategy: what it needs, whether it fits, how long, what it costs."""
    return [
        (
            f"{one.count} x {one.gpu.name}",
            one.strategy,
            weights_of(one),
            f"{one.memory.total / 1e9:.1f}",
            f"{one.spare / 1e9:+.1f}",
            "yes" if one.fits else "no",
            duration(one.seconds) if one.fits else "",
            "" if one.cost is None or not one.fits else f"{one.cost:.2f}",
        )
        for one in plan.candidates
    ]


SUMMARY_HEADINGS = ("GPUs", "strategy", "weights", "needs GB", "spare GB", "fits", "time", "cost")


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


def options_for(candidate: Candidate) -> list[str]:
    """What `lora-fsdp train` is to be given beside the YAML."""
    placement = candidate.placement
    options = []
    if candidate.sequences_are_short:
        options += ["--max_tokens_per_row", str(candidate.rows.tokens)]
    if candidate.count > 1 and not placement.offloaded:
        kept = placement.resident_layers
        name = "all" if candidate.strategy.startswith("resident") else str(kept or "none")
        options += ["--resident_layers", name]
    if placement.quantized:
        options += ["--load_in_4bit", "true"]
    if candidate.count == 1 and placement.recomputed and not placement.offloaded:
        options += ["--gradient_checkpointing", "true"]
    return options


def accelerate_yaml(plan: Plan, candidate: Candidate) -> str:
    """The accelerate YAML of a strategy; its first lines say the options that go with it."""
    settings: dict[str, Any] = {
        "compute_environment": "LOCAL_MACHINE",
        "distributed_type": "NO",
        "num_machines": 1,
        "num_processes": candidate.count,
        "main_process_port": 0,
        "mixed_precision": "no",
    }
    placement = candidate.placement
    if candidate.count > 1 or placement.offloaded:
        settings["distributed_type"] = "FSDP"
        settings["fsdp_config"] = {
            "fsdp_version": 2,
            "fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
            "fsdp_reshard_after_forward": not placement.kept_until_backward,
            "fsdp_activation_checkpointing": placement.recomputed,
            "fsdp_offload_params": placement.offloaded,
            "fsdp_cpu_ram_efficient_loading": False,
        }
    one_process = candidate.count == 1 and placement.offloaded
    options = options_for(candidate) + (
        ["--allow_fsdp_on_one_process", "true"] if one_process else []
    )
    heading = (
        f"# {plan.model} on {candidate.count} x {candidate.gpu.name}: {candidate.strategy}, "
        f"{weights_of(candidate)}, {candidate.memory.total / 1e9:.1f} GB a GPU.\n"
        f"# lora-fsdp train --accelerate_config THIS_FILE {' '.join(options)} ...\n"
    )
    return heading + yaml.safe_dump(settings, sort_keys=False)
