"""`transformers.Trainer` for LoRA over a sharded, frozen base."""

# Steps and rows stand where the Trainer has dicts of tensors.
# mypy: disable-error-code="override"

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any, cast

import pandas as pd
import torch
from peft import LoraConfig, PeftModel
from torch import nn
from torch.utils.data import DataLoader
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    ProgressCallback,
    TrainerCallback,
)
from transformers.trainer_utils import EvalLoopOutput

from lora_fsdp.adapter.attach import attach_adapter, trainable_parameters
from lora_fsdp.adapter.probes import build_probes
from lora_fsdp.arguments import FineTuningArguments
from lora_fsdp.base.fingerprints import fingerprint_base
from lora_fsdp.base.layers import base_model
from lora_fsdp.base.streaming import StoredBase
from lora_fsdp.compute.attention import avoid_kernels_planned_by_shape
from lora_fsdp.compute.label_head import (
    check_architecture,
    check_packing,
)
from lora_fsdp.data.encoding import EncodedExample, Encoder
from lora_fsdp.data.sampling import ScoringSequence, ScoringSequences, TrainingStep, TrainingSteps
from lora_fsdp.data.workload import longest_example
from lora_fsdp.distributed.launch import accelerate_without_fsdp, check_launch, read_fsdp_settings
from lora_fsdp.distributed.replication import ReplicatedParameters
from lora_fsdp.distributed.sharding import release_gathered
from lora_fsdp.errors import ArgumentError
from lora_fsdp.evaluation.batched_generation import generate_answers
from lora_fsdp.evaluation.metrics import confusion_matrix, evaluation_metrics, model_outputs
from lora_fsdp.evaluation.scoring import Scores, score_sequences
from lora_fsdp.ranks import check_ranks_agree
from lora_fsdp.tasks import Example, Task
from lora_fsdp.tasks.answers import ModelOutputs
from lora_fsdp.training.epochs import ShuffleEachEpoch
from lora_fsdp.training.logging.figures import RunFigures
from lora_fsdp.training.logging.progress import RunProgress
from lora_fsdp.training.place import place_for_training
from lora_fsdp.training.saving.resume import run_facts
from lora_fsdp.training.setup import (
    check_arguments,
    check_targets,
    enable_checkpointing,
    fold_accumulation,
    longest_answer,
    recompute_without_random_state,
    run_fingerprints,
    shares_prefix,
    work_of_run,
)
from lora_fsdp.training.step.choice import build_step
from lora_fsdp.training.watching.adapter_moves import CheckAdapterMoves
from lora_fsdp.training.watching.watched import WatchedTrainer


