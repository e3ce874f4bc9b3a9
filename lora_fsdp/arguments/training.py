"""The training run: `transformers.TrainingArguments` and what it lacks."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import TrainingArguments

from lora_fsdp.arguments.optimizers import check_optimizer
from lora_fsdp.arguments.option import check_is_text, option
from lora_fsdp.arguments.trackers import check_trackers
from lora_fsdp.arguments.trainer_settings import check_trainer_settings
from lora_fsdp.errors import ArgumentError
from lora_fsdp.ranks import rank

logger = logging.getLogger(__name__)

_SAVE_STEPS = 500  # the default of transformers


@dataclass
class FineTuningArguments(TrainingArguments):
    """`transformers.TrainingArguments` with this library's defaults and the few settings it adds.

    An optimizer step sees `per_device_train_batch_size * gradient_accumulation_steps` examples per
    process, however they are divided between the two: they are packed into sequences of at
    most `max_tokens_per_row` tokens, so accumulation is never needed to save memory.
    """

    output_dir: str = option("runs/latest", "Where the run is written.")
    per_device_train_batch_size: int = option(8, "Examples per process and accumulation step.")
    learning_rate: float = option(2e-4, "Peak learning rate.")
    logging_steps: float = option(10, "Log every so many steps.")
    logging_nan_inf_filter: bool = option(
        False, "Hide NaN losses from the log (costs a device sync every step)."
    )
    # A list, so that nothing leaves the machine unless a tracker is asked for by name.
    report_to: None | str | list[str] = field(  # noqa: RUF036 (trl reads the order)
        default_factory=list, metadata={"help": "Trackers to report to; none by default."}
    )
    share_prefix: Literal["auto", "always", "never"] = option(
        "auto",
        "Compute the tokens that all prompts of a packed sequence begin with once. "
        "auto = where neither LoRA nor the model drops anything, so that gradients are exact; "
        "with dropout they stay unbiased, but examples of a sequence share the prefix's masks.",
    )
    packing: Literal["auto", "always", "never"] = option(
        "auto",
        "Lay many examples into one sequence, kept apart by a mask. auto = where the model keeps "
        "them apart, which is checked on the model itself; otherwise, and with never, each "
        "example has a sequence of its own, as ALiBi and some recurrent models need it. always = "
        "refuse models that cannot be packed.",
    )
    max_tokens_per_row: int | None = option(
        None,
        "Longest packed sequence, or batch of sequences of one example, in tokens (bounds "
        "activation memory). Not given: what half of the free GPU memory holds, from 2048 to 8192; "
        "2048 on a CPU.",
    )
    step: Literal["auto", "eager", "fused", "compiled", "graph"] = option(
        "auto",
        "How forward and backward run: by the model's own layers, by fused layers, by "
        "layers compiled by torch and captured, or by fused layers captured as CUDA graphs "
        "(under FSDP shards with their gathers, which auto leaves out). All give the same "
        "gradients; auto says what it chose.",
    )
    resident_layers: str = option(
        "auto",
        "Under FSDP, the layers that every rank keeps resident (unsharded, never "
        "gathered): all, none, or their number. auto = as many as GPU memory holds; none on a "
        "CPU.",
    )
    examples_per_step: int | None = option(
        None,
        "Examples of an optimizer step over all processes, instead of "
        "--gradient_accumulation_steps: the same however many processes there are.",
    )
    overwrite_output_dir: bool = option(False, "Replace a run that output_dir already holds.")
    max_hours: float | None = option(
        None,
        "Stop after so many hours of training, as on SIGTERM: with a checkpoint and exit code 75.",
    )
    stall_seconds: float = option(
        600.0,
        "End a run whose step makes no progress for so long, with the last step and "
        "the stack of every rank; exit code 70. 0 = never.",
    )
    drift_check_steps: int = option(
        100,
        "Compare the adapter across ranks at the first log after so many steps. "
        "0 = only when it is saved.",
    )
    flat_loss_steps: int = option(
        200, "Warn when the loss has not moved in so many steps. 0 = never."
    )
    restore_callback_states_from_checkpoint: bool = option(
        True, "Resume callbacks (early stopping) where they were as well."
    )
    early_stopping_patience: int | None = option(
        None,
        "Stop when the metric (metric_for_best_model; the held-out loss when not given) has not "
        "improved in so many evaluations, and keep the best adapter. Evaluates and saves once an "
        "epoch where nothing else is asked for.",
    )
    early_stopping_threshold: float = option(0.0, "Least change that counts as an improvement.")
    price_per_hour: float | None = option(
        None, "GPU (or machine) price per hour; shows the run's cost so far."
    )
    allow_fsdp_on_one_process: bool = option(
        False, "Run an FSDP YAML on one process, where it shards nothing."
    )
    generate_examples: int = option(
        0, "Let base and adapter generate text freely for so many held-out rows."
    )
    probe_rows: int = option(
        2000,
        "Training rows that the frozen probe reads before training, one forward each; it is a "
        "rival in the report. 0 = no probe.",
    )
    untrained_shots: int = option(
        0,
        "Examples of training rows in the prompt of the untrained model, a further way of reading "
        "it as a rival in the report: one more pass over the scored rows. Tuning and predicting "
        "are not changed.",
    )
    focal_gamma: float = option(
        0.0,
        "Focal loss: each right answer's loss times (1 - its likelihood) to this power, so that "
        "what is known already counts less. 0 = off. Not for free text, shares, numbers or pairs.",
    )
    ranked_weight: float = option(
        0.0,
        "Scores on a scale: so many times the ranked probability score is added to the loss, which "
        "makes a level far off cost more than one next to it. 0 = off.",
    )
    max_new_tokens: int | None = option(
        None,
        "Longest answer that is generated, in tokens. Not given: the longest training "
        "answer, and at least 20.",
    )
    temperature: float = option(0.0, "Sampling temperature of free generation; 0 = greedy.")
    seeds: int = option(
        1,
        "Train so many adapters that differ in their seed alone (--seed, the next one, ...), each "
        "into a folder of its own: one figure with its spread.",
    )
    folds: int | None = option(
        None,
        "Train so many adapters, each of which leaves out another part of the rows: every row is "
        "answered by one that has not learnt from it (out_of_fold.csv).",
    )
    grid: list[str] | None = option(
        None,
        "Train an adapter for every combination: learning_rate=1e-4,3e-4 lora_r=8,32, or a YAML "
        "file. The best is chosen by validation rows and measured on the held-out rows.",
    )
    search: Literal["grid", "random", "halving"] = option(
        "grid",
        "Which settings of --grid are tried to their end: all, --trials of them at random, or by "
        "successive halving (all begin, and the best third goes on at each of a few stages).",
    )
    trials: int | None = option(
        None,
        "Of the settings of --grid, draw so many at random (--seed); with a range, as in "
        "learning_rate=1e-4..1e-2, from between its ends.",
    )
    adapters_at_once: int | None = option(
        None,
        "The most adapters that share a pass over the base; 1 = one after the other. Without it 8 "
        "on a CPU, and 1 on GPUs, where more are faster and take more memory.",
    )

    def __post_init__(self) -> None:
        if not torch.cuda.is_available():
            # Without it, ranks on a machine without GPUs would each train alone, unjoined.
            self.use_cpu = True
        if isinstance(self.resume_from_checkpoint, str):
            named = {"true": True, "last": True, "false": None, "": None}
            if self.resume_from_checkpoint.lower() == "if_any":
                named["if_any"] = self._has_any() or None
            choice = named.get(self.resume_from_checkpoint.lower(), self.resume_from_checkpoint)
            self.resume_from_checkpoint = choice  # type: ignore[assignment]
        self._settle_early_stopping()
        super().__post_init__()
        self._check()
        if self.examples_per_step is not None:
            self._divide(self.examples_per_step)

    def _has_any(self) -> bool:
        """Whether the output folder has a checkpoint."""
        folder = Path(self.output_dir or ".")
        there = folder.iterdir() if folder.is_dir() else ()
        return any(re.fullmatch(r"checkpoint-\d+", p.name) and p.is_dir() for p in there)

    def _divide(self, wanted: int) -> None:
        """Give each process its part of a step."""
        each, rest = divmod(wanted, self.world_size)
        if rest or each < 1:
            raise ArgumentError(
                f"--examples_per_step {wanted} cannot be divided between {self.world_size} "
                "processes: give a multiple of every number of processes that the run may have."
            )
        if self.gradient_accumulation_steps != 1:
            raise ArgumentError(
                f"--examples_per_step {wanted} sets the accumulation: remove "
                "--gradient_accumulation_steps."
            )
        accumulation, rest = divmod(each, self.per_device_train_batch_size)
        if rest:
            self.per_device_train_batch_size, accumulation = each, 1
        self.gradient_accumulation_steps = accumulation

    @property
    def chooses_checkpoint(self) -> bool:
        """Whether the held-out rows decide which checkpoint is kept."""
        return chooses_checkpoint(vars(self))

    def _settle_early_stopping(self) -> None:
        """What early stopping needs: evaluations, and a checkpoint of each to take the best of."""
        patience, threshold = self.early_stopping_patience, self.early_stopping_threshold
        if threshold < 0:
            raise ArgumentError(f"--early_stopping_threshold must be 0 or more, not {threshold}.")
        if patience is None:
            if threshold:
                raise ArgumentError(
                    "--early_stopping_threshold does nothing without --early_stopping_patience: "
                    "give both."
                )
            return
        if patience < 1:
            raise ArgumentError(f"--early_stopping_patience must be 1 or more, not {patience}.")
        if self.save_strategy == "no":
            raise ArgumentError(
                "--early_stopping_patience keeps the best adapter, of which --save_strategy no "
                "would save none: remove one of them."
            )
        if self.eval_strategy == "no":
            if self.eval_steps is not None:
                raise ArgumentError("--eval_steps needs --eval_strategy steps: add it.")
            self.eval_strategy = "epoch"
        # Where only evaluations were asked for, and by another measure than transformers' default.
        if self.save_strategy == "steps" and self.eval_strategy == "epoch":
            self.save_strategy = "epoch"
        elif self.save_strategy == self.eval_strategy == "steps" and self.save_steps == _SAVE_STEPS:
            self.save_steps = self.eval_steps or self.logging_steps
        self.load_best_model_at_end = True

    def _check(self) -> None:
        for name in ("output_dir", "resume_from_checkpoint", "run_name"):
            check_is_text(name, getattr(self, name))
        # `mixed_precision` also holds what the accelerate YAML says.
        if self.fp16 or self.mixed_precision == "fp16":
            raise ArgumentError(
                "fp16 is not supported: its loss scaling hides small adapter gradients. "
                "Use --dtype bfloat16 (or float32), and mixed_precision: 'no' in the YAML."
            )
        if self.fsdp or self.fsdp_config:
            raise ArgumentError(
                "FSDP is configured by an accelerate YAML only (accelerate launch --config_file "
                "accelerate_configs/fsdp2.yaml ...): remove --fsdp and --fsdp_config."
            )
        for sentence in check_trainer_settings(self):
            if rank() == 0:
                logger.warning("%s", sentence)
        if self.ignore_data_skip:
            raise ArgumentError(
                "--ignore_data_skip would show examples twice in the resumed epoch, and skipping "
                "costs nothing on packed sequences: remove it."
            )
        if self.max_hours is not None and self.max_hours <= 0:
            raise ArgumentError(f"--max_hours must be more than 0, not {self.max_hours}.")
        if self.max_new_tokens is not None and self.max_new_tokens < 1:
            raise ArgumentError(f"--max_new_tokens must be 1 or more, not {self.max_new_tokens}.")
        for name in ("stall_seconds", "drift_check_steps", "flat_loss_steps", "probe_rows",
                     "untrained_shots"):  # fmt: skip
            if getattr(self, name) < 0:
                raise ArgumentError(f"--{name} must be 0 (off) or more, not {getattr(self, name)}.")
        for name in ("focal_gamma", "ranked_weight"):
            value = getattr(self, name)
            if not (isinstance(value, int | float) and 0 <= value <= 100):
                raise ArgumentError(f"--{name} must be from 0 (off) to 100, not {value}.")
        if not 0 <= self.label_smoothing_factor < 1:
            raise ArgumentError(
                "--label_smoothing_factor must be from 0 to less than 1, not "
                f"{self.label_smoothing_factor}."
            )
        for name, least in (("seeds", 1), ("folds", 2), ("trials", 1), ("adapters_at_once", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ArgumentError(f"--{name} must be {least} or more, not {value}.")
        if self.save_on_each_node and (self.seeds > 1 or self.folds or self.grid):
            raise ArgumentError(
                "--save_on_each_node is for one adapter: put the --output_dir of several (--seeds, "
                "--folds, --grid) on a disk that all machines share, and remove it."
            )
        if self.deepspeed:
            raise ArgumentError("DeepSpeed is not supported: remove --deepspeed.")
        check_optimizer(self.optim, self.optim_args)
        check_trackers(self.report_to)  # type: ignore[arg-type] # a list by now


def chooses_checkpoint(training: Mapping[str, Any]) -> bool:
    """Whether a checkpoint is chosen by held-out rows, as early stopping does, too.

    Args:
        training: values of `FineTuningArguments` by name.
    """
    stops = training.get("early_stopping_patience") is not None
    return stops or bool(training.get("load_best_model_at_end"))


def from_training_arguments(args: TrainingArguments) -> FineTuningArguments:
    """`FineTuningArguments` that say what `transformers.TrainingArguments` do, defaults included.

    Raises:
        ArgumentError: they are of a class with further settings, or one that is refused here.
    """
    values = {one.name: getattr(args, one.name) for one in fields(TrainingArguments) if one.init}
    known = {one.name for one in fields(TrainingArguments)}
    if more := [one.name for one in fields(args) if one.name not in known]:
        named = ", ".join(more[:3]) + (", ..." if len(more) > 3 else "")
        raise ArgumentError(
            f"{type(args).__name__} has settings of another trainer ({named}): give "
            "FineTuningArguments, or transformers.TrainingArguments."
        )
    return FineTuningArguments(**values)
