"""Is it worth it: one verdict, with its uncertainty, wherever it is said.

Run: python -m pytest tests/evaluation/test_verdict.py
"""

from __future__ import annotations

import html
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from lora_fsdp.data.encoding import EncodedExample
from lora_fsdp.evaluation.comparison import Comparison, compare
from lora_fsdp.evaluation.intervals import PairedBootstrap
from lora_fsdp.evaluation.outputs import TUNED, UNTRAINED
from lora_fsdp.evaluation.verdict import score_table
from lora_fsdp.reporting import write_comparison, write_report
from lora_fsdp.reporting.model_card import write_model_card
from lora_fsdp.tasks import (
    Example,
    ExtractionTask,
    GenerationTask,
    MultipleChoiceTask,
    Prompt,
    SummarisationTask,
    Task,
)
from lora_fsdp.tasks.answers import ClosedSet, ModelOutputs
from lora_fsdp.tasks.answers.kind import MAJORITY, TFIDF
from tests.support.reported import made_up_run


def compared(right: Mapping[str, Sequence[bool]], *, metric: str = "accuracy") -> Comparison:
    """Systems that are right on these rows, by accuracy."""
    rows = len(right[TUNED])
    answers = {name: ["yes" if hit else "no" for hit in hits] for name, hits in right.items()}
    columns = {"base" if name == UNTRAINED else name: given for name, given in answers.items()}
    for baseline in (MAJORITY, TFIDF):
        if baseline in columns:
            columns[f"baseline/{baseline}"] = columns.pop(baseline)
    table: dict[str, Any] = {"row": range(1, rows + 1), "text": ["x"] * rows, "probability": 0.5}
    return Comparison(
        {name: {metric: float(np.mean(hits))} for name, hits in right.items()},
        metric,
        pd.DataFrame({**table, "target": ["yes"] * rows, **columns}),
        None,
        (),
        {},
    )


def hits(right: int, rows: int, *, first: int = 0) -> list[bool]:
    """`right` rows of `rows`, from row `first` on."""
    return [(place - first) % rows < right for place in range(rows)]


def test_a_lead_of_one_row_is_not_proven() -> None:
    """301 against 300 of 400 rows, and not the same ones."""
    said = compared({UNTRAINED: hits(300, 400, first=90), TUNED: hits(301, 400)}).verdict()
    assert said.startswith("Not proven: the lead over the untrained model may be chance.")
    assert "Accuracy 0.752 against 0.750 on 400 held-out rows: +0.002" in said
    assert "interval \u22120." in said


def test_a_row_behind_is_not_held_against_it() -> None:
    said = compared({UNTRAINED: hits(301, 400, first=90), TUNED: hits(300, 400)}).verdict()
    assert said.startswith("Not proven: the tuned model does not lead the untrained model")


def test_of_several_rivals_the_interval_is_wider() -> None:
    """Behind one rival by what is significant for one comparison, and not for three."""
    tuned, better = hits(180, 400), hits(207, 400, first=180 - 89)
    one = compared({UNTRAINED: better, TUNED: tuned})
    worse = hits(100, 400)
    three = compared({MAJORITY: worse, TFIDF: worse, UNTRAINED: better, TUNED: tuned})
    assert "95 % interval for 3 rivals together" in three.verdict()
    spans = [table_of(one)["differences"][UNTRAINED], table_of(three)["differences"][UNTRAINED]]
    assert spans[1]["low"] < spans[0]["low"]
    assert spans[1]["high"] > spans[0]["high"]


def test_a_clear_lead_is_worth_it() -> None:
    said = compared({UNTRAINED: hits(100, 400), TUNED: hits(300, 400)}).verdict()
    assert said.startswith("Worth it: the tuned model beats the untrained model.")


def test_few_rows_are_said_to_be_few() -> None:
    said = compared({UNTRAINED: hits(1, 12), TUNED: hits(12, 12)}).verdict()
    assert said.startswith("Too few held-out rows to tell: 12.")


def test_no_answer_is_the_same_in_memory_and_in_the_file(tmp_path: Path) -> None:
    found = compared({UNTRAINED: hits(100, 400), TUNED: hits(300, 400)})
    found.predictions.loc[found.predictions["base"] == "no", "base"] = None
    found.save(tmp_path)
    page = html.unescape(write_report(tmp_path).read_text(encoding="utf-8"))
    assert found.verdict().split(". ")[0] in page
    assert found.verdict().split(". ", 1)[1] in page


