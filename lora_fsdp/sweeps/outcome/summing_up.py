"""The end of a run of several adapters: every folder read again, the summary written and drawn."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

from lora_fsdp.base.folders import read_json_object
from lora_fsdp.errors import DamagedRunError
from lora_fsdp.printing import say
from lora_fsdp.reporting.run_files import METRICS_FILE, read_run
from lora_fsdp.reporting.side_by_side import write_comparison
from lora_fsdp.sweeps.earlier import (
    COMPARISON_FILE,
    STOPPED_FILE,
    SWEEP_FILE,
    TEST_FILE,
    TEST_INTERVAL,
)
from lora_fsdp.sweeps.grid import Asked
from lora_fsdp.sweeps.once import Once
from lora_fsdp.sweeps.outcome.label_errors import write_label_errors
from lora_fsdp.sweeps.outcome.member import MemberResult
from lora_fsdp.sweeps.outcome.page import write_sweep_report
from lora_fsdp.sweeps.outcome.summary import Summary

logger = logging.getLogger(__name__)


def sum_up(once: Once) -> Summary:
    """Read what every adapter has left, write and print the summary; for one rank to call."""
    summary = Summary(
        [_result(once.root, one) for one in once.asked],
        primary_metric=once.data.task.primary_metric,
        over="seeds" if once.training.folds is None else "folds",
        chooses=once.chooses,
    )
    summary.save(once.root)
    say(f"\n{summary}", flush=True)
    line = write_label_errors(summary.pooled, once.data.task, once.root)
    if line is not None:
        say(line, flush=True)
    folders = [once.root / one.name for one in summary.members if one.stopped is None]
    if len(folders) > 1:
        _try_to_write(lambda: write_comparison(folders, once.root / COMPARISON_FILE))
    if folders:
        _try_to_write(lambda: write_sweep_report(once.root, summary))
    return summary


def read_summary(root: Path) -> Summary:
    """The summary of a run that is finished, from its folder alone.

    Raises:
        DamagedRunError: a file of it is not as it was written.
    """
    found = read_json_object(root, SWEEP_FILE)
    try:
        asked = [
            Asked(one["name"], one["setting"], one["values"], one["seed"], one["fold"])
            for one in found["members"]
        ]
        return Summary(
            [_result(root, one) for one in asked],
            primary_metric=str(found["primary_metric"]),
            over=str(found["over"]),
            chooses=bool(found["chooses"]),
        )
    except (LookupError, TypeError, ValueError) as error:
        raise DamagedRunError(f"{root / SWEEP_FILE} is damaged ({error}).") from error


def _result(root: Path, one: Asked) -> MemberResult:
    folder = root / one.name
    stopped = folder / STOPPED_FILE
    why = str(read_json_object(folder, STOPPED_FILE)["why"]) if stopped.is_file() else None
    run = None if why is not None else read_run(folder)
    test = read_json_object(folder, TEST_FILE) if (folder / TEST_FILE).is_file() else None
    interval = None if test is None else test.pop(TEST_INTERVAL, None)
    return MemberResult(
        one.name,
        setting=one.setting,
        values=one.values,
        seed=one.seed,
        fold=one.fold,
        stopped=why,
        metrics={}
        if run is None
        else run.part(METRICS_FILE, lambda r: (r.metrics or {})["metrics"]),
        predictions=None if run is None else run.predictions,
        test=test,
        test_interval=None if interval is None else (interval[0], interval[1]),
    )


def _try_to_write(write: Callable[[], Path]) -> None:
    """What goes wrong here is said, and costs nothing: the adapters are saved by now."""
    try:
        say(f"Report: {write()}", flush=True)
    except Exception as error:
        logger.error("The report could not be written (%s: %s).", type(error).__name__, error)
