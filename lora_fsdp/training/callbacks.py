"""What happens at the edges of epochs and steps."""

from __future__ import annotations

import sys
import time
from typing import Any

from tqdm.auto import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from lora_fsdp.data.sampling import TrainingSteps
from lora_fsdp.distributed.replication import ReplicatedParameters

_SHOWN = ("loss", "grad_norm", "learning_rate", "eval_loss", "eval_accuracy")


class ShuffleEachEpoch(TrainerCallback):
    """Gives the training steps their epoch, also when a run resumes in the middle of one."""

    def __init__(self, steps: TrainingSteps) -> None:
        self.steps = steps

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Shuffle for the epoch that begins."""
        self.steps.set_epoch(state.global_step // len(self.steps))


class CheckAdapterMoves(TrainerCallback):
    """Stops a run whose adapter does not move in the first step that has a learning rate."""

    def __init__(self, adapter: ReplicatedParameters) -> None:
        self.adapter = adapter
        self.done = False

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Check once."""
        learning_rate = kwargs["optimizer"].param_groups[0]["lr"]
        if not self.done and learning_rate > 0:
            self.adapter.check_moved()
            self.done = True


class RunProgress(TrainerCallback):
    """Rank 0's progress: a bar on a terminal, and one short line a log.

    Stands in for transformers' own progress callbacks, which print every metric of every label.
    """

    def __init__(self, *, examples_per_step: int, primary_metric: str) -> None:
        self.examples_per_step = examples_per_step
        self.shown = (*_SHOWN, f"eval_{primary_metric}")
        self.bar: tqdm[Any] | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Open the bar."""
        self._logged = (time.perf_counter(), state.global_step)
        if state.is_world_process_zero and not args.disable_tqdm and sys.stderr.isatty():
            self.bar = tqdm(total=state.max_steps, initial=state.global_step, unit="step")

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Advance the bar."""
        if self.bar is not None:
            self.bar.update(state.global_step - self.bar.n)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Print what a person watches; everything else goes to the trackers."""
        logs = logs or {}
        shown = {name: logs[name] for name in self.shown if name in logs}
        if not state.is_world_process_zero or not shown:
            return
        if "loss" in shown:
            now, step = time.perf_counter(), state.global_step
            seconds, steps = now - self._logged[0], step - self._logged[1]
            shown["examples/s"] = steps * self.examples_per_step / max(seconds, 1e-9)
            self._logged = (now, step)
        figures = "  ".join(f"{name} {value:.4g}" for name, value in shown.items())
        tqdm.write(f"step {state.global_step}/{state.max_steps}  {figures}", file=sys.stdout)
        sys.stdout.flush()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Close the bar."""
        if self.bar is not None:
            self.bar.close()
            self.bar = None
