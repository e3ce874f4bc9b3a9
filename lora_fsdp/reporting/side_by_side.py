"""Several runs side by side: what was set differently, what came out, whether that is chance."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from lora_fsdp.errors import ArgumentError
from lora_fsdp.evaluation.intervals import (
    CONFIDENCE,
    DRAWS,
    PairedBootstrap,
    mcnemar_p_value,
)
from lora_fsdp.evaluation.outputs import TUNED
from lora_fsdp.evaluation.verdict import columns_after, scores_by_system
from lora_fsdp.reporting.rendering import write_page
from lora_fsdp.reporting.run_files import (
    METRICS_FILE,
    RECORD_FILE,
    RunFiles,
    read_run,
)
from lora_fsdp.reporting.sections.progress import curves, progress
from lora_fsdp.reporting.texts import setting_text
from lora_fsdp.tasks.answers.kind import PROBABILITY_OF, SCORE_BY, WEIGHT_BY

if TYPE_CHECKING:
    from lora_fsdp.reporting.sections.figures import Picture

# Where a run is written says nothing about how it was made.
_NO_SETTINGS = {
    "output_dir",
    "logging_dir",
    "do_eval",  # follows from eval_strategy
    "run_name",
    "overwrite_output_dir",
    "resume_from_checkpoint",
}
_CURVES = {
    "loss": "training loss per label token",
    "eval_loss": "held-out loss per label token",
    "eval_accuracy": "held-out accuracy",
    "eval_macro_f1": "held-out macro-F1",
    "eval_exact_match": "held-out exact match",
    "learning_rate": "learning rate",
}
_SAME_ROWS = ["row", "text", "target"]


def write_comparison(run_folders: Sequence[str | Path], output: str | Path) -> Path:
    """Write a page that sets runs side by side, the same as JSON, and its pictures.

    Args:
        run_folders: two or more folders of runs; the others are compared with the first.
        output: the HTML file to write, or a folder, in which it is then `comparison.html`.

    Returns:
        the path of the page.

    Raises:
        ArgumentError: fewer than two runs, or one named twice.
        RunNotFoundError, DamagedRunError: as in `write_report`.
    """
    folders = [Path(folder).resolve() for folder in run_folders]
    if len(folders) < 2 or len(set(folders)) < len(folders):
        raise ArgumentError(
            f"A comparison takes two or more different runs, not {[str(f) for f in run_folders]}."
        )
    page = Path(output).absolute()
    if page.suffix.lower() != ".html":
        page = page / "comparison.html"
    runs = dict(zip(_names(folders), map(read_run, folders), strict=True))
    contents = _contents(runs)
    page.parent.mkdir(parents=True, exist_ok=True)
    write_page(page, "comparison.html.jinja", contents, _pictures(contents))
    return page


def _names(folders: Sequence[Path]) -> list[str]:
    """The folders' names, with as many of their parents' as tell them apart."""
    for parts in range(1, max(len(folder.parts) for folder in folders)):
        names = ["/".join(folder.parts[-parts:]) for folder in folders]
        if max(Counter(names).values()) == 1:
            return names
    return [str(folder) for folder in folders]


def _contents(runs: dict[str, RunFiles]) -> dict[str, Any]:
    scores = {name: run.part(METRICS_FILE, lambda run: run.scores) for name, run in runs.items()}
    metrics = dict.fromkeys(
        metric for table in scores.values() if table for metric in table["metrics"]
    )
    names = list(runs)
    return {
        "written": datetime.now(UTC).isoformat(timespec="seconds"),
        "statistics": {"confidence": CONFIDENCE, "draws": DRAWS},
        "names": names,
        "metrics": list(metrics),
        "runs": {
            name: {
                "folder": str(run.folder),
                "finished": run.finished,
                **{key: (scores[name] or {}).get(key) for key in ("rows", "primary_metric")},
                "scores": _tuned_scores(scores[name]),
                "progress": run.part(METRICS_FILE, progress),
                "curves": run.part("the log" if run.log is None else run.log.file, curves),
            }
            for name, run in runs.items()
        },
        "settings": _settings(runs),
        "against_first": {
            name: _paired(runs[names[0]], runs[name], list(metrics)) for name in names[1:]
        },
    }


def _tuned_scores(table: dict[str, Any] | None) -> dict[str, Any]:
    if table is None:
        return {}
    found: dict[str, Any] = next(
        line["scores"] for line in table["systems"] if line["system"] == TUNED
    )
    return found


def _settings(runs: dict[str, RunFiles]) -> list[dict[str, Any]]:
    """What differs between the runs, a line each; `None` where a run does not record it."""
    flat = [run.part(RECORD_FILE, _flat_settings) for run in runs.values()]
    keys = dict.fromkeys(key for settings in flat for key in settings)
    lines = []
    for group, name in keys:
        values = [settings.get((group, name)) for settings in flat]
        if len(set(values)) > 1:
            lines.append({"group": group, "name": name, "values": values})
    return lines


def _flat_settings(run: RunFiles) -> dict[tuple[str, str], str]:
    record = run.record or {}
    groups = dict(record.get("arguments") or {"training": run.arguments or {}})
    environment = record.get("environment")
    if environment is not None:
        own = ("lora_fsdp", "lora_fsdp_commit", "python", "cuda", "devices")
        groups["versions"] = {**environment["packages"], **{key: environment[key] for key in own}}
    groups["launch"] = {key: record[key] for key in ("processes", "device") if key in record}
    return {
        (group, name): setting_text(value)
        for group, settings in groups.items()
        for name, value in settings.items()
        if name not in _NO_SETTINGS
    }


def _paired(first: RunFiles, other: RunFiles, metrics: Sequence[str]) -> dict[str, Any]:
    """The tuned models of two runs on the same held-out rows, `other` minus `first`."""
    mine, theirs = first.predictions, other.predictions
    if mine is None or theirs is None or mine.empty:
        return {"same_rows": False, "why": "the answers of one of them are not there"}
    mine, theirs = (table.sort_values("row", ignore_index=True) for table in (mine, theirs))
    if not mine[_SAME_ROWS].equals(theirs[_SAME_ROWS]):
        return {"same_rows": False, "why": "they were not scored on the same held-out rows"}
    bootstrap = _bootstrap(mine, theirs)
    right: list[np.ndarray] = [
        (table["tuned"] == table["target"]).to_numpy() for table in (mine, theirs)
    ]
    return {
        "same_rows": True,
        "rows": len(mine),
        "differences": {
            metric: asdict(found)
            for metric in metrics
            if all(bootstrap.knows(one, metric) for one in ("first", "other"))
            and np.isclose(
                (found := bootstrap.difference("other", "first", metric)).value,
                _tuned_score(other, metric) - _tuned_score(first, metric),
                atol=1e-6,
            )
        },
        "only_first_right": int((right[0] & ~right[1]).sum()),
        "only_other_right": int((right[1] & ~right[0]).sum()),
        "mcnemar_p_value": mcnemar_p_value(*right),
    }


def _bootstrap(mine: pd.DataFrame, theirs: pd.DataFrame) -> PairedBootstrap:
    """The tuned models of two runs as "first" and "other"."""
    tables = {"first": mine, "other": theirs}
    labels = [columns_after(PROBABILITY_OF, table) for table in tables.values()]

    def scores(prefix: str) -> dict[tuple[str, str], list[float]]:
        return {
            (name, metric): values
            for name, table in tables.items()
            for (system, metric), values in scores_by_system(prefix, table).items()
            if system == TUNED
        }

    return PairedBootstrap(
        mine["target"].tolist(),
        {name: table["tuned"].tolist() for name, table in tables.items()},
        labels=list(dict.fromkeys([*labels[0], *labels[1]])),
        scores=scores(SCORE_BY),
        weights=scores(WEIGHT_BY),
    )


def _tuned_score(run: RunFiles, metric: str) -> float:
    """The run's own; NaN where there is none."""
    metrics = {} if run.metrics is None else run.metrics["metrics"][TUNED]
    return float(metrics.get(metric, np.nan))


def _pictures(contents: dict[str, Any]) -> list[Picture]:
    from lora_fsdp.reporting.sections.figures import (
        curve_picture,  # matplotlib, as for one run's report
    )

    pictures = []
    for key, title in _CURVES.items():
        # Of every run, so that each has the same colour in every picture.
        drawn = {name: run["curves"].get(key, []) for name, run in contents["runs"].items()}
        if any(drawn.values()):
            values = [value for points in drawn.values() for _, value in points]
            logarithmic = key.endswith("loss") and all(value > 0 for value in values)
            pictures.append(curve_picture(key, title, drawn, logarithmic=logarithmic))
    return pictures
