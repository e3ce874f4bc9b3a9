"""Scores of label likelihoods and greedy decoding, as the task's metrics."""

from __future__ import annotations

from collections.abc import Sequence

from lora_fsdp.data.encoding import EncodedExample
from lora_fsdp.evaluation.scoring import Scores
from lora_fsdp.tasks import Task


def evaluation_metrics(
    task: Task, examples: Sequence[EncodedExample], scores: Scores
) -> dict[str, float]:
    """Loss per label token and the task's metrics, over the examples that have a target.

    Without a closed label set: the share of targets that greedy decoding writes to the letter.
    """
    known = [i for i, example in enumerate(examples) if example.target_ids]
    if not known:
        return {}
    truth = [examples[i].label or 0 for i in known]
    likelihood = sum(float(scores.log_likelihoods[i, t]) for i, t in zip(known, truth, strict=True))
    metrics = {"loss": -likelihood / sum(len(examples[i].target_ids) for i in known)}
    if task.labels is None:
        return metrics | {"exact_match": float(scores.is_greedy[known, 0].float().mean())}
    predicted = predicted_labels(task, scores)
    return metrics | task.compute_metrics(
        [task.labels[t] for t in truth], [predicted[i] for i in known]
    )


def predicted_labels(task: Task, scores: Scores) -> list[str]:
    """The most likely label of each example."""
    labels = list(task.labels or ())
    return [labels[best] for best in scores.best]
