"""The report on one run: everything it shows as one dictionary, which the page only lays out."""

from __future__ import annotations

import logging
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd

from lora_fsdp.evaluation.intervals import CONFIDENCE, DRAWS
from lora_fsdp.evaluation.verdict import score_notes
from lora_fsdp.reporting.rendering import write_page
from lora_fsdp.reporting.run_files import (
    DATA_HEALTH_FILE,
    METRICS_FILE,
    PREDICTIONS_FILE,
    RECORD_FILE,
    RunFiles,
    read_run,
)
from lora_fsdp.reporting.sections.answers import (
    choices_section,
    free_text_section,
    generated_section,
    labels_section,
)
from lora_fsdp.reporting.sections.briefs import briefs
from lora_fsdp.reporting.sections.numbers import numbers_section
from lora_fsdp.reporting.sections.progress import (
    curves,
    not_finite,
    plan_against_measured,
    progress,
)
from lora_fsdp.reporting.sections.questions import questions_section
from lora_fsdp.reporting.sections.several import several_section
from lora_fsdp.reporting.sections.sharding import sharding
from lora_fsdp.reporting.sections.shares import shares_section
from lora_fsdp.reporting.sections.spent import spent
from lora_fsdp.reporting.sections.usage import base_of, usage
from lora_fsdp.reporting.texts import one_line, setting_text
from lora_fsdp.tasks.answers import Section

logger = logging.getLogger(__name__)

# What the page shows of this file; the keys are those of `data_health`.
_HEALTH_PARTS: dict[str, tuple[str, ...]] = {
    "exact_duplicates": ("groups", "rows", "largest"),
    "near_duplicates": ("groups", "rows", "largest"),
    "contradictions": ("groups", "rows", "first"),
    "leaks": ("exact", "near"),
    "shortened": ("count", "rows"),
    "tokens": (),
    "balance": (),
    "suspected_training_labels": (),
}
_SECTIONS: dict[Section, Callable[[pd.DataFrame], dict[str, Any]]] = {
    Section.ANSWERS: labels_section,
    Section.CHOICES: choices_section,
    Section.FREE_TEXT: free_text_section,
    Section.SCORES: numbers_section,
    Section.QUESTIONS: questions_section,
    Section.SEVERAL: several_section,
    Section.SHARES: shares_section,
}


def write_report(run_folder: str | Path) -> Path:
    """Write `report.html`, `report.json` and `report_figures/` into the folder of a run.

    A run that has not finished, or failed, is reported on as far as it came.

    Returns:
        the path of `report.html`, one file that needs nothing else and no network.

    Raises:
        RunNotFoundError: there is no run in `run_folder`.
        DamagedRunError: one of its files is damaged; the message names it.
    """
    # Matplotlib takes a second to import, and only one of a run's processes draws, at its end.
    from lora_fsdp.reporting.sections.figures import run_pictures

    run = read_run(run_folder)
    contents = _contents(run)
    page = run.folder / "report.html"
    write_page(page, "report.html.jinja", contents, run_pictures(contents))
    return page


def try_to_write_report(folder: Path) -> Path | None:
    """As `write_report`; what goes wrong is said and ends nothing: the run is saved by now."""
    try:
        return folder / write_report(folder).name
    except Exception as error:  # whatever it is, it must not turn a saved run into a failed one
        logger.error("The report could not be written (%s: %s).", type(error).__name__, error)
        return None


def _contents(run: RunFiles) -> dict[str, Any]:
    log_file = "the log" if run.log is None else run.log.file
    found = run.part(log_file, curves)
    contents: dict[str, Any] = {
        "run": run.folder.name,
        "folder": str(run.folder),
        "written": datetime.now(UTC).isoformat(timespec="seconds"),
        "finished": run.finished,
        "missing": _missing(run),
        "statistics": {"confidence": CONFIDENCE, "draws": DRAWS},
        "asked": run.part(RECORD_FILE, _asked),
        "scores": run.part(METRICS_FILE, lambda run: run.scores),
        "notes": run.part(METRICS_FILE, lambda run: score_notes(run.metrics or {})),
        "calibrated": run.part(METRICS_FILE, _calibrated),
        "curves": found,
        "not_finite": not_finite(found),
        **dict[str, Any].fromkeys(_SECTIONS),
        "free_writing": run.part(METRICS_FILE, generated_section),
        "health": run.part(DATA_HEALTH_FILE, _health),
        "progress": run.part(METRICS_FILE, progress),
        "spent": run.part(METRICS_FILE, spent),
        "plan": run.part(METRICS_FILE, plan_against_measured),
        "fsdp": run.part(RECORD_FILE, sharding),
        "usage": run.part(RECORD_FILE, usage),
    }
    for section in run.part(METRICS_FILE, lambda run: [Section(name) for name in run.sections]):
        contents[section] = run.part(PREDICTIONS_FILE, partial(_section, section))
    contents["briefs"] = run.part(METRICS_FILE, lambda run: briefs(contents))
    return contents


