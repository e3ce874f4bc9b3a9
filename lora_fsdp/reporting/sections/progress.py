"""How far a run came, how fast, and what its log shows."""

from __future__ import annotations

import math
from typing import Any

from lora_fsdp.reporting.run_files import RunFiles

_TRAINING = ("loss", "grad_norm", "learning_rate")
_EVALUATION = ("loss", "accuracy", "macro_f1", "exact_match")


def curves(run: RunFiles) -> dict[str, list[list[float]]]:
    """For each logged quantity its [step, value] pairs; the held-out ones begin with `eval_`."""
    if run.log is None:
        return {}
    primary = (run.metrics or run.record or {}).get("primary_metric")
    keys = [*_TRAINING, *(f"eval_{name}" for name in dict.fromkeys((*_EVALUATION, primary)))]
    found: dict[str, list[list[float]]] = {}
    for key in keys:
        points = [
            [int(entry["step"]), float(entry[key])]
            for entry in run.log.entries
            if entry.get(key) is not None
        ]
        if points:
            found[key] = points
    return found


def not_finite(found: dict[str, list[list[float]]]) -> dict[str, int]:
    """For each curve that has any, how many of its values are NaN or infinite."""
    counts = {
        key: sum(not math.isfinite(value) for _, value in points) for key, points in found.items()
    }
    return {key: count for key, count in counts.items() if count}


def progress(run: RunFiles) -> dict[str, Any]:
    """Steps, epochs, time and speed, as far as they are known; JSON-ready."""
    entries = [] if run.log is None else run.log.entries
    metrics, record = run.metrics or {}, run.record or {}
    last = max((int(entry.get("step", 0)) for entry in entries), default=None)
    seconds, speed = metrics.get("training_seconds"), metrics.get("examples_per_second")
    tokens = metrics.get("tokens_per_second")
    if run.metrics is None:
        seconds, steps = _logged_span(entries)
        per_step = record.get("examples_per_step")
        speed = steps * per_step / seconds if seconds and per_step else None
        mean = ((run.health or {}).get("tokens") or {}).get("training", {}).get("mean")
        tokens = speed * mean if speed and mean else None
    return {
        "steps": metrics.get("steps", last),
        "max_steps": None if run.log is None else run.log.max_steps,
        "epochs": max((float(entry.get("epoch") or 0) for entry in entries), default=None),
        "resumed_at": metrics.get("first_step") or None,
        "processes": metrics.get("processes", record.get("processes")),
        "seconds": seconds,
        "examples_per_second": speed,
        "tokens_per_second": tokens,
        "peak_memory_gb": metrics.get("peak_memory_gb"),
    }


def _logged_span(entries: list[dict[str, Any]]) -> tuple[float | None, int]:
    """Seconds and steps between the first and the last training line that carry a time."""
    timed = [entry for entry in entries if "time" in entry and "loss" in entry]
    if len(timed) < 2:
        return None, 0
    seconds = float(timed[-1]["time"]) - float(timed[0]["time"])
    return seconds, int(timed[-1]["step"]) - int(timed[0]["step"])


def plan_against_measured(run: RunFiles) -> list[dict[str, Any]]:
    """What a plan predicted beside what was measured; empty unless `metrics.json` holds a `plan`.

    The plan may hold `peak_memory_gb`, `training_seconds` and `cost` (with `currency`); each is set
    beside the entry of the same name in `metrics.json`.
    """
    metrics = run.metrics or {}
    plan = metrics.get("plan") or {}
    units = {"peak_memory_gb": "GB", "training_seconds": "s", "cost": plan.get("currency", "USD")}
    names = {
        "peak_memory_gb": "peak GPU memory, rank 0",
        "training_seconds": "training time",
        "cost": "cost",
    }
    return [
        {
            "what": names[key],
            "unit": unit,
            "predicted": float(plan[key]),
            "measured": None if metrics.get(key) is None else float(metrics[key]),
        }
        for key, unit in units.items()
        if plan.get(key) is not None
    ]
