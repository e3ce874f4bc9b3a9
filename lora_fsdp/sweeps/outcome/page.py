"""The page about a run of several adapters: settings beside each other, curves, the choice."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_fsdp.evaluation.intervals import CONFIDENCE, DRAWS
from lora_fsdp.evaluation.verdict import name_of
from lora_fsdp.reporting.rendering import write_page
from lora_fsdp.reporting.run_files import read_run
from lora_fsdp.reporting.sections.progress import curves
from lora_fsdp.reporting.texts import setting_text
from lora_fsdp.sweeps.earlier import COMPARISON_FILE, OUT_OF_FOLD_FILE, REPORT_FILE
from lora_fsdp.sweeps.outcome.choice import over_rows
from lora_fsdp.sweeps.outcome.member import MemberResult, is_loss
from lora_fsdp.sweeps.outcome.summary import Summary

if TYPE_CHECKING:
    from lora_fsdp.reporting.sections.figures import Picture


def write_sweep_report(root: Path, summary: Summary) -> Path:
    """Write `report.html`, `report.json` and `report_figures/` into the run's folder.

    Args:
        root: the run's output folder, from which curves are read.
        summary: of its adapters.

    Returns:
        the path of `report.html`, one file that needs nothing else and no network.
    """
    contents = _contents(root, summary)
    page = root / REPORT_FILE
    write_page(page, "sweep.html.jinja", contents, _pictures(contents))
    return page


def _contents(root: Path, summary: Summary) -> dict[str, Any]:
    metric, best = summary.primary_metric, summary.best if summary.chooses else None
    lines = [
        _setting(summary, number, members, is_best=number == best)
        for number, members in summary.settings.items()
    ]
    sign = 1 if is_loss(metric) else -1
    if summary.chooses:
        lines.sort(key=lambda line: (line["mean"] is None, sign * (line["mean"] or 0.0)))
    keys = dict.fromkeys(key for one in summary.members for key in one.values)
    return {
        "written": datetime.now(UTC).isoformat(timespec="seconds"),
        "statistics": {"confidence": CONFIDENCE, "draws": DRAWS},
        "metric": metric,
        "over": summary.over,
        "chooses": summary.chooses,
        "adapters": len(summary.members),
        "conclusion": summary.conclusion,
        "keys": list(keys),
        "settings": lines,
        "curves": {
            one.name: read_run(root / one.name).part("the log", curves).get("loss", [])
            for one in summary.members
            if one.stopped is None
        },
        "pages": [name for name in (COMPARISON_FILE, OUT_OF_FOLD_FILE) if (root / name).is_file()],
        "folder": str(root),
    }


def _setting(
    summary: Summary, number: int, members: list[MemberResult], *, is_best: bool
) -> dict[str, Any]:
    """A line of the table, whose numbers are `None` where there are none."""
    metric = summary.primary_metric
    trained = [one for one in members if one.stopped is None]
    spread, rows = summary.spread(number), over_rows(trained, metric) if trained else None
    return {
        "values": {key: setting_text(value) for key, value in members[0].values.items()},
        "adapters": [
            {
                "name": one.name,
                "score": None if one.stopped else one.score(metric),
                "stopped": one.stopped,
            }
            for one in members
        ],
        "mean": spread.mean if trained else None,
        "deviation": spread.deviation if len(trained) > 1 else None,
        "low": None if rows is None else rows.low,
        "high": None if rows is None else rows.high,
        "is_best": is_best,
        "cannot_be_told": summary.choice is not None and number in summary.choice.not_worse,
    }


def _pictures(contents: dict[str, Any]) -> list[Picture]:
    from lora_fsdp.reporting.sections.figures import curve_picture, settings_picture

    named = name_of(contents["metric"])
    title = f"{named}, {'validation' if contents['chooses'] else 'held-out'} rows"
    pictures = [settings_picture("settings", title, list(map(_drawn, contents["settings"])))]
    if any(contents["curves"].values()):
        values = [value for points in contents["curves"].values() for _, value in points]
        pictures.append(
            curve_picture(
                "loss",
                "training loss per label token",
                contents["curves"],
                logarithmic=all(value > 0 for value in values),
            )
        )
    return pictures


def _drawn(line: dict[str, Any]) -> dict[str, Any]:
    """A setting as `settings_picture` takes it."""
    values = ", ".join(f"{key} {value}" for key, value in line["values"].items())
    scores = [one["score"] for one in line["adapters"] if one["score"] is not None]
    name = values or f"{len(line['adapters'])} adapters"
    return {"name": name, "scores": scores} | {
        key: line[key] for key in ("mean", "low", "high", "is_best")
    }
