"""Is it worth it: the tuned model beside the untrained one and the classic baselines."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from lora_fsdp.data.encoding import EncodedExample
from lora_fsdp.evaluation.baselines import majority_baseline, tfidf_baseline
from lora_fsdp.evaluation.metrics import (
    confusion_matrix,
    evaluation_metrics,
    given_answers,
)
from lora_fsdp.evaluation.outputs import (
    CHANCE,
    CHOICES,
    MAJORITY,
    TFIDF,
    TUNED,
    UNTRAINED,
    PredictionRow,
    format_metrics_table,
    format_predictions_table,
    save_confusion_matrix_png,
    write_json,
    write_text,
)
from lora_fsdp.evaluation.scoring import Scores
from lora_fsdp.tasks import ClassificationTask, Example, Task

# Metrics in the order in which they are printed, after the task's primary one.
_SHOWN = ("accuracy", "macro_f1", "exact_match", "loss")


@dataclass(frozen=True)
class Comparison:
    """Results on the held-out rows.

    Attributes:
        metrics: metrics by system.
        primary_metric: the metric that decides.
        predictions: one row per held-out example: row number, text, target, answers, probability
            (of the tuned answer; in a free-text task, of the target), the probability of every
            label (or, as JSON, the row's choices with theirs), the baselines' answers.
        confusion: counts of true by predicted label of the tuned model; `None` for free text.
        written: what both models wrote by themselves on some held-out rows, and the answer in it.
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
        contents: dict[str, Any] = {"primary_metric": self.primary_metric, **self.facts}
        contents["written"] = list(self.written)
        contents["metrics"] = {name: dict(values) for name, values in self.metrics.items()}
        if self.confusion is not None:
            contents["confusion_matrix"] = self.confusion.to_dict(orient="split")
            save_confusion_matrix_png(self.confusion, folder / "confusion_matrix.png")
        write_predictions(self.predictions, folder / "predictions.csv")
        write_json(folder / "metrics.json", contents)

    def __str__(self) -> str:
        # Of a classification the others go on label by label.
        own = self.metrics[TUNED] if self.confusion is None else ()
        keys = [
            key
            for key in dict.fromkeys(
                (self.primary_metric, *(name for name in own if name != "loss"), *_SHOWN)
            )
            if key in self.metrics[TUNED]
        ]
        sample = self.predictions.sample(min(self.shown, len(self.predictions)), random_state=0)
        fields = list(PredictionRow.__dataclass_fields__)
        rows = [PredictionRow(*values) for values in sample[fields].itertuples(index=False)]
        parts = [
            f"Held-out rows: {len(self.predictions)}",
            format_metrics_table(self.metrics, keys),
            format_predictions_table(rows),
            *map(format_written, self.written),
            self.verdict(),
        ]
        return "\n\n".join(parts)

    def verdict(self) -> str:
        """One sentence: whether tuning beats everything else."""
        key = self.primary_metric
        tuned = self.metrics[TUNED][key]
        others = {
            name: values[key]
            for name, values in self.metrics.items()
            if name != TUNED and key in values
        }
        best = max(others, key=lambda name: others[name])
        outcome = "beats" if tuned > others[best] else "does not beat"
        return (
            f"By {key} the tuned model ({tuned:.4f}) {outcome} the best of the others, "
            f"{best} ({others[best]:.4f})."
        )


def compare(
    task: Task,
    *,
    train: Sequence[Example],
    held_out: Sequence[Example],
    encoded: Sequence[EncodedExample],
    untrained: Scores,
    tuned: Scores,
    facts: Mapping[str, Any],
    written: Sequence[Mapping[str, Any]] = (),
    base_texts: Sequence[str] | None = None,
    tuned_texts: Sequence[str] | None = None,
) -> Comparison:
    """Metrics of all systems on the held-out examples.

    Args:
        train, held_out: examples with targets.
        encoded: `held_out` as tokens.
        untrained, tuned: scores of `held_out` without and with the adapter.
        facts: further entries of `metrics.json`.
        written: see `generated_texts`.
        base_texts, tuned_texts: what both models wrote on `held_out`, for a free-text task.
    """
    baselines = _baselines(task, train, held_out)
    truth = answers_of(task, held_out)
    metrics = {
        **{name: task.compute_metrics(truth, answers) for name, answers in baselines.items()},
        **_chance(task, held_out),
        UNTRAINED: evaluation_metrics(task, encoded, untrained, written=base_texts),
        TUNED: evaluation_metrics(task, encoded, tuned, written=tuned_texts),
    }
    base = given_answers(task, held_out, untrained, written=base_texts)
    answers = given_answers(task, held_out, tuned, written=tuned_texts)
    predictions = pd.DataFrame(
        {
            "row": [example.row for example in held_out],
            "text": [example.prompt.content for example in held_out],
            "target": truth,
            # As objects, where no answer stays None and does not become NaN.
            "base": pd.Series(base, dtype=object),
            "tuned": pd.Series(answers, dtype=object),
            "probability": _probabilities(task, tuned),
        }
    )
    confusion = None
    if task.per_row_choices:
        predictions[CHOICES] = choices_as_json(held_out, tuned)
    if isinstance(task, ClassificationTask):
        confusion = confusion_matrix(task, encoded, tuned)
        names = [f"probability/{label}" for label in task.labels or ()]
        by_label = pd.DataFrame(tuned.probabilities.numpy(), columns=names)
        predictions = pd.concat([predictions, by_label.astype(float)], axis=1)
    for name, guesses in baselines.items():
        predictions[f"baseline/{name}"] = guesses
    return Comparison(metrics, task.primary_metric, predictions, confusion, written, facts)


def write_predictions(predictions: pd.DataFrame, path: Path) -> None:
    """Write a table of predictions, all or nothing, each cell to the letter.

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
    """What base and tuned model wrote on the first of `examples`, and the answers in it."""
    return [
        {
            "row": example.row,
            "base": {"text": base_text, "answer": task.parse(base_text)},
            "tuned": {"text": tuned_text, "answer": task.parse(tuned_text)},
        }
        for example, base_text, tuned_text in zip(examples, base, tuned, strict=False)
    ]


def format_written(entry: Mapping[str, Any]) -> str:
    """One of `generated_texts` as text."""
    lines = [f"row {entry['row']}"]
    for who in ("base", "tuned"):
        lines.append(f"  {who:<5} writes {entry[who]['text']!r} -> {entry[who]['answer']}")
    return "\n".join(lines)


def _baselines(
    task: Task, train: Sequence[Example], held_out: Sequence[Example]
) -> dict[str, list[str]]:
    """The baselines' answers to the held-out examples."""
    if task.labels is None:
        return {}
    train_labels = answers_of(task, train)
    texts = [example.prompt.content for example in train]
    tested = [example.prompt.content for example in held_out]
    return {
        MAJORITY: majority_baseline(train_labels, len(tested)),
        TFIDF: tfidf_baseline(texts, train_labels, tested),
    }


def _chance(task: Task, held_out: Sequence[Example]) -> dict[str, dict[str, float]]:
    """What guessing among each row's choices gives on average."""
    if not task.per_row_choices or not held_out:
        return {}
    shares = [1 / len(example.choices) for example in held_out]
    return {CHANCE: {"accuracy": sum(shares) / len(shares)}}


def answers_of(task: Task, examples: Sequence[Example]) -> list[str]:
    """The right answers: labels of a closed set, or the target text."""
    return [task.answer_of(example) for example in examples]


def choices_as_json(examples: Sequence[Example], scores: Scores) -> list[str]:
    """Every row's choices with their probabilities, as a JSON object each."""
    return [
        json.dumps(
            {
                choice.strip(): round(probability, 6)
                for choice, probability in zip(example.choices, probabilities, strict=False)
            },
            ensure_ascii=False,
        )
        for example, probabilities in zip(examples, scores.probabilities.tolist(), strict=True)
    ]


def _probabilities(task: Task, scores: Scores) -> list[float]:
    """Of the answer among all that can be chosen; in a free-text task, of the target's text."""
    if task.is_free_text:
        return scores.log_likelihoods[:, 0].exp().tolist()
    return scores.probabilities.amax(dim=1).tolist()
