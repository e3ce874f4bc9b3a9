"""Scores of label likelihoods and greedy decoding, as the task's metrics."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from lora_fsdp.data.encoding import EncodedExample
from lora_fsdp.evaluation.scoring import Scores
from lora_fsdp.tasks import ClassificationTask, Task


def evaluation_metrics(
    task: Task, examples: Sequence[EncodedExample], scores: Scores
) -> dict[str, float]:
    """Loss per label token and the task's metrics, over the examples that have a target.

    Without a closed label set: the share of targets that greedy decoding writes to the letter.
    """
    known = [i for i, example in enumerate(examples) if example.target_ids]
    if not known:
        return {}
    # A free-text example has one answer, its target.
    answers = [examples[i].label or 0 for i in known]
    likelihood = scores.log_likelihoods[known, answers].double().sum().item()
    metrics = {"loss": -likelihood / sum(len(examples[i].target_ids) for i in known)}
    if task.labels is None:
        return metrics | {"exact_match": scores.is_greedy[known, 0].double().mean().item()}
    return metrics | task.compute_metrics(*_true_and_predicted(task, examples, scores))


def confusion_matrix(
    task: ClassificationTask, examples: Sequence[EncodedExample], scores: Scores
) -> pd.DataFrame:
    """Counts of true by predicted label, over the examples that have a target."""
    return task.confusion_matrix(*_true_and_predicted(task, examples, scores))


def _true_and_predicted(
    task: Task, examples: Sequence[EncodedExample], scores: Scores
) -> tuple[list[str], list[str]]:
    labels, predicted = list(task.labels or ()), predicted_labels(task, scores)
    pairs = [
        (labels[example.label], answer)
        for example, answer in zip(examples, predicted, strict=True)
        if example.label is not None
    ]
    return [true for true, _ in pairs], [answer for _, answer in pairs]


def predicted_labels(task: Task, scores: Scores) -> list[str]:
    """The most likely label of each example."""
    labels = list(task.labels or ())
    return [labels[best] for best in scores.best]
