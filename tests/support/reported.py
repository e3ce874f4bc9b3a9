"""Folders of runs as `finetune` leaves them, with made-up scores: any labels and texts."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from lora_fsdp.data.encoding import EncodedExample
from lora_fsdp.evaluation.comparison import compare
from lora_fsdp.evaluation.metrics import answers_of, model_outputs
from lora_fsdp.evaluation.outputs import write_json
from lora_fsdp.evaluation.scoring import Scores
from lora_fsdp.reporting.recording.data_health import data_health
from lora_fsdp.tasks import ClassificationTask, Example, Task

HOSTILE = '<script>document.title="broken"</script>'
HOSTILE_TEXTS = (
    HOSTILE,
    "\"quotes\" & 'apostrophes' </td></pre> &lt;",
    "שלום עולם \u202e turned around \u2067 and isolated",
    "x" * 5_000,
    "line\nbreak\ttab\x1b[31m\x00 control",
    "{{ 7 * 7 }} {% raw %} $a_b$",
)


def made_up_run(
    folder: Path,
    *,
    labels: Sequence[str] = ("negative", "neutral", "positive"),
    held_out: int = 60,
    texts: Sequence[str] = (),
    skill: float = 4.0,
    seed: int = 0,
) -> Path:
    """A finished run; with `skill` 0 its model knows nothing, with more it is right more often."""
    task = ClassificationTask(text_column="text", label_column="label", labels=labels)
    train, tested = _table(labels, 3 * held_out, texts, 1), _table(labels, held_out, texts, 2)
    tested.index += len(train)
    return save_run(folder, task, task.examples(train), task.examples(tested), skill, seed)


def save_run(
    folder: Path,
    task: Task,
    train: Sequence[Example],
    held_out: Sequence[Example],
    skill: float,
    seed: int = 0,
) -> Path:
    """The files of a run whose models score `held_out` at random, the tuned one with `skill`."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(seed)
    kind = task.answer_kind
    labels = list(kind.labels or ["the target"])
    places = [labels.index(answer) if kind.labels else 0 for answer in answers_of(task, held_out)]

    def drawn(strength: float) -> torch.Tensor:
        values = torch.randn(len(held_out), len(labels), generator=generator)
        values[torch.arange(len(held_out)), places] += strength
        return values

    encoded = [
        EncodedExample(one.row, [1], [2], (), place, shortened=False, example=one)
        for one, place in zip(held_out, places, strict=True)
    ]
    untrained, tuned = (
        model_outputs(
            encoded,
            Scores(values.log_softmax(dim=1)),
            texts=_generated(held_out, values[:, 0] > 1) if kind.generates_text else (),
        )
        for values in (drawn(0.0), drawn(skill))
    )
    compare(
        task,
        train=train,
        held_out=encoded,
        untrained=untrained,
        tuned=tuned,
        facts=_facts(task, len(train), len(held_out)),
    ).save(folder)
    rows = pd.concat([_rows(task, train, "training"), _rows(task, held_out, "held out")])
    write_json(folder / "data_health.json", data_health(rows, labels=kind.labels))
    write_json(folder / "run_record.json", _record(task, folder, train, held_out))
    _write_log(folder / "log_history.jsonl")
    return folder


def _generated(held_out: Sequence[Example], hits: torch.Tensor) -> list[str]:
    """The target where it is hit, else nothing."""
    return [
        str(one.target) if hit else "" for one, hit in zip(held_out, hits.tolist(), strict=True)
    ]


def _table(labels: Sequence[str], rows: int, texts: Sequence[str], seed: int) -> pd.DataFrame:
    random = np.random.default_rng(seed)
    words = ["late", "flight", "thanks", "bag", "crew", "gate", "again", "help"]
    lines = [
        {
            "text": texts[n % len(texts)] if texts else " ".join(random.choice(words, 6)) + f" {n}",
            "label": labels[int(random.integers(len(labels)))],
        }
        for n in range(rows)
    ]
    return pd.DataFrame(lines, index=pd.RangeIndex(1, rows + 1))


def _rows(task: Task, examples: Sequence[Example], part: str) -> pd.DataFrame:
    return pd.DataFrame(
        {
            "part": part,
            "row": [one.row for one in examples],
            "text": [one.prompt.text for one in examples],
            "answer": answers_of(task, examples),
            "tokens": [len(one.prompt.text) for one in examples],
            "shortened": [len(one.prompt.text) > 2_000 for one in examples],
        }
    )


def _facts(task: Task, train: int, held_out: int) -> dict[str, Any]:
    return {
        "task": task.name,
        "labels": list(task.answer_kind.labels),
        "training_rows": train,
        "held_out_rows": held_out,
        "finished": "2026-01-02T03:05:06+00:00",
        "steps": 30,
        "first_step": 0,
        "training_seconds": 61.5,
        "examples_per_second": 12.25,
        "tokens_per_second": 345.6,
        "processes": 2,
    }


def _record(
    task: Task, folder: Path, train: Sequence[Example], held_out: Sequence[Example]
) -> dict[str, Any]:
    ranks = [
        {
            "rank": rank,
            "device": "cpu",
            "base_parameters": 1_000,
            "base_bytes": 4_000,
            "adapter_parameters": 10,
            "adapter_bytes": 40,
        }
        for rank in range(2)
    ]
    arguments = {"model": {"model_name_or_path": f"base {HOSTILE}"}, "data": {"data_file": HOSTILE}}
    return {
        "started": "2026-01-02T03:04:05+00:00",
        "command": ["python", f"script {HOSTILE}.py"],
        "working_directory": str(folder),
        "environment": {
            "lora_fsdp": "0",
            "lora_fsdp_commit": None,
            "python": "3",
            "platform": HOSTILE,
            "packages": {"torch": "2", "trl": None},
            "cuda": None,
            "devices": ["CPU"],
        },
        "arguments": arguments,
        "not_default": arguments,
        "task": task.name,
        "labels": list(task.answer_kind.labels) or None,
        "primary_metric": task.primary_metric,
        "training_rows": len(train),
        "held_out_rows": len(held_out),
        "rows_left_out": 0,
        "processes": 2,
        "device": "cpu",
        "examples_per_step": 8,
        "fsdp": {
            "ranks": ranks,
            "groups": {"LlamaDecoderLayer": 3},
            "base_parameters": 2_000,
            "base_dtype": "float32",
            "adapter_dtype": "float32",
            "settings": None,
        },
        "prompt": None,
    }


def _write_log(path: Path) -> None:
    lines: list[dict[str, Any]] = [{"max_steps": 30, "first_step": 0}]
    for step in range(1, 31):
        entry = {"step": step, "epoch": step / 30, "loss": 5 / step, "grad_norm": 1.0 + step % 3}
        lines.append({**entry, "learning_rate": 1e-3 / step, "time": 100.0 + step})
        if step % 10 == 0:
            lines.append({"step": step, "eval_loss": 4 / step, "eval_macro_f1": step / 40})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
