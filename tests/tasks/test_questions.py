"""Several questions about one text: as if each were asked alone, at the price of one.

Run: python -m pytest tests/tasks/test_questions.py
"""

import json
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

from lora_fsdp.compute.packed_model import PackedModel
from lora_fsdp.data.encoding import Encoder
from lora_fsdp.errors import (
    ArgumentError,
    ColumnNotFoundError,
    MalformedRowError,
    SingleLabelError,
)
from lora_fsdp.evaluation.scoring import score_examples
from lora_fsdp.tasks import QuestionsTask
from lora_fsdp.tasks.answers import ModelOutputs
from lora_fsdp.tasks.answers.classic import outputs_of
from lora_fsdp.training.step.objectives.choice import objective_of
from tests.support.tiny import WORDS, adapted_model, randomise_adapter, tiny_tokenizer

LATE = {"column": "late", "ask": "Was it late?", "labels": ["yes", "no"]}
MOOD = {"column": "mood"}
STARS = {"column": "stars", "ask": "How many stars?", "scores": [5, 1, "2.0"]}


def table() -> pd.DataFrame:
    return pd.DataFrame(
        {
            "text": [" ".join(np.roll(WORDS.split(), n)) for n in range(8)],
            "late": ["yes", "no"] * 4,
            "mood": ["calm", "angry", "", "calm"] * 2,
            "stars": ["1", "5", "2.00", ""] * 2,
        },
        index=pd.RangeIndex(1, 9),
    )


def test_answers_that_are_missing_have_no_share() -> None:
    task = QuestionsTask(questions=[LATE, MOOD, STARS]).bind(table())
    examples = task.examples(table())
    assert [one["column"] for one in task.questions] == ["late", "mood", "stars"]
    assert task.questions[1] == {"column": "mood", "ask": "mood?", "labels": ["angry", "calm"]}
    assert task.questions[2]["scores"] == ["1", "2", "5"]
    assert examples[0].shares == (1, 0, 0, 1, 1, 0, 0)
    assert examples[2].shares == (1, 0, 0, 0, 0, 1, 0)
    assert json.loads(examples[3].target) == {"late": "no", "mood": "calm"}
    again = QuestionsTask(**json.loads(json.dumps(task.options())))
    asked = again.bind(table()[["text"]], with_labels=False)
    assert asked.answer_kind.questions == task.answer_kind.questions


def packed_model() -> PackedModel:
    model = adapted_model()
    randomise_adapter(model)
    return PackedModel(model)


def test_every_question_is_answered_as_if_it_were_asked_alone() -> None:
    packed = packed_model()
    bound = QuestionsTask(questions=[LATE, MOOD, STARS]).bind(table())
    encoder = Encoder(tiny_tokenizer(), task=bound, max_length=128)
    encoded = encoder.encode(bound.examples(table()))
    together = score_examples(packed, encoded, device=torch.device("cpu")).log_likelihoods
    alone = [scores_of_one(packed, one) for one in bound.questions]
    np.testing.assert_allclose(together, np.concatenate(alone, axis=1), atol=1e-5)


def scores_of_one(packed, question) -> np.ndarray:
    """Of all rows, without their answers."""
    task = QuestionsTask(questions=[question]).bind(table(), with_labels=False)
    encoder = Encoder(tiny_tokenizer(), task=task, max_length=128)
    examples = encoder.encode(task.examples(table(), with_targets=False))
    return score_examples(packed, examples, device=torch.device("cpu")).log_likelihoods.numpy()


def test_five_questions_cost_a_third_of_the_tokens() -> None:
    """200 tokens of text and five yes/no questions."""
    tokenizer = tiny_tokenizer()
    text = " good" * 199
    assert len(tokenizer(f"{text}.")["input_ids"]) == 200
    asks = [f" was the flight late {end}" for end in ("good", "bad", "crew", "bag", "help")]
    rows = pd.DataFrame({"text": [f"{text}."] * 2, **{f"q{n}": ["yes", "no"] for n in range(5)}})
    questions = [
        {"column": f"q{n}", "ask": ask, "labels": ["yes", "no"]} for n, ask in enumerate(asks)
    ]

    def tokens(asked) -> tuple[int, int]:
        task = QuestionsTask(questions=asked).bind(rows)
        encoder = Encoder(tokenizer, task=task, max_length=512)
        [one, _] = encoder.encode(task.examples(rows))
        learnt = objective_of(task).tree(one)
        scored = len(one.prompt_ids) + sum(len(ids) - 1 for ids in one.candidate_ids)
        return len(learnt), scored

    trained, scored = tokens(questions)
    apart = [tokens([one]) for one in questions]
    assert sum(learnt for learnt, _ in apart) / trained >= 3.5
    assert sum(one for _, one in apart) / scored >= 3


