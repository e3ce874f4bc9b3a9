"""What a fine-tuned model should beat: predictions without any language model."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Sequence
from functools import partial
from itertools import product
from typing import TYPE_CHECKING, Any

import numpy as np

from lora_fsdp.tasks.answers.kind import MAJORITY, TFIDF

if TYPE_CHECKING:
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.pipeline import Pipeline

_FOLDS = 3
_STRENGTHS = (1.0, 10.0, 30.0)
# Rows by labels among which a regression is chosen, and the rows that takes of each label.
_MOST_CHOOSING = 12_000
_LEAST_ROWS_A_LABEL = 10


def majority_baseline(
    train_texts: Sequence[str], train_labels: Sequence[str], test_texts: Sequence[str]
) -> list[str]:
    """The commonest training label for each test text; of equally common ones the first by name."""
    frequencies = Counter(train_labels)
    commonest = min(frequencies, key=lambda label: (-frequencies[label], label))
    return [commonest] * len(test_texts)


def tfidf_baseline(
    train_texts: Sequence[str], train_labels: Sequence[str], test_texts: Sequence[str]
) -> list[str]:
    """Predictions of a logistic regression on TF-IDF of words, pairs of words and letters.

    How strongly it is regularised, and whether rare labels weigh more, is chosen by
    cross-validation on the training rows (`choose_regression`). Where there is nothing to learn
    from (nothing that two texts share, or one label only), these are the majority's predictions.

    Args:
        train_texts: the texts to learn from.
        train_labels: their labels, as many.
        test_texts: the texts to predict.

    Returns:
        One label for each test text.
    """
    from scipy.sparse import hstack

    vectorizers = _fitted_vectorizers(train_texts)
    if not vectorizers or len(set(train_labels)) < 2:
        return majority_baseline(train_texts, train_labels, test_texts)
    train = hstack([one.transform(train_texts) for one in vectorizers]).tocsr()
    tested = hstack([one.transform(test_texts) for one in vectorizers]).tocsr()
    model = choose_regression(train, train_labels)
    return [str(label) for label in model.predict(tested)]


#: By the name that a kind of answer has for it (`AnswerKind.rivals`).
BASELINES = {MAJORITY: majority_baseline, TFIDF: tfidf_baseline}


def tfidf_out_of_fold(
    texts: Sequence[str], labels: Sequence[str], *, folds: int = 5
) -> np.ndarray | None:
    """Probabilities of a quick TF-IDF regression for each text, fitted on the other folds' texts.

    Args:
        texts: N texts.
        labels: their labels; each occurs at least `folds` times.
        folds: into how many parts the texts are divided, by label and with a fixed seed.

    Returns:
        [N, A] probabilities, columns in the order of the sorted labels; `None` where a fold leaves
        nothing to learn from.
    """
    from sklearn.model_selection import StratifiedKFold

    given, read = np.array(labels, dtype=object), np.array(texts, dtype=object)
    probabilities = np.zeros((len(given), len(set(labels))))
    splitter = StratifiedKFold(folds, shuffle=True, random_state=0)
    for train, test in splitter.split(read, given):
        model = fit_tfidf(read[train].tolist(), given[train].tolist())
        if model is None:
            return None
        probabilities[test] = model.predict_proba(read[test])
    return probabilities


def choose_regression(
    features: Any,
    labels: Sequence[str],
    *,
    strengths: Sequence[float] = _STRENGTHS,
    seed: int = 0,
) -> Any:
    """A logistic regression, fitted on all rows.

    Its C and its class weights are those with the best macro-F1 in three folds of the rows; of many
    rows, or many labels, a seeded sample is divided. Where there are too few rows for that, C is
    the middle one and rare labels weigh more.

    Args:
        features: [N, F], dense or sparse.
        labels: N labels, of which two differ at least.
        strengths: the values of C to choose from; where nothing can be chosen, the middle one.
        seed: of sample, folds and solver.
    """
    given = np.array(labels, dtype=object)
    count = len(set(labels))
    most = min(len(given), _MOST_CHOOSING // count)
    fit = partial(_fitted, seed=seed)
    if most < _LEAST_ROWS_A_LABEL * count:
        return fit(features, given, strengths[len(strengths) // 2], "balanced")
    sample = np.random.default_rng(seed).permutation(len(given))[:most]
    chosen = max(
        product(strengths, (None, "balanced")),
        key=lambda one: _cross_validated(features[sample], given[sample], *one, seed=seed),
    )
    return fit(features, given, *chosen)


def _cross_validated(
    features: Any, labels: np.ndarray, strength: float, weights: str | None, *, seed: int
) -> float:
    """Macro-F1 of three folds together."""
    from sklearn.metrics import f1_score
    from sklearn.model_selection import KFold, StratifiedKFold

    rarest = min(Counter(labels).values())
    splitter = (StratifiedKFold if rarest >= _FOLDS else KFold)(
        _FOLDS, shuffle=True, random_state=seed
    )
    answers = np.empty(len(labels), dtype=object)
    for train, test in splitter.split(features, labels):
        if len(set(labels[train])) < 2:
            return 0.0
        model = _fitted(features[train], labels[train], strength, weights, seed=seed)
        answers[test] = model.predict(features[test])
    return float(f1_score(labels, answers, average="macro", zero_division=0))


def _fitted(
    features: Any, labels: np.ndarray, strength: float, weights: str | None, *, seed: int
) -> Any:
    from scipy.sparse import issparse
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from sklearn.multiclass import OneVsRestClassifier

    model: Any = LogisticRegression(
        C=strength, class_weight=weights, tol=1e-3, max_iter=200, random_state=seed
    )
    if issparse(features):
        # The dual of liblinear: on 800 rows of TF-IDF twice as fast as the other solvers.
        model.set_params(solver="liblinear", dual=True, tol=1e-2)
        model = OneVsRestClassifier(model)
    with warnings.catch_warnings():
        # More rounds change no answer; a weaker fit shows in the cross-validation.
        warnings.simplefilter("ignore", ConvergenceWarning)
        return model.fit(features, labels)


def _fitted_vectorizers(texts: Sequence[str]) -> list[TfidfVectorizer]:
    """TF-IDF of words and of letters, each if two texts share something in it."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    # What stands in one text only says nothing about another.
    fitted = []
    for shape in ({"ngram_range": (1, 2)}, {"analyzer": "char_wb", "ngram_range": (2, 5)}):
        vectorizer = TfidfVectorizer(sublinear_tf=True, min_df=2, **shape)
        try:
            fitted.append(vectorizer.fit(texts))
        except ValueError:  # nothing is left: so scikit-learn says it
            continue
    return fitted


def fit_tfidf(texts: Sequence[str], labels: Sequence[str]) -> Pipeline | None:
    """A regression on words alone, fitted without a choice, or `None` if nothing can be learnt."""
    # Imported here, because scikit-learn takes a second to import.
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    # Words of one text only say nothing about another; C=10 regularises less than the default. On
    # 800 airline tweets: accuracy 0.77 and macro-F1 0.65, with the defaults 0.70 and 0.47.
    vectorizer = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, min_df=2)
    analyze = vectorizer.build_analyzer()
    texts_with = Counter(word for text in texts for word in set(analyze(text)))
    if max(texts_with.values(), default=0) < 2 or len(set(labels)) < 2:
        return None
    # With this solver and tolerance the scores of the default ones in a thirtieth of their time.
    regression = LogisticRegression(C=10, solver="saga", tol=1e-2, max_iter=1000, random_state=0)
    model = make_pipeline(vectorizer, regression)
    return model.fit(texts, labels)
