"""What several adapters came to. Run: python -m pytest tests/sweeps/test_results.py"""

import json
import math

import numpy as np
import pandas as pd
import pytest

from lora_fsdp.evaluation.ensemble import averaged
from lora_fsdp.sweeps.outcome.member import MemberResult, Spread
from lora_fsdp.sweeps.outcome.summary import Summary
from lora_fsdp.tasks.answers import ModelOutputs


def member(name, setting, score, *, stopped=None, test=None, **values):
    metrics = {} if stopped else {"tuned": {"accuracy": score}, "untrained": {"accuracy": 0.25}}
    right = pd.Series(range(40)) < 40 * (0.0 if stopped else score)
    table = pd.DataFrame(
        {
            "row": range(40),
            "text": "x",
            "target": "yes",
            "base": "no",
            "tuned": right.map({True: "yes", False: "no"}),
            "probability": 0.5,
        }
    )
    return MemberResult(
        name, setting, values, 0, None, stopped, metrics, None if stopped else table, test
    )


def summary(*members, over="seeds", chooses=False):
    return Summary(members, "accuracy", over, chooses)


def test_mean_and_standard_deviation():
    found = Spread.of([0.7, 0.8, 0.9, math.nan])
    assert (found.mean, found.deviation, found.count) == (
        pytest.approx(0.8),
        pytest.approx(0.1),
        3,
    )
    assert str(found) == "0.800 ± 0.100"
    assert str(Spread.of([0.5])) == "0.500"


def test_the_spread_over_seeds_stands_apart_from_the_interval_over_rows(tmp_path):
    found = summary(member("a", 0, 0.7), member("b", 0, 0.8), member("c", 0, 0.9))
    text = str(found)
    assert "Accuracy 0.800 ± 0.100 (mean ± standard deviation over 3 seeds)." in text
    assert "95 % interval of b over 40 rows" in text
    assert "The untrained model: 0.250." in text
    found.save(tmp_path)
    written = json.loads((tmp_path / "sweep.json").read_text())
    assert written["settings"][0]["spread"]["accuracy"]["mean"] == pytest.approx(0.8)
    assert written["best"] is None


def test_the_best_setting_is_measured_on_the_test_rows():
    found = summary(
        member("a", 0, 0.7, lora_r=4, test={"accuracy": 0.95}),
        member("b", 1, 0.9, lora_r=8, test={"accuracy": 0.6}),
        chooses=True,
    )
    assert found.best == 1
    assert "Best of 2 settings by accuracy on 40 validation rows: lora_r 8 (0.900)" in str(found)
    assert "by which nothing was chosen: 0.600." in str(found)
    assert found.to_json()["best"]["test"]["mean"] == pytest.approx(0.6)
    assert "0.95" not in json.dumps(found.to_json())  # told of the best alone


def test_of_a_loss_the_least_is_the_best():
    members = [member("a", 0, 0.7), member("b", 1, 0.9)]
    for one, loss in zip(members, (1.0, 2.0), strict=True):
        one.metrics["tuned"]["loss"] = loss
    assert Summary(members, "loss", "seeds", True).best == 0


def test_a_setting_of_which_one_diverged_is_not_chosen_and_is_named():
    found = summary(
        member("a", 0, 0.5, lora_r=4),
        member("b", 0, 0.0, stopped="its loss was not finite at step 2 of 9", lora_r=4),
        member("c", 1, 0.4, lora_r=8),
        chooses=True,
    )
    assert found.best == 1
    assert "b " in str(found)
    assert "its loss was not finite at step 2 of 9" in str(found)
    all_gone = summary(member("b", 0, 0.0, stopped="its loss was not finite at step 2 of 9"))
    assert all_gone.best is None
    assert "Every adapter diverged: lower --learning_rate." in str(all_gone)


def drawn_member(name, setting, chance, *, rows=100, seed=0):
    """Right on so many of its rows, by its own luck."""
    right = np.random.default_rng((seed, setting)).random(rows) < chance
    table = pd.DataFrame({"row": range(rows), "text": "x", "target": "yes", "base": "no"})
    table["tuned"] = np.where(right, "yes", "no")
    metrics = {"tuned": {"accuracy": right.mean()}, "untrained": {"accuracy": 0.0}}
    return MemberResult(name, setting, {"lora_r": setting}, 0, None, None, metrics, table)


def test_the_more_settings_are_tried_the_more_is_taken_off_the_best():
    # All are as good as each other (0.7): whichever is the best was lucky.
    corrections, errors = [], []
    for count in (2, 5, 20):
        found, alike = [], 0
        for seed in range(12):
            members = [drawn_member(str(n), n, 0.7, seed=seed) for n in range(count)]
            choice = summary(*members, chooses=True).choice
            found.append((choice.score, choice.corrected))
            alike += len(choice.not_worse)
        score, corrected = np.mean(found, axis=0)
        assert alike >= 0.9 * 12 * (count - 1)  # the differences are chance, and so it says
        corrections.append(score - corrected)
        errors.append((score - 0.7, corrected - 0.7))
    assert 0 < corrections[0] < corrections[1] < corrections[2]
    for before, after in errors[1:]:  # nearer to the truth than the best's own figure
        assert abs(after) < abs(before)


def test_what_is_better_by_more_than_chance_is_told_apart():
    members = [drawn_member("low", 0, 0.2), drawn_member("high", 1, 0.9)]
    found = summary(*members, chooses=True)
    assert found.choice.not_worse == []
    assert found.choice.corrected == pytest.approx(found.choice.score, abs=0.01)
    assert "The others are worse by more than chance." in str(found)


def test_without_answers_row_by_row_nothing_is_said_of_the_choice():
    members = [member("a", 0, 0.7), member("b", 1, 0.9)]
    members[1].metrics["tuned"]["accuracy"] = 0.3  # a metric of the task's own, by that name
    assert summary(*members, chooses=True).choice is None


def test_an_ensemble_has_the_mean_of_the_probabilities():
    one, other = (
        ModelOutputs(np.log(np.array([[first, 1 - first]])), np.ones((1, 2)), ["text"])
        for first in (0.9, 0.2)
    )
    np.testing.assert_allclose(averaged([one, other]).probabilities, [[0.55, 0.45]])
