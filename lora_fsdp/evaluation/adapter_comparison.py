"""Base against tuned on held-out rows of a finished run, with the adapter loaded by PEFT alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from lora_fsdp.errors import ArgumentError, DataFileNotFoundError
from lora_fsdp.evaluation.comparison import generated_texts
from lora_fsdp.evaluation.outputs import PredictionRow
from lora_fsdp.evaluation.prediction import Predictor
from lora_fsdp.tasks import Example, Task


@dataclass(frozen=True)
class SideBySide:
    """Some held-out rows with both models' answers.

    Attributes:
        rows: a row each.
        written: the texts that both generated, if asked for (`generated_texts`).
        agreeing: how many answers are those of the run's own evaluation.
    """

    rows: Sequence[PredictionRow]
    written: Sequence[Mapping[str, Any]]
    agreeing: int


def compare_on_held_out(
    predictor: Predictor,
    folder: str | Path,
    *,
    rows: int,
    seed: int = 0,
    generate: bool = False,
    temperature: float = 0.0,
) -> SideBySide:
    """Ask base and tuned model about a sample of the run's held-out rows.

    Args:
        predictor: the adapter, of a task that asks about one text column.
        folder: its run's output folder, with `predictions.csv`.
        rows: size of the sample.
        seed: of the sample.
        generate: let both generate freely, too; `temperature` 0 = greedy.

    Raises:
        DataFileNotFoundError: the folder holds no `predictions.csv`.
        ArgumentError: the task's prompt needs more of a row than its text.
    """
    file = Path(folder) / "predictions.csv"
    if not file.is_file():
        raise DataFileNotFoundError(
            f"There is no {file}: the run did not end, or another program wrote the folder."
        )
    held_out = pd.read_csv(file, keep_default_na=False, dtype={"target": str, "tuned": str})
    sample = held_out.sample(min(rows, len(held_out)), random_state=seed)
    examples = _examples(predictor.task, sample)
    kind, outputs = predictor.task.answer_kind, predictor.outputs(examples)
    answers, probabilities = kind.answers(examples, outputs), kind.probabilities(outputs)
    texts = predictor.write(examples, temperature=temperature) if generate else []
    with predictor.model.disable_adapter():
        base_answers = kind.answers(examples, predictor.outputs(examples))
        base_texts = predictor.write(examples, temperature=temperature) if generate else []
    columns = zip(
        sample["row"], sample["text"], sample["target"], base_answers, answers, probabilities,
        strict=True,
    )  # fmt: skip
    return SideBySide(
        rows=[PredictionRow(int(row), *values) for row, *values in columns],
        written=generated_texts(predictor.task, examples, base=base_texts, tuned=texts),
        agreeing=sum((a or "") == b for a, b in zip(answers, sample["tuned"], strict=True)),
    )


def _examples(task: Task, sample: pd.DataFrame) -> list[Example]:
    column = str(task.options().get("text_column") or "text")
    try:
        return [
            Example(int(row), task.build_prompt({column: text}), None, task.build_choices({}))
            for row, text in zip(sample["row"], sample["text"], strict=True)
        ]
    except KeyError as error:
        raise ArgumentError(
            f"Task {task.name!r} asks about more than one column (it also needs {error}), and a "
            "run's predictions.csv holds one text a row: use lora-fsdp evaluate on the table."
        ) from error
