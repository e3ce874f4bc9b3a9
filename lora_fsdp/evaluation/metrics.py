"""What a model gives for examples, as the task's answers and metrics."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch

from lora_fsdp.data.encoding import EncodedExample
from lora_fsdp.evaluation.scoring import Scores
from lora_fsdp.tasks import Example, Task
from lora_fsdp.tasks.answers import ModelOutputs


def model_outputs(
    examples: Sequence[EncodedExample], scores: Scores, *, texts: Sequence[str] = ()
) -> ModelOutputs:
    """Scores of N examples, and what was generated for them, as a kind of answer takes them."""
    tokens = np.zeros(tuple(scores.log_likelihoods.shape), dtype=np.int64)
    for place, example in enumerate(examples):
        lengths = [len(ids) for ids in example.scored_ids]
        tokens[place, : len(lengths)] = lengths
    return ModelOutputs(scores.log_likelihoods.numpy(), tokens, texts)


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
    # Where the target alone is scored, it is the first and only one.
    targets = [examples[place].label or 0 for place in known]
    likelihood = torch.from_numpy(outputs.log_likelihoods)[known, targets].double().sum().item()
    metrics = {"loss": -likelihood / sum(len(examples[place].target_ids) for place in known)}
    kind = task.answer_kind
    if kind.generates_text and not outputs.texts:
        return metrics
    sources, outputs = [examples[place].example for place in known], outputs.of(known)
    metrics |= kind.metrics_of_outputs(sources, outputs)
    return metrics | task.measure(sources, kind.answers(sources, outputs))


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
