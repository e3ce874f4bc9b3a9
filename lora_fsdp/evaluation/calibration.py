"""Probabilities that one may act on: calibrated, with a threshold, or as sets of answers.

A temperature, and a bias for each label where there are rows apart from the reported ones, are
fitted on rows that were not trained on. No reported row's probability comes from parameters that
were fitted on it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from lora_fsdp.base.folders import read_json_object
from lora_fsdp.errors import AdapterVerificationError, ArgumentError
from lora_fsdp.tasks import Example, Task
from lora_fsdp.tasks.answers import ModelOutputs

CALIBRATION_FILE = "calibration.json"
# Fewer rows say little about a temperature, and for a bias each label needs some.
LEAST_ROWS = 50
_ROWS_A_LABEL = 20
_FOLDS = 5
_BINS = 10
# A bias costs as much as this many rows would, so that a rare label's does not run away.
_PENALTY = 1.0
_LARGEST_BIAS = 20.0
_LOWEST, _HIGHEST = math.log(0.05), math.log(20.0)


@dataclass(frozen=True)
class Calibration:
    """What is added to and multiplied with the log-likelihoods of answers.

    Attributes:
        temperature: they are divided by it.
        biases: added afterwards, one for each of the task's labels; empty = none.
        labels: the task's labels.
        rows: how many rows it was fitted on.
        apart: whether none of them is reported on.
        scores: sorted, one for each of these rows: 1 minus the probability of the right answer,
            each by parameters that were fitted on other rows (for `answer_sets`).
        adapter_sha256: of the adapter that it is of.
    """

    temperature: float
    biases: tuple[float, ...]
    labels: tuple[str, ...]
    rows: int
    apart: bool
    scores: tuple[float, ...]
    adapter_sha256: str = ""

    def of(self, outputs: ModelOutputs) -> ModelOutputs:
        """The outputs with calibrated log-likelihoods (up to a constant for each example)."""
        scores = outputs.log_likelihoods / self.temperature
        if self.biases and scores.shape[1] == len(self.biases):
            scores = scores + np.asarray(self.biases)
        return replace(outputs, log_likelihoods=scores.astype(np.float32))

    def described(self) -> str:
        """In a few words."""
        biases = ", a bias for each label" if self.biases else ""
        return f"temperature {self.temperature:.3g}{biases}, fitted on {self.rows:,} held-out rows"

    def threshold(self, coverage: float) -> float:
        """The least probability of an answer in a set that holds the right one so often.

        Source: Vovk, Gammerman and Shafer, "Algorithmic Learning in a Random World" (2005), split
        conformal prediction; the score is Sadinle, Lei and Wasserman's (JASA 114, 2019).

        Raises:
            ArgumentError: no share between 0 and 1.
        """
        if not 0 < coverage < 1:
            raise ArgumentError(f"--coverage {coverage}: give a share between 0 and 1.")
        place = math.ceil((len(self.scores) + 1) * coverage)
        return 1 - self.scores[place - 1] if place <= len(self.scores) else 0.0

    def to_json(self) -> str:
        """As `read_calibration` reads it."""
        return json.dumps(asdict(self), ensure_ascii=False, indent=1) + "\n"


def fit_calibration(
    log_likelihoods: np.ndarray, right: np.ndarray, *, labels: Sequence[str], apart: bool
) -> tuple[Calibration, np.ndarray] | None:
    """A calibration, and the rows' own log-likelihoods calibrated by what other rows say.

    Args:
        log_likelihoods: [N, A] of the candidates, minus infinity where there are fewer.
        right: [N] the place of the right one.
        labels: the task's; empty if the candidates are each row's own.
        apart: whether none of the rows is reported on. Only then a bias is fitted, which may change
            answers: the reported ones would not be those that the adapter gives.

    Returns:
        `None` where there are fewer than 50 rows, or nothing to choose from.
    """
    rows, width = log_likelihoods.shape
    if rows < LEAST_ROWS or width < 2:
        return None
    scores = log_likelihoods.astype(np.float64)
    ways = [False]
    if apart and width == len(labels) and rows >= _ROWS_A_LABEL * width:
        ways.append(True)
    crossed = {biased: _cross_fitted(scores, right, biased=biased) for biased in ways}
    biased = min(ways, key=lambda way: _loss_of(crossed[way], right))
    temperature, biases = _fitted(scores, right, biased=biased)
    of_right = _probabilities(crossed[biased])[np.arange(rows), right]
    calibration = Calibration(
        temperature=temperature,
        biases=tuple(round(float(one), 6) for one in biases) if biased else (),
        labels=tuple(labels),
        rows=rows,
        apart=apart,
        # Rounded up: a set may be larger for it, and not smaller.
        scores=tuple(sorted((np.ceil((1 - of_right) * 1e6) / 1e6).tolist())),
    )
    return calibration, crossed[biased].astype(np.float32)


def answer_sets(
    task: Task, examples: Sequence[Example], outputs: ModelOutputs, *, threshold: float
) -> list[list[str]]:
    """For each example the answers that are likely enough, the likeliest first, and at least one.

    Args:
        task: bound.
        examples: N.
        outputs: calibrated, for them.
        threshold: see `Calibration.threshold`.
    """
    labels, found = list(task.answer_kind.labels), []
    for example, row in zip(examples, outputs.probabilities, strict=True):
        names = labels or [choice.strip() for choice in example.choices]
        order = np.argsort(-row[: len(names)], kind="stable")
        found.append(
            [names[place] for rank, place in enumerate(order)
             if rank == 0 or row[place] >= threshold]
        )  # fmt: skip
    return found


def figures(log_likelihoods: np.ndarray, right: np.ndarray) -> dict[str, float]:
    """Loss of the right answers (nats a row), and the expected calibration error in ten bins."""
    probabilities = _probabilities(log_likelihoods.astype(np.float64))
    confidence = probabilities.max(axis=1)
    hits = probabilities.argmax(axis=1) == right
    places = np.minimum((confidence * _BINS).astype(int), _BINS - 1)
    gaps = [abs((hits[places == p] - confidence[places == p]).sum()) for p in range(_BINS)]
    return {
        "loss": float(_loss_of(log_likelihoods.astype(np.float64), right)),
        "error": float(sum(gaps) / len(right)),
    }


def read_calibration(folder: Path, task: Task, *, adapter_sha256: str) -> Calibration | None:
    """The calibration beside an adapter; `None` if there is none.

    Raises:
        AdapterVerificationError: it is damaged, or of another adapter or task.
    """
    file = folder / CALIBRATION_FILE
    if not file.exists() and not file.is_symlink():
        return None
    found = _parsed(read_json_object(folder, CALIBRATION_FILE), file)
    if found.adapter_sha256 != adapter_sha256:
        raise AdapterVerificationError(
            f"{file} is of another adapter than the one beside it: take it out of the folder, or "
            "pass --calibrated false."
        )
    if list(found.labels) != list(task.answer_kind.labels):
        raise AdapterVerificationError(
            f"{file} is of other labels than the task's: take it out of the folder, or pass "
            "--calibrated false."
        )
    return found


def _parsed(contents: dict[str, Any], file: Path) -> Calibration:
    def numbers(name: str) -> tuple[float, ...]:
        values = contents[name]
        if not isinstance(values, list) or not all(map(_is_number, values)):
            raise TypeError(name)
        return tuple(map(float, values))

    try:
        temperature, labels = contents["temperature"], contents["labels"]
        rows, apart, digest = (contents[key] for key in ("rows", "apart", "adapter_sha256"))
        biases, scores = numbers("biases"), numbers("scores")
        fits = (
            _is_number(temperature) and 1e-3 <= temperature <= 1e3,
            all(abs(bias) <= _LARGEST_BIAS for bias in biases),
            isinstance(labels, list) and all(isinstance(one, str) for one in labels),
            isinstance(rows, int) and isinstance(apart, bool) and isinstance(digest, str),
            len(biases) in (0, len(labels)) and list(scores) == sorted(scores),
            all(0 <= score <= 1 for score in scores),
        )
        if not all(fits):
            raise ValueError("a value is of another kind")
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise AdapterVerificationError(
            f"{file} is damaged ({type(error).__name__}: {str(error)[:80]}): take it out of the "
            "folder, or pass --calibrated false."
        ) from error
    return Calibration(float(temperature), biases, tuple(labels), rows, apart, scores, digest)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _cross_fitted(scores: np.ndarray, right: np.ndarray, *, biased: bool) -> np.ndarray:
    """[N, A], each row by parameters that were fitted on the other folds."""
    folds = np.random.default_rng(0).permutation(len(scores)) % _FOLDS
    found = np.empty_like(scores)
    for fold in range(_FOLDS):
        others = folds != fold
        temperature, biases = _fitted(scores[others], right[others], biased=biased)
        found[~others] = scores[~others] / temperature + biases
    return found


def _fitted(scores: np.ndarray, right: np.ndarray, *, biased: bool) -> tuple[float, np.ndarray]:
    """Temperature and biases [A] of the least loss.

    Source: Guo et al., "On Calibration of Modern Neural Networks", ICML 2017 (temperature scaling;
    with biases, its vector scaling with one temperature for all labels).
    """
    from scipy.optimize import minimize

    width = scores.shape[1] if biased else 0
    bounds = [(-_HIGHEST, -_LOWEST), *[(-_LARGEST_BIAS / 2, _LARGEST_BIAS / 2)] * width]
    objective = partial(_loss_and_gradient, scores=scores, right=right)
    found = minimize(objective, np.zeros(1 + width), jac=True, bounds=bounds, method="L-BFGS-B").x
    biases = found[1:] - found[1:].mean() if width else np.zeros(scores.shape[1])
    return float(np.exp(-found[0])), biases


def _loss_and_gradient(
    values: np.ndarray, *, scores: np.ndarray, right: np.ndarray
) -> tuple[float, np.ndarray]:
    """Of the logarithm of 1/temperature and the biases, with a weak pull of these to 0."""
    scale, biases = np.exp(values[0]), values[1:]
    there = np.isfinite(scores)
    scaled = scores * scale + (biases if len(biases) else 0.0)
    errors = _probabilities(scaled)
    errors[np.arange(len(right)), right] -= 1
    of_scale = (errors * np.where(there, scores, 0.0)).sum() * scale
    gradient = [of_scale, *(errors.sum(axis=0) + _PENALTY * biases if len(biases) else ())]
    loss = _loss_of(scaled, right) * len(right) + _PENALTY * (biases**2).sum() / 2
    return float(loss / len(right)), np.array(gradient) / len(right)


def _loss_of(scores: np.ndarray, right: np.ndarray) -> float:
    chosen = _probabilities(scores)[np.arange(len(right)), right]
    return float(-np.log(np.maximum(chosen, 1e-300)).mean())


def _probabilities(scores: np.ndarray) -> np.ndarray:
    powers = np.exp(scores - scores.max(axis=1, keepdims=True))
    found: np.ndarray = powers / powers.sum(axis=1, keepdims=True)
    return found
