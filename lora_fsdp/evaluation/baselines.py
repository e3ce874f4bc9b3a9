"""What a fine-tuned model should beat: predictions without any language model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence


def majority_baseline(train_labels: Sequence[str], count: int) -> list[str]:
    """The commonest training label, `count` times; of equally common ones the first by name."""
    frequencies = Counter(train_labels)
    commonest = min(frequencies, key=lambda label: (-frequencies[label], label))
    return [commonest] * count


def tfidf_baseline(
    train_texts: Sequence[str], train_labels: Sequence[str], test_texts: Sequence[str]
) -> list[str]:
    """Predictions of a logistic regression on TF-IDF of words and pairs of words.

    Where there is nothing to learn from (no word that two texts share, or one label only), these
    are the majority's predictions.

    Args:
        train_texts: the texts to learn from.
        train_labels: their labels, as many.
        test_texts: the texts to predict.

    Returns:
        One label for each test text.
    """
    # Imported here, because scikit-learn takes a second to import.
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    # Words of one text only say nothing about another; C=10 regularises less than the default. On
    # 800 airline tweets: accuracy 0.77 and macro-F1 0.65, with the defaults 0.70 and 0.47.
    vectorizer = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, min_df=2)
    analyze = vectorizer.build_analyzer()
    texts_with = Counter(word for text in train_texts for word in set(analyze(text)))
    if max(texts_with.values(), default=0) < 2 or len(set(train_labels)) < 2:
        return majority_baseline(train_labels, len(test_texts))
    # With this solver and tolerance the scores of the default ones in a thirtieth of their time.
    regression = LogisticRegression(C=10, solver="saga", tol=1e-2, max_iter=1000, random_state=0)
    model = make_pipeline(vectorizer, regression)
    model.fit(train_texts, train_labels)
    return [str(label) for label in model.predict(test_texts)]
