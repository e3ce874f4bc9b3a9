"""Is it worth it: the tuned model beside the untrained one and the classic baselines."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from lora_fsdp.data.encoding import EncodedExample
from lora_fsdp.evaluation.baselines import BASELINES
from lora_fsdp.evaluation.metrics import (
    answers_of,
    confusion_matrix,
    evaluation_metrics,
    labels_without_rows,
    with_loss_of,
)
from lora_fsdp.evaluation.outputs import (
    CHANCE,
    TUNED,
    UNTRAINED,
    PredictionRow,
    format_metrics_table,
    format_predictions_table,
    save_confusion_matrix_png,
    shown_metrics,
    write_json,
    write_text,
)
from lora_fsdp.evaluation.untrained import AS_TRAINED, best_way
from lora_fsdp.evaluation.verdict import BASELINE, score_notes, score_table, ways_of
from lora_fsdp.printing import visible
from lora_fsdp.ranks import on_first_rank
from lora_fsdp.tasks import Example, Task
from lora_fsdp.tasks.answers import ModelOutputs
from lora_fsdp.tasks.answers.kind import SCORE_BY, WEIGHT_BY
from lora_fsdp.tasks.text_metrics import weighted_mean


@dataclass(frozen=True)
class Comparison:
    """Results on the held-out rows.

    Attributes:
        metrics: metrics by system.
        primary_metric: the metric that decides.
        predictions: one row per held-out example: row number, text, target, answers, probability
            (of the tuned answer; in a free-text task, of the target), what the kind of answer adds
            (the probability of every label, or the row's choices with theirs as JSON), the scores
            of which a metric is the mean, if it is one, with their weights, the baselines' answers.
        confusion: counts of true by predicted label of the tuned model; `None` where the kind of
            answer has no such table.
        written: the texts that both models generated for some held-out rows, and the answers in
            them.
        facts: what else is worth keeping in `metrics.json`.
        shown: how many predictions to print.
    """

    metrics: Mapping[str, Mapping[str, float]]
    primary_metric: str
    predictions: pd.DataFrame
    confusion: pd.DataFrame | None
    written: Sequence[Mapping[str, Any]]
    facts: Mapping[str, Any]
    shown: int = 10

    def save(self, folder: Path) -> None:
        """Write `metrics.json`, `predictions.csv` and `confusion_matrix.png` into `folder`."""
        if self.confusion is not None:
            save_confusion_matrix_png(self.confusion, folder / "confusion_matrix.png")
        write_predictions(self.predictions, folder / "predictions.csv")
        self.save_facts(folder)

    def save_facts(self, folder: Path, **later: Any) -> None:
        """Write `metrics.json` into `folder`, with what has been found out `later`."""
        contents: dict[str, Any] = {"primary_metric": self.primary_metric, **self.facts, **later}
        contents["written"] = list(self.written)
        contents["metrics"] = {name: dict(values) for name, values in self.metrics.items()}
        if self.confusion is not None:
            contents["confusion_matrix"] = self.confusion.to_dict(orient="split")
        write_json(folder / "metrics.json", contents)

    def __str__(self) -> str:
        keys = shown_metrics(self.metrics[TUNED], primary=self.primary_metric)
        sample = self.predictions.sample(min(self.shown, len(self.predictions)), random_state=0)
        fields = list(PredictionRow.__dataclass_fields__)
        rows = [PredictionRow(*values) for values in sample[fields].itertuples(index=False)]
        parts = [
            f"Held-out rows: {len(self.predictions)}",
            "\n".join([format_metrics_table(self.metrics, keys), *score_notes(self.facts)]),
            format_predictions_table(rows),
            *map(format_generated, self.written),
            self.verdict(),
        ]
        return "\n\n".join(parts)

    def verdict(self) -> str:
        """Whether tuning beats everything else, in the report's words, with its interval."""
        table = score_table(
            self.metrics,
            self.predictions,
            primary=self.primary_metric,
            chosen_among=self.facts.get("chosen_among"),
            untrained_ways=ways_of(self.facts),
        )
        return f"{table['verdict']['headline']} {table['verdict']['detail']}"


def compare(
    task: Task,
    *,
    train: Sequence[Example],
    held_out: Sequence[EncodedExample],
    untrained: ModelOutputs,
    tuned: ModelOutputs,
    facts: Mapping[str, Any],
    written: Sequence[Mapping[str, Any]] = (),
    ways: Mapping[str, ModelOutputs] | None = None,
    rivals: Mapping[str, Sequence[str]] | None = None,
    calibrated: ModelOutputs | None = None,
    decided: Task | None = None,
) -> Comparison:
    """Metrics of all systems on the held-out examples.

    Args:
        train, held_out: examples with targets.
        untrained, tuned: what the model gives for `held_out`, without and with the adapter.
        facts: further entries of `metrics.json`.
        written: see `generated_texts`.
        ways: other readings of what the model gives without the adapter (`ways_of_reading`); the
            best stands for it, with the loss of `untrained`.
        rivals: answers of further systems to `held_out`, by their name; of a baseline that is
            among them, none are made.
        calibrated: `tuned` with calibrated probabilities, which are then shown, with the answers
            that they make; the loss stays that of `tuned`.
        decided: `task` with what validation rows have decided of the tuned model's answers. The
            others' are then decided as well, crosswise by these rows (`AnswerKind.as_decided`).
    """
    tested = [encoded.example for encoded in held_out]
    as_asked = evaluation_metrics(task, held_out, untrained)
    ways = ways or {AS_TRAINED: untrained}
    task = decided or task
    kind = task.answer_kind
    classic = on_first_rank(lambda: kind.classic(train, tested))
    if decided is not None:
        classic = {name: kind.as_decided(tested, one) for name, one in classic.items()}
        ways = {name: kind.as_decided(tested, one) for name, one in ways.items()}
        untrained = kind.as_decided(tested, untrained)
    baselines = _baselines(task, train, tested, classic=classic, known=rivals or {})
    way, by_way = best_way(task, held_out, ways)
    best = ways.get(way, untrained)
    shown = calibrated or tuned
    metrics = {
        **_metrics_of_others(task, tested, baselines, classic),
        # Each with the loss of what the model itself says.
        UNTRAINED: with_loss_of(as_asked, evaluation_metrics(task, held_out, best)),
        TUNED: with_loss_of(
            evaluation_metrics(task, held_out, tuned), evaluation_metrics(task, held_out, shown)
        ),
    }
    predictions = {
        **_columns(task, tested, untrained=best, tuned=shown),
        **_row_scores(task, tested, {**classic, UNTRAINED: best, TUNED: shown}, metrics),
        **{f"{BASELINE}{name}": answers for name, answers in baselines.items()},
    }
    return Comparison(
        metrics,
        task.primary_metric,
        pd.DataFrame(predictions),
        confusion_matrix(task, held_out, shown),
        written,
        {
            **facts,
            "answer_kind": kind.name,
            "report_sections": list(kind.report_sections),
            "labels_without_held_out_rows": labels_without_rows(task, tested),
            "untrained": {"way": way, "by_way": by_way},
        },
    )


def _metrics_of_others(
    task: Task,
    examples: Sequence[Example],
    answers: Mapping[str, Sequence[str | None]],
    outputs: Mapping[str, ModelOutputs],
) -> dict[str, dict[str, float]]:
    """Metrics of what is no language model: by its answers, by its outputs if it has any; and of
    chance.
    """
    kind, truth = task.answer_kind, answers_of(task, examples)
    metrics = {
        name: (kind.metrics_of_outputs(examples, outputs[name]) if name in outputs else {})
        | task.compute_metrics(truth, given)
        for name, given in answers.items()
    }
    chance = kind.chance(examples)
    return metrics | ({CHANCE: chance} if chance else {})


def _columns(
    task: Task, examples: Sequence[Example], *, untrained: ModelOutputs, tuned: ModelOutputs
) -> dict[str, Any]:
    """The columns of `predictions.csv` about the model itself."""
    kind = task.answer_kind
    return {
        "row": [example.row for example in examples],
        "text": [example.prompt.content for example in examples],
        "target": answers_of(task, examples),
        # As objects, where no answer stays None and does not become NaN.
        "base": pd.Series(kind.answers(examples, untrained), dtype=object),
        "tuned": pd.Series(kind.answers(examples, tuned), dtype=object),
        "probability": kind.probabilities(tuned),
        **kind.run_columns(examples, tuned),
    }


def write_predictions(predictions: pd.DataFrame, path: Path) -> None:
    """Write a table of predictions, atomically, each cell as it is.

    Cells that begin like a formula ("=", "@united ...") are data: what reads the file again gets
    the texts as they were. Import it as text into a spreadsheet.
    """
    text = predictions.to_csv(index=False, lineterminator="\n")
    if "\r" in text:  # left unquoted by the csv module, it would end the line for a reader
        text = predictions.to_csv(index=False, lineterminator="\n", quoting=csv.QUOTE_NONNUMERIC)
    write_text(path, text)


def generated_texts(
    task: Task, examples: Sequence[Example], *, base: Sequence[str], tuned: Sequence[str]
) -> list[dict[str, Any]]:
    """What base and tuned model generated for the first of `examples`, and the answers in it."""
    return [
        {
            "row": example.row,
            "base": {"text": base_text, "answer": task.parse(base_text)},
            "tuned": {"text": tuned_text, "answer": task.parse(tuned_text)},
        }
        for example, base_text, tuned_text in zip(examples, base, tuned, strict=False)
    ]


def format_generated(entry: Mapping[str, Any]) -> str:
    """One of `generated_texts` as text."""
    lines = [f"row {entry['row']}"]
    for who in ("base", "tuned"):
        answer = visible(str(entry[who]["answer"]), lines=False)
        lines.append(f"  {who:<5} generates {entry[who]['text']!r} -> {answer}")
    return "\n".join(lines)


def _row_scores(
    task: Task,
    examples: Sequence[Example],
    outputs: Mapping[str, ModelOutputs],
    metrics: Mapping[str, Mapping[str, float]],
) -> dict[str, Sequence[float]]:
    """Columns with the scores of the rows, and their weights, of which a metric is the mean."""
    kind = task.answer_kind
    columns: dict[str, Sequence[float]] = {}
    for metric in shown_metrics(metrics[TUNED], primary=task.primary_metric):
        given = {
            system: (
                kind.row_scores(metric, examples, found),
                kind.row_weights(metric, examples, found),
            )
            for system, found in outputs.items()
        }
        given[CHANCE] = (kind.chance_scores(metric, examples), None)
        for system, (scores, weights) in given.items():
            value = metrics.get(system, {}).get(metric, np.nan)
            # A task's own metric may have the name, and another meaning.
            if scores is None or not np.isclose(_mean(scores, weights), value):
                continue
            columns[f"{SCORE_BY}{metric}/{system}"] = scores
            if weights is not None:
                columns[f"{WEIGHT_BY}{metric}/{system}"] = weights
    return columns


def _mean(scores: Sequence[float], weights: Sequence[float] | None) -> float:
    return weighted_mean(scores, [1.0] * len(scores) if weights is None else weights)


def _baselines(
    task: Task,
    train: Sequence[Example],
    held_out: Sequence[Example],
    *,
    classic: Mapping[str, ModelOutputs],
    known: Mapping[str, Sequence[str]],
) -> dict[str, Sequence[str | None]]:
    """The baselines' answers to the held-out examples; those that are `known` are not made."""
    kind, labels = task.answer_kind, answers_of(task, train)
    texts = [example.prompt.content for example in train]
    tested = [example.prompt.content for example in held_out]
    names = [name for name in kind.rivals if name not in known]
    made = on_first_rank(lambda: {one: BASELINES[one](texts, labels, tested) for one in names})
    by_outputs = {name: kind.answers(held_out, outputs) for name, outputs in classic.items()}
    return {**made, **by_outputs, **known}
