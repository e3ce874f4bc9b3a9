"""What several adapters leave in their output folder, beside a folder for each of them."""

from __future__ import annotations

from pathlib import Path

from lora_fsdp.base.folders import read_json_object
from lora_fsdp.errors import ArgumentError, DamagedRunError, LoraFsdpError, OutputFolderError

#: What the run consists of, written when it starts.
PLAN_FILE = "sweep_plan.json"
#: What it came to.
SWEEP_FILE = "sweep.json"
#: With successive halving, what each adapter scored at the end of each stage.
HALVING_FILE = "halving.json"
#: In an adapter's folder: where a stage of a shared pass left it.
STAGE_FILE = "stage_state.safetensors"
#: In an adapter's folder: its scores where its turns ended, by the step.
STAGE_SCORES_FILE = "stage_scores.json"
#: With folds, every row answered by an adapter that had not learnt from it.
OUT_OF_FOLD_FILE = "out_of_fold.csv"
#: Of those rows, the ones whose label may be wrong.
LABEL_ERRORS_FILE = "label_errors.csv"
#: The page about all of them, and the one that sets every two side by side.
REPORT_FILE = "report.html"
COMPARISON_FILE = "comparison.html"
_PAGES = (
    REPORT_FILE, "report.json", "report_figures",
    COMPARISON_FILE, "comparison.json", "comparison_figures",
)  # fmt: skip
#: In an adapter's folder: its figures on the test rows; why it was stopped before its end.
TEST_FILE = "test_metrics.json"
#: A key of the first.
TEST_INTERVAL = "interval"
STOPPED_FILE = "stopped.json"
#: Where adapters that share a pass keep their common checkpoints, with a number.
TOGETHER = "together"
_FILES = (PLAN_FILE, SWEEP_FILE, HALVING_FILE, OUT_OF_FOLD_FILE, LABEL_ERRORS_FILE, *_PAGES)


def earlier_files(root: Path) -> list[Path]:
    """Files and folders of an earlier run of several adapters; nothing that a user has put there.

    Raises:
        OutputFolderError: one of them is a link, which no run makes.
    """
    if not (root / PLAN_FILE).is_file():
        return []
    names = [*_FILES, *(path.name for path in root.glob(f"{TOGETHER}-*"))]
    found = [root / name for name in dict.fromkeys([*members(root), *names])]
    there = [path for path in found if path.exists() or path.is_symlink()]
    for path in there:
        if path.is_symlink():
            raise OutputFolderError(
                f"{path} is a link, which no run makes under this name: it is not removed. Move it "
                "away, or choose another --output_dir."
            )
    return there


def adapters_of(folder: Path) -> list[Path]:
    """The adapters that answer where `folder` is named: of a run of several adapters its best
    setting's, or all where nothing was chosen; of any other folder itself.

    Raises:
        ArgumentError: the run of several adapters is not finished, or none of them is.
        DamagedRunError: `sweep.json` does not have its form.
    """
    if not (folder / PLAN_FILE).is_file():
        return [folder]
    if not (folder / SWEEP_FILE).is_file():
        raise ArgumentError(
            f"{folder} holds several adapters that are not all finished: let the run end "
            "(--resume_from_checkpoint true), or name one of its folders."
        )
    found = read_json_object(folder, SWEEP_FILE)
    try:
        best = found["best"]
        trained = [one["name"] for one in found["members"] if one["stopped"] is None]
        names = trained if best is None else best["adapters"]
    except (LookupError, TypeError) as error:
        raise DamagedRunError(f"{folder / SWEEP_FILE} is damaged ({error}).") from error
    if not names:
        raise ArgumentError(f"No adapter in {folder} was trained to its end: all diverged.")
    return [folder / Path(str(name)).name for name in names]


def members(root: Path) -> list[str]:
    """The folders' names of the adapters that a run into `root` has; none if it is no such run."""
    if not (root / PLAN_FILE).is_file():
        return []
    try:
        names = list(read_json_object(root, PLAN_FILE).get("adapters", {}))
    except LoraFsdpError:
        return []
    return [name for name in names if Path(name).name == name and name not in ("", ".", "..")]
