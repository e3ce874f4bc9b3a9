"""What a model should beat. Run: python -m pytest tests/evaluation/test_baselines.py"""

from __future__ import annotations

import numpy as np
import pytest

from lora_fsdp.evaluation.baselines import choose_regression, majority_baseline, tfidf_baseline


def test_majority() -> None:
    assert majority_baseline([], ["b", "a", "b"], ["x", "y"]) == ["b", "b"]
    assert majority_baseline([], ["b", "a"], ["x"]) == ["a"]


def test_tfidf_learns_words() -> None:
    texts = ["what a great flight", "great crew", "awful delay", "an awful seat"]
    labels = ["positive", "positive", "negative", "negative"]
    predictions = tfidf_baseline(texts, labels, ["great", "awful", "great great crew"])
    assert predictions == ["positive", "negative", "positive"]
    assert all(type(label) is str for label in predictions)


def test_tfidf_is_the_same_every_time() -> None:
    texts = [f"word{number % 7} word{number % 3}" for number in range(60)]
    labels = ["abc"[number % 3] for number in range(60)]
    assert tfidf_baseline(texts, labels, texts) == tfidf_baseline(texts, labels, texts)


@pytest.mark.parametrize("texts", [["!", "?", "!"], ["", "", ""], ["a", "b", "c"]])
def test_tfidf_without_words_is_the_majority(texts: list[str]) -> None:
    assert tfidf_baseline(texts, ["x", "y", "y"], ["hello", ""]) == ["y", "y"]


def test_tfidf_with_one_label_is_that_label() -> None:
    assert tfidf_baseline(["some words"], ["x"], ["hello"]) == ["x"]


def test_tfidf_of_texts_it_knows_no_word_of() -> None:
    assert len(tfidf_baseline(["good day", "bad day"], ["p", "n"], ["", "unseen"])) == 2


def test_tfidf_reads_letters_where_no_words_are_divided() -> None:
    texts = [f"{begin}{middle}天" for begin in ("好看", "难看") for middle in "一二三四五六"]
    labels = ["p"] * 6 + ["n"] * 6
    assert tfidf_baseline(texts, labels, ["好看八", "难看九"]) == ["p", "n"]


def test_a_regression_weighs_rare_labels_where_cross_validation_says_so() -> None:
    generator = np.random.default_rng(0)
    labels = ["rare" if number % 12 == 0 else "common" for number in range(600)]
    centres = np.array([[1.0] if label == "rare" else [0.0] for label in labels])
    features = centres + generator.standard_normal((600, 1))
    model = choose_regression(features, labels)
    assert model.class_weight == "balanced"
    given = np.array(labels)
    assert (model.predict(features)[given == "rare"] == "rare").mean() > 0.7
    # Too few rows of each label to choose by: weighted as well.
    few = choose_regression(features[:14], labels[:14])
    assert (few.C, few.class_weight) == (10.0, "balanced")


def test_a_label_of_one_row_does_not_stand_in_the_way() -> None:
    features = np.arange(80, dtype=float)[:, None]
    labels = ["low"] * 40 + ["high"] * 39 + ["once"]
    assert set(choose_regression(features, labels).predict(features)) >= {"low", "high"}
