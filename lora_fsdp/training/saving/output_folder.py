"""Whether a run may write into its output folder, and what of an earlier run it would replace."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import cast

from lora_fsdp.arguments import FineTuningArguments
from lora_fsdp.errors import OutputFolderError
from lora_fsdp.training.saving.atomic_folders import is_ours
from lora_fsdp.training.saving.checkpoints import check_named_checkpoint, newest_whole_checkpoint

# What a run leaves in its folder and no other program does; nothing else is ever removed. Of the
# names with a pattern only those of numbered folders.
_RUN_FILES = (
    "adapter_config.json",
    "adapter_model.safetensors",
    "calibration.json",
    "confusion_matrix.png",
    "manifest.json",
    "metrics.json",
    "out_of_fold.csv",
    "predictions.csv",
    "report.html",
    "report.json",
    "proof.json",
    "sweep.json",
    "sweep_plan.json",
    "task.json",
    "training_args.json",
)
_RUN_FOLDERS = ("checkpoint-*", "diverged-step-*", "report_figures", "stalled")
_NUMBERED = ("checkpoint-", "diverged-step-")


def check_output_folder(folder: Path, arguments: FineTuningArguments) -> list[Path]:
    """What is in the folder of an earlier run and would be replaced; nothing is changed.

    Raises:
        OutputFolderError: it holds a run, and neither resuming nor overwriting was asked for; or
            what would be replaced is of another kind than what a run makes.
        DamagedCheckpointError: it is to be resumed and holds no whole checkpoint.
    """
    left = [*files_of(folder, _RUN_FILES), *_folders_of(folder)]
    resume = cast(str | bool | None, arguments.resume_from_checkpoint)
    if isinstance(resume, str):
        check_named_checkpoint(Path(resume))
        elsewhere = Path(resume).absolute().parent != folder.absolute()
        if left and elsewhere and not arguments.overwrite_output_dir:
            raise OutputFolderError(
                f"{folder} already holds another run than {resume} is of: choose another "
                "--output_dir, or replace it with --overwrite_output_dir true."
            )
        return []
    if resume:
        newest_whole_checkpoint(folder)
        return []
    if left and not arguments.overwrite_output_dir:
        raise OutputFolderError(
            f"{folder} already holds a run: choose another --output_dir, continue it with "
            "--resume_from_checkpoint true, or replace it with --overwrite_output_dir true."
        )
    for path in left:
        check_kind(path, is_folder=path.name not in _RUN_FILES)
    return left


def _folders_of(folder: Path) -> list[Path]:
    found = files_of(folder, _RUN_FOLDERS)
    return [path for path in found if not path.name.startswith(_NUMBERED) or is_ours(path.name)]


def check_kind(path: Path, *, is_folder: bool) -> None:
    """Refuse to remove a link, or a file where a run makes a folder, or the other way round.

    Raises:
        OutputFolderError: names it.
    """
    if path.is_symlink() or path.is_dir() != is_folder:
        kind = "link" if path.is_symlink() else "file" if is_folder else "folder"
        raise OutputFolderError(
            f"{path} is a {kind}, which no run makes under this name: it is not removed. Move it "
            "away, or choose another --output_dir."
        )


def check_inputs_stay(inputs: Sequence[Path], replaced: Sequence[Path]) -> None:
    """Refuse to replace an earlier run whose files the new one reads.

    Raises:
        OutputFolderError: names the file.
    """
    gone = {path.resolve() for path in replaced}
    for given in inputs:
        place = given.resolve()
        if gone & {place, *place.parents}:
            raise OutputFolderError(
                f"{given} belongs to the run that --overwrite_output_dir true would remove, and "
                "the new run reads it: copy it to another place, or choose another --output_dir."
            )


def files_of(folder: Path, patterns: Sequence[str]) -> list[Path]:
    """Files and folders in `folder` that match one of the patterns."""
    return [path for pattern in patterns for path in folder.glob(pattern)]
