"""Which rows without an answer would teach a model most: the unsure ones, unlike each other."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np

# Rows among which clusters are sought, for each row that is asked for and at least.
_CANDIDATES_FOR_EACH, _LEAST_CANDIDATES = 10, 1000
_MOST_CLUSTERS = 100
# Each takes a look at all candidates; what is ranked behind them takes no more.
_MOST_ONE_BY_ONE = 1000
_MOST_FEATURES = 20_000


def margins(probabilities: np.ndarray) -> np.ndarray:
    """[N] from 0 (sure) to 1: one less the lead of the likeliest answer over the next.

    Args:
        probabilities: [N, A] of two answers or more, each row's sum 1.
    """
    first, second = -np.sort(-probabilities, axis=1)[:, :2].T
    return np.asarray(1 - (first - second))


def entropies(probabilities: np.ndarray) -> np.ndarray:
    """[N] from 0 (sure) to 1 (all answers alike): entropy over that of equal probabilities.

    Args:
        probabilities: [N, A] of two answers or more, each row's sum 1.
    """
    logs = np.log(np.where(probabilities > 0, probabilities, 1.0))
    return np.asarray(-(probabilities * logs).sum(axis=1) / np.log(probabilities.shape[1]))


#: How unsure a model is of one question, by name.
SCORES = {"margin": margins, "entropy": entropies}


def unsure(questions: Sequence[np.ndarray], *, by: str) -> np.ndarray:
    """[N] from 0 to 1: how unsure the model is, on average over the questions to a row.

    Args:
        questions: of each question [N, options] probabilities.
        by: of `SCORES`.
    """
    return np.asarray(np.mean([SCORES[by](one) for one in questions], axis=0))


def rank(scores: np.ndarray, texts: Sequence[str], *, count: int, seed: int = 0) -> list[int]:
    """Places of the `count` rows to label next, the first first; fewer if there are fewer.

    One row after the other, the one that is worth most: its score, less what the rows before it
    have taken. Each of them in its cluster halves it, and the nearest of all takes the share that
    the two texts have in common (cosine). So of two texts that are nearly the same the second
    comes late. Texts are TF-IDF of letters, clusters those of k-means among the rows with the
    highest scores.

    Args:
        scores: [N], from 0.
        texts: N texts, none of them empty.
        count: how many rows.
        seed: of the clusters.
    """
    order = np.argsort(-scores, kind="stable")
    candidates = order[: max(_CANDIDATES_FOR_EACH * count, _LEAST_CANDIDATES)]
    features = _features([texts[place] for place in candidates])
    clusters = _clusters(features, most=count, seed=seed)
    own, nearest = scores[candidates].astype(float), np.zeros(len(candidates))
    taken = np.zeros(len(candidates))
    left = np.ones(len(candidates), dtype=bool)
    chosen: list[int] = []
    while len(chosen) < min(count, len(candidates), _MOST_ONE_BY_ONE):
        worth = np.where(left, own * 0.5**taken * (1 - nearest), -1.0)
        place = int(worth.argmax())  # of equal ones the first, which has the higher score
        chosen.append(place)
        left[place] = False
        taken[clusters == clusters[place]] += 1
        nearest = np.maximum(nearest, np.clip((features @ features[place].T).toarray()[:, 0], 0, 1))
    rest = np.flatnonzero(left)
    worth = own[rest] * 0.5 ** taken[rest] * (1 - nearest[rest])
    chosen += rest[np.argsort(-worth, kind="stable")].tolist()
    return [int(candidates[place]) for place in chosen[:count]]


def _features(texts: Sequence[str]) -> Any:
    """[N, features] sparse, each row of length 1."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    letters = TfidfVectorizer(
        analyzer="char_wb", ngram_range=(2, 4), sublinear_tf=True, max_features=_MOST_FEATURES
    )
    return letters.fit_transform(texts).tocsr()


def _clusters(features: Any, *, most: int, seed: int) -> np.ndarray:
    """[N] the cluster of each text; at most `most`, and half as many as there are texts."""
    from sklearn.cluster import KMeans
    from sklearn.exceptions import ConvergenceWarning

    rows = features.shape[0]
    count = min(most, _MOST_CLUSTERS, rows // 2)
    if count < 2:
        return np.zeros(rows, dtype=int)
    with warnings.catch_warnings():
        # Texts that differ in nothing but spaces are one point.
        warnings.simplefilter("ignore", ConvergenceWarning)
        found = KMeans(count, n_init=1, random_state=seed).fit_predict(features)
    return np.asarray(found)
