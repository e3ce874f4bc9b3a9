"""Which checkpoints a run has: the newest whole one, and those that are no longer needed."""

from __future__ import annotations

import re
from pathlib import Path

from lora_fsdp.errors import DamagedCheckpointError
from lora_fsdp.training.saving.atomic_folders import check_whole, remove_folder


def list_checkpoints(run_folder: Path) -> list[Path]:
    """The checkpoint folders of a run by step, the newest first, whole or not."""
    found = {}
    for path in run_folder.glob("checkpoint-*"):
        match = re.fullmatch(r"checkpoint-([0-9]+)", path.name)
        if match and path.is_dir():
            found[int(match[1])] = path
    return [found[step] for step in sorted(found, reverse=True)]


def find_damage(checkpoint: Path, *, hashes: bool = True) -> str | None:
    """What is wrong with a checkpoint, as the end of a sentence about it; `None` if it is whole."""
    try:
        facts = check_whole(checkpoint, hashes=hashes)["facts"]
    except DamagedCheckpointError as error:
        return str(error)
    launch = facts.get("launch")
    whole = isinstance(launch, dict) and all(isinstance(n, int) for n in launch.values())
    if not whole or not all(isinstance(facts.get(k), dict) for k in ("must_stay", "may_change")):
        return "its marker says nothing of the run"
    return None


def newest_whole_checkpoint(run_folder: Path) -> tuple[Path, list[str]]:
    """The newest checkpoint that is as it was written, and what is wrong with each newer one.

    Raises:
        DamagedCheckpointError: there is none; the message says what is wrong with each.
    """
    skipped: list[str] = []
    for checkpoint in list_checkpoints(run_folder):
        damage = find_damage(checkpoint)
        if damage is None:
            return checkpoint, skipped
        skipped.append(f"{checkpoint.name} ({damage})")
    reasons = "; ".join(skipped) or "there are no checkpoint-* folders"
    raise DamagedCheckpointError(
        f"{run_folder} holds no whole checkpoint to resume from: {reasons}. Start anew with "
        "--overwrite_output_dir true."
    )


def check_named_checkpoint(checkpoint: Path) -> Path:
    """A checkpoint that was asked for by its path.

    Raises:
        DamagedCheckpointError: it is not whole.
    """
    damage = find_damage(checkpoint) if checkpoint.is_dir() else "there is no such folder"
    if damage is not None:
        raise DamagedCheckpointError(
            f"Cannot resume from {checkpoint}: {damage}. Name another, or take the newest whole "
            "one with --resume_from_checkpoint true."
        )
    return checkpoint


def remove_old_checkpoints(run_folder: Path, *, limit: int | None, keep: set[Path]) -> None:
    """Remove the oldest whole checkpoints beyond `limit`; to be called when a new one is whole.

    Damaged ones do not count and are left for a person to look at; so are links, which somebody
    else made.

    Args:
        run_folder: the run's folder.
        limit: how many to keep (`save_total_limit`); `None` or 0 = all.
        keep: those that stay whatever the limit: the newest and the best.
    """
    if not limit or limit < 0:
        return
    own = [path for path in list_checkpoints(run_folder) if not path.is_symlink()]
    whole = [path for path in own if not find_damage(path, hashes=False)]
    protected = [path for path in whole if path in keep]
    others = [path for path in whole if path not in keep]
    for checkpoint in others[max(limit - len(protected), 0) :]:
        remove_folder(checkpoint)