def _section(section: Section, run: RunFiles) -> dict[str, Any]:
    return _SECTIONS[section](run.predictions)


def _calibrated(run: RunFiles) -> dict[str, Any] | None:
    """The calibration of the probabilities that are shown, if there is one."""
    found: dict[str, Any] | None = (run.metrics or {}).get("calibration")
    keys = ("temperature", "biases", "rows", "apart", "before", "after")
    return found and {key: found[key] for key in keys}


def _health(run: RunFiles) -> dict[str, Any] | None:
    if run.health is None:
        return None
    parts = {part: run.health[part] for part in _HEALTH_PARTS}
    for part, keys in _HEALTH_PARTS.items():
        parts[part] = {key: parts[part][key] for key in keys} if keys else parts[part]
    return parts


def _missing(run: RunFiles) -> list[str]:
    """What is not in the folder, and what the report therefore lacks."""
    lacks = {
        f"{RECORD_FILE}: the settings, versions and FSDP status": run.record,
        f"{DATA_HEALTH_FILE}: the data health": run.health,
        "log_history.jsonl or a checkpoint: the curves": run.log,
        f"{METRICS_FILE}: the scores; a run writes it last": run.metrics,
        f"{PREDICTIONS_FILE}: the answers row by row": run.predictions,
        "adapter_config.json: the adapter": run.adapter,
    }
    return [what for what, part in lacks.items() if part is None]


def _asked(run: RunFiles) -> dict[str, Any]:
    """What was asked, with which model and versions; where unknown, `None`."""
    record = run.record or {}
    metrics = run.metrics or {}
    data = (record.get("arguments") or {}).get("data") or {}
    changed = record.get("not_default") or {}
    options = (run.task or {}).get("options") or {}
    environment = record.get("environment")
    return {
        "started": record.get("started"),
        "finished": metrics.get("finished"),
        "task": record.get("task") or metrics.get("task") or (run.task or {}).get("task"),
        "instruction": one_line(options.get("instruction") or "", limit=400) or None,
        "labels": run.labels,
        "answers": record.get("answers"),
        "base": base_of(run) or None,
        "adapter": _adapter(run),
        "data_file": data.get("data_file"),
        "eval_file": data.get("eval_file"),
        "test_file": data.get("test_file"),
        "training_rows": record.get("training_rows", metrics.get("training_rows")),
        "held_out_rows": record.get("held_out_rows", metrics.get("held_out_rows")),
        "validation_rows": record.get("validation_rows", metrics.get("validation_rows")),
        "splits": [one_line(line) for line in record.get("splits") or ()],
        "shown_rows": [one_line(str(row)) for row in record.get("shown_rows") or ()],
        "rows_left_out": record.get("rows_left_out", metrics.get("rows_left_out")),
        "device": record.get("device"),
        "settings": {
            group: {name: setting_text(value) for name, value in changed.get(group, {}).items()}
            for group in ("model", "adapter", "data", "training")
        },
        "versions": environment and _versions(environment),
        "devices": environment and environment["devices"],
        "platform": environment and environment["platform"],
    }


def _adapter(run: RunFiles) -> str | None:
    """Rank, scale, dropout and places of the adapter, in a line."""
    if run.adapter is not None:
        names = ("r", "lora_alpha", "lora_dropout", "target_modules")
        rank, alpha, dropout, targets = (run.adapter[name] for name in names)
    elif "adapter" in ((run.record or {}).get("arguments") or {}):
        asked = run.record["arguments"]["adapter"]  # type: ignore[index]
        names = ("lora_r", "lora_alpha", "lora_dropout", "lora_target_modules")
        rank, alpha, dropout, targets = (asked[name] for name in names)
    else:
        return None
    places = targets if isinstance(targets, str) else ", ".join(sorted(targets))
    return one_line(f"LoRA, r {rank}, alpha {alpha}, dropout {dropout:g}, on {places}")


def _versions(environment: dict[str, Any]) -> dict[str, str]:
    commit = environment.get("lora_fsdp_commit")
    versions = {
        "lora_fsdp": environment["lora_fsdp"] + (f" (commit {commit})" if commit else ""),
        "python": environment["python"],
        "CUDA": environment["cuda"] or "none",
        **{name: version or "none" for name, version in environment["packages"].items()},
    }
    return {name: str(version) for name, version in versions.items()}
