"""Intervals, paired tests, calibration. Run: python -m pytest tests/reporting/test_statistics.py"""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import f1_score

from lora_fsdp.evaluation.intervals import PairedBootstrap, mcnemar_p_value, wilson_interval
from lora_fsdp.reporting.recording.label_errors import suspected_label_errors
from lora_fsdp.reporting.sections.calibration import calibration

LABELS = ["a", "b", "c"]


def answers(targets: list[str], *, right: float, seed: int) -> list[str]:
    random = np.random.default_rng(seed)
    return [target if random.random() < right else str(random.choice(LABELS)) for target in targets]


@pytest.fixture(scope="module")
def targets() -> list[str]:
    return np.random.default_rng(0).choice(LABELS, 400, p=[0.6, 0.3, 0.1]).tolist()


def test_wilson_is_as_published() -> None:
    """8 of 10; the bounds are those of Wilson's formula worked out by hand."""
    found = wilson_interval(8, 10)
    assert (found.value, found.low, found.high) == pytest.approx((0.8, 0.49016, 0.94331), abs=1e-4)
    none = wilson_interval(0, 1)
    assert (none.low, none.high) == pytest.approx((0.0, 0.79345), abs=1e-4)


def test_bootstrap_gives_the_metrics_own_value(targets: list[str]) -> None:
    given = answers(targets, right=0.7, seed=1)
    found = PairedBootstrap(targets, {"x": given}, labels=LABELS).interval("x", "macro_f1")
    assert found.value == pytest.approx(f1_score(targets, given, labels=LABELS, average="macro"))
    assert found.low < found.value < found.high


def test_bootstrap_of_accuracy_is_about_the_binomials_width(targets: list[str]) -> None:
    given = answers(targets, right=0.7, seed=1)
    found = PairedBootstrap(targets, {"x": given}).interval("x", "accuracy")
    deviation = np.sqrt(found.value * (1 - found.value) / len(targets))
    assert found.high - found.low == pytest.approx(2 * 1.96 * deviation, rel=0.08)


def test_bootstrap_equals_drawing_the_rows_one_by_one(targets: list[str]) -> None:
    given = answers(targets, right=0.7, seed=1)
    found = PairedBootstrap(targets, {"x": given}, labels=LABELS).interval("x", "macro_f1")
    random, pairs = np.random.default_rng(5), np.array([targets, given], dtype=object)
    drawn = [pairs[:, random.integers(400, size=400)] for _ in range(400)]
    scores = [f1_score(*sample, labels=LABELS, average="macro") for sample in drawn]
    low, high = np.percentile(scores, [2.5, 97.5])
    assert (found.low, found.high) == pytest.approx((low, high), abs=0.015)


def test_differences_are_paired(targets: list[str]) -> None:
    first = answers(targets, right=0.7, seed=1)
    second = list(first)
    for place in range(0, 20, 2):  # nearly the same answers
        second[place] = targets[place]
    paired = PairedBootstrap(targets, {"x": first, "y": second, "z": first}, labels=LABELS)
    alone = paired.interval("x", "macro_f1")
    together = paired.difference("y", "x", "macro_f1")
    assert together.value > 0
    assert together.high - together.low < 0.5 * (alone.high - alone.low)
    same = paired.difference("z", "x", "macro_f1")
    assert (same.value, same.low, same.high) == (0, 0, 0)
    back = paired.difference("x", "y", "macro_f1")
    assert (back.value, back.low) == pytest.approx((-together.value, -together.high))


def test_rare_labels_do_not_push_the_interval_below_the_score() -> None:
    """Many samples miss a label of one row; counted as 0 there, perfect answers would look bad."""
    labels = [f"label {n}" for n in range(40)]
    found = PairedBootstrap(labels, {"x": labels}, labels=labels).interval("x", "macro_f1")
    assert (found.low, found.value, found.high) == (1, 1, 1)
    absent = PairedBootstrap(labels, {"x": labels}, labels=[*labels, "nowhere"])
    found = absent.interval("x", "macro_f1")
    assert (found.low, found.value, found.high) == (1, 1, 1)


def test_bootstrap_of_rows_scores_is_about_the_means_width() -> None:
    scores = np.random.default_rng(3).random(400)
    better = np.minimum(scores + 0.01, 1)
    targets = ["x"] * 400
    paired = PairedBootstrap(
        targets,
        {"x": targets, "y": targets},
        scores={("x", "f1"): scores.tolist(), ("y", "f1"): better.tolist()},
    )
    assert (paired.knows("x", "f1"), paired.knows("x", "macro_f1")) == (True, False)
    found = paired.interval("x", "f1")
    assert found.value == pytest.approx(scores.mean())
    width = 2 * 1.96 * scores.std() / 20
    assert found.high - found.low == pytest.approx(width, rel=0.1)
    difference = paired.difference("y", "x", "f1")
    assert difference.value == pytest.approx((better - scores).mean())
    assert 0.009 < difference.low < difference.high < 0.0101


