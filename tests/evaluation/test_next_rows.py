"""Which rows to label next. Run: python -m pytest tests/evaluation/test_next_rows.py"""

import math

import numpy as np
import pytest

from lora_fsdp.evaluation.labelling.next_rows import entropies, margins, rank, unsure
from lora_fsdp.tasks.answers import ModelOutputs
from lora_fsdp.tasks.answers.several_labels import SeveralLabels


def test_scores_are_as_counted_by_hand():
    generator = np.random.default_rng(0)
    probabilities = generator.dirichlet([0.5, 1, 2], 40)
    for row, margin, entropy in zip(
        probabilities.tolist(), margins(probabilities), entropies(probabilities), strict=True
    ):
        second, first = sorted(row)[-2:]
        assert margin == pytest.approx(1 - (first - second))
        assert entropy == pytest.approx(-sum(p * math.log(p) for p in row) / math.log(3))
    sure, torn = np.array([[1.0, 0.0]]), np.array([[0.5, 0.5]])
    for score in (margins, entropies):
        assert score(sure).tolist() == [0]
        assert score(torn).tolist() == [1]


def test_of_several_questions_it_is_the_mean():
    yes = np.array([[0.5, 1.0], [0.9, 0.8]])
    logs = np.log(np.maximum(np.stack([yes, 1 - yes], axis=-1), 1e-300)).reshape(2, 4)
    outputs = ModelOutputs(logs, np.ones((2, 4)))
    found = unsure(SeveralLabels(["a", "b"]).probabilities_by_question(outputs), by="margin")
    np.testing.assert_allclose(found, [0.5, (0.2 + 0.4) / 2], atol=1e-9)


TEXTS = [
    "the flight was cancelled and nobody called us",  # unsure, three times nearly the same
    "The flight was cancelled and nobody called us!",
    "the flight was cancelled, and nobody called us ...",
    "my luggage has been lost in Denver",  # unsure
    "what time does boarding begin at gate 14",  # unsure
    "thank you so much for the wonderful crew",  # sure
    "worst service of my whole life",  # sure
]
SCORES = np.array([0.95, 0.96, 0.94, 0.9, 0.85, 0.02, 0.01])


def test_near_duplicates_and_clear_cases_come_after_different_unsure_ones():
    for seed in range(5):
        assert rank(SCORES, TEXTS, count=3, seed=seed) == [1, 3, 4]


def test_more_than_there_are_is_all_of_them_in_a_rank():
    ranked = rank(SCORES, TEXTS, count=100)
    assert sorted(ranked) == list(range(7))
    assert ranked[:3] == [1, 3, 4]
    assert set(ranked[3:]) == {0, 2, 5, 6}
    assert ranked == rank(SCORES, TEXTS, count=100)


@pytest.mark.parametrize("texts", [["same"] * 4, ["\x1b", "\x00", "?", "!!!"], ["a  b", "a b"] * 2])
def test_texts_without_words_or_differences_are_ranked_too(texts):
    assert sorted(rank(np.array([0.1, 0.4, 0.3, 0.2]), texts, count=4)) == [0, 1, 2, 3]
    assert rank(np.array([0.1, 0.4, 0.3, 0.2]), texts, count=1) == [1]
    assert rank(np.array([0.5]), texts[:1], count=3) == [0]


def test_a_large_pool_gives_the_most_unsure_of_different_ones():
    generator = np.random.default_rng(1)
    words = [f"word{number}" for number in range(300)]
    texts = [" ".join(generator.choice(words, 8)) for _ in range(3000)]
    scores = generator.random(3000)
    ranked = rank(scores, texts, count=20)
    assert len(set(ranked)) == 20
    assert scores[ranked].min() > 0.9
