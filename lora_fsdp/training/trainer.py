"""`transformers.Trainer` for LoRA over a sharded, frozen base."""

from __future__ import annotations

import copy
import hashlib
import json
import logging
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from torch import nn
from torch.utils.data import DataLoader
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    ProgressCallback,
    Trainer,
    TrainerCallback,
)
from transformers.trainer_utils import EvalLoopOutput

from lora_fsdp.arguments import FineTuningArguments
from lora_fsdp.data.encoding import EncodedExample, Encoder
from lora_fsdp.data.sampling import ScoringRow, ScoringRows, TrainingStep, TrainingSteps
from lora_fsdp.distributed.launch import (
    FsdpSettings,
    accelerate_without_fsdp,
    check_launch,
    check_ranks_agree,
    launch_fingerprint,
    read_fsdp_settings,
)
from lora_fsdp.distributed.replication import ReplicatedParameters
from lora_fsdp.distributed.sharding import check_placement, place_model
from lora_fsdp.errors import ArgumentError
from lora_fsdp.evaluation.metrics import evaluation_metrics
from lora_fsdp.evaluation.prediction import save_task
from lora_fsdp.evaluation.scoring import Scores, score_rows
from lora_fsdp.modeling.adapters import (
    attach_adapter,
    load_adapter,
    save_adapter,
    trainable_parameters,
)
from lora_fsdp.modeling.label_head import check_architecture, label_log_probs
from lora_fsdp.tasks import Example, Task
from lora_fsdp.training.callbacks import CheckAdapterMoves, RunProgress, ShuffleEachEpoch

logger = logging.getLogger(__name__)


