"""Base against tuned on held-out rows of a finished run, with the adapter loaded by PEFT alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from lora_fsdp.errors import DataFileNotFoundError
from lora_fsdp.evaluation.comparison import generated_texts
from lora_fsdp.evaluation.outputs import PredictionRow
from lora_fsdp.evaluation.prediction import Predictor, examples_of_texts

_ADVICE = (
    "a run's predictions.csv holds one text a row. Use lora-fsdp evaluate on the table instead."
)


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
        folder: its run's output folder, with `predictions.csv`, or a checkpoint in it.
        rows: size of the sample.
        seed: of the sample.
        generate: let both generate freely, too; `temperature` 0 = greedy.

    Raises:
        DataFileNotFoundError: there is no `predictions.csv`.
        ArgumentError: the task's prompt needs more of a row than its text.
    """
    held_out = pd.read_csv(
        held_out_file(folder), keep_default_na=False, dtype={"target": str, "tuned": str}
    )
    sample = held_out.sample(min(rows, len(held_out)), random_state=seed)
    texts = dict(zip(sample["row"].tolist(), sample["text"], strict=True))
    examples = examples_of_texts(predictor.task, texts, advice=_ADVICE)
    kind = predictor.task.answer_kind
    outputs = predictor.calibrated(predictor.outputs(examples))
    answers, asked = kind.answers(examples, outputs), examples if generate else []
    tuned = predictor.write(asked, temperature=temperature)
    with predictor.model.disable_adapter():
        base_answers = kind.answers(examples, predictor.outputs(examples))
        base = predictor.write(asked, temperature=temperature)
    known = (sample[name] for name in ("row", "text", "target"))
    columns = zip(*known, base_answers, answers, kind.probabilities(outputs), strict=True)
    return SideBySide(
        rows=[PredictionRow(int(row), *values) for row, *values in columns],
        written=generated_texts(predictor.task, asked, base=base, tuned=tuned),
        agreeing=sum((a or "") == b for a, b in zip(answers, sample["tuned"], strict=True)),
    )


def is_checkpoint(folder: str | Path) -> bool:
    """Whether an adapter's folder is a checkpoint of the run in the folder above."""
    return Path(folder).absolute().name.startswith("checkpoint-")


def held_out_file(folder: str | Path) -> Path:
    """The answers to the held-out rows of the run whose adapter, or checkpoint, is in `folder`.

    Raises:
        DataFileNotFoundError: there are none.
    """
    run = Path(folder).absolute().parent if is_checkpoint(folder) else Path(folder)
    file = run / "predictions.csv"
    if not file.is_file():
        raise DataFileNotFoundError(
            f"There is no {file}: the run has not ended, or another program wrote the folder. Ask "
            "the adapter about rows of a table with lora-fsdp evaluate."
        )
    return file