@pytest.mark.parametrize("skill", [4.0, 0.3, 0.0, -4.0])
def test_terminal_report_and_card_say_the_same(tmp_path: Path, skill: float) -> None:
    run = made_up_run(tmp_path / "run", skill=skill, held_out=200)
    metrics = json.loads((run / "metrics.json").read_text())
    terminal = Comparison(
        metrics["metrics"],
        metrics["primary_metric"],
        pd.read_csv(run / "predictions.csv", keep_default_na=False),
        None,
        (),
        {},
    ).verdict()
    page = write_report(run)
    verdict = json.loads(page.with_suffix(".json").read_text())["scores"]["verdict"]
    assert terminal == f"{verdict['headline']} {verdict['detail']}"
    assert f">{html.escape(verdict['headline'])}</h1>" in page.read_text(encoding="utf-8")
    adapter = {
        "base_model_name_or_path": "tiny",
        "r": 8,
        "lora_alpha": 16,
        "lora_dropout": 0.0,
        "target_modules": ["q_proj"],
    }
    (run / "adapter_config.json").write_text(json.dumps(adapter), encoding="utf-8")
    card = write_model_card(run)
    assert card is not None
    assert terminal in card.read_text(encoding="utf-8").replace("\\:", ":")


CHOICES = ("north", "south", "east", "west")


def asked(rows: int) -> list[Example]:
    """Questions with 2 to 4 choices, of which the first is right."""
    return [
        Example(row, Prompt("", f"q{row}", ""), f" {CHOICES[0]}", tuple(CHOICES[: 2 + row % 3]))
        for row in range(1, rows + 1)
    ]


def chosen(examples: Sequence[Example], right: Sequence[bool]) -> ModelOutputs:
    """The first choice is the likeliest where it is to be `right`, else the second."""
    scores = np.full((len(examples), len(CHOICES)), -np.inf, dtype=np.float32)
    for row, (example, hit) in enumerate(zip(examples, right, strict=True)):
        scores[row, : len(example.choices)] = -5.0
        scores[row, 0 if hit else 1] = -1.0
    return ModelOutputs(scores, np.ones(scores.shape, dtype=np.int64))


def generated(texts: Sequence[str]) -> ModelOutputs:
    scores = np.full((len(texts), 1), -1.0, dtype=np.float32)
    return ModelOutputs(scores, np.ones(scores.shape, dtype=np.int64), list(texts))


def run_of(
    task: Task, examples: Sequence[Example], untrained: ModelOutputs, tuned: ModelOutputs
) -> Comparison:
    held_out = [
        EncodedExample(one.row, [1], [2], (), 0, shortened=False, example=one) for one in examples
    ]
    return compare(
        task, train=examples, held_out=held_out, untrained=untrained, tuned=tuned, facts={}
    )


def table_of(found: Comparison) -> dict[str, Any]:
    return score_table(found.metrics, found.predictions, primary=found.primary_metric)


@pytest.mark.parametrize("metric", ["accuracy", "accuracy_normalised"])
def test_chance_is_tested_by_its_expected_value(metric: str) -> None:
    examples = asked(300)
    task = MultipleChoiceTask()
    task.primary_metric = metric
    expected = float(np.mean([1 / len(example.choices) for example in examples]))
    good = run_of(task, examples, chosen(examples, hits(60, 300)), chosen(examples, hits(240, 300)))
    assert good.verdict().startswith("Worth it: the tuned model beats the guess among the choices")
    lead = table_of(good)["differences"]["chance"]
    assert lead["value"] == pytest.approx(0.8 - expected)
    width = 2 * 1.96 * np.sqrt(0.8 * 0.2 / 300)
    assert lead["high"] - lead["low"] == pytest.approx(width, rel=0.2)
    share = round(300 * expected) + 3
    same = run_of(
        task, examples, chosen(examples, hits(60, 300)), chosen(examples, hits(share, 300))
    )
    assert same.verdict().startswith("Not proven: the lead over the guess among the choices")


class Extracted(ExtractionTask):
    name = "tests-verdict-extraction"


