"""What a folded section holds, in the few words that stand beside its title."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

_SECTIONS = ("calibration", "mistakes", "writing", "health", "spent", "plan", "speed", "fsdp")
_ODD = {
    "exact_duplicates": "repeated texts",
    "near_duplicates": "near duplicates",
    "contradictions": "rows with contradicting answers",
}


def briefs(contents: Mapping[str, Any]) -> dict[str, str | None]:
    """For each section that a report folds, its brief; `None` where it is open or not there.

    A section that found something which puts the scores in doubt stays open.
    """
    chosen = contents["answers"] or contents["choices"]
    found: dict[str, str | None] = dict.fromkeys(_SECTIONS)
    if chosen:
        found |= {"calibration": _calibration(chosen), "mistakes": _mistakes(chosen)}
    if contents["free_writing"]:
        found["writing"] = _counted(len(contents["free_writing"]), "row", "rows")
    if contents["health"]:
        found["health"] = _health(contents)
    if contents["spent"]:
        found["spent"] = _spent(contents["spent"])
    if contents["plan"]:
        found["plan"] = ", ".join(line["what"] for line in contents["plan"])
    if contents["fsdp"]:
        found["fsdp"] = _fsdp(contents["fsdp"])
    found["speed"] = _speed(contents["progress"])
    found["use"] = _use(contents["usage"])
    found["asked"] = _asked(contents["asked"])
    return found


def _calibration(chosen: Mapping[str, Any]) -> str:
    found = chosen["calibration"]
    if found["confidence"] > found["accuracy_high"]:
        said = "it is too sure of itself"
    elif found["confidence"] < found["accuracy_low"]:
        said = "it is right more often than it says"
    else:
        said = "no difference that these rows could show"
    return f"expected calibration error {found['error']:.3f}: {said}"


def _mistakes(chosen: Mapping[str, Any]) -> str:
    if not chosen["mistakes"]:
        return f"none among {_counted(chosen['rows'], 'held-out row', 'held-out rows')}"
    return f"{chosen['mistakes']:,} of {_counted(chosen['rows'], 'row', 'rows')}"


def _health(contents: Mapping[str, Any]) -> str | None:
    health, answers = contents["health"], contents["answers"]
    if health["leaks"]["exact"]["rows"] or health["leaks"]["near"]["rows"]:
        return None
    counts = {words: health[part]["rows"] for part, words in _ODD.items()}
    counts["shortened texts"] = health["shortened"]["count"]
    suspects = [health["suspected_training_labels"], answers and answers["suspected_labels"]]
    counts["suspected label errors"] = sum(one["count"] for one in suspects if one)
    said = [f"{words}: {count:,}" for words, count in counts.items() if count]
    return ", ".join(said) if said else "nothing found"


def _spent(spent: Mapping[str, Any]) -> str:
    most = max(spent["parts"], key=lambda one: one["seconds"])
    return f"{spent['total']:,.0f} s, of which {most['part']} {100 * most['share']:.0f} %"


def _speed(progress: Mapping[str, Any]) -> str:
    said = [_counted(progress["steps"] or 0, "step", "steps")]
    if progress["examples_per_second"] is not None:
        said.append(f"{progress['examples_per_second']:,.3g} examples per second")
    if progress["peak_memory_gb"] is not None:
        said.append(f"{progress['peak_memory_gb']:.3g} GB of GPU memory")
    return ", ".join(said)


def _fsdp(fsdp: Mapping[str, Any]) -> str:
    base = "the base sharded" if fsdp["groups"] else "the base whole on every rank"
    return f"{_counted(len(fsdp['ranks']), 'process', 'processes')}, {base}"


def _use(usage: Mapping[str, Any]) -> str:
    ways = {"load": "PEFT", "predict": "Python", "serve": "vLLM", "resume": "resuming"}
    said = [words for way, words in ways.items() if usage[way]]
    return ", ".join(said) or "no adapter in the folder"


def _asked(asked: Mapping[str, Any]) -> str:
    base = PurePath(asked["base"]).name if asked["base"] else None
    return ", ".join(words for words in (asked["task"], base, asked["adapter"]) if words)


def _counted(count: int, one: str, several: str) -> str:
    return f"{count:,} {one if count == 1 else several}"
