"""Several toy adapters trained at once, in one call."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from peft import LoraConfig

from lora_fsdp import FineTuningArguments
from lora_fsdp.data.encoding import Encoder
from lora_fsdp.training.together.loop import AdaptersTogether
from lora_fsdp.training.together.members import MemberPlan
from tests.support.tiny import ToyTask, tiny_model, tiny_tokenizer, toy_table

#: Three that differ in all that adapters of one pass may differ in.
DIFFERENT: Mapping[str, dict[str, Any]] = {
    "one": {"seed": 3, "learning_rate": 1e-2, "r": 4},
    "two": {
        "seed": 4,
        "learning_rate": 3e-3,
        "r": 8,
        "lora_alpha": 4,
        "target_modules": ["q_proj", "v_proj"],
        "per_device_train_batch_size": 6,
        "lr_scheduler_type": "linear",
        "warmup_steps": 2,
        "weight_decay": 0.1,
    },
    "three": {
        "seed": 5,
        "rows": range(3, 21),
        "num_train_epochs": 3,
        "max_grad_norm": 0.1,
        "use_rslora": True,
    },
}
_OF_THE_ADAPTER = {"r", "lora_alpha", "target_modules", "use_rslora", "fan_in_fan_out"}


def arguments_of(output_dir: str | Path, **settings: Any) -> FineTuningArguments:
    """As `toy_trainer` has them."""
    defaults: dict[str, Any] = {
        "per_device_train_batch_size": 8,
        "learning_rate": 1e-2,
        "num_train_epochs": 2,
        "logging_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": True,
        "lr_scheduler_type": "constant",
    }
    return FineTuningArguments(output_dir=str(output_dir), **{**defaults, **settings})


def toy_encoder() -> Encoder:
    """Of the toy task."""
    task = ToyTask()
    return Encoder(tiny_tokenizer(), task=task.bind(toy_table(24)), max_length=128)


def toy_plan(
    encoder: Encoder, name: str, output_dir: str | Path, *, table: Any = None, **settings: Any
) -> MemberPlan:
    """One of several; `rows` among the settings are the places of its training rows."""
    config = {key: settings.pop(key) for key in _OF_THE_ADAPTER & settings.keys()}
    rows: Sequence[int] = settings.pop("rows", range(24))
    table = toy_table(24) if table is None else table
    examples = encoder.encode(encoder.task.examples(table))
    return MemberPlan(
        name,
        arguments_of(Path(output_dir) / name, **settings),
        LoraConfig(**{"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM"} | config),
        [examples[place] for place in rows],
    )


def several(
    output_dir: str | Path,
    members: Mapping[str, dict[str, Any]] = DIFFERENT,
    *,
    kind: str = "llama",
    tables: Mapping[str, Any] | None = None,
    grouped: bool | None = None,
    **common: Any,
) -> AdaptersTogether:
    """Adapters to train; `common` are arguments of all together, `tables` the rows of some."""
    encoder = toy_encoder()
    held_out = encoder.encode(encoder.task.examples(toy_table(13, seed=9)))
    plans = [
        toy_plan(encoder, name, output_dir, table=(tables or {}).get(name), **settings)
        for name, settings in members.items()
    ]
    return AdaptersTogether(
        tiny_model(kind),
        arguments_of(output_dir, **common),
        plans=plans,
        encoder=encoder,
        held_out=held_out,
        grouped=grouped,
    )


def parameters_of(together: AdaptersTogether) -> dict[str, dict[str, Any]]:
    """Of every adapter by its name: its parameters, under the names that it would have alone."""
    return {
        member.plan.name: {
            name.replace(f".{member.adapter_name}.", ".default."): value.detach().numpy().copy()
            for name, value in member.adapter.parameters.items()
        }
        for member in together.members
    }
