"""Whose the output folder is: claimed before a run reads its data, and given back after it."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from pathlib import Path

from lora_fsdp.arguments import FineTuningArguments
from lora_fsdp.distributed.orphans import end_with_launcher
from lora_fsdp.ranks import on_first_of_hosts, on_first_rank
from lora_fsdp.reporting.model_card import remove_model_card
from lora_fsdp.reporting.run_files import RECORD_FILES
from lora_fsdp.sweeps.earlier import earlier_files
from lora_fsdp.training.saving.atomic_folders import remove_leftovers, writing_into
from lora_fsdp.training.saving.output_folder import (
    check_inputs_stay,
    check_kind,
    check_output_folder,
    files_of,
)
from lora_fsdp.training.saving.run_lock import hold_folder, release_folder
from lora_fsdp.training.saving.separate_disks import agree_on_resume


@contextmanager
def claimed(arguments: FineTuningArguments, *, inputs: Sequence[Path] = ()) -> Iterator[Path]:
    """Within it, the output folder is this run's. Parameters and errors as `claim_output_folder`'s.

    Raises:
        CheckpointSaveError: it can no longer be written to.
    """
    folder = claim_output_folder(arguments, inputs=inputs)
    try:
        with writing_into(folder):
            yield folder
    finally:
        release_folder(folder)


@contextmanager
def claimed_for_several(
    arguments: FineTuningArguments, *, inputs: Sequence[Path]
) -> Iterator[Path]:
    """As `claimed`, of a run of several adapters: of an earlier one, all is removed at once."""
    folder = Path(arguments.output_dir or ".")
    end_with_launcher()
    on_first_rank(lambda: claim_for_several(folder, arguments, inputs=inputs))
    try:
        with writing_into(folder):
            yield folder
    finally:
        release_folder(folder)


def claim_output_folder(arguments: FineTuningArguments, *, inputs: Sequence[Path] = ()) -> Path:
    """The output folder, held by rank 0; of an earlier run nothing is removed yet.

    Args:
        arguments: the run's.
        inputs: files and folders that the run reads.

    Raises:
        OutputFolderError: it holds a run, and neither resuming nor overwriting was asked for; or
            overwriting would remove what the run reads; or another run is writing into it.
        DamagedCheckpointError: it is to be resumed and holds no complete checkpoint.
    """
    folder = Path(arguments.output_dir or ".")
    end_with_launcher()
    each = bool(arguments.save_on_each_node)
    resume = agree_on_resume(folder, arguments.resume_from_checkpoint, on_each_host=each)
    arguments.resume_from_checkpoint = resume  # type: ignore[assignment]
    on_first_rank(lambda: _claim(folder, arguments, inputs))
    if each:
        on_first_of_hosts(lambda: check_output_folder(folder, arguments))
    return folder


def claim_for_several(
    folder: Path, arguments: FineTuningArguments, *, inputs: Sequence[Path]
) -> None:
    """Hold the output folder of several adapters; for one rank to call.

    Raises:
        OutputFolderError: as `claim_output_folder`.
    """
    hold_folder(folder)
    try:
        remove_leftovers(folder)
        alone = copy(arguments)
        alone.resume_from_checkpoint = None
        earlier = earlier_files(folder)
        if not arguments.resume_from_checkpoint:
            replaced = [*check_output_folder(folder, alone), *earlier]
            check_inputs_stay(inputs, replaced)
            for path in dict.fromkeys(replaced):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
    except BaseException:
        release_folder(folder)
        raise


def _claim(folder: Path, arguments: FineTuningArguments, inputs: Sequence[Path]) -> None:
    hold_folder(folder)
    try:
        # What a process killed while writing leaves behind is nothing that could be lost.
        remove_leftovers(folder)
        replaced = check_output_folder(folder, arguments)
        check_inputs_stay(inputs, replaced)
        for path in files_of(folder, RECORD_FILES):
            check_kind(path, is_folder=False)
    except BaseException:
        release_folder(folder)
        raise


def remove_earlier_run(folder: Path, arguments: FineTuningArguments) -> None:
    """Remove what the new run replaces, if it does not go on with it."""
    replaced = check_output_folder(folder, arguments)
    if arguments.resume_from_checkpoint:
        return
    for path in [*replaced, *files_of(folder, RECORD_FILES)]:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    remove_model_card(folder)
