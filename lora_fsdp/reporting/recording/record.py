"""What is known when a run starts, written at once: also a run that fails can be reported on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, fields, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol

import pandas as pd

from lora_fsdp.arguments import FineTuningArguments
from lora_fsdp.arguments.fsdp import FsdpSettings
from lora_fsdp.base.folders import sha256_of_file
from lora_fsdp.data.checking import row_digests
from lora_fsdp.data.encoding import EncodedExample
from lora_fsdp.data.rows import TaskData
from lora_fsdp.distributed.status import FsdpStatus
from lora_fsdp.evaluation.metrics import answers_of
from lora_fsdp.evaluation.outputs import write_json
from lora_fsdp.placement.decide import Placement
from lora_fsdp.printing import without_secrets
from lora_fsdp.reporting.recording.asking import AskedRun, asking
from lora_fsdp.reporting.recording.data_health import HELD_OUT, TRAINING, data_health
from lora_fsdp.reporting.recording.environment import environment, launch_command
from lora_fsdp.reporting.run_files import DATA_HEALTH_FILE, RECORD_FILE, TRAINED_ON
from lora_fsdp.tasks import Example

_SAMPLE_CHARACTERS = 200
# What `TrainingArguments` works out by itself from the machine or from other arguments.
_DERIVED = {"accelerator_config", "dataloader_pin_memory", "do_eval", "use_cpu"}


class RecordedRun(AskedRun, Protocol):
    """What a record asks of a run: a `LoraTrainer`, or one adapter of several."""

    @property
    def args(self) -> FineTuningArguments: ...

    @property
    def fsdp_settings(self) -> FsdpSettings | None: ...

    @property
    def placement(self) -> Placement: ...

    @property
    def examples_per_step(self) -> int: ...

    @property
    def max_new_tokens(self) -> int: ...


def record_start(
    folder: Path,
    *,
    trainer: RecordedRun,
    data: TaskData,
    status: FsdpStatus,
    asked: Mapping[str, Any],
) -> None:
    """Write `run_record.json` and `data_health.json` into `folder`; for one rank to call.

    Args:
        folder: the run's output folder.
        trainer, data, status: of the run.
        asked: by their group the argument objects (dataclasses) beside the trainer's.
    """
    folder.mkdir(parents=True, exist_ok=True)
    arguments = {group: (given, asdict(given)) for group, given in asked.items()}
    arguments["training"] = (trainer.args, trainer.args.to_dict())
    settings = None if trainer.fsdp_settings is None else asdict(trainer.fsdp_settings)
    record = {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": launch_command(),
        "working_directory": Path.cwd(),
        "environment": environment(),
        "arguments": without_secrets({group: values for group, (_, values) in arguments.items()}),
        "not_default": without_secrets(
            {group: _not_default(*given) for group, given in arguments.items()}
        ),
        **_facts(trainer, data),
        "prompt": _sample_prompt(trainer, data.reported),
        "asking": asking(trainer, data),
        "data_sha256": _digests(asked["data"]),
        TRAINED_ON: sorted(set(row_digests(data.train))),
        "fsdp": asdict(status) | {"settings": settings},
    }
    write_json(folder / RECORD_FILE, record)
    rows = pd.concat(
        [
            _rows(data, data.train, trainer.train_dataset, part=TRAINING),
            _rows(data, data.scored, _scored(trainer), part=HELD_OUT),
        ]
    )
    write_json(folder / DATA_HEALTH_FILE, data_health(rows, labels=data.task.answer_kind.labels))


def _facts(trainer: RecordedRun, data: TaskData) -> dict[str, Any]:
    kind = data.task.answer_kind
    return {
        "task": data.task.name,
        "labels": list(kind.labels) or None,
        "answers": kind.announcement(max_new_tokens=trainer.max_new_tokens),
        "primary_metric": data.task.primary_metric,
        "training_rows": len(data.train),
        "held_out_rows": len(data.reported),
        "validation_rows": len(data.held_out) if data.test else None,
        "splits": list(data.splits),
        "shown_rows": [shot.row for shot in data.shots] or None,
        "rows_left_out": data.dropped,
        "processes": trainer.args.world_size,
        "device": trainer.args.device.type,
        "examples_per_step": trainer.examples_per_step,
        "share_prefix": trainer.placement.shares_prefix,
        "packing": str(trainer.placement.packing.packing),
    }


def _rows(
    data: TaskData, examples: Sequence[Example], encoded: Sequence[EncodedExample], *, part: str
) -> pd.DataFrame:
    return pd.DataFrame(
        {
            "part": part,
            "row": [example.row for example in examples],
            "text": pd.Series([example.prompt.content for example in examples], dtype=object),
            "answer": pd.Series(answers_of(data.task, examples), dtype=object),
            "tokens": [one.tokens for one in encoded],
            "shortened": pd.Series([one.shortened for one in encoded], dtype=bool),
        }
    )


def _scored(trainer: RecordedRun) -> list[EncodedExample]:
    return [*trainer.held_out, *trainer.test_dataset]


def _sample_prompt(trainer: RecordedRun, held_out: Sequence[Example]) -> dict[str, Any] | None:
    """A prompt as the model sees it, for the snippet that asks the adapter."""
    if not held_out:
        return None
    encoder, prompt = trainer.encoder, held_out[0].prompt
    short = replace(prompt, text=prompt.text[:_SAMPLE_CHARACTERS])
    answers = [len(one.target_ids) for one in trainer.train_dataset]
    return {
        "row": held_out[0].row,
        "text": short.text,
        "rendered": encoder.render(short),
        "chat_template": encoder.chat_template,
        "end_token_id": encoder.end_token_id,
        "longest_answer_tokens": max(answers, default=0),
    }


def _digests(arguments: Any) -> dict[str, str]:
    """SHA-256 of the files that the rows came from."""
    options = ("data_file", "eval_file", "test_file")
    named = {option: getattr(arguments, option) for option in options}
    return {
        option: sha256_of_file(Path(name))
        for option, name in named.items()
        if name is not None and Path(name).is_file()
    }


def _not_default(arguments: Any, values: dict[str, Any]) -> dict[str, Any]:
    """The fields that were set to something else than their default."""
    changed = {}
    for field in fields(arguments):
        default = field.default
        if default is MISSING and field.default_factory is not MISSING:
            default = field.default_factory()
        value = values.get(field.name)
        # Paths and enumerations are compared as they are shown; unset is unset in any form.
        same = str(value) == str(default) or (not value and not default)
        if not same and field.name not in _DERIVED and not field.name.endswith("_token"):
            changed[field.name] = value
    return changed
