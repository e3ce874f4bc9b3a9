"""Any number of labels at once: a yes/no question for each, as branches of one text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd

from lora_fsdp.tasks.answers.classic import classic_outputs
from lora_fsdp.tasks.answers.kind import AnswerKind, Labelled, ModelOutputs, Section
from lora_fsdp.tasks.example import Example

#: A column of predictions: the probability that a label applies.
APPLIES = "yes/"
#: The answer where no label applies, and what stands between labels otherwise.
NONE, JOINT = "none", "; "
_YES, _NO = " yes", " no"
MICRO, MACRO, SUBSET = "micro_f1", "macro_f1", "subset_accuracy"
_AT_CHOSEN = "_at_thresholds"
# Fewer rows of a label say nothing about its threshold.
LEAST_ROWS = 5


class SeveralLabels(AnswerKind):
    """Those of `options` that apply, each with a probability of its own.

    Args:
        options: the labels.
        thresholds: from which probability on a label is given, where it is not 0.5.
    """

    name = "several_labels"
    description = "any number of labels at once, a yes or no for each"
    report_sections = (Section.SEVERAL, Section.CHOICES)
    answer_column = "predicted_labels"
    asked_alike = True
    losses = ("focal_gamma",)
    reading = (
        "Every label is a question of its own: after the prompt stand the label, a colon, and yes "
        "or no, and the label is given where yes is likely enough."
    )

    def __init__(
        self, options: Sequence[str], thresholds: Mapping[str, float] | None = None
    ) -> None:
        self.options = tuple(options)
        given = thresholds or {}
        self._are_given = bool(given)
        self.thresholds = np.array([given.get(label, 0.5) for label in self.options])
        named = zip(self.options, self.thresholds.tolist(), strict=True)
        own = [f"{label} from {value:.3g}" for label, value in named if value != 0.5]
        self.decided = ", ".join([*own, "others from 0.5"] if len(own) < len(self.options) else own)

    def objective_settings(self) -> dict[str, Any]:
        """Which candidates are the answers to one question."""
        return {"questions": (2,) * len(self.options)}

    def candidates(self, example: Example) -> Sequence[str]:
        """Yes and no, once for each label."""
        return (_YES, _NO) * len(self.options)

    def contexts(self, example: Example) -> Sequence[str]:
        """The label that is asked about."""
        return tuple(f"{label}:" for label in self.options for _ in (_YES, _NO))

    def answers(self, examples: Sequence[Example], outputs: ModelOutputs) -> Sequence[str | None]:
        """The labels that apply."""
        return self._named(self.applying(outputs) >= self.thresholds)

    def probabilities_by_question(self, outputs: ModelOutputs) -> Sequence[np.ndarray]:
        """Yes and no of each label."""
        return [np.stack([yes, 1 - yes], axis=1) for yes in self.applying(outputs).T]

    def applying(self, outputs: ModelOutputs) -> np.ndarray:
        """[N, K] float64, the probability that each label applies: of yes against no."""
        scores = outputs.log_likelihoods.astype(np.float64)
        scores = scores.reshape(len(scores), len(self.options), 2)
        return 1 / (1 + np.exp(np.clip(scores[..., 1] - scores[..., 0], -700, 700)))

    def probabilities(self, outputs: ModelOutputs) -> Sequence[float | None]:
        """That every label's yes or no is right, taken as independent of each other."""
        applying = self.applying(outputs)
        given = applying >= self.thresholds
        return np.where(given, applying, 1 - applying).prod(axis=1).tolist()

    def metrics(
        self, targets: Sequence[str], predictions: Sequence[str | None]
    ) -> dict[str, float]:
        """Of the labels given, as scikit-learn has them.

        Args:
            targets: the right labels of each row, joined by "; "; "none" where there are none.
            predictions: as many; `None` = none.

        Returns:
            `micro_f1` over all yes and no together, `macro_f1` as the mean over the labels that
            occur, `subset_accuracy` as the share of rows with all labels right, and for every label
            `precision/<label>`, `recall/<label>` and `f1/<label>`.
        """
        right, given = self._matrix(targets), self._matrix(predictions)
        by_label = _scores_by_label(right, given)
        found = {
            MICRO: _micro_f1(right, given),
            MACRO: _macro_f1(right, given),
            SUBSET: float((right == given).all(axis=1).mean()),
        }
        for name, values in by_label.items():
            for label, value in zip(self.options, values.tolist(), strict=True):
                found[f"{name}/{label}"] = value
        return found

    def metrics_of_outputs(
        self, examples: Sequence[Example], outputs: ModelOutputs
    ) -> dict[str, float]:
        """F1 with a threshold for each label that other rows have chosen, where none is given.

        The thresholds of every other row are those with the best F1 on the rows between them, so
        that no row has a part in its own.
        """
        right = self._matrix([self.answer_of(example) for example in examples])
        if self._are_given:
            return {}
        given = self.applying(outputs) >= self._crosswise(right, self.applying(outputs))
        return {
            f"{MICRO}{_AT_CHOSEN}": _micro_f1(right, given),
            f"{MACRO}{_AT_CHOSEN}": _macro_f1(right, given),
        }

    def as_decided(self, examples: Sequence[Example], outputs: ModelOutputs) -> ModelOutputs:
        """Every yes moved so far that the kind's thresholds mean what the rival's own would."""
        applying = self.applying(outputs)
        right = self._matrix([self.answer_of(example) for example in examples])
        own = self._crosswise(right, applying)
        moved = _logit(applying) - _logit(own) + _logit(self.thresholds)
        # On its threshold is above it, whatever rounding says.
        at_least = np.where(applying >= own, _logit(self.thresholds) + 1e-4, -np.inf)
        return replace(outputs, log_likelihoods=_as_pairs(np.maximum(moved, at_least)))

    def _crosswise(self, right: np.ndarray, applying: np.ndarray) -> np.ndarray:
        """[N, K] thresholds of each row, which those of every other row have chosen."""
        found = np.empty(right.shape)
        for half in (slice(0, None, 2), slice(1, None, 2)):
            other = slice(1 - half.start, None, 2)
            found[half] = best_thresholds(right[other], applying[other])
        return found

    def row_scores(
        self, metric: str, examples: Sequence[Example], outputs: ModelOutputs
    ) -> Sequence[float] | None:
        """Of F1 over all labels together, which `row_weights` join; and whether all are right."""
        right, given = self._both(examples, outputs)
        if metric == SUBSET:
            return (right == given).all(axis=1).astype(float).tolist()
        if metric != MICRO:
            return None
        counted = right.sum(axis=1) + given.sum(axis=1)
        return (2 * (right & given).sum(axis=1) / np.maximum(counted, 1)).tolist()

    def row_weights(
        self, metric: str, examples: Sequence[Example], outputs: ModelOutputs
    ) -> Sequence[float] | None:
        """A row's right and given labels, which are what F1 divides by."""
        if metric != MICRO:
            return None
        right, given = self._both(examples, outputs)
        return (right.sum(axis=1) + given.sum(axis=1)).astype(float).tolist()

    def chance(self, examples: Sequence[Example]) -> dict[str, float]:
        """Of one who tosses a coin for each label."""
        return {SUBSET: 0.5 ** len(self.options)}

    def chance_scores(self, metric: str, examples: Sequence[Example]) -> Sequence[float] | None:
        """The same for every row."""
        return [0.5 ** len(self.options)] * len(examples) if metric == SUBSET else None

    def classic(
        self, train: Sequence[Example], asked: Sequence[Example]
    ) -> Mapping[str, ModelOutputs]:
        """How frequent each label is, and TF-IDF, a regression a label."""
        return classic_outputs(self, train, asked, options=(2,) * len(self.options))

    def run_columns(
        self, examples: Sequence[Example], outputs: ModelOutputs
    ) -> dict[str, Sequence[Any]]:
        """Every label's probability to apply."""
        columns = zip(self.options, self.applying(outputs).T.tolist(), strict=True)
        return {f"{APPLIES}{label}": values for label, values in columns}

    def labelled(self, predictions: pd.DataFrame) -> Sequence[Labelled]:
        """Yes or no of each label."""
        given = self._matrix(predictions["target"].tolist())
        options = (_YES.strip(), _NO.strip())
        found = []
        for place, label in enumerate(self.options):
            yes = predictions[f"{APPLIES}{label}"].to_numpy(np.float64)
            own = [options[0] if there else options[1] for there in given[:, place].tolist()]
            found.append(Labelled(label, options, own, np.stack([yes, 1 - yes], axis=1)))
        return found

    def announcement(self, *, max_new_tokens: int) -> str:
        """The labels."""
        return f"any of {', '.join(self.options)}"

    def _both(
        self, examples: Sequence[Example], outputs: ModelOutputs
    ) -> tuple[np.ndarray, np.ndarray]:
        right = self._matrix([self.answer_of(example) for example in examples])
        return right, self.applying(outputs) >= self.thresholds

    def _named(self, given: np.ndarray) -> list[str]:
        return [
            JOINT.join(label for label, there in zip(self.options, row, strict=True) if there)
            or NONE
            for row in given.tolist()
        ]

    def _matrix(self, answers: Sequence[str | None]) -> np.ndarray:
        """[N, K] bool, which labels each answer has."""
        rows = [labels_in(answer) for answer in answers]
        matrix = [[label in row for label in self.options] for row in rows]
        return np.array(matrix, dtype=bool).reshape(len(rows), len(self.options))


