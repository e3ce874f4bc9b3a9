"""Checkpoints where every host has a disk of its own.

Rank 0 writes, as always. With `--save_on_each_node` its files then go to the first rank of every
other host, which compares each with the SHA-256 of the marker before the folder takes its place: a
host that has the folder has what was written. Where a run goes on, the newest whole checkpoint of
any host is given to those that lack it, so that a host may come back with an empty disk. Nothing is
written twice on a disk that several hosts see.
"""

from __future__ import annotations

import logging
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from lora_fsdp.errors import CheckpointSaveError, DamagedCheckpointError, RankMismatchError
from lora_fsdp.ranks import (
    from_every_rank,
    from_rank,
    host_count,
    is_first_of_host,
    on_first_of_hosts,
    rank,
)
from lora_fsdp.training.saving.atomic_folders import (
    MARKER,
    check_whole,
    read_marker,
    received_folder,
    remove_leftovers,
)
from lora_fsdp.training.saving.checkpoints import find_damage, list_checkpoints

logger = logging.getLogger(__name__)

_PIECE_BYTES = 32 * 2**20


@dataclass(frozen=True)
class _Holding:
    """What a host has to go on from: nothing, or a whole checkpoint."""

    rank: int
    host: str
    name: str | None
    step: int
    marker: str


def agree_on_resume(
    run_folder: Path, resume: str | bool | None, *, on_each_host: bool
) -> str | bool | None:
    """Whether a run goes on, the same on every rank, and with what on every host. Collective.

    Args:
        run_folder: of this host.
        resume: what this rank was told, or found (`if_any`).
        on_each_host: every host has a disk of its own (`--save_on_each_node`); a host that lacks
            the newest checkpoint gets it.

    Raises:
        RankMismatchError: the hosts do not see the same, and their disks are not said to be apart.
        CheckpointSaveError: a host cannot write what it gets.
    """
    if host_count() == 1:
        return resume
    if on_each_host:
        on_first_of_hosts(lambda: remove_leftovers(run_folder))
    asked = [one for one in from_every_rank(resume) if one]
    if not asked:
        return resume
    agreed = asked[0]
    holdings = _holdings(run_folder, agreed)
    there = [one for one in holdings if one.name is not None]
    if not there:
        return agreed  # rank 0 says what is wrong with each
    newest = max(there, key=lambda one: (one.step, -one.rank))
    others = [one for one in holdings if one.marker != newest.marker]
    if others and not on_each_host:
        raise _not_shared(run_folder, newest, others[0])
    for one in others:
        if rank() == 0:
            logger.warning(
                "%s has %s and not %s of %s: it gets that one from %s.",
                one.host,
                "no whole checkpoint" if one.name is None else one.name,
                newest.name,
                run_folder,
                newest.host,
            )
    folder = Path(agreed) if isinstance(agreed, str) else run_folder / str(newest.name)
    give_to_hosts(folder, sender=newest.rank)
    return agreed


def give_to_hosts(folder: Path, *, sender: int = 0, last: str | None = None) -> bool:
    """Give what was written atomically on one host to those that do not have it. Collective.

    Args:
        folder: where it is, on every host.
        sender: the rank that has it.
        last: `None` = the folder as a whole; else its files are moved in, this one at the end.

    Returns:
        Whether this rank has written a copy.

    Raises:
        CheckpointSaveError: on every rank; names the host that cannot write it.
    """
    if host_count() == 1:
        return False
    mine = _marker_text(folder) if rank() == sender or is_first_of_host() else None
    sent = from_rank(sender, mine)
    if sent is None:
        raise CheckpointSaveError(f"{folder} is not whole where it was written: look at its disk.")
    lacks = is_first_of_host() and rank() != sender and mine != sent
    if not any(from_every_rank(lacks)):
        return False
    pieces = _pieces(folder, sender=sender)
    problem = None
    if lacks:
        try:
            with received_folder(folder, last=last) as partial:
                for name, piece in pieces:
                    place = partial / name
                    place.parent.mkdir(parents=True, exist_ok=True)
                    with place.open("ab") as opened:
                        opened.write(piece)
        except CheckpointSaveError as error:
            problem = f"{socket.gethostname()}: {error}"
    for _ in pieces:
        pass  # a rank that writes nothing, or no longer, still takes part in every broadcast
    if problems := [one for one in from_every_rank(problem) if one is not None]:
        raise CheckpointSaveError(" ".join(problems))
    return lacks


def _pieces(folder: Path, *, sender: int) -> Iterator[tuple[str, bytes]]:
    """Every file of a folder by pieces, from the rank that has it to all. Collective."""
    names: list[str] = []
    if rank() == sender:
        names = [*read_marker(folder)["files"], MARKER]
    for name in from_rank(sender, names):
        opened = (folder / name).open("rb") if rank() == sender else None
        try:
            while True:
                piece = b""
                if opened is not None:
                    try:
                        piece = opened.read(_PIECE_BYTES)
                    except OSError as error:  # what arrives is not whole, which is said there
                        logger.warning("%s cannot be read (%s).", folder / name, error.strerror)
                piece = from_rank(sender, piece)
                if not piece:
                    break
                yield name, piece
        finally:
            if opened is not None:
                opened.close()


def _holdings(run_folder: Path, resume: str | bool) -> list[_Holding]:
    """What each host has, by host. A collective call."""
    mine = None
    if is_first_of_host():
        named = [Path(resume)] if isinstance(resume, str) else list_checkpoints(run_folder)
        found = next((one for one in named if one.is_dir() and find_damage(one) is None), None)
        step = -1 if found is None else int(read_marker(found)["facts"].get("step", 0))
        mine = _Holding(
            rank(),
            socket.gethostname(),
            None if found is None else found.name,
            step,
            "" if found is None else str(_marker_text(found)),
        )
    return [one for one in from_every_rank(mine) if one is not None]


def _not_shared(run_folder: Path, newest: _Holding, odd: _Holding) -> RankMismatchError:
    has = "no whole checkpoint" if odd.name is None else f"another {odd.name}"
    if odd.name not in (None, newest.name):
        has = f"{odd.name} as the newest"
    return RankMismatchError(
        f"{newest.host} has {newest.name} of {run_folder} to go on from, and {odd.host} has {has} "
        "there: put --output_dir on a disk that all hosts share, or give --save_on_each_node true, "
        "with which a host gets what it lacks."
    )


def _marker_text(folder: Path) -> str | None:
    """The marker of a folder that is whole; it names every file's SHA-256."""
    try:
        check_whole(folder)
        return (folder / MARKER).read_text(encoding="utf-8")
    except (DamagedCheckpointError, OSError):
        return None
