"""Calibrated probabilities and sets of answers.

Run: python -m pytest tests/evaluation/test_calibration.py
"""

import json
import math
from dataclasses import replace

import numpy as np
import pytest

from lora_fsdp.errors import AdapterVerificationError, ArgumentError
from lora_fsdp.evaluation.calibration import (
    CALIBRATION_FILE,
    answer_sets,
    figures,
    fit_calibration,
    read_calibration,
)
from lora_fsdp.tasks import Example, Prompt
from lora_fsdp.tasks.answers import ModelOutputs
from tests.support.tiny import LABELS, ToyTask


def drawn(rows, *, temperature=1.0, biases=(0.0, 0.0, 0.0), seed=0):
    """Log-likelihoods that these parameters calibrate, and the places of the right answers."""
    generator = np.random.default_rng(seed)
    true = generator.normal(size=(rows, 3)) * 1.5
    powers = np.exp(true)
    right = (powers.cumsum(axis=1) / powers.sum(axis=1, keepdims=True)
             > generator.random(rows)[:, None]).argmax(axis=1)  # fmt: skip
    return ((true - np.array(biases)) * temperature - 4).astype(np.float32), right


def test_temperature_and_biases_are_found():
    scores, right = drawn(6000, temperature=2.5)
    calibration, _ = fit_calibration(scores, right, labels=LABELS, apart=False)
    assert calibration.temperature == pytest.approx(2.5, rel=0.06)
    assert calibration.biases == ()
    scores, right = drawn(6000, temperature=2.5, biases=(1.0, -0.5, -0.5))
    calibration, _ = fit_calibration(scores, right, labels=LABELS, apart=True)
    assert calibration.temperature == pytest.approx(2.5, rel=0.06)
    assert calibration.biases == pytest.approx((1.0, -0.5, -0.5), abs=0.12)
    outputs = ModelOutputs(scores, np.ones_like(scores))
    before, after = (figures(one.log_likelihoods, right) for one in
                     (outputs, calibration.of(outputs)))  # fmt: skip
    assert after["error"] < 0.02 < 0.1 < before["error"]
    assert after["loss"] < before["loss"]


def test_rows_that_are_reported_change_no_answer():
    scores, right = drawn(400, temperature=0.3, biases=(2.0, 0.0, -2.0))
    _, crossed = fit_calibration(scores, right, labels=LABELS, apart=False)
    assert (crossed.argmax(axis=1) == scores.argmax(axis=1)).all()


@pytest.mark.parametrize("seed", range(5))
def test_no_row_is_calibrated_by_itself(seed):
    """Another right answer of a row leaves its own calibrated probabilities as they were."""
    scores, right = drawn(60, seed=seed)
    _, before = fit_calibration(scores, right, labels=LABELS, apart=False)
    other = right.copy()
    other[7] = (other[7] + 1) % 3
    _, after = fit_calibration(scores, other, labels=LABELS, apart=False)
    assert np.array_equal(before[7], after[7])
    assert not np.array_equal(before, after)


def test_loss_falls_on_rows_that_were_not_fitted():
    for seed in range(10):
        scores, right = drawn(1000, temperature=2.0, seed=seed)
        calibration, _ = fit_calibration(scores[:300], right[:300], labels=LABELS, apart=True)
        new = ModelOutputs(scores[300:], np.ones_like(scores[300:]))
        before = figures(new.log_likelihoods, right[300:])
        assert figures(calibration.of(new).log_likelihoods, right[300:])["loss"] < before["loss"]


def test_choices_of_the_rows_own_may_be_fewer():
    scores, right = drawn(300, temperature=2.0)
    scores[::2, 2] = -np.inf
    right[::2] = scores[::2].argmax(axis=1)
    calibration, crossed = fit_calibration(scores, right, labels=(), apart=True)
    assert calibration.biases == ()
    assert np.isneginf(crossed[::2, 2]).all()
    assert np.isfinite(crossed[1::2]).all()


