"""What rows that were not trained on say of a finished run: its calibration, its thresholds."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from lora_fsdp.adapter.folder import ADAPTER_FILE
from lora_fsdp.base.folders import sha256_of_file
from lora_fsdp.data.encoding import EncodedExample
from lora_fsdp.evaluation.calibration import (
    CALIBRATION_FILE,
    Calibration,
    figures,
    fit_calibration,
)
from lora_fsdp.evaluation.prediction import TASK_FILE, read_task
from lora_fsdp.tasks import Task
from lora_fsdp.tasks.answers import ModelOutputs
from lora_fsdp.training.saving.atomic_folders import add_file
from lora_fsdp.training.trainer import LoraTrainer


@dataclass(frozen=True)
class CalibratedRun:
    """What the tuned model says, calibrated.

    Attributes:
        calibration: for the adapter; `None` if there is none.
        outputs: for the reported rows, by parameters that none of them was fitted on; `None` too.
        facts: for `metrics.json`.
    """

    calibration: Calibration | None
    outputs: ModelOutputs | None
    facts: Mapping[str, Any]


@dataclass(frozen=True)
class DecidedTask:
    """A task with what validation rows decide of its answers.

    Attributes:
        task: for the adapter and the report; `None` = nothing was decided.
        facts: for `metrics.json`.
    """

    task: Task | None
    facts: Mapping[str, Any]


UNDECIDED = DecidedTask(None, {})


def calibrate(
    trainer: LoraTrainer, reported: Sequence[EncodedExample], tuned: ModelOutputs
) -> CalibratedRun:
    """Fit on the validation rows, or crosswise on the reported ones where there are no others.

    A collective call.

    Args:
        trainer: after training.
        reported: the rows of the report.
        tuned: its outputs for them.
    """
    apart = bool(trainer.test_dataset)
    rows = list(trainer.held_out) if apart else None
    return calibrate_outputs(trainer.task, reported, tuned, apart=rows, outputs_of=trainer.outputs)


def calibrate_outputs(
    task: Task,
    reported: Sequence[EncodedExample],
    tuned: ModelOutputs,
    *,
    apart: Sequence[EncodedExample] | None = None,
    outputs_of: Callable[[Sequence[EncodedExample]], ModelOutputs] | None = None,
) -> CalibratedRun:
    """As `calibrate`, of any model's outputs.

    Args:
        task: what was learnt.
        reported: the rows of the report.
        tuned: the outputs for them.
        apart: rows that are not reported on, to be fitted on; `None` = there are none.
        outputs_of: the model's outputs for those.
    """
    kind = task.answer_kind
    rows = reported if apart is None else apart
    # What is generated has no candidates, and what is no one candidate no right one.
    known = all(one.label is not None and not one.shares for one in [*rows, *reported])
    if kind.generates_text or not known or not _is_likeliest(task, reported, tuned):
        return CalibratedRun(None, None, {"calibration": None})
    outputs = tuned if apart is None or outputs_of is None else outputs_of(rows)
    is_apart = apart is not None
    found = fit_calibration(
        outputs.log_likelihoods, _right(rows), labels=kind.labels, apart=is_apart
    )
    if found is None:
        return CalibratedRun(None, None, {"calibration": None})
    calibration, crossed = found
    calibrated = calibration.of(tuned) if is_apart else replace(tuned, log_likelihoods=crossed)
    facts = {
        "temperature": calibration.temperature,
        "biases": dict(zip(calibration.labels, calibration.biases, strict=False)),
        "rows": calibration.rows,
        "apart": is_apart,
        "before": figures(tuned.log_likelihoods, _right(reported)),
        "after": figures(calibrated.log_likelihoods, _right(reported)),
    }
    return CalibratedRun(calibration, calibrated, {"calibration": facts})


def _is_likeliest(task: Task, reported: Sequence[EncodedExample], tuned: ModelOutputs) -> bool:
    """Whether answers stay as they are where all probabilities draw nearer to each other.

    Not those that are a mean or pass a threshold: they have a calibration of another kind.
    """
    kind, examples = task.answer_kind, [one.example for one in reported]
    flatter = replace(tuned, log_likelihoods=tuned.log_likelihoods / 4)
    return list(kind.answers(examples, tuned)) == list(kind.answers(examples, flatter))


def decide(trainer: LoraTrainer) -> DecidedTask:
    """What the rows that are not reported on decide of the answers, where there are such rows.

    A collective call.

    Args:
        trainer: after training.
    """
    task, rows = trainer.task, list(trainer.held_out)
    # Without rows for the test, the validation rows are those of the report.
    if not trainer.test_dataset or not rows or not task.is_undecided:
        return UNDECIDED
    decided = task.decided_by([one.example for one in rows], trainer.outputs(rows))
    before, after = task.options(), decided.options()
    options = {name: value for name, value in after.items() if value != before.get(name)}
    facts = {"rows": len(rows), "options": options, "says": decided.answer_kind.decided}
    return DecidedTask(decided, {"decided": facts})


def save_decided(task: Task, folder: Path) -> None:
    """Write it into `task.json` beside the adapter in `folder`; for one rank to call."""
    saved = read_task(folder)
    saved["options"] = task.options()
    add_file(folder, TASK_FILE, json.dumps(saved, ensure_ascii=False, indent=2) + "\n")


def save_calibration(calibration: Calibration, folder: Path) -> None:
    """Write it beside the adapter in `folder`; for one rank to call."""
    digest = sha256_of_file(folder / ADAPTER_FILE)
    add_file(folder, CALIBRATION_FILE, replace(calibration, adapter_sha256=digest).to_json())


def _right(examples: Sequence[EncodedExample]) -> np.ndarray:
    return np.array([one.label for one in examples], dtype=np.int64)
