"""Reading what a run has left in its folder so far; a file that is damaged is named."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import pandas as pd

from lora_fsdp.errors import DamagedRunError, RunNotFoundError
from lora_fsdp.evaluation.outputs import LOG_FILE
from lora_fsdp.evaluation.verdict import columns_after, score_table, ways_of
from lora_fsdp.tasks.answers.kind import CHOICES, PROBABILITY_OF, SCORE_BY, WEIGHT_BY, Section

RECORD_FILE = "run_record.json"
# Its key with the digests of the rows that were trained on.
TRAINED_ON = "training_rows_sha256"
DATA_HEALTH_FILE = "data_health.json"
# Begun anew by every run; they alone do not keep another run out of the folder.
RECORD_FILES = (RECORD_FILE, DATA_HEALTH_FILE, LOG_FILE)
METRICS_FILE = "metrics.json"
PREDICTIONS_FILE = "predictions.csv"
ADAPTER_FILE = "adapter_config.json"
_COLUMNS = ("row", "text", "target", "base", "tuned", "probability")
_ADAPTER_KEYS = ("base_model_name_or_path", "r", "lora_alpha", "lora_dropout", "target_modules")

Part = TypeVar("Part")


@dataclass(frozen=True)
class RunLog:
    """The log lines of a run; `max_steps` is `None` where no file says it."""

    entries: list[dict[str, Any]]
    max_steps: int | None
    file: str


@dataclass(frozen=True)
class RunFiles:
    """What a run's folder holds; `None` for each file that is not there (yet).

    Attributes:
        folder: the absolute path.
        record: `run_record.json`.
        health: `data_health.json`.
        metrics: `metrics.json`, which a run writes last.
        predictions: `predictions.csv`: `row` int, probabilities and scores float, all else text
            ("" = none).
        log: `log_history.jsonl`, or the log in a `trainer_state.json`.
        arguments, task, adapter: `training_args.json`, `task.json`, `adapter_config.json`.
        checkpoints: names of the checkpoint folders, oldest first.
    """

    folder: Path
    record: dict[str, Any] | None
    health: dict[str, Any] | None
    metrics: dict[str, Any] | None
    predictions: pd.DataFrame | None
    log: RunLog | None
    arguments: dict[str, Any] | None
    task: dict[str, Any] | None
    adapter: dict[str, Any] | None
    checkpoints: list[str]

    @property
    def finished(self) -> bool:
        """Whether the run came to its end."""
        return self.metrics is not None

    @property
    def labels(self) -> list[str] | None:
        """The closed label set; `None` for free text, or if no file says it."""
        for source in (self.record, self.metrics):
            if source is not None and source.get("labels"):
                return [str(label) for label in source["labels"]]
        return None

    @property
    def scores(self) -> dict[str, Any] | None:
        """All systems' scores and the verdict (`score_table`); `None` before the run has ended."""
        if self.metrics is None:
            return None
        return score_table(
            self.metrics["metrics"],
            self.predictions,
            primary=str(self.metrics["primary_metric"]),
            rows=self.metrics.get("held_out_rows"),
            chosen_among=self.metrics.get("chosen_among"),
            untrained_ways=ways_of(self.metrics),
        )

    @property
    def sections(self) -> list[str]:
        """The sections about answers that fit; none without predictions."""
        if self.predictions is None or self.predictions.empty:
            return []
        if self.metrics is not None and "report_sections" in self.metrics:
            return list(self.metrics["report_sections"])
        # A run of an earlier version, or one whose metrics are gone, shows it by its columns.
        if columns_after(PROBABILITY_OF, self.predictions):
            return [Section.ANSWERS]
        return [Section.CHOICES if CHOICES in self.predictions.columns else Section.FREE_TEXT]

    def part(self, file: str, build: Callable[[RunFiles], Part]) -> Part:
        """`build(self)`, where a form that `file` should not have becomes an error that names it.

        Raises:
            DamagedRunError: something that `file` should hold is missing or of another kind.
        """
        try:
            return build(self)
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            raise DamagedRunError(
                f"{self.folder / file} does not have the form that a run gives it "
                f"({type(error).__name__}: {error}). Restore it, or take it out of the folder to "
                "report on the rest."
            ) from error


