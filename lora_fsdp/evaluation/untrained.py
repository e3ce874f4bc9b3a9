"""The untrained model at its best: the ways in which the answers of one scoring can be read.

An untrained model has never seen how an answer ends, and it prefers some labels whatever the text.
Neither is what a user of it would put up with, so a comparison takes the way that does best.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from lora_fsdp.data.encoding import EncodedExample
from lora_fsdp.evaluation.metrics import evaluation_metrics
from lora_fsdp.evaluation.scoring import Scores
from lora_fsdp.tasks import Task
from lora_fsdp.tasks.answers import ModelOutputs

AS_TRAINED = "as it is trained"
WITHOUT_END = "without the end token"
CALIBRATED = "calibrated on the batch"


def ways_of_reading(task: Task, outputs: ModelOutputs, scores: Scores) -> dict[str, ModelOutputs]:
    """The outputs of N examples, read in each way that fits the task's kind of answer.

    Calibrated on the batch: of each label's log-probability its mean over all N rows is subtracted,
    for which no right answer is needed (Zhou et al., "Batch Calibration", ICLR 2024,
    https://arxiv.org/abs/2309.17249).

    Args:
        task: bound.
        outputs: as a run scores them.
        scores: from which they were made.
    """
    ways = {AS_TRAINED: outputs}
    kind = task.answer_kind
    if kind.generates_text or outputs.log_likelihoods.shape[1] < 2:
        return ways
    if scores.end_log_likelihoods is not None:
        ways[WITHOUT_END] = replace(
            outputs,
            log_likelihoods=outputs.log_likelihoods - scores.end_log_likelihoods.numpy(),
            tokens=np.maximum(outputs.tokens - 1, 0),
        )
    # What is a label in every row, and not a choice of the row's own.
    if outputs.log_likelihoods.shape[1] == len(kind.labels):
        for name, read in list(ways.items()):
            both = CALIBRATED if name == AS_TRAINED else f"{name}, {CALIBRATED}"
            ways[both] = replace(read, log_likelihoods=_calibrated(read.log_likelihoods))
    return ways


def best_way(
    task: Task, examples: Sequence[EncodedExample], ways: Mapping[str, ModelOutputs]
) -> tuple[str, dict[str, float]]:
    """The way with the best primary metric, the first of equal ones, and that metric of each."""
    found = {
        name: evaluation_metrics(task, examples, outputs).get(task.primary_metric, float("nan"))
        for name, outputs in ways.items()
    }
    finite = {name: value for name, value in found.items() if np.isfinite(value)}
    return max(finite, key=finite.__getitem__, default=AS_TRAINED), found


def _calibrated(log_likelihoods: np.ndarray) -> np.ndarray:
    scores = log_likelihoods.astype(np.float64)
    highest = scores.max(axis=1, keepdims=True, initial=-np.inf)
    normal = scores - highest - np.log(np.exp(scores - highest).sum(axis=1, keepdims=True))
    return (normal - normal.mean(axis=0, keepdims=True)).astype(np.float32)
