"""One checkpoint for several adapters: all of them, whole or not there."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lora_fsdp.adapter.settings import CARRIED_OUT
from lora_fsdp.arguments import FineTuningArguments
from lora_fsdp.errors import DamagedCheckpointError
from lora_fsdp.ranks import check_ranks_agree, on_first_rank
from lora_fsdp.training.run_fingerprints import as_text, digest_examples
from lora_fsdp.training.saving.atomic_folders import (
    MARKER,
    atomic_folder,
    read_marker,
    remove_leftovers,
)
from lora_fsdp.training.saving.checkpoints import (
    find_damage,
    list_checkpoints,
    newest_whole_checkpoint,
    remove_old_checkpoints,
)
from lora_fsdp.training.saving.resume import OF_THE_OPTIMIZER, check_can_resume
from lora_fsdp.training.saving.state_file import read_state, write_state
from lora_fsdp.training.together.members import Member, MemberPlan

logger = logging.getLogger(__name__)

STATE_FILE = "adapters_state.safetensors"
_OF_THE_BASE = ("the base model (SHA-256 of a sample)",)


def facts_of(
    args: FineTuningArguments, plans: Sequence[MemberPlan], *, fingerprints: Mapping[str, str]
) -> dict[str, Any]:
    """What a checkpoint's marker says of the adapters that are trained together, all of it JSON."""
    must_stay = {name: fingerprints[name] for name in _OF_THE_BASE}
    must_stay["the adapters"] = ", ".join(plan.name for plan in plans)
    for plan in plans:
        must_stay |= {f"{plan.name}: {name}": text for name, text in _of_one(plan).items()}
    return {
        "launch": {
            "per_device_train_batch_size": int(args.per_device_train_batch_size),
            "gradient_accumulation_steps": int(args.gradient_accumulation_steps),
            "processes": int(args.world_size),
        },
        "must_stay": must_stay,
        "may_change": {
            f"--{name}": str(getattr(args, name)) for name in ("share_prefix", "max_tokens_per_row")
        },
    }


def _of_one(plan: MemberPlan) -> dict[str, str]:
    values = plan.args.to_dict()
    settings = plan.config.to_dict()
    batch = plan.args.per_device_train_batch_size * plan.args.gradient_accumulation_steps
    return {
        "the seed": str(plan.args.seed),
        "the seed of the data's order": str(plan.order_seed),
        "the number of training examples": str(len(plan.train)),
        "the training examples (SHA-256)": digest_examples(plan.train),
        "examples a step": str(batch * plan.args.world_size),
        "--num_train_epochs": str(values["num_train_epochs"]),
        "--max_steps": str(values["max_steps"]),
        **{f"--{name}": str(values[name]) for name in OF_THE_OPTIMIZER},
        **{f"LoRA's {name}": as_text(settings[name]) for name in sorted(CARRIED_OUT)},
    }


class CommonState:
    """Checkpoints of adapters that are trained together. Every method is a collective call.

    Args:
        folder: in which they stand as `checkpoint-<step>`.
        facts: what their markers say (`facts_of`).
        limit: how many stay (`save_total_limit`).
    """

    def __init__(self, folder: Path, facts: dict[str, Any], *, limit: int | None) -> None:
        self.folder, self.facts, self.limit = folder, facts, limit

    def save(self, members: Sequence[Member], *, step: int) -> None:
        """Write one checkpoint of all adapters, from rank 0.

        Raises:
            CheckpointSaveError: it cannot be written; on every rank.
        """
        place = self.folder / f"checkpoint-{step}"

        def write() -> None:
            self.folder.mkdir(parents=True, exist_ok=True)
            with atomic_folder(place, self.facts | {"step": step}) as partial:
                states = {member.plan.name: member.state() for member in members}
                write_state(partial / STATE_FILE, {"step": step, "members": states})
            remove_old_checkpoints(self.folder, limit=self.limit, keep={place})

        on_first_rank(write)

    def put_back(self, members: Sequence[Member]) -> int:
        """Go on from the newest whole checkpoint, if there is any; the step it was written after.

        Raises:
            ResumeMismatchError: it is of adapters with other data or settings.
            DamagedCheckpointError: there are checkpoints, and none is whole.
        """
        checkpoint = on_first_rank(self._newest)
        if checkpoint is None:
            return 0
        seen = find_damage(checkpoint) or str(read_marker(checkpoint)["files"])
        check_ranks_agree({f"what {checkpoint / MARKER} says": seen})
        check_can_resume(checkpoint, saved=read_marker(checkpoint)["facts"], facts=self.facts)
        if not (checkpoint / STATE_FILE).is_file():
            raise DamagedCheckpointError(
                f"{checkpoint} is of one adapter, not of several: choose another --output_dir."
            )
        state = read_state(checkpoint / STATE_FILE)
        for member in members:
            member.put_back(state["members"][member.plan.name])
        logger.info("Resuming %d adapters from %s.", len(members), checkpoint)
        return int(state["step"])

    def _newest(self) -> Path | None:
        remove_leftovers(self.folder)
        if not list_checkpoints(self.folder):
            return None
        checkpoint, skipped = newest_whole_checkpoint(self.folder)
        if skipped:
            logger.warning("Not resumed from %s.", "; ".join(skipped))
        return checkpoint
