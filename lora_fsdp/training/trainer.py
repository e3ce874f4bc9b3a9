"""`transformers.Trainer` for LoRA over a sharded, frozen base."""

# Steps and packed sequences stand where the Trainer has dicts of tensors.
# mypy: disable-error-code="override"

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from itertools import islice
from operator import itemgetter
from pathlib import Path
from typing import Any, Never, cast

import pandas as pd
import torch
from accelerate.optimizer import AcceleratedOptimizer
from peft import LoraConfig, PeftModel
from torch import nn
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader
from transformers import (
    EarlyStoppingCallback,
    PreTrainedTokenizerBase,
    PrinterCallback,
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.trainer_utils import EvalLoopOutput, PredictionOutput, TrainOutput

from lora_fsdp.arguments import FineTuningArguments
from lora_fsdp.data.encoding import EncodedExample, Encoder
from lora_fsdp.data.sampling import (
    ScoringSequence,
    ScoringSequences,
    TrainingStep,
    TrainingSteps,
    shares_of_step,
)
from lora_fsdp.distributed.launch import accelerate_without_fsdp, read_fsdp_settings
from lora_fsdp.distributed.lost_hosts import watch_hosts
from lora_fsdp.distributed.orphans import end_with_launcher
from lora_fsdp.errors import ArgumentError
from lora_fsdp.evaluation.metrics import confusion_matrix, evaluation_metrics
from lora_fsdp.evaluation.scoring import Scores
from lora_fsdp.placement.network import HostTraffic, host_traffic
from lora_fsdp.ranks import on_first_rank
from lora_fsdp.tasks import Task
from lora_fsdp.tasks.answers import ModelOutputs
from lora_fsdp.tasks.shots import Shot
from lora_fsdp.training.checks import check_arguments
from lora_fsdp.training.given import (
    Base,
    Rows,
    by_name,
    examples_of,
    given_adapter,
    given_arguments,
    given_base,
    given_callbacks,
    given_data,
    given_tokenizer,
)
from lora_fsdp.training.hooks import (
    SEARCH,
    assigned_by_default,
    refuse_unused_arguments,
    refuse_unused_assignments,
    refuse_unused_overrides,
    warn_of_unused_events,
)
from lora_fsdp.training.logging.figures import RunFigures
from lora_fsdp.training.logging.progress import RunProgress
from lora_fsdp.training.logging.time_spent import spent_on
from lora_fsdp.training.placed import place_run
from lora_fsdp.training.prepared import (
    PreparedRun,
    fold_accumulation,
    longest_answer,
    prepare_run,
)
from lora_fsdp.training.saving.adapter_writer import AdapterWriter
from lora_fsdp.training.saving.checkpointer import Checkpointer
from lora_fsdp.training.saving.edges import AtTheEdges
from lora_fsdp.training.saving.resume import facts_once_placed
from lora_fsdp.training.saving.run_lock import run_lock
from lora_fsdp.training.saving.training_state import LoopState, TrainingState
from lora_fsdp.training.scorer import RunScorer
from lora_fsdp.training.step.objectives.choice import SETTINGS, objective_of
from lora_fsdp.training.step.objectives.objective import Objective
from lora_fsdp.training.watching.adapter_moves import AdapterMoves
from lora_fsdp.training.watching.watchdogs import Watchdogs


class LoraTrainer(Trainer):
    """Trains a LoRA adapter for a task.

    It derives from `transformers.Trainer` and not from `trl.SFTTrainer`, whose loss gathers over
    the ranks and waits for the device several times a step. Each override says why it is there; the
    work is done by parts: `Checkpointer` and `AtTheEdges` (saving), `Watchdogs` (watching),
    `RunFigures` (logging), `RunScorer` (evaluation), a step, and the adapters.

    Args:
        model: a causal LM (with `peft_config`), loaded, yet to be read (`open_base`), or its folder
            or name on the Hub; or a PEFT model whose adapter is to be trained.
        args: see `FineTuningArguments`; plain `TrainingArguments` keep their own defaults.
        task: what is learnt, or its name; to examples, bound to their table (`Task.bind`).
        train_dataset: examples with targets (`Task.examples`), or the rows that `task` makes them
            of (a `datasets.Dataset`, or dicts); the same on every rank.
        eval_dataset: held-out examples or rows, or several such datasets by name.
        test_dataset: further ones, which no evaluation while training sees.
        processing_class: the tokenizer; by default the model's.
        peft_config: the adapter to attach.
        adapter_name_or_path: folder of a saved adapter to go on with, which has its own settings.
        max_length: longest example in tokens; longer ones have their text shortened.
        chat_template: put prompts through the tokenizer's chat template.
        chat_template_kwargs: further arguments of that template.
        thinking: where an answer stands in a template with a thinking block (`ChatTemplate`).
        shots: rows that every prompt shows with their answers (`TaskData.shots`).
        objective: what is minimised; `None` = what the task's kind of answer is trained with,
            supervised learning of the targets if it does not say otherwise.
        callbacks: further callbacks.
        optimizer_cls_and_kwargs: the optimizer's class and its arguments, instead of `args.optim`.
        positional, unused: other arguments of `transformers.Trainer` and `trl.SFTTrainer`, each
            refused with what to use instead.

    Attributes:
        adapter: the run's adapters (`AdapterSet`).
        placement: how the run computes.
        confusion_matrices: of every evaluation by the optimizer step it was made at (and the
            metrics' prefix, if that is not "eval"), counts of true by predicted label (loggers take
            single numbers only); only of tasks whose kind of answer has one.
        held_out: all held-out examples, of every dataset.
        max_new_tokens: of the longest text that is generated.

    Raises:
        ArgumentError: an argument is refused.
        LaunchError: the ranks did not get what the accelerate YAML asked for.
    """

    # Narrower than the Trainer's own annotations.
    args: FineTuningArguments
    model: PeftModel
    objective: Objective
    processing_class: PreTrainedTokenizerBase
    train_dataset: list[EncodedExample]
    eval_dataset: list[EncodedExample] | dict[str, list[EncodedExample]] | None

    def __init__(
        self,
        model: Base | str | None = None,
        args: TrainingArguments | None = None,
        *positional: Never,
        task: Task | str = "",
        processing_class: PreTrainedTokenizerBase | None = None,
        train_dataset: Rows | None = None,
        eval_dataset: Rows | Mapping[str, Rows] | None = None,
        test_dataset: Rows | None = None,
        peft_config: LoraConfig | None = None,
        adapter_name_or_path: str | Path | None = None,
        max_length: int = 512,
        chat_template: bool = False,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        thinking: str = "auto",
        shots: Sequence[Shot] = (),
        objective: Objective | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizer_cls_and_kwargs: tuple[type[torch.optim.Optimizer], dict[str, Any]] | None = None,
        **unused: Never,
    ) -> None:
        refuse_unused_arguments(positional, unused, known=_ARGUMENTS)
        watch_hosts()
        own_args = given_arguments(args)
        self.fsdp_settings = read_fsdp_settings()
        check_arguments(own_args, self.fsdp_settings, max_length=max_length)
        data = given_data(task, train=train_dataset, held_out=eval_dataset, test=test_dataset)
        self.objective = _objective(objective, own_args, data.task)
        tokenizer = given_tokenizer(processing_class, model)
        peft_config, start = given_adapter(peft_config, adapter_name_or_path)
        self.encoder = Encoder(
            tokenizer,
            task=data.task,
            max_length=max_length,
            chat_template=chat_template,
            chat_template_kwargs=chat_template_kwargs,
            thinking=thinking,
            shots=shots,
        )
        run = prepare_run(
            given_base(model, peft_config=peft_config, device=own_args.device),
            own_args,
            settings=self.fsdp_settings,
            objective=self.objective,
            encoder=self.encoder,
            data=data,
            peft_config=peft_config,
            start=start,
        )
        super().__init__(
            model=run.model,
            args=fold_accumulation(own_args),
            train_dataset=run.train,
            eval_dataset=by_name(run.held_out, data.names) or None,
            processing_class=tokenizer,
            callbacks=given_callbacks(callbacks),
            optimizer_cls_and_kwargs=optimizer_cls_and_kwargs,
        )
        self._by_default = assigned_by_default(self)
        self._place(run)
        self._add_parts(run)

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Refuse to override what would never be called (`training/hooks.py`)."""
        super().__init_subclass__(**kwargs)
        refuse_unused_overrides(cls, base=LoraTrainer)

    # ---- placement ------------------------------------------------------------------------------

    def create_accelerator_and_postprocess(self) -> None:
        """Without accelerate's FSDP, which would gather the whole base at every checkpoint."""
        with accelerate_without_fsdp():
            super().create_accelerator_and_postprocess()

    def _move_model_to_device(self, model: nn.Module, device: torch.device) -> None:
        """Nothing: `_place` puts the model where it stays (its shards perhaps in host memory)."""

    def _place(self, run: PreparedRun) -> None:
        """Put base and adapter where they stay, and make the step that computes with them."""
        self.task, self.request, self.schedule = self.encoder.task, run.request, run.schedule
        self.held_out, self.test_dataset, self.shortened = run.held_out, run.test, run.shortened
        self.max_new_tokens = longest_answer(self.args, run.train)
        self.parameter_count = self.model.num_parameters()
        placed = place_run(
            run,
            self.args,
            objective=self.objective,
            longest=self.encoder.max_length,
            autocast=self.accelerator.autocast,
        )
        self.placement, self.packed = placed.placement, placed.packed
        self.adapter, self.step = placed.adapter, placed.step
        self.work = placed.work

    def _add_parts(self, run: PreparedRun) -> None:
        self.confusion_matrices: dict[int | tuple[int, str], pd.DataFrame] = {}
        self.scorer = RunScorer(
            model=self.model,
            packed=self.packed,
            encoder=self.encoder,
            device=self.args.device,
            autocast=self.accelerator.autocast,
            max_new_tokens=self.max_new_tokens,
        )
        moves = AdapterMoves(self.adapter)
        self.checkpointer = self._checkpointer(run, moves)
        self.watchdogs = Watchdogs(
            args=self.args,
            model=self.model,
            adapters=self.adapter,
            moves=moves,
            shares_of_step=partial(
                shares_of_step,
                run.train,
                examples_per_step=self.examples_per_step,
                world_size=self.args.world_size,
                seed=self.order_seed,
            ),
            tokenizer=self.processing_class,
        )
        self.edges = AtTheEdges(self.args, restore_loop=self._restore_loop)
        self.figures = RunFigures(
            run.train,
            examples_per_step=self.examples_per_step,
            seed=self.order_seed,
            device=self.args.device,
            world_size=self.args.world_size,
            price_per_hour=self.args.price_per_hour,
        )
        if (patience := self.args.early_stopping_patience) is not None:
            threshold = self.args.early_stopping_threshold
            self.add_callback(EarlyStoppingCallback(patience, threshold))
        progress = RunProgress(self.figures, primary_metric=self.task.primary_metric)
        for unused in (ProgressCallback, PrinterCallback):
            self.remove_callback(unused)
        for callback in (moves, progress, *self.watchdogs.warnings, self.watchdogs, self.edges):
            self.add_callback(callback)

    def _checkpointer(self, run: PreparedRun, moves: AdapterMoves) -> Checkpointer:
        facts = facts_once_placed(
            run.facts, self.placement, optimizer=self.optimizer_cls_and_kwargs
        )
        writer = AdapterWriter(
            model=self.model,
            args=self.args,
            encoder=self.encoder,
            max_new_tokens=self.max_new_tokens,
            base_fingerprint=run.base_fingerprint,
            probes=run.probes,
            packed=self.packed,
            autocast=self.accelerator.autocast,
        )
        each = bool(self.args.save_on_each_node)
        return Checkpointer(writer, self.adapter, moves, facts, on_each_host=each)

    # ---- training -------------------------------------------------------------------------------

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> TrainOutput:
        """Train, from the beginning or from a checkpoint: not one of another run.

        It stops on request, watches for ranks that stall, and releases the step's graphs.

        Args:
            resume_from_checkpoint: a checkpoint's folder, or `True` for the newest complete one of
                the output folder.
            trial: of a hyperparameter search.
            ignore_keys_for_eval: of no effect; the Trainer's.

        Raises:
            DamagedCheckpointError: there is no complete checkpoint to resume from.
            ResumeMismatchError: it is of a run with other data or settings.
            ArgumentError: a function was assigned that a run does not call.
            TrainingInterrupted: stopped by SIGTERM or `max_hours`, with a checkpoint.
            WatchdogError: a step was not finite, or the ranks drifted apart.
        """
        refuse_unused_assignments(self, by_default=self._by_default)
        warn_of_unused_events(
            self.callback_handler.callbacks,
            accumulation=self.checkpointer.facts["launch"]["gradient_accumulation_steps"],
        )
        end_with_launcher()
        folder = Path(str(self.args.output_dir))
        for part in (self.watchdogs, self.edges):  # last: they see what other callbacks decide
            part.begin()
            self.remove_callback(part)
            self.add_callback(part)
        with ExitStack() as held:
            held.enter_context(self.watchdogs.watching())
            held.callback(lambda: self.step.release())
            on_first_rank(lambda: held.enter_context(run_lock(folder)))
            checkpoint = self.checkpointer.begin(folder, resume_from_checkpoint)
            held.enter_context(self.edges.watching())
            return super().train(
                None if checkpoint is None else str(checkpoint), trial, ignore_keys_for_eval
            )

    def hyperparameter_search(self, *arguments: Any, **options: Any) -> Never:
        """Refused: every trial would need a base of its own, placed anew.

        Raises:
            ArgumentError: says what to use instead.
        """
        raise ArgumentError(
            "LoraTrainer has no hyperparameter_search, since its base is placed once and has no "
            f"model_init: {SEARCH}."
        )

    def set_initial_training_values(
        self, args: TrainingArguments, dataloader: DataLoader[Any]
    ) -> tuple[int, int, int, int, int, int | None, int]:
        """The Trainer's; no epoch is left where the checkpoint is that of a finished run."""
        values = super().set_initial_training_values(args, dataloader)
        resumed = self.checkpointer.resumed
        if resumed is not None and resumed.is_finished(values[-1]):
            self._load_rng_state(None)  # which the Trainer does where an epoch begins
            return (0, *values[1:])
        return values

    @property
    def host_traffic(self) -> HostTraffic:
        """What each host sends to others in an optimizer step, predicted."""
        sequences = max(1.0, self.work.step_tokens / self.placement.sequence_length)
        return host_traffic(self.placement.shape, self.placement.layout, sequences=sequences)

    @property
    def examples_per_step(self) -> int:
        """Examples of one optimizer step over all ranks."""
        return int(self.args.per_device_train_batch_size) * int(self.args.world_size)

    @property
    def order_seed(self) -> int:
        """Seed of the order of examples."""
        return int(self.args.seed if self.args.data_seed is None else self.args.data_seed)

    def get_train_dataloader(self) -> DataLoader[TrainingStep]:
        """One item per optimizer step: this rank's packed sequences."""
        if not self.train_dataset:
            raise ArgumentError("There are no training examples: give a train_dataset.")
        steps = TrainingSteps(
            self.train_dataset,
            examples_per_step=self.examples_per_step,
            rank=self.args.process_index,
            world_size=self.args.world_size,
            seed=self.order_seed,
            share_prefix=self.placement.shares_prefix,
            max_tokens=self.placement.sequence_length,
            tree_of=self.objective.tree,
            count_of=self.objective.count,
            packing=self.packed.packing,
        )
        return self._loader(steps)

    def get_batch_samples(
        self, epoch_iterator: Iterator[TrainingStep], num_batches: int, device: torch.device
    ) -> tuple[list[TrainingStep], None]:
        """The next step. Its number of label tokens is known to it: nothing is gathered."""
        return list(islice(epoch_iterator, num_batches)), None

    def training_step(
        self,
        model: nn.Module,
        inputs: TrainingStep,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor:
        """Forward and backward of this rank's sequences, then the sum of gradients over the ranks.

        Returns:
            the step's mean loss per label token, scaled so that the Trainer's mean over ranks is
            the global value.
        """
        if not model.training:
            model.train()
        if self.optimizer is not None:  # a step may be asked for outside of `train`
            cast(AcceleratedOptimizer, self.optimizer).train()  # schedule-free ones swap weights
        loss = self.step(
            inputs.sequences, denominator=inputs.denominator, sizes_of_ranks=inputs.sizes_of_ranks
        )
        self.watchdogs.before_sum(loss, step=self.state.global_step + 1)
        self.adapter.sum_gradients()
        return loss * self.args.world_size

    def _clip_grad_norm(self, model: nn.Module) -> torch.Tensor:
        """On the adapter's one block: the Trainer's own walks through the whole base."""
        return self.adapter.clip_gradients(self.args.max_grad_norm)

    def _get_grad_norm(
        self, model: nn.Module, grad_norm: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The norm that clipping gave, or the norm; the last thing before the optimizer's step."""
        norm = self.adapter.gradient_norm() if grad_norm is None else grad_norm
        self.watchdogs.before_optimizer(norm, step=self.state.global_step + 1)
        return norm

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """The Trainer's, held still once a step was not finite."""
        optimizer = super().create_optimizer(model)
        self.watchdogs.hold(optimizer)
        return optimizer

    def _give_weights_that_answer(self) -> None:
        """Have a schedule-free optimizer put its averaged weights, the result, into the adapter."""
        if isinstance(self.optimizer, AcceleratedOptimizer):
            self.optimizer.eval()

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log, with the run's figures beside the loss, unless a watchdog stops the run."""
        if "loss" in logs:
            logs.update(self.figures.at(self.state.global_step, last=self.state.max_steps))
            self.watchdogs.at_log(step=self.state.global_step)
        if "train_loss" in logs:
            logs["train_loss"] = self._total_loss_scalar / max(self.state.global_step, 1)
        self.figures.leave_out(logs.get("eval_runtime", 0.0))
        super().log(logs, start_time)

    def floating_point_ops(self, inputs: TrainingStep) -> int:
        """4 per parameter and token: a frozen weight has no gradient of its own."""
        return 4 * self.parameter_count * sum(map(len, inputs.sequences))

    def num_examples(self, dataloader: DataLoader[Any]) -> int:
        """Examples, not steps or packed sequences."""
        return len(dataloader.dataset.examples)  # type: ignore[attr-defined]

    # ---- saving and loading ---------------------------------------------------------------------

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write adapter, tokenizer and arguments from rank 0. Nothing of the base is gathered.

        Raises:
            CheckpointSaveError: they cannot be written; on every rank.
        """
        with spent_on("save"):
            self._give_weights_that_answer()
            self.checkpointer.save_final(Path(str(output_dir or self.args.output_dir)))
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Write an atomic checkpoint from rank 0, then remove those beyond `save_total_limit`.

        The Trainer's own writes in place, pickles optimizer and random state, and lets the other
        ranks hang when rank 0 cannot write.
        """
        with spent_on("save"), self.watchdogs.away("saving a checkpoint"):
            self.watchdogs.check_finite()
            self._give_weights_that_answer()
            if self.hp_search_backend is None and trial is None:
                self.store_flos()
            folder = Path(self._get_output_dir(trial=trial))
            folder = folder / f"checkpoint-{self.state.global_step}"
            self.checkpointer.save(
                folder,
                state=self.state,
                callbacks=self.callback_handler.callbacks,
                training=None if self.args.save_only_model else self._training_state(),
                limit=self.args.save_total_limit,
            )
            if self.args.push_to_hub:
                self._push_from_checkpoint(str(folder))

    def _training_state(self) -> TrainingState:
        """All that the next step depends on beside the adapter. A collective call."""
        stops = self.control.should_training_stop and not self.edges.stopped_by_callback
        return TrainingState.take(
            optimizer=cast(torch.optim.Optimizer, self.optimizer),
            scheduler=cast(LRScheduler, self.lr_scheduler),
            device=self.args.device,
            loss_since_log=self._tr_loss.item(),
            loop=LoopState(
                step=self.state.global_step,
                epochs=self.state.num_train_epochs,
                stopped_early=stops and self.state.global_step < self.state.max_steps,
                total_loss=self._total_loss_scalar,
                step_last_logged=self._globalstep_last_logged,
                confusion_matrices=self.confusion_matrices,
            ),
        )

    def _restore_loop(self) -> None:
        """Continue what the Trainer starts anew at every `train`: called when the loop begins."""
        resumed = self.checkpointer.resumed
        if resumed is None:
            return
        rank, world_size = self.args.process_index, self.args.world_size
        self._tr_loss.fill_(resumed.loss_since_log(rank=rank, world_size=world_size))
        self._total_loss_scalar = resumed.loop.total_loss
        self._globalstep_last_logged = resumed.loop.step_last_logged
        self.state.train_batch_size = self._train_batch_size
        # It is 0 where no epoch is left.
        self.state.num_train_epochs = self.state.num_train_epochs or resumed.loop.epochs
        self.confusion_matrices.update(resumed.loop.confusion_matrices)
        if self.state.best_global_step:  # also where the folder was moved
            best = Path(str(self.args.output_dir)) / f"checkpoint-{self.state.best_global_step}"
            self.state.best_model_checkpoint = str(best) if best.is_dir() else None

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: nn.Module | None = None
    ) -> None:
        """Load a checkpoint's adapter; nothing is unpickled."""
        self.checkpointer.load_adapter(Path(resume_from_checkpoint))

    def _load_best_model(self) -> None:
        """Load the adapter with the best metric; the base stays as it is."""
        self.checkpointer.load_best_adapter(self.state)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Continue optimizer and schedule; nothing is unpickled."""
        if (resumed := self.checkpointer.resumed) is not None:
            cast(torch.optim.Optimizer, self.optimizer).load_state_dict(resumed.optimizer)
            cast(LRScheduler, self.lr_scheduler).load_state_dict(resumed.scheduler)

    def _load_scaler(self, checkpoint: str | None) -> None:
        """Nothing: fp16, which has one, is refused."""

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Continue this rank's random numbers; draw new ones for another number of ranks."""
        if (resumed := self.checkpointer.resumed) is not None:
            resumed.put_back_random_numbers(
                rank=self.args.process_index,
                world_size=self.args.world_size,
                device=self.args.device,
                seed=self.args.seed,
            )

    def _finalize_training(
        self, trial: Any, num_train_samples: int, start_time: float
    ) -> TrainOutput:
        """The Trainer's, which with a limit of 1 would keep the best checkpoint only."""
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            with self.watchdogs.away("the end of training"):
                self.watchdogs.check_finite()
                self._give_weights_that_answer()
                return super()._finalize_training(trial, num_train_samples, start_time)
        finally:
            self.args.save_total_limit = limit

    # ---- evaluation -----------------------------------------------------------------------------

    def get_eval_dataloader(
        self, eval_dataset: Rows | str | None = None
    ) -> DataLoader[ScoringSequence]:
        """This rank's packed sequences of the held-out examples (or of others of the task)."""
        self._give_weights_that_answer()
        examples = self._to_score(eval_dataset)
        if not examples:
            raise ArgumentError("There are no examples to evaluate: give an eval_dataset.")
        return self._loader(
            ScoringSequences(
                examples,
                rank=self.args.process_index,
                world_size=self.args.world_size,
                max_tokens=self.placement.sequence_length,
                packing=self.packed.packing,
            )
        )

    def _to_score(self, chosen: Rows | str | None) -> list[EncodedExample]:
        """The held-out examples, those of one dataset by its name, or others of the task."""
        held_out = self.eval_dataset
        if isinstance(chosen, str) or (chosen is None and isinstance(held_out, dict)):
            named = held_out if isinstance(held_out, dict) else {}
            if chosen not in named:
                raise ArgumentError(
                    f"eval_dataset has no dataset {chosen!r}: name one of {', '.join(named)}."
                )
            return named[chosen]
        if chosen is None:
            return cast(list[EncodedExample], held_out or [])
        return self.encoder.encode(examples_of(chosen, task=self.task, name="The dataset"))

    def get_test_dataloader(self, test_dataset: Rows) -> DataLoader[ScoringSequence]:
        """As `get_eval_dataloader`, for other examples of the task."""
        return self.get_eval_dataloader(test_dataset)

    def evaluate(
        self,
        eval_dataset: Any = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """The Trainer's, which may rightly take long."""
        with spent_on("evaluate"), self.watchdogs.away("evaluation"):
            return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)

    def predict(
        self,
        test_dataset: Rows,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "test",
    ) -> PredictionOutput:
        """The Trainer's, which may rightly take long: the answers' scores, and their metrics."""
        with self.watchdogs.away("prediction"):
            return super().predict(cast(Any, test_dataset), ignore_keys, metric_key_prefix)

    def score(self, examples: Rows) -> Scores:
        """Scores of every answer to `examples`; a collective call, the same on every rank.

        Args:
            examples: of the task; they may be encoded already, as `eval_dataset` is.
        """
        return self.scorer.score(self.get_eval_dataloader(examples))

    def outputs(self, examples: Rows | None = None) -> ModelOutputs:
        """What the answers to `examples` (by default the held-out ones) are read from: `score`,
        and what `write` generates where the task's kind of answer asks for it.
        """
        return self.scorer.outputs(self.get_eval_dataloader(examples))

    def write(self, examples: Rows) -> list[str]:
        """The text that greedy decoding generates after each prompt; as `score`, on all ranks.

        Returns:
            the texts without the prompts; `Task.parse` finds the answers in them.
        """
        self._give_weights_that_answer()
        return self.scorer.generate(self._to_score(examples))

    def evaluation_loop(
        self,
        dataloader: DataLoader[ScoringSequence],
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """The task's metrics, the same on every rank.

        Returns:
            `predictions` [N, answers] log-likelihoods, `label_ids` [N] index of the true label (-1:
            none), and the metrics, prefixed.
        """
        refuse_unused_assignments(self, by_default=self._by_default)
        examples = cast(ScoringSequences, dataloader.dataset).examples
        self.callback_handler.eval_dataloader = dataloader
        outputs = self.scorer.outputs(
            dataloader,
            after_sequence=lambda: self.callback_handler.on_prediction_step(
                self.args, self.state, self.control
            ),
        )
        metrics = evaluation_metrics(self.task, examples, outputs)
        matrix = confusion_matrix(self.task, examples, outputs)
        if matrix is not None:
            step = self.state.global_step
            place = step if metric_key_prefix == "eval" else (step, metric_key_prefix)
            self.confusion_matrices[place] = matrix
        labels = [-1 if example.label is None else example.label for example in examples]
        return EvalLoopOutput(
            predictions=outputs.log_likelihoods,
            label_ids=torch.tensor(labels).numpy(),
            metrics={f"{metric_key_prefix}_{name}": value for name, value in metrics.items()},
            num_samples=len(examples),
        )

    def _loader(self, dataset: Any) -> DataLoader[Any]:
        return DataLoader(
            dataset,
            batch_size=1,
            collate_fn=itemgetter(0),
            num_workers=self.args.dataloader_num_workers,
            prefetch_factor=self.args.dataloader_prefetch_factor,
            multiprocessing_context=getattr(self.args, "dataloader_multiprocessing_context", None),
            pin_memory=self.args.dataloader_pin_memory and self.args.device.type == "cuda",
        )


def _objective(given: Objective | None, args: FineTuningArguments, task: Task) -> Objective:
    if given is None:
        return objective_of(task, vars(args))
    for name in SETTINGS:
        if getattr(args, name):
            raise ArgumentError(
                f"--{name} is of the task's own objective, and {type(given).__name__} "
                "was given in its place: remove one of them."
            )
    return given


_ARGUMENTS = tuple(inspect.signature(LoraTrainer).parameters)
