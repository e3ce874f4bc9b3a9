"""A distribution over labels: what several people said, or how sure somebody was."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from lora_fsdp.tasks.answers.classic import classic_outputs
from lora_fsdp.tasks.answers.closed_set import ClosedSet
from lora_fsdp.tasks.answers.kind import Labelled, ModelOutputs, Section
from lora_fsdp.tasks.example import Example

#: A column of predictions: the row's own share of a label.
SHARE_OF = "share/"
OVERLAP, BRIER, KL, ACCURACY = "overlap", "brier_score", "kl_divergence", "accuracy"
_LEAST = 1e-12


class Distribution(ClosedSet):
    """A probability for each of `labels`; the answer in one word is the likeliest.

    Args:
        labels: the label set.
        target_of: the text that stands for a label (`Task.target_of`).
    """

    name = "distribution"
    description = "a probability for each label, as the rows have shares of them"
    rivals = ()
    report_sections = (Section.ANSWERS, Section.SHARES)
    losses = ()  # of no answer alone it can be said that it is the right one

    def metrics(
        self, targets: Sequence[str], predictions: Sequence[str | None]
    ) -> dict[str, float]:
        """The share of rows whose likeliest label is the one with the largest share."""
        right = [one == other for one, other in zip(targets, predictions, strict=True)]
        return {ACCURACY: sum(right) / len(right)}

    def metrics_of_outputs(
        self, examples: Sequence[Example], outputs: ModelOutputs
    ) -> dict[str, float]:
        """How near the probabilities p are to the rows' shares q, as means over the rows.

        Returns:
            `overlap`, the sum of min(p, q) over the labels (1 less the total variation distance; 1
            is best), `brier_score`, the sum of (p - q)² (Brier, 1950; 0 is best), and
            `kl_divergence`, the sum of q log(q / p) in nats (0 is best).
        """
        return {
            metric: float(self._of_rows(metric, examples, outputs.probabilities).mean())
            for metric in (OVERLAP, BRIER, KL)
        }

    def row_scores(
        self, metric: str, examples: Sequence[Example], outputs: ModelOutputs
    ) -> Sequence[float] | None:
        """What the metric is of each row."""
        if metric not in (OVERLAP, BRIER, KL):
            return None
        return self._of_rows(metric, examples, outputs.probabilities).tolist()

    def chance(self, examples: Sequence[Example]) -> dict[str, float]:
        """Of one who says that all labels are as likely."""
        if not examples:
            return {}
        found = {
            metric: float(np.mean(self.chance_scores(metric, examples) or [0.0]))
            for metric in (OVERLAP, BRIER, KL)
        }
        return found | {ACCURACY: 1 / len(self.labels)}

    def chance_scores(self, metric: str, examples: Sequence[Example]) -> Sequence[float] | None:
        """The same of each row."""
        if metric not in (OVERLAP, BRIER, KL):
            return None
        evenly = np.full((len(examples), len(self.labels)), 1 / len(self.labels))
        return self._of_rows(metric, examples, evenly).tolist()

    def classic(
        self, train: Sequence[Example], asked: Sequence[Example]
    ) -> Mapping[str, ModelOutputs]:
        """The training rows' average shares, and TF-IDF trained on shares."""
        return classic_outputs(self, train, asked, options=[len(self.labels)])

    def run_columns(
        self, examples: Sequence[Example], outputs: ModelOutputs
    ) -> dict[str, Sequence[Any]]:
        """Every label's probability, and beside it the row's own share where it is known."""
        columns = super().run_columns(examples, outputs)
        if examples and all(example.shares for example in examples):
            shares = np.array([example.shares for example in examples])
            for place, label in enumerate(self.labels):
                columns[f"{SHARE_OF}{label}"] = shares[:, place].tolist()
        return columns

    def labelled(self, predictions: pd.DataFrame) -> Sequence[Labelled]:
        """None: a row may be right to have shares of several labels."""
        return ()

    def announcement(self, *, max_new_tokens: int) -> str:
        """The labels."""
        return f"a probability for each of {', '.join(self.labels)}"

    def _of_rows(self, metric: str, examples: Sequence[Example], given: np.ndarray) -> np.ndarray:
        """[N]; `given` are [N, K] probabilities."""
        shares = np.array([self.shares(example) for example in examples], dtype=np.float64)
        if metric == OVERLAP:
            return np.minimum(shares, given).sum(axis=1)
        if metric == BRIER:
            return np.square(shares - given).sum(axis=1)
        certain = np.maximum(shares, _LEAST)  # 0 log 0 = 0
        return (shares * np.log(certain / np.maximum(given, _LEAST))).sum(axis=1)
