"""What is decided on made-up hardware, a line a case.

python -m tests.placement.decisions        writes decisions.txt
python -m pytest tests/placement/test_decisions.py
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch
from peft import LoraConfig
from transformers import LlamaConfig

from lora_fsdp.adapter.attach import attach_adapter
from lora_fsdp.arguments.fsdp import FsdpSettings
from lora_fsdp.base.layers import base_model, decoder_layers
from lora_fsdp.data.workload import Work, given_work
from lora_fsdp.distributed import residency
from lora_fsdp.errors import LoraFsdpError
from lora_fsdp.placement import memory
from lora_fsdp.placement.counting import build_on_meta, shape_of
from lora_fsdp.planning.models import dense_config
from lora_fsdp.training import place
from lora_fsdp.training.step import choice

TABLE = Path(__file__).with_suffix(".txt")
SEVEN_BILLION = LlamaConfig(
    vocab_size=102400,
    hidden_size=4096,
    intermediate_size=11008,
    num_hidden_layers=30,
    num_attention_heads=32,
    num_key_value_heads=32,
)
MODELS = {"7B": SEVEN_BILLION, "70B": dense_config(70e9)}
YAMLS = {
    "none": None,
    "fsdp": FsdpSettings(True, False, False, None, True),
    "kept": FsdpSettings(False, False, False, None, True),
    "offload": FsdpSettings(True, True, True, None, True),
}


@dataclass(frozen=True)
class Case:
    """A run on GPUs that nobody has rented."""

    model: str
    gigabytes: int
    ranks: int
    yaml: str
    quantized: bool = False
    tokens: int = 36
    dropout: float = 0.0
    step: str = "auto"
    resident: str = "auto"
    recomputing: bool = False
    row: int | None = None

    def __str__(self) -> str:
        words = [
            f"{self.model:>3} {self.ranks} x {self.gigabytes:>3} GB {self.yaml:<7}",
            "4bit" if self.quantized else "bf16",
            f"{self.tokens:>4} tokens",
            f"dropout {self.dropout}" if self.dropout else "",
            f"--step {self.step}" if self.step != "auto" else "",
            f"--resident_layers {self.resident}" if self.resident != "auto" else "",
            "--gradient_checkpointing" if self.recomputing else "",
            f"--max_tokens_per_row {self.row}" if self.row else "",
        ]
        return " ".join(word for word in words if word)


def cases() -> Iterator[Case]:
    for model, gigabytes, ranks, quantized, tokens in itertools.product(
        MODELS, (24, 48, 80, 141), (1, 2, 8), (False, True), (36, 1500)
    ):
        for yaml in ("none", "fsdp") if ranks > 1 else ("none",):
            yield Case(model, gigabytes, ranks, yaml, quantized, tokens)
    for gigabytes, ranks, dropout, step in itertools.product(
        (24, 80), (1, 2), (0.0, 0.1), ("auto", "eager", "fused", "compiled", "graph")
    ):
        yaml = "fsdp" if ranks > 1 else "none"
        for recomputing in (False, True):
            yield Case(
                "7B", gigabytes, ranks, yaml, tokens=1500, dropout=dropout, step=step,
                recomputing=recomputing,
            )  # fmt: skip
    for yaml, resident, quantized in itertools.product(
        ("fsdp", "kept", "offload"), ("auto", "all", "none", "7"), (False, True)
    ):
        for tokens in (36, 1500):
            for step in ("auto", "graph"):
                yield Case(
                    "7B", 24, 2, yaml, quantized, tokens, resident=resident, step=step
                )  # fmt: skip
    for row, tokens in itertools.product((1500, 4096), (36, 1500)):
        yield Case("7B", 24, 1, "none", tokens=tokens, row=row)
    for quantized in (False, True):
        yield Case("70B", 24, 1, "offload", quantized)
        yield Case("70B", 24, 2, "offload", quantized)


def work_of(case: Case) -> Work:
    return given_work(
        examples=4500,
        tokens_per_example=case.tokens,
        label_tokens_per_example=2,
        examples_per_rank=8,
        epochs=3,
        max_tokens_per_row=case.row,
    )


@cache
def counted(model: str, dropout: float, fuse: bool) -> memory.ModelShape:
    adapter = LoraConfig(
        r=8, target_modules=["q_proj", "v_proj"], lora_dropout=dropout, task_type="CAUSAL_LM"
    )
    return shape_of(build_on_meta(MODELS[model]), adapter, fuse=fuse)


@cache
def adapted(model: str, dropout: float):
    adapter = LoraConfig(
        r=8, target_modules=["q_proj", "v_proj"], lora_dropout=dropout, task_type="CAUSAL_LM"
    )
    with torch.device("meta"):
        return attach_adapter(build_on_meta(MODELS[model]), adapter)


def decision(case: Case) -> str:
    try:
        return _decision(case)
    except LoraFsdpError as error:
        return f"refused: {error}"


def _decision(case: Case) -> str:
    """As `place_for_training` decides, with what a GPU of that size would have free."""
    model, settings, work = adapted(case.model, case.dropout), YAMLS[case.yaml], work_of(case)
    base = base_model(model)
    layers = decoder_layers(base)
    free = int(case.gigabytes * 2**30 * 0.97) - memory.CONTEXT
    args = SimpleNamespace(
        device=torch.device("cuda"), step=case.step, resident_layers=case.resident,
        gradient_checkpointing=case.recomputing, gradient_checkpointing_kwargs=None,
        max_tokens_per_row=case.row, world_size=case.ranks, share_prefix="auto",
    )  # fmt: skip
    not_fused = choice.why_run_not_fused(model, args, autocast=False)
    fused = not_fused or []
    if args.step == "fused" and isinstance(fused, str):
        return "refused"
    is_fused = not isinstance(fused, str)
    shape = counted(case.model, case.dropout, is_fused)
    gathers_stay_out = choice.why_gathers_stay_out(args, settings)
    base.is_loaded_in_4bit = case.quantized
    longest = work.longest_example
    with (
        mock.patch.object(place, "least_free_memory", lambda device: free),
        mock.patch.object(residency, "least_free_memory", lambda device: free),
    ):
        placement, recomputing = place._choose_placement(
            model, args, settings, layers=len(layers), shape=shape, is_fused=is_fused,
            gathers_captured=gathers_stay_out is None,
            shortest=memory.largest_sequence(work, max(longest, case.row or 0)),
        )  # fmt: skip
        found = place._choose_residency(
            base, layers, args=args, settings=settings, shape=shape, least=placement,
            rows=memory.largest_sequence(work, max(longest, case.row or memory.USUAL_SEQUENCE)),
        )  # fmt: skip
    uncaptured = choice.why_not_captured(
        model, args, settings, is_fused=is_fused, recomputed=placement.recomputed
    )
    if uncaptured is None and not found.is_whole:
        uncaptured = gathers_stay_out
    seconds = 4.0 * shape.parameters * work.step_tokens * work.steps(case.ranks) / 3e14
    step, _ = choice.choose_step(args, fused=fused, why_not_captured=uncaptured, seconds=seconds)
    final = replace(
        placement, resident_layers=len(found.indices), whole_head=found.head is not None
    )
    tiny = memory.device_memory(shape, final, memory.LargestSequence(1, 1))
    free_beside = free - tiny.base_shard - tiny.resident - 4 * shape.adapter_parameters
    length = case.row or memory.longest_sequence(
        shape, free=free_beside, longest_example=longest, recomputed=placement.recomputed,
        most=memory.LONGEST_SEQUENCE if is_fused else memory.USUAL_SEQUENCE,
    )  # fmt: skip
    rows = memory.largest_sequence(work, length)
    needed = memory.device_memory(shape, final, rows)
    parts = [
        f"{len(found.indices)}/{shape.layers} resident",
        "head whole" if final.whole_head else "",
        step,
        f"sequences of {length}",
        "recomputing" if final.recomputed else "",
        f"{needed.total / 1e9:.1f} GB",
        "" if needed.allocated <= free else "does not fit",
    ]
    return ", ".join(part for part in parts if part)


def table() -> str:
    lines = dict.fromkeys(cases())
    return "".join(f"{case}: {decision(case)}\n" for case in lines)


if __name__ == "__main__":
    TABLE.write_text(table(), encoding="utf-8")