@pytest.mark.parametrize(
    ("task", "target", "metrics"),
    [
        (GenerationTask(), "the quick Fox", ("token_f1", "exact_match")),
        (SummarisationTask(), "the quick fox", ("rouge1", "rouge2", "rougeL")),
        (Extracted(), '{"a": 1, "b": [2, 3]}', ("field_f1", "valid_json", "whole_object")),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_every_mean_of_free_text_has_an_interval(
    task: Task, target: str, metrics: Sequence[str]
) -> None:
    """The normalised exact match too, which is not equality of the texts."""
    examples = [Example(row, Prompt("", f"t{row}", ""), f" {target}") for row in range(1, 121)]
    right, wrong = target.lower() + ("" if target[0] == "{" else "."), "nothing of it"
    half = [right if row % 2 else wrong for row in range(120)]
    found = run_of(task, examples, generated([wrong] * 120), generated(half))
    assert found.verdict().startswith("Worth it: the tuned model beats the untrained model.")
    systems = {line["system"]: line["scores"] for line in table_of(found)["systems"]}
    for metric in metrics:
        shown = systems[TUNED][metric]
        assert shown["value"] == pytest.approx(found.metrics[TUNED][metric])
        assert shown["low"] < shown["value"] < shown["high"], metric


def test_a_weighted_mean_is_resampled_as_one() -> None:
    """The interval of a ratio of sums, against drawing the rows one by one."""
    random = np.random.default_rng(0)
    scores, weights = random.random(300), random.integers(1, 20, 300).astype(float)
    bootstrap = PairedBootstrap(
        ["x"] * 300,
        {},
        scores={("x", "f1"): scores.tolist()},
        weights={("x", "f1"): weights.tolist()},
    )
    found = bootstrap.interval("x", "f1")
    assert found.value == pytest.approx(np.average(scores, weights=weights))
    drawn = [random.integers(300, size=300) for _ in range(2000)]
    means = [np.average(scores[rows], weights=weights[rows]) for rows in drawn]
    assert (found.low, found.high) == pytest.approx(np.percentile(means, [2.5, 97.5]), abs=0.006)


@pytest.mark.parametrize("metric", ["weighted_f1", "f1/a", "precision/b", "recall/a", "macro_f1"])
def test_label_metrics_are_those_of_the_task(metric: str) -> None:
    random = np.random.default_rng(1)
    targets = random.choice(["a", "b", "c"], 200).tolist()
    answers = [one if random.random() < 0.7 else "a" for one in targets]
    expected = ClosedSet(["a", "b", "c"], str).metrics(targets, answers)[metric]
    bootstrap = PairedBootstrap(targets, {"x": answers}, labels=["a", "b", "c"])
    assert bootstrap.knows("x", metric)
    assert bootstrap.interval("x", metric).value == pytest.approx(expected)


class OwnMetricTask(GenerationTask):
    """A metric that is no mean over the rows."""

    name = "tests-verdict-own-metric"
    primary_metric = "corpus_score"

    def measure_answers(
        self, answers: Sequence[str | None], references: Sequence[Sequence[str]]
    ) -> dict[str, float]:
        return {"corpus_score": len({answer for answer in answers if answer}) / 10}


def test_without_an_interval_it_is_said_that_there_is_none() -> None:
    examples = [Example(row, Prompt("", f"t{row}", ""), " x") for row in range(1, 41)]
    found = run_of(
        OwnMetricTask(),
        examples,
        generated(["same"] * 40),
        generated([f"text {row % 8}" for row in range(40)]),
    )
    said = found.verdict()
    assert said.startswith("The tuned model leads the untrained model, by a metric that has no")
    assert "no interval: whether that is chance is not known" in said
    assert table_of(found)["verdict"]["outcome"] == "unclear"


def test_runs_side_by_side_are_compared_by_their_rows_scores(tmp_path: Path) -> None:
    """By normalised exact match and F1 of words, which equality of texts does not give."""
    examples = [Example(row, Prompt("", f"t{row}", ""), " Some Words.") for row in range(1, 81)]
    for name, right in (("first", 20), ("other", 60)):
        texts = ["some words" if row < right else "none" for row in range(80)]
        (tmp_path / name).mkdir()
        run_of(GenerationTask(), examples, generated(["none"] * 80), generated(texts)).save(
            tmp_path / name
        )
    page = write_comparison([tmp_path / "first", tmp_path / "other"], tmp_path)
    found = json.loads(page.with_suffix(".json").read_text())["against_first"]["other"]
    for metric in ("token_f1", "exact_match"):
        difference = found["differences"][metric]
        assert difference["value"] == pytest.approx(0.5)
        assert 0.35 < difference["low"] < difference["high"] < 0.65
