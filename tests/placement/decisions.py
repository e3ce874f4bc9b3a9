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

from peft import LoraConfig
from transformers import GPTNeoConfig, Lfm2Config, LlamaConfig, PreTrainedModel

from lora_fsdp.arguments.fsdp import FsdpSettings
from lora_fsdp.compute.architectures import why_apart
from lora_fsdp.data.workload import Work, given_work
from lora_fsdp.errors import LoraFsdpError
from lora_fsdp.placement.decide import decide
from lora_fsdp.placement.gpus import GPUS
from lora_fsdp.placement.hardware import Hardware
from lora_fsdp.placement.request import Request
from lora_fsdp.placement.shape import ModelShape
from lora_fsdp.planning.models import dense_config
from lora_fsdp.sizing.counting import build_on_meta, shape_of

TABLE = Path(__file__).with_suffix(".txt")
SEVEN_BILLION = LlamaConfig(
    vocab_size=102400,
    hidden_size=4096,
    intermediate_size=11008,
    num_hidden_layers=30,
    num_attention_heads=32,
    num_key_value_heads=32,
)
# Attention in one of three layers, and a state that is handed on in the others.
HYBRID = Lfm2Config(
    vocab_size=65536,
    hidden_size=2048,
    intermediate_size=12288,
    num_hidden_layers=16,
    num_attention_heads=32,
    num_key_value_heads=8,
    full_attn_idxs=[2, 5, 8, 10, 12, 14],
)
# Windows of its own making, through which no mask reaches: each example gets its own sequence.
APART = GPTNeoConfig(
    hidden_size=2560, num_layers=32, num_heads=20, attention_types=[[["global", "local"], 16]]
)
MODELS = {"7B": SEVEN_BILLION, "70B": dense_config(70e9), "hyb": HYBRID, "neo": APART}
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
        ("7B", "70B"), (24, 48, 80, 141), (1, 2, 8), (False, True), (36, 1500)
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
    for model, gigabytes, ranks, tokens, step in itertools.product(
        ("hyb", "neo"), (24, 80), (1, 2), (36, 1500), ("auto", "graph")
    ):
        yaml = "fsdp" if ranks > 1 else "none"
        yield Case(model, gigabytes, ranks, yaml, tokens=tokens, step=step)
        yield Case(model, gigabytes, ranks, yaml, tokens=tokens, step=step, recomputing=True)


def work_of(case: Case) -> Work:
    training = {
        "per_device_train_batch_size": 8, "gradient_accumulation_steps": 1,
        "num_train_epochs": 3, "max_steps": -1,
    }  # fmt: skip
    return given_work(
        training,
        examples=4500,
        tokens_per_example=case.tokens,
        label_tokens_per_example=2,
        ranks=case.ranks,
    )


@cache
def skeleton(model: str) -> PreTrainedModel:
    return build_on_meta(MODELS[model])


@cache
def counted(model: str, dropout: float, stay: str | None, *, packed: bool) -> ModelShape:
    adapter = LoraConfig(
        r=8, target_modules=["q_proj", "v_proj"], lora_dropout=dropout, task_type="CAUSAL_LM"
    )
    # The adapter is attached to what is counted.
    return shape_of(build_on_meta(MODELS[model]), adapter, stay=stay, packed=packed)


def decision(case: Case) -> str:
    request = Request(
        step=case.step,
        resident_layers=case.resident,
        max_tokens_per_row=case.row,
        gradient_checkpointing=case.recomputing,
        fsdp=YAMLS[case.yaml],
        quantized=case.quantized,
        lora_dropout=bool(case.dropout),
        why_apart=why_apart(skeleton(case.model)),
    )
    packed = not request.packing_choice.packing.is_apart
    card = replace(GPUS["H100-80GB"], memory=case.gigabytes * 2**30)
    shape = counted(case.model, case.dropout, request.why_not_fused, packed=packed)
    try:
        found = decide(shape, work_of(case), Hardware.of(card, case.ranks), request)
    except LoraFsdpError as error:
        return f"refused: {error}"
    layout = found.layout
    parts = [
        f"{layout.resident_layers}/{shape.layers} resident",
        "head whole" if layout.whole_head else "",
        str(found.step),
        f"sequences of {found.sequence_length}",
        "recomputing" if layout.recomputed else "",
        "" if packed else str(found.packing.packing),
        f"{found.memory.total / 1e9:.1f} GB",
        "" if found.fits else "does not fit",
    ]
    return ", ".join(part for part in parts if part)


def table() -> str:
    lines = dict.fromkeys(cases())
    return "".join(f"{case}: {decision(case)}\n" for case in lines)


if __name__ == "__main__":
    TABLE.write_text(table(), encoding="utf-8")