def labels_in(answer: str | None) -> set[str]:
    """The labels of an answer of this kind."""
    return set() if answer is None or answer in ("", NONE) else set(answer.split(JOINT))


def best_thresholds(right: np.ndarray, applying: np.ndarray) -> np.ndarray:
    """[K] from which probability on each label's F1 is best on these rows.

    Of thresholds that are as good the one nearest to 0.5, which it also is where no row has the
    label.

    Args:
        right: [N, K] bool.
        applying: [N, K] probabilities.
    """
    return np.array(
        [_best_threshold(right[:, k], applying[:, k]) for k in range(applying.shape[1])]
    )


def _best_threshold(right: np.ndarray, applying: np.ndarray) -> float:
    if not right.any():
        return 0.5
    order = np.argsort(-applying, kind="stable")
    hits, probabilities = np.cumsum(right[order]), applying[order]
    f1 = 2 * hits / (np.arange(1, len(order) + 1) + right.sum())
    # A threshold lies between two probabilities that differ.
    following = np.append(probabilities[1:], 0.0)
    middles = np.where(probabilities > following, (probabilities + following) / 2, np.nan)
    usable = ~np.isnan(middles)
    best = f1[usable].max()
    among = middles[usable][np.isclose(f1[usable], best)]
    return float(among[np.abs(among - 0.5).argmin()])