def read_run(folder: str | Path) -> RunFiles:
    """Everything that the folder of a run holds.

    Raises:
        RunNotFoundError: there is no such folder, or no run in it.
        DamagedRunError: a file cannot be read; the message names it.
    """
    folder = Path(folder).absolute()
    if not folder.is_dir():
        raise RunNotFoundError(f"There is no folder {folder}: give the output folder of a run.")
    checkpoints = sorted(folder.glob("checkpoint-*/trainer_state.json"), key=_step_of)
    run = RunFiles(
        folder=folder,
        record=_json(folder / RECORD_FILE),
        health=_json(folder / DATA_HEALTH_FILE),
        metrics=_json(folder / METRICS_FILE),
        predictions=_predictions(folder / PREDICTIONS_FILE),
        log=_log(folder, checkpoints),
        arguments=_json(folder / "training_args.json"),
        task=_json(folder / "task.json"),
        adapter=_json(folder / ADAPTER_FILE, needed=_ADAPTER_KEYS),
        checkpoints=[path.parent.name for path in checkpoints],
    )
    found = (run.record, run.metrics, run.predictions, run.log, run.task, run.adapter)
    if all(part is None for part in found):
        raise RunNotFoundError(
            f"{folder} holds no run: none of {RECORD_FILE}, {LOG_FILE}, {METRICS_FILE}, "
            f"{PREDICTIONS_FILE} or a checkpoint is there. Give the output folder of a run."
        )
    return run


def _step_of(state: Path) -> int:
    step = state.parent.name.rpartition("-")[2]
    return int(step) if step.isdigit() else -1


def _json(path: Path, *, needed: Sequence[str] = ()) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        contents = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise _damaged(path, error) from error
    if not isinstance(contents, dict):
        raise _damaged(path, "it should hold a JSON object")
    missing = [key for key in needed if key not in contents]
    if missing:
        raise _damaged(path, f"it has no {', '.join(missing)}")
    return contents


def _log(folder: Path, checkpoints: list[Path]) -> RunLog | None:
    growing = folder / LOG_FILE
    if growing.is_file():
        return _growing_log(growing)
    for path in [folder / "trainer_state.json", *reversed(checkpoints)]:
        state = _json(path)
        if state is not None:
            entries = state.get("log_history")
            if not isinstance(entries, list):
                raise _damaged(path, "it should hold the list log_history")
            return RunLog(entries, state.get("max_steps"), str(path.relative_to(folder)))
    return None


def _growing_log(path: Path) -> RunLog:
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (ValueError, OSError) as error:
        raise _damaged(path, error) from error
    entries, max_steps = [], None
    # After the last line break is nothing, or the part of a line that was still being written.
    for number, line in enumerate(lines[:-1], start=1):
        try:
            entry = json.loads(line)
        except ValueError as error:
            raise _damaged(path, f"line {number}: {error}") from error
        if not isinstance(entry, dict):
            raise _damaged(path, f"line {number} should be a JSON object")
        if "max_steps" in entry:
            max_steps = entry["max_steps"]
        else:
            entries.append(entry)
    return RunLog(entries, max_steps, path.name)


def _predictions(path: Path) -> pd.DataFrame | None:
    if not path.is_file():
        return None
    try:
        # As text: a label may be "NA" or "007", and "" stands for no answer.
        table = pd.read_csv(path, dtype=str, keep_default_na=False, encoding="utf-8")
        missing = [column for column in _COLUMNS if column not in table.columns]
        if missing:
            raise _damaged(path, f"it has no column {', '.join(missing)}")
        table["row"] = table["row"].astype(int)
        for column in table.columns:
            if column == "probability" or column.startswith((PROBABILITY_OF, SCORE_BY, WEIGHT_BY)):
                table[column] = table[column].astype(float)
    except (ValueError, OSError) as error:
        if isinstance(error, DamagedRunError):
            raise
        raise _damaged(path, error) from error
    return table


def _damaged(path: Path, why: object) -> DamagedRunError:
    return DamagedRunError(
        f"{path} is damaged ({why}). Restore it, or take it out of the folder to report on the "
        "rest."
    )
