"""How alike two texts are: exact match and the F1 of their words, as SQuAD counts them.

Source: the evaluation script of SQuAD (Rajpurkar et al., "SQuAD: 100,000+ Questions for Machine
Comprehension of Text", EMNLP 2016), for answers that may be empty that of SQuAD 2.0. Chinese and
Japanese characters count as words of their own, as in MLQA (Lewis et al., ACL 2020), since no blank
divides their words.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence

_PUNCTUATION = re.compile(f"[{re.escape(string.punctuation)}]")
_ARTICLES = re.compile(r"\b(?:a|an|the)\b")
_IDEOGRAPHS = re.compile("([\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff])")


def normalise(text: str) -> str:
    """Lower case, without punctuation, articles and superfluous blanks."""
    bare = _PUNCTUATION.sub("", text.lower())
    return " ".join(_ARTICLES.sub(" ", bare).split())


def words(text: str) -> list[str]:
    """The words of a normalised text."""
    return space_ideographs(normalise(text)).split()


def space_ideographs(text: str) -> str:
    """The text with blanks around each Chinese or Japanese character."""
    return _IDEOGRAPHS.sub(r" \1 ", text)


def exact_match(answer: str, references: Sequence[str]) -> float:
    """1 if the answer is one of the references, normalised; else 0."""
    return float(any(normalise(answer) == normalise(reference) for reference in references))


def token_f1(answer: str, references: Sequence[str]) -> float:
    """The best F1 of the answer's words against those of a reference, from 0 to 1."""
    return max(_f1(words(answer), words(reference)) for reference in references)


def _f1(answer: Sequence[str], reference: Sequence[str]) -> float:
    if not answer or not reference:
        return float(answer == reference)
    shared = sum((Counter(answer) & Counter(reference)).values())
    return 2 * shared / (len(answer) + len(reference))


def weighted_mean(scores: Sequence[float], weights: Sequence[float]) -> float:
    """The mean of `scores` by `weights`; where none of them counts, all count alike."""
    total = sum(weights)
    if total == 0:
        return sum(scores) / len(scores)
    return sum(one * weight for one, weight in zip(scores, weights, strict=True)) / total