def chosen_thresholds(right: np.ndarray, applying: np.ndarray) -> np.ndarray:
    """[K] as `best_thresholds`, but 0.5 for a label that fewer than five rows have.

    Args:
        right: [N, K] bool.
        applying: [N, K] probabilities.
    """
    enough = right.sum(axis=0) >= LEAST_ROWS
    return np.where(enough, best_thresholds(right, applying), 0.5)


def _logit(probabilities: np.ndarray) -> np.ndarray:
    inside = np.clip(probabilities, 1e-12, 1 - 1e-12)
    return np.log(inside) - np.log1p(-inside)


def _as_pairs(logits: np.ndarray) -> np.ndarray:
    """[N, 2 K] float32 log-probabilities of yes and no with these [N, K] differences."""
    yes, no = -np.logaddexp(0, -logits), -np.logaddexp(0, logits)
    return np.stack([yes, no], axis=2).reshape(len(logits), -1).astype(np.float32)


def _micro_f1(right: np.ndarray, given: np.ndarray) -> float:
    counted = right.sum() + given.sum()
    return float(2 * (right & given).sum() / counted) if counted else 0.0


def _macro_f1(right: np.ndarray, given: np.ndarray) -> float:
    occurring = right.any(axis=0) | given.any(axis=0)
    return float(_scores_by_label(right, given)["f1"][occurring].mean()) if occurring.any() else 0.0


def _scores_by_label(right: np.ndarray, given: np.ndarray) -> dict[str, np.ndarray]:
    hits, there, said = (right & given).sum(axis=0), right.sum(axis=0), given.sum(axis=0)
    return {
        "precision": hits / np.maximum(said, 1),
        "recall": hits / np.maximum(there, 1),
        "f1": 2 * hits / np.maximum(there + said, 1),
    }
