"""Adapters that share no pass: each trained as its own run, one after the other."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import SaveStrategy

from lora_fsdp.arguments import FineTuningArguments, LoraArguments
from lora_fsdp.data.encoding import EncodedExample
from lora_fsdp.data.rows import TaskData
from lora_fsdp.errors import NonFiniteError
from lora_fsdp.evaluation.comparison import Comparison
from lora_fsdp.evaluation.metrics import evaluation_metrics
from lora_fsdp.evaluation.outputs import write_json
from lora_fsdp.printing import say
from lora_fsdp.ranks import on_first_rank, rank
from lora_fsdp.sweeps.earlier import STAGE_SCORES_FILE
from lora_fsdp.sweeps.grid import Asked
from lora_fsdp.sweeps.halving import Stage, step_at
from lora_fsdp.sweeps.kept_base import KeptBase
from lora_fsdp.sweeps.once import Once
from lora_fsdp.sweeps.passes import note_stopped
from lora_fsdp.tasks import Example
from lora_fsdp.tasks.answers import ModelOutputs
from lora_fsdp.training.rivals import Untrained
from lora_fsdp.training.trainer import LoraTrainer

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunAlone:
    """What an adapter is trained with in its turn.

    Attributes:
        lora, training: its own arguments.
        data: its examples.
        tokens: the same as token ids.
        base: the base, to be taken and given back.
        untrained: what the untrained model gives for its held-out rows, if that is known.
        test: rows of which only the tuned model's answers are wanted.
    """

    lora: LoraArguments
    training: FineTuningArguments
    data: TaskData
    tokens: Callable[[Sequence[Example]], list[EncodedExample]]
    base: KeptBase
    untrained: Untrained | None
    test: list[Example]


@dataclass(frozen=True)
class RanAlone:
    """What it came to, and what the untrained model gives for its held-out rows.

    `test` is `None` where there are no test rows.
    """

    comparison: Comparison
    untrained: Untrained
    test: ModelOutputs | None


@dataclass(frozen=True)
class TrainAlone:
    """How one adapter is trained by itself: both are collective calls.

    Attributes:
        to_the_end: trains, saves and scores it, in its folder.
        to_share: trains it up to a share of its steps, leaves a checkpoint, and gives its score.
    """

    to_the_end: Callable[[RunAlone], RanAlone]
    to_share: Callable[[RunAlone, float], float]


def train_in_turn(
    once: Once,
    one: Asked,
    arguments: FineTuningArguments,
    *,
    train_alone: TrainAlone,
    stage: Stage | None = None,
) -> float | None:
    """Train one adapter by itself, into its folder, and score it. A collective call.

    Args:
        once: what all adapters have in common.
        one: the adapter.
        arguments: its own.
        train_alone: trains and scores.
        stage: up to where; `None` = to the end.

    Returns:
        of a stage, its score on its validation rows, `None` if it has diverged.
    """
    folder = once.root / one.name
    later = stage is not None and stage.number > 0
    goes_on = (once.training.resume_from_checkpoint or later) and any(folder.glob("checkpoint-*"))
    arguments.resume_from_checkpoint = True if goes_on else None  # type: ignore[assignment]
    arguments.overwrite_output_dir = True  # what is left of a session that was killed
    if rank() == 0:
        say(f"\n{one.name}:", flush=True)
    alone = RunAlone(
        one.adapter(once.lora),
        arguments,
        once.data_of(one),
        once.tokens,
        once.base,
        once.untrained.get(one.fold),
        once.rows.test,
    )
    try:
        if stage is not None and stage.share < 1:
            return train_alone.to_share(alone, stage.share)
        ran = train_alone.to_the_end(alone)
    except NonFiniteError as error:  # on every rank
        why = " ".join(str(error).split())
        on_first_rank(lambda: note_stopped(folder, why))
        logger.warning("%s stops: %s. The others go on.", one.name, why)
        return None
    once.know(one.fold, ran.untrained, ran.comparison)
    on_first_rank(lambda: once.write_results(one.name, ran.comparison, ran.test))
    if later and SaveStrategy(arguments.save_strategy) is SaveStrategy.NO:
        on_first_rank(lambda: _remove_checkpoints(folder))
    return None


def _remove_checkpoints(folder: Path) -> None:
    """Those that stages have left, where none were asked for."""
    for checkpoint in folder.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)


class StopAtShare(TrainerCallback):
    """Scores the held-out rows after a share of the steps, then has the run saved and stopped.

    The score is written before the checkpoint, so that a checkpoint there has its score, whenever
    the process is killed.

    Args:
        trainer: of the run.
        share: of its optimizer steps.

    Attributes:
        step: after which it stops.
        score: by the metric that decides; `None` before.
    """

    def __init__(self, trainer: LoraTrainer, share: float) -> None:
        self.trainer = trainer
        self.step = step_at(share, trainer.schedule.steps)
        self.score: float | None = None

    @property
    def _folder(self) -> Path:
        return Path(str(self.trainer.args.output_dir))

    def known(self) -> float | None:
        """The score, if an earlier session came to this step and is gone on with."""
        file = self._folder / STAGE_SCORES_FILE
        there = (self._folder / f"checkpoint-{self.step}").is_dir()
        if not self.trainer.args.resume_from_checkpoint or not there or not file.is_file():
            return None
        score = json.loads(file.read_text(encoding="utf-8")).get(str(self.step))
        return None if score is None else float(score)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Score, save and stop."""
        if state.global_step < self.step:
            return
        trainer = self.trainer
        # Loaders draw numbers, too: the run is to go on as if it had not been stopped.
        with torch.random.fork_rng(devices=()), trainer.watchdogs.away("scoring a stage"):
            outputs = trainer.outputs(trainer.held_out)
        metrics = evaluation_metrics(trainer.task, trainer.held_out, outputs)
        self.score = float(metrics[trainer.task.primary_metric])
        on_first_rank(self._write)
        control.should_save = control.should_training_stop = True

    def _write(self) -> None:
        file = self._folder / STAGE_SCORES_FILE
        before = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        write_json(file, {**before, str(self.step): self.score})
