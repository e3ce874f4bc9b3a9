"""What a model gives for examples, as the task's answers and metrics."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from lora_fsdp.data.encoding import EncodedExample
from lora_fsdp.evaluation.scoring import Scores
from lora_fsdp.tasks import Example, Task
from lora_fsdp.tasks.answers import ModelOutputs


def model_outputs(
    examples: Sequence[EncodedExample],
    scores: Scores,
    *,
    texts: Sequence[str] = (),
    reference: Scores | None = None,
) -> ModelOutputs:
    """Scores of N examples, and what was generated for them, as a kind of answer takes them.

    `reference` are the frozen base's scores, where the kind of answer needs them.
    """
    base = None if reference is None else reference.log_likelihoods.numpy()
    tokens = np.zeros(tuple(scores.log_likelihoods.shape), dtype=np.int64)
    for place, example in enumerate(examples):
        lengths = [len(ids) for ids in example.scored_ids]
        tokens[place, : len(lengths)] = lengths
        tokens[place, : len(example.given)] -= np.array(example.given, dtype=np.int64)
    return ModelOutputs(scores.log_likelihoods.numpy(), tokens, texts, base)


def evaluation_metrics(
    task: Task, examples: Sequence[EncodedExample], outputs: ModelOutputs
) -> dict[str, float]:
    """Loss per label token and the task's metrics, over the examples that have a target.

    Args:
        task: the task.
        examples: N examples.
        outputs: for them. Where the answers are generated and no texts are given, there is only
            the loss.
    """
    known = [place for place, example in enumerate(examples) if example.target_ids]
    if not known:
        return {}
    metrics = {"loss": _loss([examples[place] for place in known], outputs.of(known))}
    kind = task.answer_kind
    if kind.generates_text and not outputs.texts:
        return metrics
    sources, outputs = [examples[place].example for place in known], outputs.of(known)
    metrics |= kind.metrics_of_outputs(sources, outputs)
    return metrics | task.measure(sources, kind.answers(sources, outputs))


def _loss(examples: Sequence[EncodedExample], outputs: ModelOutputs) -> float:
    """Per label token of the right answers, each by its share."""
    shares = np.zeros(outputs.tokens.shape)
    for place, example in enumerate(examples):
        if example.shares:
            shares[place, : len(example.shares)] = example.shares
        else:  # where the target alone is scored, it is the first and only one
            shares[place, example.label or 0] = 1.0
    counted = shares > 0
    likelihood = (shares[counted] * outputs.log_likelihoods[counted].astype(np.float64)).sum()
    return float(-likelihood / (shares * outputs.tokens).sum())


def with_loss_of(other: Mapping[str, float], metrics: Mapping[str, float]) -> dict[str, float]:
    """The metrics of outputs that were changed, with the loss of those that they were made of."""
    return {name: other["loss"] if name == "loss" else value for name, value in metrics.items()}


def confusion_matrix(
    task: Task, examples: Sequence[EncodedExample], outputs: ModelOutputs
) -> pd.DataFrame | None:
    """Counts of true by predicted answer, over the examples that have a target.

    `None` where the task's kind of answer has no such table.
    """
    known = [place for place, example in enumerate(examples) if example.target_ids]
    sources, kind = [examples[place].example for place in known], task.answer_kind
    answers = kind.answers(sources, outputs.of(known))
    return kind.confusion_matrix(answers_of(task, sources), answers)


def labels_without_rows(task: Task, examples: Sequence[Example]) -> list[str]:
    """The labels of the task that no right answer to `examples` is; nothing is measured of them."""
    held_out = set(answers_of(task, examples))
    return [label for label in task.answer_kind.labels if label not in held_out]


def answers_of(task: Task, examples: Sequence[Example]) -> list[str]:
    """The right answers: labels of a closed set, or the target text."""
    return [task.answer_of(example) for example in examples]
