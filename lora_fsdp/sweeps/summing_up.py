"""The end of a run of several adapters: every folder read again, the summary written and drawn."""

from __future__ import annotations

import logging

from lora_fsdp.base.folders import read_json_object
from lora_fsdp.printing import say
from lora_fsdp.reporting.run_files import read_run
from lora_fsdp.reporting.side_by_side import write_comparison
from lora_fsdp.sweeps.earlier import REPORT_FILE, STOPPED_FILE, TEST_FILE
from lora_fsdp.sweeps.grid import Asked
from lora_fsdp.sweeps.once import Once
from lora_fsdp.sweeps.results import MemberResult, Summary

logger = logging.getLogger(__name__)


def sum_up(once: Once) -> Summary:
    """Read what every adapter has left, write and print the summary; for one rank to call."""
    summary = Summary(
        [_result(once, one) for one in once.asked],
        primary_metric=once.data.task.primary_metric,
        over="seeds" if once.training.folds is None else "folds",
        chooses=once.chooses,
    )
    summary.save(once.root)
    say(f"\n{summary}", flush=True)
    _report(once, summary)
    return summary


def _result(once: Once, one: Asked) -> MemberResult:
    folder = once.root / one.name
    stopped = folder / STOPPED_FILE
    why = str(read_json_object(folder, STOPPED_FILE)["why"]) if stopped.is_file() else None
    found = None if why is not None else read_run(folder)
    has_test = found is not None and bool(once.rows.test)
    return MemberResult(
        one.name,
        setting=one.setting,
        values=one.values,
        seed=one.seed,
        fold=one.fold,
        stopped=why,
        metrics={} if found is None else (found.metrics or {})["metrics"],
        predictions=None if found is None else found.predictions,
        test=read_json_object(folder, TEST_FILE) if has_test else None,
    )


def _report(once: Once, summary: Summary) -> None:
    """All adapters side by side; what goes wrong here is said, and costs nothing."""
    folders = [once.root / one.name for one in summary.members if one.stopped is None]
    if len(folders) < 2:
        return
    try:
        say(f"Report: {write_comparison(folders, once.root / REPORT_FILE)}", flush=True)
    except Exception as error:  # the adapters are saved by now
        logger.error("The report could not be written (%s: %s).", type(error).__name__, error)
