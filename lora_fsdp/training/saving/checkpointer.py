"""What a run writes and reads of itself: checkpoints, the final adapter, and an exact resume."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft.utils import CONFIG_NAME
from transformers import TrainerCallback, TrainerControl, TrainerState
from transformers.trainer_callback import ExportableState

from lora_fsdp.adapter.adapter_set import AdapterSet
from lora_fsdp.adapter.proof import read_proof
from lora_fsdp.adapter.saved import load_adapter
from lora_fsdp.errors import CheckpointError
from lora_fsdp.ranks import check_ranks_agree, on_first_rank
from lora_fsdp.training.saving.adapter_writer import AdapterWriter
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
from lora_fsdp.training.saving.resume import check_can_resume
from lora_fsdp.training.saving.separate_disks import agree_on_resume, give_to_hosts
from lora_fsdp.training.saving.training_state import STATE_FILE, TrainingState
from lora_fsdp.training.watching.adapter_moves import AdapterMoves

logger = logging.getLogger(__name__)


@dataclass
class Checkpointer:
    """Saves and loads for one trainer. Every method is a collective call.

    Attributes:
        writer: writes the adapter.
        adapters: those that must be equal on every rank.
        moves: whether training has moved them; told so when an adapter is loaded.
        facts: what a checkpoint says of the run (`run_facts`).
        on_each_host: what rank 0 writes goes to the disk of every other host as well.
        resumed: what the checkpoint that the run goes on from holds beside the adapter; `None` = it
            began anew.
    """

    writer: AdapterWriter
    adapters: AdapterSet
    moves: AdapterMoves
    facts: dict[str, Any]
    on_each_host: bool = False
    resumed: TrainingState | None = None

    # ---- saving ---------------------------------------------------------------------------------

    def save_final(self, folder: Path) -> None:
        """Write adapter, tokenizer and arguments from rank 0. Nothing of the base is gathered.

        Raises:
            CheckpointSaveError: they cannot be written; on every rank.
        """
        self.adapters.check_equal()
        answers = self.writer.answer_probes()

        def write() -> None:
            with atomic_files(folder, self.facts, last=CONFIG_NAME) as partial:
                self.writer.write(partial, answers, goes_to=folder, trained=self.moves.moved)

        on_first_rank(write)
        if self.on_each_host:
            give_to_hosts(folder, last=CONFIG_NAME)

    def save(
        self,
        folder: Path,
        *,
        state: TrainerState,
        callbacks: Sequence[TrainerCallback],
        training: TrainingState | None,
        limit: int | None,
    ) -> None:
        """Write a checkpoint from rank 0, then remove those beyond `limit`.

        Args:
            folder: where to; whole when this returns, and not there before.
            state: the Trainer's, which gets its callbacks' states and the best checkpoint's path.
            callbacks: the Trainer's.
            training: all else that the next step depends on; `None` = nobody is to resume from it.
            limit: how many checkpoints stay (`save_total_limit`).
        """
        started = time.perf_counter()
        if state.best_global_step:
            best = folder.parent / f"checkpoint-{state.best_global_step}"
            if best == folder or best.is_dir():
                state.best_model_checkpoint = str(best)
        self.adapters.check_equal()
        answers = self.writer.answer_probes()

        def tidy() -> None:
            kept = state.best_model_checkpoint
            keep = {folder, *([Path(kept)] if kept else [])}
            remove_old_checkpoints(folder.parent, limit=limit, keep=keep)

        def write() -> None:
            with atomic_folder(folder, self.facts | {"step": state.global_step}) as partial:
                self.writer.write(partial, answers, goes_to=folder, trained=self.moves.moved)
                if training is not None:
                    training.write(partial)
                state.stateful_callbacks = _states_of(callbacks)  # type: ignore[assignment]
                state.save_to_json(str(partial / "trainer_state.json"))
            tidy()
            logger.debug("%s took %.2f s.", folder, time.perf_counter() - started)

        on_first_rank(write)
        if self.on_each_host and give_to_hosts(folder):
            tidy()

    # ---- loading --------------------------------------------------------------------------------

    def begin(self, run_folder: Path, resume: str | bool | None) -> Path | None:
        """Tidy the run's folder and find the checkpoint to go on from, if that is asked for.

        Raises:
            DamagedCheckpointError: there is no whole checkpoint to resume from.
            ResumeMismatchError: it is of a run with other data or settings.
            RankMismatchError: the hosts do not see the same checkpoints.
        """
        resume = agree_on_resume(run_folder, resume, on_each_host=self.on_each_host)
        checkpoint = on_first_rank(lambda: _prepare(run_folder, resume))
        self.resumed = None if checkpoint is None else self._read(checkpoint)
        return checkpoint

    def load_adapter(self, checkpoint: Path) -> None:
        """Make a checkpoint's adapter the live one."""
        load_adapter(self.writer.model, checkpoint)
        proof = read_proof(checkpoint)
        self.moves.moved = proof is None or proof.trained

    def load_best_adapter(self, state: TrainerState) -> None:
        """Load the adapter with the best metric."""
        best = Path(str(state.best_model_checkpoint))
        logger.info("Loading the best adapter, %s (%s).", best, state.best_metric)
        on_first_rank(lambda: check_named_checkpoint(best))
        self.load_adapter(best)
        if not self.moves.moved:
            logger.warning(
                "The best adapter, %s, was saved before the first step with a learning rate above "
                "0: it changes nothing, and the answers are the base's. No later evaluation was "
                "better: look at --learning_rate, --warmup_steps and --metric_for_best_model.",
                best,
            )

    def _read(self, checkpoint: Path) -> TrainingState:
        """What a checkpoint holds beside the adapter, if this run can go on from it."""
        # Each rank looks for itself: the folder may be another one on another machine.
        damage = find_damage(checkpoint)
        seen = damage or str(read_marker(checkpoint)["files"])
        check_ranks_agree({f"what {checkpoint / MARKER} says": seen})
        check_can_resume(checkpoint, saved=read_marker(checkpoint)["facts"], facts=self.facts)
        if not (checkpoint / STATE_FILE).is_file():
            raise CheckpointError(
                f"Cannot resume from {checkpoint}: it was written with --save_only_model, without "
                "the optimizer's state. Start anew in another --output_dir."
            )
        logger.info("Resuming from %s.", checkpoint)
        return TrainingState.read(checkpoint)


def _prepare(run_folder: Path, resume: str | bool | None) -> Path | None:
    for path in remove_leftovers(run_folder):
        logger.info("Removed %s, which an earlier run left unfinished.", path)
    if not resume:
        return None
    if isinstance(resume, str):
        return check_named_checkpoint(Path(resume))
    checkpoint, skipped = newest_whole_checkpoint(run_folder)
    if skipped:
        logger.warning("Not resumed from %s.", "; ".join(skipped))
    return checkpoint


def _states_of(callbacks: Sequence[TrainerCallback]) -> dict[str, Any]:
    """Of callbacks that have one. The control's would repeat what this step already did."""
    with_state = [callback for callback in callbacks if isinstance(callback, ExportableState)]
    return TrainerState(stateful_callbacks=[*with_state, TrainerControl()]).stateful_callbacks  # type: ignore[list-item, return-value]