def test_metrics_count_what_is_known() -> None:
    task = QuestionsTask(questions=[LATE, MOOD, STARS]).bind(table())
    examples, kind = task.examples(table()), task.answer_kind
    generator = np.random.default_rng(0)
    parts = [generator.dirichlet(np.ones(size), 8) for size in kind.sizes]
    outputs = outputs_of(np.concatenate(parts, axis=1))
    given = [json.loads(one) for one in kind.answers(examples, outputs)]
    assert [one["late"] for one in given] == [("yes", "no")[n] for n in parts[0].argmax(axis=1)]
    expected = parts[2] @ [1, 2, 5]
    nearest = np.abs(expected[:, None] - [1, 2, 5]).argmin(axis=1)
    assert [one["stars"] for one in given] == [("1", "2", "5")[place] for place in nearest]
    rows = table()
    hits = {
        "late": [a["late"] == b for a, b in zip(given, rows.late, strict=True)],
        "mood": [a["mood"] == b for a, b in zip(given, rows.mood, strict=True) if b],
        "stars": [
            float(a["stars"]) == float(b) for a, b in zip(given, rows.stars, strict=True) if b
        ],
    }
    found = task.measure(examples, kind.answers(examples, outputs))
    for name, right in hits.items():
        assert found[f"accuracy/{name}"] == pytest.approx(np.mean(right))
    total = [hit for right in hits.values() for hit in right]
    assert found["answer_accuracy"] == pytest.approx(np.mean(total))
    weights = kind.row_weights("answer_accuracy", examples, outputs)
    of_rows = kind.row_scores("answer_accuracy", examples, outputs)
    assert np.average(of_rows, weights=weights) == pytest.approx(found["answer_accuracy"])
    columns = kind.run_columns(examples, outputs)
    assert columns["answer/late"] == [one["late"] for one in given]
    np.testing.assert_allclose(columns["certainty/late"], parts[0].max(axis=1), rtol=1e-5)
    np.testing.assert_allclose(columns["expected/stars"], expected, rtol=1e-5)
    nothing = ModelOutputs(np.zeros((0, 0)), np.zeros((0, 0)))
    asked = kind.run_columns([replace(one, target=None) for one in examples], outputs)
    assert set(kind.run_columns([], nothing)) == set(asked)
    assert set(columns) - set(asked) == {"options/late", "options/mood", "options/stars"}
    assert json.loads(columns["options/late"][0]) == pytest.approx(
        dict(zip(("yes", "no"), parts[0][0].tolist(), strict=True)), abs=1e-5
    )
    average = kind.classic(examples, examples)["average"].probabilities[0]
    np.testing.assert_allclose(
        average * 3, [0.5, 0.5, 1 / 3, 2 / 3, 1 / 3, 1 / 3, 1 / 3], rtol=1e-4
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"late": "maybe"}, r"row 2 \(column 'late': 'maybe' is none of 'yes', 'no'\)"),
        ({"stars": "3"}, "row 2 .*column 'stars': '3' is none of '1', '2', '5'"),
        ({"stars": "many"}, "row 2 .*column 'stars' holds 'many', no number"),
        ({"mood": ["calm"]}, "row 2 .*column 'mood' holds a list, not one label"),
        ({"text": " "}, r"row 2 \(nothing in column 'text'\)"),
        (
            {"late": "", "mood": "", "stars": ""},
            "row 2 .*no answer in columns 'late', 'mood', 'sta",
        ),
    ],
)
def test_an_answer_that_is_none_is_named(changes, message) -> None:
    rows = table().astype(object)
    for name, cell in changes.items():
        rows.at[2, name] = cell
    task = QuestionsTask(questions=[LATE, MOOD, STARS])
    with pytest.raises(MalformedRowError, match=message):
        task.bind(rows)
    assert task.drop_bad_rows(rows)[1] == 1


@pytest.mark.parametrize(
    ("questions", "message"),
    [
        ("late", "must be a list of mappings"),
        ([], "must be a list of mappings"),
        (["late"], "Question 1 must be a mapping"),
        ([{"ask": "Late?"}], "Question 1 names no column"),
        ([{"column": "late", "label": ["a"]}], "unknown key 'label'. Did you mean 'labels'"),
        ([{"column": "late", "labels": ["a"]}], "two or more"),
        ([{"column": "late", "labels": ["a", "a"]}], "none twice"),
        ([{"column": "late", "labels": [True, False]}], "put labels in quotes"),
        ([{"column": "late", "scores": [1, "b"]}], "must be numbers, not 'b'"),
        ([{"column": "late", "scores": [1, 2], "labels": ["a", "b"]}], "both labels and scores"),
        ([LATE, LATE], "one column or the same words"),
    ],
)
def test_questions_that_are_none(questions, message) -> None:
    with pytest.raises(ArgumentError, match=message):
        QuestionsTask(questions=questions)


def test_questions_that_the_table_does_not_answer() -> None:
    with pytest.raises(ArgumentError, match="has no questions"):
        QuestionsTask().bind(table())
    with pytest.raises(ColumnNotFoundError, match="needs 'wifi'"):
        QuestionsTask(questions=[{"column": "wifi"}]).bind(table())
    with pytest.raises(SingleLabelError, match="'mood' has 1 different answer"):
        QuestionsTask(questions=[MOOD]).bind(table().assign(mood="calm"))
