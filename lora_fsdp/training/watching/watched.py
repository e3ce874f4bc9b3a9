"""`transformers.Trainer` whose runs are watched: what went wrong is said while it does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from accelerate.optimizer import AcceleratedOptimizer
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import TrainOutput

from lora_fsdp.data.encoding import EncodedExample
from lora_fsdp.data.sampling import shares_of_step
from lora_fsdp.distributed.drift import check_no_drift
from lora_fsdp.training.saving.durable import DurableTrainer
from lora_fsdp.training.watching.diverged_step import diverged
from lora_fsdp.training.watching.finiteness import FiniteSteps
from lora_fsdp.training.watching.heartbeat import Heartbeat
from lora_fsdp.training.watching.log_warnings import WarnFlatLoss, WarnSlowdown


class WatchedTrainer(DurableTrainer):
    """What `LoraTrainer` overrides of the Trainer to watch a run, and why:

    * `train`: watches for ranks that stall, while it runs.
    * `create_optimizer`: a fused one can be held still on the device.
    * `log`, `_save_checkpoint`, `_finalize_training`: where the host waits for the device anyway,
      steps that were not finite and ranks that drifted apart are found.
    * `evaluate`, `_save_checkpoint`, `_finalize_training`: may rightly take long.
    """

    train_dataset: list[EncodedExample]
    examples_per_step: int
    order_seed: int
    finite: FiniteSteps
    heartbeat: Heartbeat

    # After which step the ranks were last found equal.
    _last_equal: int | None = None

    def watch(self) -> None:
        """Begin to watch; to be called when the trainer is complete."""
        self._begin_watching()
        self.add_callback(WarnFlatLoss(self.args.flat_loss_steps))
        self.add_callback(WarnSlowdown())

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> TrainOutput:
        """As `DurableTrainer.train`.

        Raises:
            WatchdogError: a step was not finite, or the ranks drifted apart.
        """
        self._begin_watching()
        self.remove_callback(Beat)
        self.add_callback(Beat(self.heartbeat))
        with self.heartbeat.watching():
            return super().train(resume_from_checkpoint, trial, ignore_keys_for_eval)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """The Trainer's, held still once a step was not finite."""
        optimizer = super().create_optimizer(model)
        inner = optimizer
        if isinstance(inner, AcceleratedOptimizer):  # at a second `train`
            inner = inner.optimizer
        self.finite.hold(inner)
        return optimizer

    def before_optimizer(self, norm: torch.Tensor) -> None:
        """Look at the norm of the summed gradient."""
        self.finite.see_sum(norm, step=self.state.global_step + 1)
        if not self.moves.done:  # which would take an adapter that is held still for a stuck one
            self.check_finite()

    def check_finite(self) -> None:
        """Stop if a step was not finite. Waits for the device; a collective call.

        Raises:
            NonFiniteError: names step, ranks and rows; the batch is saved.
        """
        bad = self.finite.first_bad_step()
        if bad is None:
            return
        raise diverged(
            bad,
            shares=shares_of_step(
                self.train_dataset,
                bad.step - 1,
                examples_per_step=self.examples_per_step,
                world_size=self.args.world_size,
                seed=self.order_seed,
            ),
            model=self.model,
            tokenizer=self.processing_class,
            run_folder=Path(str(self.args.output_dir)),
            adapter_held=self.finite.holds_optimizer,
        )

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log, unless a watchdog stops the run."""
        if "loss" in logs:
            self.check_finite()
            self._check_drift()
        super().log(logs, start_time)

    def _check_drift(self) -> None:
        step, every = self.state.global_step, self.args.drift_check_steps
        if every and step - (self._last_equal or 0) >= every:
            check_no_drift(self.adapter, step=step, last_equal=self._last_equal)
            self._last_equal = step

    def evaluate(
        self,
        eval_dataset: Any = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """The Trainer's."""
        with self.heartbeat.away("evaluation"):
            return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        with self.heartbeat.away("saving a checkpoint"):
            self.check_finite()
            super()._save_checkpoint(model, trial)

    def _finalize_training(
        self, trial: Any, num_train_samples: int, start_time: float
    ) -> TrainOutput:
        with self.heartbeat.away("the end of training"):
            self.check_finite()
            return super()._finalize_training(trial, num_train_samples, start_time)

    def _begin_watching(self) -> None:
        self.finite = FiniteSteps(self.adapter, self.args.device)
        self._last_equal = None
        self.heartbeat = Heartbeat(
            rank=self.args.process_index,
            world_size=self.args.world_size,
            stall_seconds=self.args.stall_seconds,
            run_folder=Path(str(self.args.output_dir)),
        )


class Beat(TrainerCallback):
    """Tells the heartbeat where the main thread is."""

    def __init__(self, heartbeat: Heartbeat) -> None:
        self.heartbeat = heartbeat

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """The step's rows are there."""
        self.heartbeat.beat(state.global_step + 1, "forward and backward")

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """The step is made."""
        self.heartbeat.armed()
        self.heartbeat.beat(state.global_step, "done; the next one's rows or a callback")