class LoraTrainer(Trainer):
    """Trains a LoRA adapter for a task.

    It derives from `transformers.Trainer` and not from `trl.SFTTrainer`, whose loss gathers over
    the ranks and waits for the device several times a step. What it overrides, and why:

    * `create_accelerator_and_postprocess`: shards the frozen base and replicates the adapter, so
      that to the Trainer the model is an ordinary one; its own FSDP paths would gather or write the
      whole base at every checkpoint.
    * `get_train_dataloader`, `get_batch_samples`, `training_step`: packed rows, loss at label positions over the global
      number of label tokens, one all-reduce of the adapter's gradients.
    * `get_eval_dataloader`, `evaluation_loop`: the task's metrics from label likelihoods.
    * `_save`, `_load_from_checkpoint`, `_load_best_model`: the adapter only, verified.

    Args:
        model: a causal LM (with `peft_config`), or a PEFT model whose adapter is to be trained.
        args: see `FineTuningArguments`.
        task: what is learnt; bound to its table (`Task.bind`).
        train_dataset: examples with targets (`Task.examples`), the same on every rank.
        eval_dataset: held-out examples.
        processing_class: the tokenizer.
        peft_config: the adapter to attach.
        max_length: longest example in tokens; longer ones have their text shortened.
        chat_template: put prompts through the tokenizer's chat template.
        callbacks: further callbacks.

    Raises:
        LaunchError: the ranks did not get what the accelerate YAML asked for.
    """

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
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
        _check_arguments(args, self.fsdp_settings, max_length=max_length)
        self.task = task
        self.encoder = Encoder(
            processing_class, task=task, max_length=max_length, chat_template=chat_template
        )
        train = self.encoder.encode(train_dataset)
        held_out = self.encoder.encode(eval_dataset)
        _check_targets(train)
        self.shortened = sum(example.shortened for example in (*train, *held_out))
        if not isinstance(model, PeftModel):
            if peft_config is None:
                raise ArgumentError("Give a peft_config, or a model that already has an adapter.")
            check_architecture(model, longest=max_length)
            model = attach_adapter(model, peft_config)
        super().__init__(
            model=model,
            args=_fold_accumulation(args),
            train_dataset=train,  # type: ignore[arg-type]
            eval_dataset=held_out or None,  # type: ignore[arg-type]
            processing_class=processing_class,
            callbacks=callbacks,
        )
        self._check_agreement(train)
        self.remove_callback(ProgressCallback)
        self.remove_callback(PrinterCallback)
        self.add_callback(RunProgress(examples_per_step=self.examples_per_step))
        self.add_callback(CheckAdapterMoves(self.adapter))

    # ---- placement ------------------------------------------------------------------------------

    def create_accelerator_and_postprocess(self) -> None:
        """Create the accelerator, then put base and adapter where they stay."""
        with accelerate_without_fsdp():
            super().create_accelerator_and_postprocess()
        device, world_size = self.args.device, self.args.world_size
        self.base_dtype: torch.dtype = self.model.get_base_model().dtype
        self.share_prefix = _shares_prefix(self.args, self.model)
        _enable_checkpointing(self.model, self.args, self.fsdp_settings)
        place_model(self.model, settings=self.fsdp_settings, device=device, world_size=world_size)
        check_placement(self.model, settings=self.fsdp_settings)
        self.adapter = ReplicatedParameters(trainable_parameters(self.model))
        self.adapter.broadcast()
        # accelerate must not wrap the model in DDP: the adapter's gradients are summed here.
        self.model._is_accelerate_prepared = True

    def _move_model_to_device(self, model: nn.Module, device: torch.device) -> None:
        """Nothing: the model already lies where it stays (its shards perhaps in host memory)."""

    def _check_agreement(self, train: Sequence[EncodedExample]) -> None:
        tokens = [(example.prompt_ids, example.target_ids) for example in train]
        check_ranks_agree(
            {
                "the accelerate YAML's FSDP settings": launch_fingerprint(),
                "the number of training examples": str(len(train)),
                "the training examples": _digest(tokens),
                "the seed": f"{self.args.seed}/{self.args.data_seed}",
                "the batch size": str(self.args.per_device_train_batch_size),
            }
        )
        self.adapter.check_equal()

    # ---- training -------------------------------------------------------------------------------

    @property
    def examples_per_step(self) -> int:
        """Examples of one optimizer step over all ranks."""
        return int(self.args.per_device_train_batch_size) * int(self.args.world_size)

    def get_train_dataloader(self) -> DataLoader[TrainingStep]:
        """One item per optimizer step: this rank's packed rows."""
        if not self.train_dataset:
            raise ArgumentError("There are no training examples: give a train_dataset.")
        steps = TrainingSteps(
            self.train_dataset,  # type: ignore[arg-type]
            examples_per_step=self.examples_per_step,
            rank=self.args.process_index,
            world_size=self.args.world_size,
            seed=self.args.seed if self.args.data_seed is None else self.args.data_seed,
            share_prefix=self.share_prefix,
            max_tokens=self.args.max_tokens_per_row,
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
        inputs: TrainingStep,  # type: ignore[override]
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor:
        """Forward and backward of this rank's rows, then the sum of gradients over the ranks.

        Returns:
            the step's mean loss per label token, scaled so that the Trainer's mean over ranks is
            the global value.
        """
        if not model.training:
            model.train()
        loss = torch.zeros((), device=self.args.device)
        for packed in inputs.rows:
            row = packed.to(self.args.device, non_blocking=True)
            with self.accelerator.autocast():
                log_probs = label_log_probs(model, row, dtype=self.base_dtype)
            row_loss = -log_probs.sum() / inputs.label_tokens
            self.accelerator.backward(row_loss)
            loss += row_loss.detach()
        self.adapter.sum_gradients()
        return loss * self.args.world_size

    def floating_point_ops(self, inputs: TrainingStep) -> int:  # type: ignore[override]
        """4 per base parameter and token: a frozen weight has no gradient of its own."""
        base = sum(parameter.numel() for parameter in self.model.parameters())
        return 4 * base * sum(len(row) for row in inputs.rows)

    def num_examples(self, dataloader: DataLoader[Any]) -> int:
        """Examples, not steps or rows."""
        return len(dataloader.dataset.examples)  # type: ignore[attr-defined]

    # ---- evaluation -----------------------------------------------------------------------------

    def get_eval_dataloader(
        self, eval_dataset: Sequence[Example] | str | None = None
    ) -> DataLoader[ScoringRow]:  # type: ignore[override]
        """This rank's rows of the held-out examples (or of other examples of the task)."""
        examples = self.eval_dataset
        if isinstance(eval_dataset, str):
            examples = self.eval_dataset[eval_dataset]  # type: ignore[index,call-overload]
        elif eval_dataset is not None:
            examples = _encoded(eval_dataset, self.encoder)
        if not examples:
            raise ArgumentError("There are no examples to evaluate: give an eval_dataset.")
        return self._loader(
            ScoringRows(
                examples,  # type: ignore[arg-type]
                rank=self.args.process_index,
                world_size=self.args.world_size,
                max_tokens=self.args.max_tokens_per_row,
            )
        )

    def get_test_dataloader(self, test_dataset: Sequence[Example]) -> DataLoader[ScoringRow]:  # type: ignore[override]
        """As `get_eval_dataloader`."""
        return self.get_eval_dataloader(test_dataset)

    def score(self, examples: Sequence[Example]) -> Scores:
        """Scores of every answer to `examples`; a collective call, the same on every rank."""
        return self._score(self.get_eval_dataloader(examples))

    def evaluation_loop(
        self,
        dataloader: DataLoader[ScoringRow],
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """The task's metrics from the likelihoods of its answers, the same on every rank.

        Returns:
            `predictions` [N, answers] log-likelihoods, `label_ids` [N] index of the true label (-1:
            none), and the metrics, prefixed.
        """
        rows: ScoringRows = dataloader.dataset  # type: ignore[assignment]
        scores = self._score(dataloader)
        metrics = evaluation_metrics(self.task, rows.examples, scores)
        labels = [-1 if example.label is None else example.label for example in rows.examples]
        return EvalLoopOutput(
            predictions=scores.log_likelihoods.numpy(),
            label_ids=torch.tensor(labels).numpy(),
            metrics={f"{metric_key_prefix}_{name}": value for name, value in metrics.items()},
            num_samples=len(rows.examples),
        )

    def _score(self, dataloader: DataLoader[ScoringRow]) -> Scores:
        rows: ScoringRows = dataloader.dataset  # type: ignore[assignment]
        self.callback_handler.eval_dataloader = dataloader
        with self.accelerator.autocast():
            return score_rows(
                self.model,
                dataloader,
                count=len(rows.examples),
                answers=len(rows.answers[0]),
                device=self.args.device,
                dtype=self.base_dtype,
                after_row=lambda: self.callback_handler.on_prediction_step(
                    self.args, self.state, self.control
                ),
            )

    # ---- saving and loading ---------------------------------------------------------------------

    def _save(
        self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None
    ) -> None:
        """Write adapter, tokenizer and arguments from rank 0. Nothing of the base is gathered."""
        self.adapter.check_equal()
        if not self.args.should_save:
            return
        folder = Path(output_dir or self.args.output_dir or ".")
        folder.mkdir(parents=True, exist_ok=True)
        save_adapter(self.model, folder)
        self.processing_class.save_pretrained(folder)
        save_task(self.encoder, folder)
        # As JSON: a pickle would have to be trusted by whoever reads it.
        arguments = json.dumps(self.args.to_dict(), indent=2, default=str)
        (folder / "training_args.json").write_text(arguments, encoding="utf-8")

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: nn.Module | None = None
    ) -> None:
        """Load a checkpoint's adapter."""
        load_adapter(self.model, resume_from_checkpoint)

    def _load_best_model(self) -> None:
        """Load the adapter with the best metric."""
        logger.info(
            "Loading the best adapter, %s (%s).",
            self.state.best_model_checkpoint,
            self.state.best_metric,
        )
        load_adapter(self.model, str(self.state.best_model_checkpoint))

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


def _encoded(examples: Sequence[Any], encoder: Encoder) -> list[EncodedExample]:
    """`examples` as tokens; those the Trainer hands back from itself already are."""
    if examples and isinstance(examples[0], EncodedExample):
        return list(examples)
    return encoder.encode(examples)


def _digest(tokens: list[Any]) -> str:
    return hashlib.sha256(json.dumps(tokens).encode()).hexdigest()[:16]


def _check_targets(examples: Sequence[EncodedExample]) -> None:
    for example in examples:
        if not example.target_ids:
            raise ArgumentError(f"Row {example.row} has no target: it cannot be trained on.")


def _fold_accumulation(args: FineTuningArguments) -> FineTuningArguments:
    """The same arguments with accumulation folded into the batch: packed rows make it needless."""
    folded = copy.copy(args)
    folded.per_device_train_batch_size *= args.gradient_accumulation_steps
    folded.gradient_accumulation_steps = 1
    folded._n_gpu = min(args.n_gpu, 1)  # several GPUs are used by several processes
    return folded


def _shares_prefix(args: FineTuningArguments, model: PeftModel) -> bool:
    if args.share_prefix == "auto":
        config = model.peft_config[model.active_adapter]
        return getattr(config, "lora_dropout", 0.0) == 0.0
    return args.share_prefix == "always"


def _check_arguments(
    args: FineTuningArguments, settings: FsdpSettings | None, *, max_length: int
) -> None:
    if args.gradient_checkpointing and settings is not None and settings.activation_checkpointing:
        raise ArgumentError(
            "Both --gradient_checkpointing and the YAML's fsdp_activation_checkpointing are set, "
            "which would recompute everything twice: keep one."
        )
    if args.max_tokens_per_row < max_length:
        raise ArgumentError(
            f"--max_tokens_per_row {args.max_tokens_per_row} is less than --max_length "
            f"{max_length}: a row must hold the longest example."
        )
    if args.torch_compile:
        raise ArgumentError("--torch_compile is not supported yet: remove it.")


def _enable_checkpointing(
    model: PeftModel, args: FineTuningArguments, settings: FsdpSettings | None
) -> None:
    """Recompute activations layer by layer if the YAML asks for it.

    By transformers' own switch and not by wrapper modules, which would rename the adapter's
    parameters; `--gradient_checkpointing` is switched on by the Trainer itself.
    """
    if settings is None or not settings.activation_checkpointing:
        return
    base = model.get_base_model()
    # transformers < 5.20 knows the switch by its old name only.
    enable = getattr(base, "activation_checkpointing_enable", base.gradient_checkpointing_enable)
    enable()
