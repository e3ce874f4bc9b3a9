"""A run of one adapter that ends at a stage: scored there, with a checkpoint to go on from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from lora_fsdp.evaluation.metrics import evaluation_metrics
from lora_fsdp.evaluation.outputs import write_json
from lora_fsdp.ranks import on_first_rank
from lora_fsdp.sweeps.earlier import STAGE_SCORES_FILE
from lora_fsdp.sweeps.halving import step_at
from lora_fsdp.training.trainer import LoraTrainer


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
