"""The columns that are added to rows that were answered."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lora_fsdp.data.streams import Chunk
from lora_fsdp.errors import ArgumentError
from lora_fsdp.evaluation.answering.rows import has_text
from lora_fsdp.evaluation.ensemble import Ensemble
from lora_fsdp.evaluation.prediction import Predictor
from lora_fsdp.tasks import Example


@dataclass(frozen=True)
class Confidence:
    """What is asked of the answers' probabilities.

    Attributes:
        least: a row whose answer is less probable gets no answer; `None` = every row gets one.
        coverage: the share of rows whose set of answers is to hold the right one; `None` = no sets.
    """

    least: float | None = None
    coverage: float | None = None


def check_confidence(predictor: Predictor | Ensemble, confidence: Confidence) -> None:
    """Refuse what the probabilities of this adapter cannot answer.

    Raises:
        ArgumentError: names the option.
    """
    named = {"--min_probability": confidence.least, "--coverage": confidence.coverage}
    for option, value in named.items():
        if value is None:
            continue
        if not 0 < value < 1:
            raise ArgumentError(f"{option} {value}: give a number between 0 and 1.")
        if "probability" not in answer_columns(predictor, []):
            raise ArgumentError(
                f"{option} {value}: the answers of task {predictor.task.name!r} have no "
                "probabilities."
            )
    if confidence.coverage is not None and predictor.calibration is None:
        raise ArgumentError(
            f"--coverage {confidence.coverage}: the sets need the calibration that a run fits on "
            "50 held-out rows or more, and there is none: of this adapter, of several together, "
            "or with --calibrated false."
        )


def asked_columns(
    predictor: Predictor | Ensemble,
    examples: Sequence[Example],
    *,
    prefix: str = "",
    confidence: Confidence | None = None,
) -> tuple[dict[str, list[Any]], int]:
    """The new columns, `None` where there is no text; and how many answers were left out."""
    confidence, unsure = confidence or Confidence(), 0
    found = answer_columns(predictor, examples, coverage=confidence.coverage)
    if confidence.least is not None:
        column = predictor.task.answer_kind.answer_column
        unsure = leave_out_unsure(found, column=column, least=confidence.least)
    return {f"{prefix}{name}": values for name, values in found.items()}, unsure


def answer_columns(
    predictor: Predictor | Ensemble, examples: Sequence[Example], *, coverage: float | None = None
) -> dict[str, list[Any]]:
    """The new columns of N rows, `None` in a row without a text.

    Args:
        predictor: the adapter.
        examples: the rows.
        coverage: of the sets of answers; `None` = no sets.
    """
    places = [place for place, example in enumerate(examples) if has_text(example)]
    columns = predictor.columns([examples[place] for place in places], coverage=coverage)
    spread: dict[str, list[Any]] = {name: [None] * len(examples) for name in columns}
    for name, values in columns.items():
        for place, value in zip(places, values, strict=True):
            spread[name][place] = value
    return spread


def leave_out_unsure(columns: Mapping[str, list[Any]], *, column: str, least: float) -> int:
    """Empty the answers that are less probable than `least`; returns how many."""
    unsure = 0
    for place, probability in enumerate(columns["probability"]):
        if probability is not None and probability < least:
            columns[column][place], unsure = None, unsure + 1
    return unsure


def refuse_taken_names(added: Iterable[str], chunk: Chunk) -> None:
    """Refuse new columns that a table already has.

    Raises:
        ArgumentError: names them.
    """
    if taken := [name for name in added if name in chunk.columns]:
        raise ArgumentError(
            f"The table already has {', '.join(map(repr, taken))}: give the new columns other "
            "names, for example with --column_prefix new_."
        )
