"""`transformers.Trainer` whose runs survive: whole checkpoints, exact resume, stops on request."""

from __future__ import annotations

import json
import logging
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pandas as pd
from peft import PeftModel
from torch import nn
from torch.utils.data import DataLoader
from transformers import (
    PreTrainedTokenizerBase,
    Trainer,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import TrainOutput

from lora_fsdp.adapter.folder import ADAPTER_FILE
from lora_fsdp.adapter.probes import Probe, probe_log_likelihoods
from lora_fsdp.adapter.proof import PROOF_FILE, Proof, beside, read_proof
from lora_fsdp.adapter.saved import load_adapter, save_adapter
from lora_fsdp.arguments import FineTuningArguments
from lora_fsdp.base.fingerprints import BaseFingerprint, fingerprint_tokenizer
from lora_fsdp.base.folders import sha256_of_file
from lora_fsdp.base.layers import base_model
from lora_fsdp.compute.packed_model import PackedModel
from lora_fsdp.data.encoding import Encoder
from lora_fsdp.distributed.orphans import end_with_launcher
from lora_fsdp.distributed.replication import ReplicatedParameters
from lora_fsdp.distributed.sharding import release_gathered
from lora_fsdp.errors import CheckpointError
from lora_fsdp.evaluation.outputs import write_json
from lora_fsdp.evaluation.prediction import save_task
from lora_fsdp.ranks import check_ranks_agree, from_every_rank, on_first_rank
from lora_fsdp.training.saving.atomic_folders import (
    MARKER,
    atomic_files,
    atomic_folder,
    read_marker,
    remove_leftovers,
)
from lora_fsdp.training.saving.checkpoints import (
    check_named_checkpoint,
    find_damage,
    newest_whole_checkpoint,
    remove_old_checkpoints,
)
from lora_fsdp.training.saving.edges import AtTheEdges
from lora_fsdp.training.saving.random_state import (
    draw_random_state,
    put_back_random_state,
    take_random_state,
)
from lora_fsdp.training.saving.resume import check_can_resume
from lora_fsdp.training.saving.run_lock import run_lock
from lora_fsdp.training.saving.state_file import read_state, write_state
from lora_fsdp.training.step.eager import EagerStep
from lora_fsdp.training.watching.adapter_moves import CheckAdapterMoves
from lora_fsdp.training.watching.interruption import StopRequests

logger = logging.getLogger(__name__)

STATE_FILE = "training_state.safetensors"


class DurableTrainer(Trainer):
    """What `LoraTrainer` overrides of the Trainer's saving, loading and stopping, and why:

    * `train`: takes the newest whole checkpoint, refuses one of another run, stops on request, and
      releases the step's graphs.
    * `_save_checkpoint`: a folder that is whole or not there. The Trainer's own writes in place,
      pickles optimizer and random state, and lets the other ranks hang when rank 0 cannot write.
    * `_load_optimizer_and_scheduler`, `_load_rng_state`, `_load_scaler`, `_load_from_checkpoint`,
      `_load_best_model`: the counterparts; nothing is unpickled.
    * `save_model`: the adapter only, from rank 0, checked on every rank.
    * `set_initial_training_values`: a run that is resumed after its last step trains no further.
    * `_finalize_training`: the newest checkpoint stays.
    * `log`: `train_loss` is of the whole run, also of a resumed one.
    """

    args: FineTuningArguments
    model: PeftModel
    processing_class: PreTrainedTokenizerBase
    adapter: ReplicatedParameters
    encoder: Encoder
    max_new_tokens: int
    run_facts: dict[str, Any]
    probes: list[Probe]
    base_fingerprint: BaseFingerprint
    packed: PackedModel
    moves: CheckAdapterMoves
    confusion_matrices: dict[int, pd.DataFrame]
    step: EagerStep

    # Set by `AtTheEdges`: a callback stops the run for a reason that is not in its metrics.
    stopped_by_callback = False
    # What the checkpoint that this run goes on from holds beside the adapter.
    _resumed: dict[str, Any] | None = None

    # ---- training -------------------------------------------------------------------------------

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> TrainOutput:
        """Train, from the beginning or from a checkpoint.

        Args:
            resume_from_checkpoint: a checkpoint's folder, or `True` for the newest whole one of the
                output folder.
            trial: of a hyperparameter search.
            ignore_keys_for_eval: of no effect; the Trainer's.

        Raises:
            DamagedCheckpointError: there is no whole checkpoint to resume from.
            ResumeMismatchError: it is of a run with other data or settings.
            TrainingInterrupted: stopped by SIGTERM or `max_hours`, with a checkpoint.
        """
        end_with_launcher()
        folder = Path(str(self.args.output_dir))
        with ExitStack() as held:
            held.callback(lambda: self.step.release())
            on_first_rank(lambda: held.enter_context(run_lock(folder)))
            checkpoint = on_first_rank(lambda: _prepare(folder, resume_from_checkpoint))
            self._resumed = None if checkpoint is None else self._read_checkpoint(checkpoint)
            self.stop_requests = StopRequests(
                rank=self.args.process_index,
                world_size=self.args.world_size,
                max_hours=self.args.max_hours,
            )
            self.remove_callback(AtTheEdges)
            self.add_callback(AtTheEdges(self))
            with self.stop_requests.watching():
                return super().train(
                    None if checkpoint is None else str(checkpoint), trial, ignore_keys_for_eval
                )

    def set_initial_training_values(
        self, args: TrainingArguments, dataloader: DataLoader[Any]
    ) -> tuple[int, int, int, int, int, int | None, int]:
        """The Trainer's; no epoch is left where the checkpoint is that of a finished run."""
        values = super().set_initial_training_values(args, dataloader)
        self.epochs, self.steps_per_epoch, max_steps = values[0], values[1], values[-1]
        if self._resumed is not None:
            loop = self._resumed["loop"]
            if loop["stopped_early"] or loop["step"] >= max_steps:
                self._load_rng_state(None)  # which the Trainer does where an epoch begins
                return (0, *values[1:])
        return values

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log; the mean loss is that of all steps and not of those since the run was resumed."""
        if "train_loss" in logs:
            logs["train_loss"] = self._total_loss_scalar / max(self.state.global_step, 1)
        super().log(logs, start_time)

    def _finalize_training(
        self, trial: Any, num_train_samples: int, start_time: float
    ) -> TrainOutput:
        """The Trainer's, which with a limit of 1 would keep the best checkpoint only."""
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            return super()._finalize_training(trial, num_train_samples, start_time)
        finally:
            self.args.save_total_limit = limit

    # ---- saving ---------------------------------------------------------------------------------

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write adapter, tokenizer and arguments from rank 0. Nothing of the base is gathered.

        Raises:
            CheckpointSaveError: they cannot be written; on every rank.
        """
        self.adapter.check_equal()
        folder = Path(str(output_dir or self.args.output_dir))
        answers = self._answer_probes()
        on_first_rank(lambda: self._write_final(folder, answers))
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def _write_final(self, folder: Path, answers: list[list[float]]) -> None:
        with atomic_files(folder, self.run_facts, last="adapter_config.json") as partial:
            self._write_adapter(partial, answers, goes_to=folder)

    def _write_adapter(self, folder: Path, answers: list[list[float]], *, goes_to: Path) -> None:
        save_adapter(self.model, folder, trained=self.moves.moved)
        # PEFT's form with nothing filled in, which would take the place of a card with contents.
        (folder / "README.md").unlink(missing_ok=True)
        self.processing_class.save_pretrained(folder)
        save_task(self.encoder, folder, max_new_tokens=self.max_new_tokens)
        write_json(folder / PROOF_FILE, self._proof(folder, answers, goes_to=goes_to).to_json())
        # As JSON: a pickle would have to be trusted by whoever reads it.
        arguments = json.dumps(self.args.to_dict(), indent=2, default=str)
        (folder / "training_args.json").write_text(arguments, encoding="utf-8")

    def _answer_probes(self) -> list[list[float]]:
        """The live adapter's answers to the probes; a collective call."""
        with self.accelerator.autocast():
            answers = probe_log_likelihoods(self.packed, self.probes, device=self.args.device)
        release_gathered(self.model)
        return answers

    def _proof(self, folder: Path, answers: list[list[float]], *, goes_to: Path) -> Proof:
        """What the adapter in `folder` can later be checked against, at `goes_to`."""
        config = base_model(self.model).config
        quantization = getattr(config, "quantization_config", None)
        return Proof(
            adapter_sha256=sha256_of_file(folder / ADAPTER_FILE),
            trained=self.moves.moved,
            base=self.base_fingerprint,
            base_name=str(config.name_or_path),
            base_beside=beside(str(config.name_or_path), goes_to),
            base_commit=getattr(config, "_commit_hash", None),
            base_dtype=str(self.packed.dtype).removeprefix("torch."),
            base_quantization=None if quantization is None else str(quantization),
            tokenizer_sha256=fingerprint_tokenizer(self.processing_class),
            end_token_id=self.encoder.end_token_id,
            probes=self.probes,
            log_likelihoods=answers,
        )

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Write a checkpoint from rank 0, then remove those beyond `save_total_limit`."""
        if self.hp_search_backend is None and trial is None:
            self.store_flos()
        run_folder = Path(self._get_output_dir(trial=trial))
        folder = run_folder / f"checkpoint-{self.state.global_step}"
        if self.state.best_global_step:
            best = run_folder / f"checkpoint-{self.state.best_global_step}"
            if best == folder or best.is_dir():
                self.state.best_model_checkpoint = str(best)
        self.adapter.check_equal()
        state = None if self.args.save_only_model else self._training_state()
        answers = self._answer_probes()
        on_first_rank(lambda: self._write_checkpoint(folder, state, answers))
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(folder))

    def _write_checkpoint(
        self, folder: Path, state: dict[str, Any] | None, answers: list[list[float]]
    ) -> None:
        started = time.perf_counter()
        with atomic_folder(folder, self.run_facts | {"step": self.state.global_step}) as partial:
            self._write_adapter(partial, answers, goes_to=folder)
            if state is not None:
                write_state(partial / STATE_FILE, state)
            self.state.stateful_callbacks = self._callback_states()  # type: ignore[assignment]
            self.state.save_to_json(str(partial / "trainer_state.json"))
        best = self.state.best_model_checkpoint
        remove_old_checkpoints(
            folder.parent,
            limit=self.args.save_total_limit,
            keep={folder, *([Path(best)] if best else [])},
        )
        logger.debug("%s took %.2f s.", folder, time.perf_counter() - started)

    def _callback_states(self) -> dict[str, Any]:
        """Of callbacks that have one. The control's would repeat what this step already did."""
        with_state = [c for c in self.callback_handler.callbacks if isinstance(c, ExportableState)]
        return TrainerState(stateful_callbacks=[*with_state, TrainerControl()]).stateful_callbacks  # type: ignore[list-item, return-value]

    def _training_state(self) -> dict[str, Any]:
        """All that the next step depends on beside the adapter. A collective call."""
        early = self.state.global_step < self.state.max_steps
        mine = {
            "random": take_random_state(self.args.device),
            "loss_since_log": self._tr_loss.item(),
        }
        return {
            "optimizer": self.optimizer.state_dict(),  # type: ignore[union-attr]
            "scheduler": self.lr_scheduler.state_dict(),  # type: ignore[union-attr]
            "ranks": from_every_rank(mine),
            "loop": {
                "step": self.state.global_step,
                "epochs": self.state.num_train_epochs,
                "stopped_early": early
                and self.control.should_training_stop
                and not self.stopped_by_callback,
                "total_loss": self._total_loss_scalar,
                "step_last_logged": self._globalstep_last_logged,
                "confusion_matrices": {
                    step: matrix.to_dict(orient="split")
                    for step, matrix in self.confusion_matrices.items()
                },
            },
        }

    # ---- loading --------------------------------------------------------------------------------

    def _read_checkpoint(self, checkpoint: Path) -> dict[str, Any]:
        """What a checkpoint holds beside the adapter, if this run can go on from it."""
        # Each rank looks for itself: the folder may be another one on another machine.
        damage = find_damage(checkpoint)
        seen = damage or str(read_marker(checkpoint)["files"])
        check_ranks_agree({f"what {checkpoint / MARKER} says": seen})
        facts = read_marker(checkpoint)["facts"]
        check_can_resume(checkpoint, saved=facts, facts=self.run_facts)
        if not (checkpoint / STATE_FILE).is_file():
            raise CheckpointError(
                f"Cannot resume from {checkpoint}: it was written with --save_only_model, without "
                "the optimizer's state. Start anew in another --output_dir."
            )
        logger.info("Resuming from %s.", checkpoint)
        return read_state(checkpoint / STATE_FILE)

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: nn.Module | None = None
    ) -> None:
        """Load a checkpoint's adapter."""
        self._put_adapter(Path(resume_from_checkpoint))

    def _load_best_model(self) -> None:
        """Load the adapter with the best metric."""
        best = str(self.state.best_model_checkpoint)
        logger.info("Loading the best adapter, %s (%s).", best, self.state.best_metric)
        on_first_rank(lambda: check_named_checkpoint(Path(best)))
        self._put_adapter(Path(best))
        if not self.moves.moved:
            logger.warning(
                "The best adapter, %s, was saved before the first step with a learning rate above "
                "0: it changes nothing, and the answers are the base's. No later evaluation was "
                "better: look at --learning_rate, --warmup_steps and --metric_for_best_model.",
                best,
            )

    def _put_adapter(self, checkpoint: Path) -> None:
        """Make a checkpoint's adapter the live one."""
        load_adapter(self.model, checkpoint)
        proof = read_proof(checkpoint)
        self.moves.moved = proof is None or proof.trained

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Continue optimizer and schedule."""
        if self._resumed is not None:
            self.optimizer.load_state_dict(self._resumed["optimizer"])  # type: ignore[union-attr]
            self.lr_scheduler.load_state_dict(self._resumed["scheduler"])  # type: ignore[union-attr]

    def _load_scaler(self, checkpoint: str | None) -> None:
        """Nothing: fp16, which has one, is refused."""

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Continue this rank's random numbers; draw new ones for another number of ranks."""
        if self._resumed is None:
            return
        rank, ranks = self.args.process_index, self._resumed["ranks"]
        if len(ranks) == self.args.world_size:
            put_back_random_state(ranks[rank]["random"], self.args.device)
        else:
            draw_random_state(seed=self.args.seed, step=self.state.global_step, rank=rank)

    def restore_loop(self) -> None:
        """Continue what the Trainer starts anew at every `train`: called when the loop begins."""
        if self._resumed is None:
            return
        loop, ranks = self._resumed["loop"], self._resumed["ranks"]
        losses = [rank["loss_since_log"] for rank in ranks]
        same = len(ranks) == self.args.world_size
        # The Trainer logs the mean over ranks, which for other ranks is everyone's share.
        self._tr_loss.fill_(losses[self.args.process_index] if same else sum(losses) / len(losses))
        self._total_loss_scalar = loop["total_loss"]
        self._globalstep_last_logged = loop["step_last_logged"]
        self.state.train_batch_size = self._train_batch_size
        self.state.num_train_epochs = self.epochs
        self.confusion_matrices.update(
            {
                step: pd.DataFrame(matrix["data"], matrix["index"], matrix["columns"])
                for step, matrix in loop["confusion_matrices"].items()
            }
        )
        if self.state.best_global_step:  # also where the folder was moved
            best = Path(str(self.args.output_dir)) / f"checkpoint-{self.state.best_global_step}"
            self.state.best_model_checkpoint = str(best) if best.is_dir() else None


def _prepare(folder: Path, resume: str | bool | None) -> Path | None:
    """Tidy the output folder and find the checkpoint to go on from."""
    for path in remove_leftovers(folder):
        logger.info("Removed %s, which an earlier run left unfinished.", path)
    if not resume:
        return None
    if isinstance(resume, str):
        return check_named_checkpoint(Path(resume))
    checkpoint, skipped = newest_whole_checkpoint(folder)
    if skipped:
        logger.warning("Not resumed from %s.", "; ".join(skipped))
    return checkpoint
