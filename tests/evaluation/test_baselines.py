"""What a model should beat. Run: python -m pytest tests/evaluation/test_baselines.py"""

from __future__ import annotations

import pytest

from lora_fsdp.evaluation.baselines import majority_baseline, tfidf_baseline


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