def test_same_seed_same_interval(targets: list[str]) -> None:
    given = answers(targets, right=0.7, seed=1)
    one, two = (PairedBootstrap(targets, {"x": given}, labels=LABELS) for _ in range(2))
    assert one.interval("x", "macro_f1") == two.interval("x", "macro_f1")


def test_mcnemar_by_hand() -> None:
    """5 against 15 discordant rows: twice the binomial tail P(X <= 5; 20, 1/2) = 0.0414."""
    first = np.array([True] * 5 + [False] * 15 + [True] * 30)
    second = np.array([False] * 5 + [True] * 15 + [True] * 30)
    assert mcnemar_p_value(first, second) == pytest.approx(0.04139, abs=1e-5)
    assert mcnemar_p_value(first, first) == 1.0


def test_calibration_by_hand() -> None:
    confidence = np.array([0.95, 0.95, 0.95, 0.95, 0.62, 0.68, 1.0])
    right = np.array([True, True, True, False, False, True, True])
    found = calibration(confidence, right)
    assert [one["rows"] for one in found["bins"]] == [2, 5]
    assert [one["accuracy"] for one in found["bins"]] == [0.5, 0.8]
    # 2/7 * |0.5 - 0.65| + 5/7 * |0.8 - 0.96|
    assert found["error"] == pytest.approx(2 / 7 * 0.15 + 5 / 7 * 0.16)


def test_calibrated_answers_have_a_small_error() -> None:
    random = np.random.default_rng(0)
    confidence = random.uniform(0.3, 1, 20_000)
    assert calibration(confidence, random.random(20_000) < confidence)["error"] < 0.01
    assert calibration(confidence, random.random(20_000) < confidence - 0.2)["error"] > 0.15


@pytest.mark.parametrize("rows", [40, 400, 4000])
def test_the_error_of_a_calibrated_model_is_what_is_expected(rows: int) -> None:
    """Over many samples of that size; it falls with the root of the rows."""
    random = np.random.default_rng(rows)
    found = []
    for _ in range(60):
        confidence = random.uniform(0.3, 1, rows)
        found.append(calibration(confidence, random.random(rows) < confidence))
    errors = [one["error"] for one in found]
    expected = float(np.mean([one["error_expected"] for one in found]))
    assert np.mean(errors) == pytest.approx(expected, rel=0.12)
    assert expected == pytest.approx(1.1 / np.sqrt(rows), rel=0.25)
    above = np.mean([one["error"] > one["error_high"] for one in found])
    assert above <= 0.15


@pytest.mark.slow
def test_a_rival_of_several_is_better_by_chance_no_more_often_than_one() -> None:
    """Three rivals as good as the tuned model, 300 times: one is 'better' in 2.5 % at most."""
    random = np.random.default_rng(4)
    better = {1: 0, 3: 0}
    for _ in range(300):
        targets = random.choice(LABELS, 150).tolist()
        systems = {
            name: answers(targets, right=0.7, seed=int(random.integers(1 << 30)))
            for name in ("tuned", "a", "b", "c")
        }
        bootstrap = PairedBootstrap(targets, systems)
        for of in better:
            highs = [bootstrap.difference("tuned", one, "accuracy", of=of).high for one in "abc"]
            better[of] += min(highs) < 0
    assert better[3] <= 0.035 * 300 < better[1]


def test_planted_label_errors_are_suspected() -> None:
    random = np.random.default_rng(0)
    true = random.integers(3, size=300)
    probabilities = np.full((300, 3), 0.1)
    probabilities[np.arange(300), true] = random.uniform(0.6, 0.95, 300)
    given, wrong = true.copy(), [7, 80, 200]
    given[wrong] = (true[wrong] + 1) % 3
    probabilities[wrong, true[wrong]] = 0.99
    found = suspected_label_errors([LABELS[i] for i in given], probabilities, LABELS)
    assert set(found["position"].head(3)) == set(wrong)
    first = found.iloc[0]
    assert (first["given"], first["suggested"]) == (
        LABELS[given[first["position"]]],
        LABELS[true[first["position"]]],
    )
    assert suspected_label_errors([LABELS[i] for i in true], probabilities, LABELS).empty


def test_a_label_that_no_row_carries_is_never_suggested() -> None:
    probabilities = np.tile([0.05, 0.05, 0.9], (4, 1))
    assert suspected_label_errors(["a", "a", "b", "b"], probabilities, LABELS).empty