def test_where_there_is_nothing_to_fit():
    scores, right = drawn(49)
    assert fit_calibration(scores, right, labels=LABELS, apart=False) is None
    scores, right = drawn(80)
    assert fit_calibration(scores[:, :1], right * 0, labels=(), apart=False) is None
    # A label that is right, and probable, in no row, and a model that is never wrong.
    sure = np.full((80, 3), -50.0, dtype=np.float32)
    sure[np.arange(80), np.arange(80) % 2] = 0.0
    calibration, _ = fit_calibration(sure, np.arange(80) % 2, labels=LABELS, apart=True)
    assert math.isfinite(calibration.temperature)
    assert np.isfinite(calibration.biases).all()


@pytest.mark.parametrize("coverage", [0.8, 0.9, 0.97])
def test_sets_hold_the_right_answer_as_often_as_they_say(coverage):
    shares, sizes = [], []
    for seed in range(60):
        scores, right = drawn(700, temperature=2.0, seed=seed)
        calibration, _ = fit_calibration(scores[:300], right[:300], labels=LABELS, apart=True)
        outputs = calibration.of(ModelOutputs(scores[300:], np.ones_like(scores[300:])))
        threshold = calibration.threshold(coverage)
        examples = [Example(1, Prompt("", "a", ""), None)] * 400
        sets = answer_sets(ToyTask(), examples, outputs, threshold=threshold)
        held = [LABELS[place] in one for one, place in zip(sets, right[300:], strict=True)]
        shares.append(np.mean(held))
        sizes.append(np.mean([len(one) for one in sets]))
    assert coverage - 0.01 <= np.mean(shares) <= coverage + 0.015
    assert 1 <= np.mean(sizes) < 3


def test_sets_are_in_order_and_never_empty():
    outputs = ModelOutputs(np.log([[0.2, 0.7, 0.1], [0.4, 0.25, 0.35]]), np.ones((2, 3)))
    examples = [Example(1, Prompt("", "a", ""), None)] * 2
    negative, neutral, positive = LABELS
    assert answer_sets(ToyTask(), examples, outputs, threshold=0.15) == [
        [neutral, negative], [negative, positive, neutral]]  # fmt: skip
    assert answer_sets(ToyTask(), examples, outputs, threshold=0.9) == [[neutral], [negative]]


def test_a_coverage_that_so_few_rows_cannot_promise_takes_all_answers():
    scores, right = drawn(60)
    calibration, _ = fit_calibration(scores, right, labels=LABELS, apart=True)
    assert calibration.threshold(0.99) == 0.0
    for coverage in (0, 1, 1.5, -0.1):
        with pytest.raises(ArgumentError, match="--coverage"):
            calibration.threshold(coverage)


class TestFile:
    def write(self, folder, **changes):
        scores, right = drawn(60)
        calibration, _ = fit_calibration(scores, right, labels=LABELS, apart=True)
        calibration = replace(calibration, adapter_sha256="abc")
        contents = json.loads(calibration.to_json()) | changes
        (folder / CALIBRATION_FILE).write_text(json.dumps(contents))
        return calibration

    def test_reads_what_was_written(self, tmp_path):
        assert read_calibration(tmp_path, ToyTask(), adapter_sha256="abc") is None
        calibration = self.write(tmp_path)
        assert read_calibration(tmp_path, ToyTask(), adapter_sha256="abc") == calibration

    @pytest.mark.parametrize(
        ("changes", "words"),
        [
            ({"adapter_sha256": "other"}, "another adapter"),
            ({"labels": ["a", "b", "c"]}, "other labels"),
            ({"temperature": 0}, "damaged"),
            ({"temperature": 1e-300}, "damaged"),
            ({"temperature": 10**400}, "damaged"),
            ({"biases": [1e9, 0, 0]}, "damaged"),
            ({"temperature": float("nan")}, "damaged"),
            ({"temperature": "1"}, "damaged"),
            ({"biases": [1.0]}, "damaged"),
            ({"biases": None}, "damaged"),
            ({"scores": [0.5, 0.1]}, "damaged"),
            ({"scores": [2.0]}, "damaged"),
            ({"labels": 3}, "damaged"),
            ({"rows": "many"}, "damaged"),
        ],
    )
    def test_damage(self, tmp_path, changes, words):
        self.write(tmp_path, **changes)
        with pytest.raises(AdapterVerificationError, match=words):
            read_calibration(tmp_path, ToyTask(), adapter_sha256="abc")
