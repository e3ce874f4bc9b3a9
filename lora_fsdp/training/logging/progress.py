"""The progress that a person watches: a bar on a terminal, and one short line a log."""

from __future__ import annotations

import os
import sys
from datetime import timedelta
from typing import Any

from tqdm.auto import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from lora_fsdp.printing import cost_text
from lora_fsdp.training.logging.figures import RunFigures

_SHOWN = ("loss", "grad_norm", "learning_rate", "eval_loss", "eval_accuracy")


class RunProgress(TrainerCallback):
    """Rank 0's progress: a bar on a terminal, and one short line a log.

    Stands in for transformers' own progress callbacks, which print every metric of every label.
    """

    def __init__(self, figures: RunFigures, *, primary_metric: str) -> None:
        self.figures = figures
        self.shown = tuple(dict.fromkeys((*_SHOWN, f"eval_{primary_metric}")))
        self.bar: tqdm[Any] | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Open the bar."""
        self.figures.start(state.global_step)
        live = sys.stderr.isatty() and os.environ.get("TERM") != "dumb"
        if state.is_world_process_zero and not args.disable_tqdm and live:
            self.bar = tqdm(
                total=state.max_steps,
                initial=state.global_step,
                unit="step",
                dynamic_ncols=True,
                desc="training",
            )

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
        shown = [f"{name} {logs[name]:.4g}" for name in self.shown if name in logs]
        if not state.is_world_process_zero or not shown:
            return
        line = "  ".join([f"step {state.global_step}/{state.max_steps}", *shown, *_figures(logs)])
        tqdm.write(line, file=sys.stdout)
        sys.stdout.flush()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Close the bar."""
        if self.bar is not None:
            self.bar.close()
            self.bar = None


def _figures(logs: dict[str, float]) -> list[str]:
    """Speed, remaining time, cost and GPUs of a log, for one line."""
    shown = []
    for name, short in (("examples_per_second", "examples/s"), ("tokens_per_second", "tokens/s")):
        if name in logs:
            value = logs[name]
            shown.append(f"{short} {value:,.0f}" if value >= 1000 else f"{short} {value:.4g}")
    if "eta_seconds" in logs:
        shown.append(f"ETA {timedelta(seconds=round(logs['eta_seconds']))}")
    if "cost" in logs:
        shown.append(f"cost {cost_text(logs['cost'])}")
    for prefix, heading, unit in (("gpu_memory_gb/", "GPU", "GB"), ("gpu_utilization/", "", "%")):
        values = [value for name, value in logs.items() if name.startswith(prefix)]
        if values:
            listed = " ".join(f"{value:.3g}" for value in values)
            shown.append(f"{heading} {listed} {unit}".strip())
    return shown
