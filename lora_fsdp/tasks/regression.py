"""A number for each text."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any, Self

import numpy as np
import pandas as pd

from lora_fsdp.errors import ArgumentError, SingleLabelError
from lora_fsdp.tasks.answers.numbers import Numbers
from lora_fsdp.tasks.cells import cell_text
from lora_fsdp.tasks.columns import ColumnTask
from lora_fsdp.tasks.rating import number_of, number_text
from lora_fsdp.tasks.registry import register_task

# How far a bin's centre may be rounded, as a part of the distance to the nearer one beside it.
_ROUNDED = 0.05


@register_task
class RegressionTask(ColumnTask):
    """A number for each text: a price, a duration, an age.

    Attributes:
        bins: how many bins the numbers of the table are divided into, each with as many rows.
        centres: the bins' centres; `None` = quantiles of the table's numbers, shortly spelled.
    """

    name = "regression"
    description = "A number for each text, by the expected value over bins"
    primary_metric = "r2"

    instruction = (
        "Which number fits the following text? Output exactly one number, with no extra text:"
    )
    text_column = "text"
    label_column = "value"
    bins: int = 20
    centres: Sequence[str] | None = None

    def __init__(
        self,
        *,
        instruction: str | None = None,
        text_column: str | None = None,
        label_column: str | None = None,
        bins: int | None = None,
        centres: Sequence[float | str] | None = None,
    ) -> None:
        super().__init__(
            instruction=instruction, text_column=text_column, label_column=label_column
        )
        if bins is not None:
            if not isinstance(bins, int) or isinstance(bins, bool) or not 2 <= bins <= 200:
                raise ArgumentError(f"bins must be a whole number from 2 to 200, not {bins!r}.")
            self.bins = bins
        if centres is None:
            return
        listed = [] if isinstance(centres, str) else list(centres)
        numbers = [number_of(one) for one in listed]
        known = sorted(set(number for number in numbers if number is not None))
        if len(known) < max(2, len(listed)):
            raise ArgumentError(
                f"centres must be a list of two numbers or more, none twice, not {centres!r}."
            )
        self.centres = tuple(map(number_text, known))

    @property
    def answer_kind(self) -> Numbers:
        """A distribution over the bins."""
        return Numbers(self.centres or ("0", "1"))

    def settled_by(self, table: pd.DataFrame) -> Self:
        """A copy with its bins.

        Raises:
            SingleLabelError: all rows have one number.
        """
        if self.centres is not None:
            return self
        task = copy.copy(self)
        numbers = [number_of(cell) for cell in table[self.label_column]]
        task.centres = _centres(np.array(numbers, dtype=np.float64), bins=self.bins)
        if len(task.centres) < 2:
            raise SingleLabelError(
                f"All {len(table)} rows have the number {task.centres[0]} in column "
                f"{self.label_column!r}: there is nothing to learn."
            )
        return task

    def fault(self, row: Mapping[str, Any], *, with_labels: bool) -> str | None:
        """No text, or no number."""
        if (found := super().fault(row, with_labels=with_labels)) is not None or not with_labels:
            return found
        cell = row[self.label_column]
        if number_of(cell) is None:
            return f"column {self.label_column!r} holds {cell_text(cell)[:40]!r}, no number"
        return None

    def build_target(self, row: Mapping[str, Any]) -> str:
        """The number as it is, of which `build_shares` says which bins it belongs to."""
        return f" {number_text(row[self.label_column])}"

    def build_shares(self, row: Mapping[str, Any]) -> tuple[float, ...]:
        """The two bins between which the number lies."""
        return self.answer_kind.share(float(number_text(row[self.label_column])))

    def compute_metrics(
        self, targets: Sequence[str], predictions: Sequence[str | None]
    ) -> dict[str, float]:
        """See `Numbers.metrics`."""
        return self.answer_kind.metrics(targets, predictions)


def _centres(numbers: np.ndarray, *, bins: int) -> tuple[str, ...]:
    """Quantiles from the smallest to the largest, with as few digits as leave them apart."""
    if len(np.unique(numbers)) <= bins:
        return tuple(map(number_text, np.unique(numbers).tolist()))
    found = np.unique(np.quantile(numbers, np.linspace(0, 1, bins)))
    gaps = np.diff(found, prepend=-np.inf, append=np.inf)
    allowed = _ROUNDED * np.minimum(gaps[:-1], gaps[1:])
    for digits in range(1, 17):
        texts = [number_text(f"{number:.{digits}g}") for number in found]
        rounded = np.array(texts, dtype=np.float64)
        if len(set(texts)) == len(found) and (np.abs(rounded - found) <= allowed).all():
            return tuple(texts)
    return tuple(map(number_text, found.tolist()))