class LoraTrainer(WatchedTrainer):
    """Trains a LoRA adapter for a task.

    It derives from `transformers.Trainer` and not from `trl.SFTTrainer`, whose loss gathers over
    the ranks and waits for the device several times a step. What it overrides, and why:

    * `create_accelerator_and_postprocess`: shards the frozen base and replicates the adapter, so
      that to the Trainer the model is an ordinary one; its own FSDP paths would gather or write the
      whole base at every checkpoint.
    * `get_train_dataloader`, `get_batch_samples`, `training_step`: packed rows, loss at label
      positions over the global number of label tokens, one all-reduce of the adapter's gradients.
    * `_clip_grad_norm`, `_get_grad_norm` and the model's `zero_grad`: on the adapter alone; the
      Trainer's walk through every module of the base, which takes longer than a captured step.
    * `log`: the run's speed, cost and GPU load, for every tracker.
    * `get_eval_dataloader`, `evaluation_loop`: the task's metrics, from the likelihoods of answers
      or from the text that the model generates.
    * saving, loading, resuming and stopping: see `DurableTrainer`; what watches a run: see
      `WatchedTrainer`.

    Args:
        model: a causal LM (with `peft_config`), loaded or yet to be read (`open_base`), or a PEFT
            model whose adapter is to be trained.
        args: see `FineTuningArguments`.
        task: what is learnt; bound to its table (`Task.bind`).
        train_dataset: examples with targets (`Task.examples`), the same on every rank.
        eval_dataset: held-out examples.
        processing_class: the tokenizer.
        peft_config: the adapter to attach.
        max_length: longest example in tokens; longer ones have their text shortened.
        chat_template: put prompts through the tokenizer's chat template.
        callbacks: further callbacks.

    Attributes:
        confusion_matrices: of every evaluation by the optimizer step it was made at, counts of true
            by predicted label (loggers take single numbers only); only of tasks whose kind of
            answer has one.
        max_new_tokens: longest generated text.

    Raises:
        LaunchError: the ranks did not get what the accelerate YAML asked for.
    """

    # Narrower than the Trainer's own annotations.
    args: FineTuningArguments
    model: PeftModel
    processing_class: PreTrainedTokenizerBase
    train_dataset: list[EncodedExample]
    eval_dataset: list[EncodedExample] | None

    def __init__(
        self,
        model: PreTrainedModel | PeftModel | StoredBase,
        args: FineTuningArguments,
        *,
        task: Task,
        processing_class: PreTrainedTokenizerBase,
        train_dataset: Sequence[Example] = (),
        eval_dataset: Sequence[Example] = (),
        peft_config: LoraConfig | None = None,
        max_length: int = 512,
        chat_template: bool = False,
        callbacks: list[TrainerCallback] | None = None,
    ) -> None:
        self.fsdp_settings = read_fsdp_settings()
        check_launch(args, self.fsdp_settings, allow_one_process=args.allow_fsdp_on_one_process)
        check_arguments(args, self.fsdp_settings, max_length=max_length)
        self.task = task
        self.confusion_matrices: dict[int, pd.DataFrame] = {}
        self.encoder = Encoder(
            processing_class, task=task, max_length=max_length, chat_template=chat_template
        )
        train = self.encoder.encode(train_dataset)
        held_out = self.encoder.encode(eval_dataset)
        check_targets(train)
        self.max_new_tokens = longest_answer(args, train)
        self.longest_example = longest_example([*train, *held_out])
        self.shortened = sum(example.shortened for example in (*train, *held_out))
        if isinstance(model, PeftModel) == (peft_config is not None):
            raise ArgumentError("Give a peft_config, or a model that already has an adapter.")
        self.stored = model if isinstance(model, StoredBase) else None
        if isinstance(model, StoredBase):
            model = model.model
        check_architecture(
            base_model(model) if isinstance(model, PeftModel) else model, longest=max_length
        )
        # Before the adapter is attached, which may change the base (PiSSA), and before sharding.
        self.base_fingerprint = (
            fingerprint_base(model) if self.stored is None else self.stored.fingerprint()
        )
        self.probes = build_probes(self.encoder, [*train_dataset, *eval_dataset])
        if not isinstance(model, PeftModel):
            model = attach_adapter(model, cast(LoraConfig, peft_config), stored=self.stored)
        self.share_prefix = shares_prefix(args, model)
        self.work = work_of_run(args, train, held_out, share_prefix=self.share_prefix)
        fingerprints = run_fingerprints(
            args, model, train=train, held_out=held_out, stored=self.stored
        )
        check_ranks_agree(fingerprints)
        self.run_facts = run_facts(args, model, fingerprints=fingerprints)
        super().__init__(
            model=model,
            args=fold_accumulation(args),
            train_dataset=train,
            eval_dataset=held_out or None,
            processing_class=processing_class,
            callbacks=callbacks,
        )
        # What was chosen for this machine: a run that goes on elsewhere rounds otherwise.
        self.run_facts["may_change"] |= {
            "--step": self.plan.step,
            "--max_tokens_per_row": str(self.plan.max_tokens_per_row),
        }
        self.remove_callback(ProgressCallback)
        self.remove_callback(PrinterCallback)
        self.figures = RunFigures(
            train,
            examples_per_step=self.examples_per_step,
            seed=self.order_seed,
            device=args.device,
            world_size=args.world_size,
            price_per_hour=args.price_per_hour,
        )
        self.moves = CheckAdapterMoves(self.adapter)
        self.add_callback(self.moves)
        self.add_callback(RunProgress(self.figures, primary_metric=task.primary_metric))
        self.watch()

    # ---- placement ------------------------------------------------------------------------------

    def create_accelerator_and_postprocess(self) -> None:
        """Create the accelerator, then put base and adapter where they stay."""
        with accelerate_without_fsdp():
            super().create_accelerator_and_postprocess()
        avoid_kernels_planned_by_shape()
        self.parameter_count = self.model.num_parameters()
        self.plan = place_for_training(
            self.model,
            args=self.args,
            settings=self.fsdp_settings,
            autocast=self.accelerator.mixed_precision != "no",
            work=self.work,
            longest_example=self.longest_example,
            stored=self.stored,
        )
        self.stored = None  # its files are closed
        if self.plan.placement.recomputed and self.plan.is_captured:
            recompute_without_random_state(self.args)
        # What the arguments ask for, the Trainer itself switches on.
        if self.plan.placement.recomputed and not self.args.gradient_checkpointing:
            enable_checkpointing(self.model, self.args, self.fsdp_settings)
        self.adapter = ReplicatedParameters(trainable_parameters(self.model))
        self.adapter.broadcast()
        self.adapter.check_equal()
        self.computation = check_packing(
            self.model, device=self.args.device, computation=self.plan.computation
        )
        release_gathered(self.model)
        self.step = build_step(
            self.plan.step,
            self.model,
            largest=self.plan.rows,
            gathers=not self.plan.residency.is_whole,
            computation=self.computation,
            adapter=self.adapter,
            device=self.args.device,
            autocast=self.accelerator.autocast,
        )
        self.model.zero_grad = self.adapter.drop_gradients  # type: ignore[method-assign]
        # accelerate must not wrap the model in DDP: the adapter's gradients are summed here.
        self.model._is_accelerate_prepared = True  # type: ignore[assignment]

    def _move_model_to_device(self, model: nn.Module, device: torch.device) -> None:
        """Nothing: the model already lies where it stays (its shards perhaps in host memory)."""

    # ---- training -------------------------------------------------------------------------------

    @property
    def examples_per_step(self) -> int:
        """Examples of one optimizer step over all ranks."""
        return int(self.args.per_device_train_batch_size) * int(self.args.world_size)

    @property
    def order_seed(self) -> int:
        """Seed of the order of examples."""
        return int(self.args.seed if self.args.data_seed is None else self.args.data_seed)

    def get_train_dataloader(self) -> DataLoader[TrainingStep]:
        """One item per optimizer step: this rank's packed rows."""
        if not self.train_dataset:
            raise ArgumentError("There are no training examples: give a train_dataset.")
        steps = TrainingSteps(
            self.train_dataset,
            examples_per_step=self.examples_per_step,
            rank=self.args.process_index,
            world_size=self.args.world_size,
            seed=self.order_seed,
            share_prefix=self.share_prefix,
            max_tokens=self.plan.max_tokens_per_row,
        )
        self.remove_callback(ShuffleEachEpoch)
        self.add_callback(ShuffleEachEpoch(steps))
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
        """Forward and backward of this rank's rows, then the sum of gradients over the ranks.

        Returns:
            the step's mean loss per label token, scaled so that the Trainer's mean over ranks is
            the global value.
        """
        if not model.training:
            model.train()
        loss = self.step(
            inputs.rows, label_tokens=inputs.label_tokens, sizes_of_ranks=inputs.sizes_of_ranks
        )
        self.finite.see_rank(loss)
        self.heartbeat.beat(self.state.global_step + 1, "summing gradients over ranks")
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
        self.before_optimizer(norm)
        return norm

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log, with the run's figures beside the loss, so that every tracker gets them."""
        if "loss" in logs:
            logs.update(self.figures.at(self.state.global_step, last=self.state.max_steps))
        self.figures.leave_out(logs.get("eval_runtime", 0.0))
        super().log(logs, start_time)

    def floating_point_ops(self, inputs: TrainingStep) -> int:
        """4 per parameter and token: a frozen weight has no gradient of its own."""
        return 4 * self.parameter_count * sum(len(row) for row in inputs.rows)

    def num_examples(self, dataloader: DataLoader[Any]) -> int:
        """Examples, not steps or rows."""
        return len(dataloader.dataset.examples)  # type: ignore[attr-defined]

    # ---- evaluation -----------------------------------------------------------------------------

    def get_eval_dataloader(
        self, eval_dataset: Sequence[Example] | Sequence[EncodedExample] | None = None
    ) -> DataLoader[ScoringSequence]:
        """This rank's packed sequences of the held-out examples (or of others of the task)."""
        examples = self.eval_dataset
        if eval_dataset is not None:
            examples = self.encoder.encode(eval_dataset)
        if not examples:
            raise ArgumentError("There are no examples to evaluate: give an eval_dataset.")
        return self._loader(
            ScoringSequences(
                examples,
                rank=self.args.process_index,
                world_size=self.args.world_size,
                max_tokens=self.plan.max_tokens_per_row,
            )
        )

    def get_test_dataloader(self, test_dataset: Sequence[Example]) -> DataLoader[ScoringSequence]:
        """As `get_eval_dataloader`."""
        return self.get_eval_dataloader(test_dataset)

    def score(self, examples: Sequence[Example] | Sequence[EncodedExample]) -> Scores:
        """Scores of every answer to `examples`; a collective call, the same on every rank.

        Args:
            examples: of the task; they may be encoded already, as `eval_dataset` is.
        """
        return self._score(self.get_eval_dataloader(examples))

    def outputs(
        self, examples: Sequence[Example] | Sequence[EncodedExample] | None = None
    ) -> ModelOutputs:
        """What the answers to `examples` (by default the held-out ones) are read from: `score`,
        and what `write` generates where the task's kind of answer asks for it.
        """
        return self._outputs(self.get_eval_dataloader(examples))

    def write(self, examples: Sequence[Example] | Sequence[EncodedExample]) -> list[str]:
        """The text that greedy decoding generates after each prompt; as `score`, on all ranks.

        Returns:
            the texts without the prompts; `Task.parse` finds the answers in them.
        """
        texts = generate_answers(
            self.model,
            self.processing_class,
            [example.prompt_ids for example in self.encoder.encode(examples)],
            device=self.args.device,
            max_new_tokens=self.max_new_tokens,
            end_token_id=self.encoder.end_token_id,
        )
        release_gathered(self.model)
        return texts

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
        rows: ScoringSequences = dataloader.dataset  # type: ignore[assignment]
        outputs = self._outputs(dataloader)
        metrics = evaluation_metrics(self.task, rows.examples, outputs)
        matrix = confusion_matrix(self.task, rows.examples, outputs)
        if matrix is not None:
            self.confusion_matrices[self.state.global_step] = matrix
        labels = [-1 if example.label is None else example.label for example in rows.examples]
        return EvalLoopOutput(
            predictions=outputs.log_likelihoods,
            label_ids=torch.tensor(labels).numpy(),
            metrics={f"{metric_key_prefix}_{name}": value for name, value in metrics.items()},
            num_samples=len(rows.examples),
        )

    def _outputs(self, dataloader: DataLoader[ScoringSequence]) -> ModelOutputs:
        examples = dataloader.dataset.examples  # type: ignore[attr-defined]
        scores = self._score(dataloader)
        texts = self.write(examples) if self.task.answer_kind.generates_text else ()
        return model_outputs(examples, scores, texts=texts)

    def _score(self, dataloader: DataLoader[ScoringSequence]) -> Scores:
        rows: ScoringSequences = dataloader.dataset  # type: ignore[assignment]
        self.callback_handler.eval_dataloader = dataloader
        with self.accelerator.autocast():
            scores = score_sequences(
                self.model,
                dataloader,
                answers=[len(answers) for answers in rows.answers],
                device=self.args.device,
                computation=self.computation,
                after_row=lambda: self.callback_handler.on_prediction_step(
                    self.args, self.state, self.control
                ),
            )
        release_gathered(self.model)
        return scores

    def _loader(self, dataset: Any) -> DataLoader[Any]:
        return DataLoader(
            dataset,
            batch_size=1,
            collate_fn=_only_item,
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory and self.args.device.type == "cuda",
        )


def _only_item(batch: list[Any]) -> Any:
    return batch[0]
