"""Scores of likelihoods and of written answers, as the task's metrics."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd
import torch

from lora_fsdp.data.encoding import EncodedExample
from lora_fsdp.evaluation.scoring import Scores
from lora_fsdp.tasks import ClassificationTask, Example, Task


def evaluation_metrics(
    task: Task,
    examples: Sequence[EncodedExample],
    scores: Scores,
    *,
    written: Sequence[str] | None = None,
) -> dict[str, float]:
    """Loss per label token and the task's metrics, over the examples that have a target.

    Where rows bring their own choices, also `accuracy_normalised`: the share of rows in which the
    right choice has the highest log-likelihood per token. Without that division a longer choice is
    less likely for its length alone.
    Source: `acc_norm` of https://github.com/EleutherAI/lm-evaluation-harness, which divides by
    characters.

    Args:
        task: the task.
        examples: N examples.
        scores: of their answers.
        written: [N] what the model wrote, for a free-text task; without it there is only the loss.
    """
    known = [place for place, example in enumerate(examples) if example.target_ids]
    if not known:
        return {}
    # A free-text example has one answer, its target.
    answers = [examples[place].label or 0 for place in known]
    likelihood = scores.log_likelihoods[known, answers].double().sum().item()
    metrics = {"loss": -likelihood / sum(len(examples[place].target_ids) for place in known)}
    if task.is_free_text and written is None:
        return metrics
    if task.per_row_choices:
        metrics |= _accuracy_normalised([examples[place] for place in known], scores, known)
    sources = [example.example for example in examples]
    given = given_answers(task, sources, scores, written=written)
    return metrics | task.measure([sources[i] for i in known], [given[i] for i in known])


def _accuracy_normalised(
    examples: Sequence[EncodedExample], scores: Scores, places: Sequence[int]
) -> dict[str, float]:
    right = 0
    for example, place in zip(examples, places, strict=True):
        lengths = torch.tensor([len(ids) for ids in example.candidate_ids])
        per_token = scores.log_likelihoods[place, : len(lengths)] / lengths
        right += int(per_token.argmax()) == example.label
    return {"accuracy_normalised": right / len(examples)}


def confusion_matrix(
    task: ClassificationTask, examples: Sequence[EncodedExample], scores: Scores
) -> pd.DataFrame:
    """Counts of true by predicted label, over the examples that have a target."""
    labels, predicted = list(task.labels or ()), predicted_labels(task, scores)
    pairs = [
        (labels[example.label], answer)
        for example, answer in zip(examples, predicted, strict=True)
        if example.label is not None
    ]
    return task.confusion_matrix([true for true, _ in pairs], [answer for _, answer in pairs])


def given_answers(
    task: Task,
    examples: Sequence[Example],
    scores: Scores,
    *,
    written: Sequence[str] | None = None,
) -> list[str | None]:
    """The answer to each example: the likeliest, or what is found in the text written."""
    if task.is_free_text:
        return [task.parse(text) for text in written or ()]
    if task.labels is not None:
        return list(predicted_labels(task, scores))
    chosen = zip(examples, scores.best, strict=True)
    return [example.choices[best].strip() for example, best in chosen]


def predicted_labels(task: Task, scores: Scores) -> list[str]:
    """The most likely label of each example, of a closed set."""
    labels = list(task.labels or ())
    return [labels[best] for best in scores.best]
