"""Classic baselines for answers that may be right in part: no language model, and a distribution.

What a kind of answer reads from a model's likelihoods, it reads from theirs as well.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from lora_fsdp.tasks.answers.kind import TFIDF, AnswerKind, ModelOutputs
from lora_fsdp.tasks.example import Example

if TYPE_CHECKING:
    from sklearn.feature_extraction.text import TfidfVectorizer

#: How the training rows are answered on average, whatever the text.
AVERAGE = "average"
# What is never said is unlikely, and not impossible.
_LEAST = 1e-6


def classic_outputs(
    kind: AnswerKind,
    train: Sequence[Example],
    asked: Sequence[Example],
    *,
    options: Sequence[int],
) -> dict[str, ModelOutputs]:
    """The training rows' average answer, and a logistic regression on TF-IDF.

    Args:
        kind: all of whose examples have the same candidates.
        train: examples with targets.
        asked: examples to answer.
        options: how many candidates are the answers to each question, in their order. A row may
            answer some of them only.
    """
    shares = np.array([kind.shares(example) for example in train], dtype=np.float64)
    texts = [example.prompt.content for example in train]
    to_answer = [example.prompt.content for example in asked]
    ends = np.cumsum(options).tolist()
    questions = [slice(end - size, end) for end, size in zip(ends, options, strict=True)]
    average = shares.sum(axis=0)
    for columns in questions:
        average[columns] /= max(average[columns].sum(), _LEAST)
    regressed = np.tile(average, (len(asked), 1))
    if (vectorizer := fitted_tfidf(texts)) is not None:
        known, new = vectorizer.transform(texts), vectorizer.transform(to_answer)
        for columns in questions:
            regressed[:, columns] = _regressed(known, shares[:, columns], new)
    return {
        AVERAGE: outputs_of(np.tile(average, (len(asked), 1))),
        TFIDF: outputs_of(regressed),
    }


def outputs_of(probabilities: np.ndarray) -> ModelOutputs:
    """As if a model had given these, [N, A]."""
    scores = np.log(np.maximum(probabilities, _LEAST)).astype(np.float32)
    return ModelOutputs(scores, np.ones(scores.shape, dtype=np.int64))


def fitted_tfidf(texts: Sequence[str]) -> TfidfVectorizer | None:
    """Words and pairs of words, as in `evaluation/baselines.py`; `None` if no two texts share one.

    There it says why so.
    """
    # Imported here, because scikit-learn takes a second to import.
    from sklearn.feature_extraction.text import TfidfVectorizer

    vectorizer = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, min_df=2)
    analyze = vectorizer.build_analyzer()
    texts_with = Counter(word for text in texts for word in set(analyze(text)))
    if max(texts_with.values(), default=0) < 2:
        return None
    return vectorizer.fit(texts)


def _regressed(known: np.ndarray, shares: np.ndarray, new: np.ndarray) -> np.ndarray:
    """A logistic regression's probabilities, where a row counts for each answer by its share."""
    from scipy.sparse import vstack
    from sklearn.linear_model import LogisticRegression

    occurring = [place for place in range(shares.shape[1]) if shares[:, place].any()]
    found = np.zeros((new.shape[0], shares.shape[1]))
    if len(occurring) < 2:
        found[:, occurring] = 1.0
        return found
    rows = [np.flatnonzero(shares[:, place]) for place in occurring]
    answers = np.concatenate(
        [np.full(len(there), place) for place, there in zip(occurring, rows, strict=True)]
    )
    counted = np.concatenate(
        [shares[there, place] for place, there in zip(occurring, rows, strict=True)]
    )
    model = LogisticRegression(C=10, solver="saga", tol=1e-2, max_iter=1000, random_state=0)
    model.fit(vstack([known[there] for there in rows]), answers, sample_weight=counted)
    found[:, model.classes_] = model.predict_proba(new)
    return found
