"""What stands beside the tuned model: the untrained one, and the frozen probe on its states."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import DataLoader

from lora_fsdp.arguments import FineTuningArguments
from lora_fsdp.data.encoding import EncodedExample
from lora_fsdp.data.sampling import ScoringSequence
from lora_fsdp.data.workload import probed_rows
from lora_fsdp.evaluation.comparison import Comparison, compare
from lora_fsdp.evaluation.metrics import answers_of
from lora_fsdp.evaluation.outputs import PROBE
from lora_fsdp.evaluation.probing import probe_answers, shared_tokens
from lora_fsdp.evaluation.untrained import AS_TRAINED
from lora_fsdp.ranks import on_first_rank
from lora_fsdp.tasks import Example, Task
from lora_fsdp.tasks.answers import ModelOutputs
from lora_fsdp.training.calibrating import (
    UNDECIDED,
    CalibratedRun,
    DecidedTask,
    save_calibration,
    save_decided,
)
from lora_fsdp.training.scorer import RunScorer
from lora_fsdp.training.trainer import LoraTrainer


@dataclass(frozen=True)
class Untrained:
    """What the base alone gives for the reported rows.

    Attributes:
        ways: its outputs, read in each way that fits.
        answers: those of further rivals, by their name.
        facts: about them, for `metrics.json`.
    """

    ways: Mapping[str, ModelOutputs]
    answers: Mapping[str, Sequence[str]]
    facts: Mapping[str, Any]


def score_untrained(
    trainer: LoraTrainer,
    reported: Sequence[EncodedExample],
    *,
    with_shots: Sequence[EncodedExample] = (),
) -> Untrained:
    """Score the base on the reported rows, and read its states of them and of training rows.

    A collective call.

    Args:
        trainer: has the base.
        reported: the rows.
        with_shots: the same with examples in their prompts, for further ways of reading the base.
    """
    found = score_base(
        trainer.scorer,
        trainer.get_eval_dataloader,
        learnt=rows_to_probe(trainer.task, trainer.args, trainer.train_dataset),
        reported=reported,
    )
    if not with_shots:
        return found
    ways, _ = trainer.scorer.untrained(trainer.get_eval_dataloader(with_shots))
    shown = f"{trainer.args.untrained_shots} examples in the prompt"
    more = {shown if way == AS_TRAINED else f"{shown}, {way}": out for way, out in ways.items()}
    return replace(found, ways={**found.ways, **more})


def score_base(
    scorer: RunScorer,
    loader: Callable[[Sequence[EncodedExample]], DataLoader[ScoringSequence]],
    *,
    learnt: Sequence[EncodedExample],
    reported: Sequence[EncodedExample],
) -> Untrained:
    """As `score_untrained`, of any model that a scorer has.

    Args:
        scorer: of the model.
        loader: lays examples into this rank's sequences.
        learnt: of `rows_to_probe`.
        reported: the rows that are scored.
    """
    skip = shared_tokens([*learnt, *reported]) if learnt else None
    ways, tested = scorer.untrained(loader(reported), skip=skip)
    if tested is None or skip is None:
        return Untrained(ways, {}, {})
    # Their answers are not scored: one token of each is asked for, since a forward needs a label.
    prompts = [
        replace(one, candidate_ids=(), target_ids=one.target_ids[:1], label=None) for one in learnt
    ]
    features = scorer.features(loader(prompts), skip=skip)
    if features is None:
        return Untrained(ways, {}, {})
    labels = answers_of(scorer.encoder.task, [one.example for one in learnt])
    answers = on_first_rank(lambda: probe_answers(features, labels, tested))
    return Untrained(ways, {PROBE: answers}, {"probe_rows": len(learnt)})


def rows_to_probe(
    task: Task, arguments: FineTuningArguments, rows: Sequence[EncodedExample]
) -> list[EncodedExample]:
    """Training rows that the probe learns from, a seeded sample; none where it does not fit."""
    if not (most := probed_rows(task, arguments.probe_rows, len(rows))):
        return []
    order = np.random.default_rng(arguments.seed).permutation(len(rows))
    return [rows[place] for place in sorted(order[:most].tolist())]


def compare_run(
    task: Task,
    *,
    train: Sequence[Example],
    reported: Sequence[EncodedExample],
    untrained: Untrained,
    tuned: ModelOutputs,
    calibrated: CalibratedRun,
    decided: DecidedTask = UNDECIDED,
    folder: Path,
    facts: Mapping[str, Any],
    written: Sequence[Mapping[str, Any]] = (),
) -> Comparison:
    """The tuned model's scores beside all others'; what was fitted for it is saved.

    A collective call.

    Args:
        task: what was learnt.
        train, reported: the rows.
        untrained: what the base alone gives.
        tuned, calibrated: what the tuned model gives.
        decided: what validation rows decide of its answers.
        folder: the adapter's.
        facts: further entries of `metrics.json`.
        written: see `generated_texts`.
    """
    if (calibration := calibrated.calibration) is not None:
        on_first_rank(lambda: save_calibration(calibration, folder))
    if (settled := decided.task) is not None:
        on_first_rank(lambda: save_decided(settled, folder))
    return compare(
        task,
        train=train,
        held_out=reported,
        untrained=untrained.ways[AS_TRAINED],
        ways=untrained.ways,
        rivals=untrained.answers,
        tuned=tuned,
        calibrated=calibrated.outputs,
        decided=decided.task,
        written=written,
        facts={**facts, **untrained.facts, **calibrated.facts, **decided.facts},
    )
