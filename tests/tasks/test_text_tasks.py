"""What the tasks over columns make of a row, what they refuse, and how they measure.

Run: python -m pytest tests/tasks/test_text_tasks.py
"""

from __future__ import annotations

import builtins
import json
from typing import Any

import numpy as np
import pandas as pd
import pytest
from rouge_score.rouge_scorer import RougeScorer

from lora_fsdp.errors import (
    ArgumentError,
    ColumnNotFoundError,
    EmptyTextError,
    MalformedRowError,
    MissingPackageError,
)
from lora_fsdp.tasks import (
    AlpacaTask,
    ChatTask,
    ExtractionTask,
    GenerationTask,
    InferenceTask,
    MultipleChoiceTask,
    QuestionAnsweringTask,
    SummarisationTask,
    get_task,
    summarisation,
)
from lora_fsdp.tasks.text_metrics import exact_match, token_f1

QUESTION = {"question": "Capital of France?", "choices": ["Rome", "Paris"], "answer": "Paris"}
TURNS = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello!"},
    {"role": "user", "content": "Bye"},
    {"role": "assistant", "content": "See you."},
]


def table(*rows: dict[str, Any]) -> pd.DataFrame:
    return pd.DataFrame(list(rows), index=pd.RangeIndex(1, len(rows) + 1))


class TestRows:
    @pytest.mark.parametrize(
        ("task", "good", "change", "words"),
        [
            (GenerationTask(), {"text": "a", "answer": "b"}, {"answer": " "}, "'answer'"),
            (MultipleChoiceTask(), QUESTION, {"choices": None}, "'choices' holds no list"),
            (MultipleChoiceTask(), QUESTION, {"choices": "Rome or Paris"}, "holds no list"),
            (MultipleChoiceTask(), QUESTION, {"choices": ["Paris"]}, "needs two choices"),
            (MultipleChoiceTask(), QUESTION, {"choices": ["Paris", "Paris"]}, "or twice"),
            (MultipleChoiceTask(), QUESTION, {"answer": "Berlin"}, "'answer': 'Berlin' is none"),
            (MultipleChoiceTask(), QUESTION, {"answer": "C"}, "'answer': 'C' is none"),
            (ExtractionTask(), {"text": "a", "fields": {"x": 1}}, {"fields": "[1]"}, "'fields'"),
            (
                QuestionAnsweringTask(),
                {"context": "a", "question": "b", "answer": "c"},
                {"answer": {"text": [None], "answer_start": [0]}},
                "'answer' holds no answer",
            ),
            (ChatTask(), {"messages": TURNS}, {"messages": "Hi"}, "does not end with an answer"),
            (ChatTask(), {"messages": TURNS}, {"messages": [{"role": "user"}]}, "holds no list"),
            (ChatTask(), {"messages": TURNS}, {"messages": TURNS[:2]}, "does not end"),
            (ChatTask(), {"messages": TURNS}, {"messages": [TURNS[0], TURNS[2]]}, "no message of"),
            (
                ChatTask(),
                {"messages": TURNS},
                {"messages": [{"role": "tool", "content": "x"}, *TURNS]},
                "role 'tool'",
            ),
        ],
    )
    def test_a_bad_row_is_named_with_its_column(self, task, good, change, words) -> None:
        rows = table(good, good, {**good, **change})
        with pytest.raises(MalformedRowError, match=r"1 of 3 rows.*row 3 \(") as caught:
            task.bind(rows)
        assert words in str(caught.value)
        kept, dropped = task.drop_bad_rows(rows)
        assert (list(kept.index), dropped) == ([1, 2], 1)
        task.bind(kept)

    def test_a_missing_column_is_named_with_the_nearest(self) -> None:
        with pytest.raises(ColumnNotFoundError, match="Did you mean 'choises' for 'choices'"):
            MultipleChoiceTask().bind(table({"question": "a", "choises": [], "answer": "b"}))

    def test_options_make_the_bound_task_again(self) -> None:
        task = QuestionAnsweringTask(question_column="q", instruction="Say:")
        again = get_task(task.name, task.options())
        assert again.options() == task.options()
        assert task.options()["question_column"] == "q"

    def test_an_option_that_is_no_text(self) -> None:
        with pytest.raises(ArgumentError, match="choices_column"):
            MultipleChoiceTask(choices_column=3)  # type: ignore[arg-type]


class TestMultipleChoice:
    @pytest.mark.parametrize(
        ("choices", "answer", "right"),
        [
            (["Rome", "Paris"], "Paris", " Paris"),
            (["Rome", "Paris"], "B", " Paris"),
            (["Rome", "Paris"], 1, " Paris"),
            (["Rome", "Paris"], 1.0, " Paris"),
            (np.array(["Rome", "Paris"], dtype=object), np.int64(0), " Rome"),
            ('["Rome", "Paris"]', "A", " Rome"),
            ({"text": ["Rome", "Paris"], "label": ["1", "2"]}, "1", " Rome"),
            ([2, 4, 8], 4, " 4"),  # numbers among numbers are the answers themselves
        ],
    )
    def test_how_an_answer_is_named(self, choices, answer, right) -> None:
        row = {"question": "?", "choices": choices, "answer": answer}
        task = MultipleChoiceTask().bind(table(row))
        [example] = task.examples(table(row))
        assert example.target == right
        assert right in example.choices

    def test_the_model_sees_the_choices(self) -> None:
        [example] = MultipleChoiceTask().examples(table(QUESTION))
        assert str(example.prompt).endswith("?\nChoices:\n- Rome\n- Paris\nAnswer:")


class TestPairs:
    @pytest.mark.parametrize(
        ("shorten", "first", "second", "cut"),
        [
            ("longer", "a long premise", "short", "a long premise"),
            ("longer", "short", "a long hypothesis", "a long hypothesis"),
            ("first", "short", "a long hypothesis", "short"),
            ("second", "a long premise", "short", "short"),
        ],
    )
    def test_which_text_may_be_cut(self, shorten, first, second, cut) -> None:
        prompt = InferenceTask(shorten=shorten).build_prompt(
            {"premise": first, "hypothesis": second}
        )
        assert prompt.text == cut
        assert prompt.message.endswith(f"Premise: {first}\nHypothesis: {second}\nOutput:")

    def test_a_missing_second_text(self) -> None:
        good = {"premise": "a", "hypothesis": "b", "label": "x"}
        rows = table(good, {**good, "label": "y"}, {**good, "hypothesis": " "})
        with pytest.raises(EmptyTextError, match="nothing in column 'hypothesis': row 3"):
            InferenceTask().bind(rows)
        assert InferenceTask().drop_bad_rows(rows)[1] == 1

    def test_an_unknown_way_to_shorten(self) -> None:
        with pytest.raises(ArgumentError, match="'both'"):
            InferenceTask(shorten="both")  # type: ignore[arg-type]


class TestInstructions:
    def test_alpaca_with_and_without_input(self) -> None:
        task = AlpacaTask()
        bare = task.build_prompt({"instruction": "Name a colour.", "input": None})
        given = task.build_prompt({"instruction": "Translate.", "input": "Hello"})
        assert (bare.text, given.text) == ("Name a colour.", "Hello")
        assert given.message.endswith(
            "### Instruction:\nTranslate.\n\n### Input:\nHello\n\n### Response:"
        )
        assert bare.before == given.before

    def test_chat_learns_the_last_answer(self) -> None:
        cell = json.dumps(TURNS)  # as CSV has it
        [example] = ChatTask().bind(table({"messages": cell})).examples(table({"messages": cell}))
        assert [role for role, _ in example.prompt.turns] == ["system", "user", "assistant"]
        assert (example.prompt.text, example.target) == ("Bye", "See you.")

    def test_chat_predicts_with_or_without_the_answer(self) -> None:
        prompts = [ChatTask().build_prompt({"messages": TURNS[:n]}) for n in (4, 5)]
        assert prompts[0] == prompts[1]
        assert ChatTask().build_prompt({"messages": "Hi"}).message == "Hi"


class TestMetrics:
    @pytest.mark.parametrize(
        ("answer", "right", "exact", "f1"),
        [
            ("The Eiffel Tower!", ["eiffel tower"], 1.0, 1.0),
            ("the big tower", ["Eiffel tower"], 0.0, 0.5),
            ("in 1871", ["1871", "in 1871"], 1.0, 1.0),
            ("", ["x"], 0.0, 0.0),
            ("x x", ["x"], 0.0, 2 / 3),
            ("北京市", ["北京"], 0.0, 0.8),
        ],
    )
    def test_squad(self, answer, right, exact, f1) -> None:
        assert exact_match(answer, right) == exact
        assert token_f1(answer, right) == pytest.approx(f1)

    def test_all_right_answers_count(self) -> None:
        rows = table({"context": "c", "question": "q", "answer": {"text": ["1871", "in 1871"]}})
        task = QuestionAnsweringTask().bind(rows)
        examples = task.examples(rows)
        assert examples[0].target == " 1871"
        assert task.measure(examples, ["in 1871"]) == {"token_f1": 1.0, "exact_match": 1.0}
        assert task.measure(examples, [None]) == {"token_f1": 0.0, "exact_match": 0.0}

    def test_extraction(self) -> None:
        right = [{"a": 1, "b": ["x", "y"]}, {"a": 2}, {"a": 3}]
        rows = table(*({"text": "t", "fields": fields} for fields in right))
        task = ExtractionTask().bind(rows)
        written = ['{"b": ["y", "z"], "a": 1} and more', "no JSON", '{"a": "3"}']
        answers = [task.parse(text) for text in written]
        assert answers[1] is None
        found = task.measure(task.examples(rows), answers)
        # Right: a and y of the first. Given 3 + 0 + 1 fields, to be given 3 + 1 + 1.
        assert found["field_f1"] == pytest.approx(2 * 2 / (4 + 5))
        assert found["valid_json"] == pytest.approx(2 / 3)
        assert found["whole_object"] == 0.0
        same = [task.parse(json.dumps(fields)) for fields in right]
        assert set(task.measure(task.examples(rows), same).values()) == {1.0}

    @pytest.mark.parametrize(
        ("right", "given", "f1", "whole"),
        [
            # Scrambled records: of each entry one field of two is right.
            (
                {"orders": [{"id": "a", "amount": 10}, {"id": "b", "amount": 20}]},
                {"orders": [{"id": "a", "amount": 20}, {"id": "b", "amount": 10}]},
                0.5,
                0,
            ),
            # The same records in another order are the same.
            (
                {"orders": [{"id": "a", "amount": 10}, {"id": "b", "amount": 20}]},
                {"orders": [{"amount": 20, "id": "b"}, {"id": "a", "amount": 10.0}]},
                1.0,
                1,
            ),
            # One entry forgotten: two of four fields are given, both right.
            ({"x": [{"i": 1, "j": 2}, {"i": 3, "j": 4}]}, {"x": [{"i": 3, "j": 4}]}, 2 / 3, 0),
            ({"x": [[1, 2], [3, 4]]}, {"x": [[1, 4], [3, 2]]}, 0.5, 0),
            ({"a": 2}, {"a": 2.0}, 1.0, 1),
            ({"a": [1, 2.0]}, {"a": [2, 1.0]}, 1.0, 1),
            ({"a": 1}, {"a": True}, 0.0, 0),
            ({"a": [1]}, {"a": [True]}, 0.0, 0),
            ({"a": "2"}, {"a": 2}, 0.0, 0),
            ({"a": None}, {}, 0.0, 0),
            ({"a": {}}, {"a": {}}, 1.0, 1),
            ({"a": {}}, {"a": []}, 0.0, 0),
            ({"a": [1, 1]}, {"a": [1]}, 2 / 3, 0),
            ({}, {}, 1.0, 1),
        ],
    )
    def test_records_are_compared_as_wholes(
        self, right: dict[str, Any], given: dict[str, Any], f1: float, whole: float
    ) -> None:
        found = ExtractionTask().measure_answers([json.dumps(given)], [[json.dumps(right)]])
        assert found == pytest.approx({"field_f1": f1, "valid_json": 1, "whole_object": whole})

    @pytest.mark.parametrize(
        "text",
        [
            '{"a": 1}',
            ' {"a": 1} and more',
            '```json\n{"a": 1}\n```',
            'Here it is:\n```\n{\n "a": 1\n}\n```\nAnything else?',
            '```JSON \r\n{"a": 1}',
        ],
    )
    def test_an_object_is_found_in_a_fenced_block_too(self, text: str) -> None:
        assert ExtractionTask().parse(text) == '{"a": 1}'

    @pytest.mark.parametrize("text", ['It is {"a": 1}', "```json\n[1]\n```", "[" * 10**5, "```"])
    def test_what_is_no_object_is_no_answer(self, text: str) -> None:
        assert ExtractionTask().parse(text) is None

    def test_objects_in_objects_are_bounded(self) -> None:
        deep, fair = ('{"a": ' * levels + "1" + "}" * levels for levels in (400, 90))
        assert ExtractionTask().parse(deep) is None
        answer = ExtractionTask().parse(fair)
        assert ExtractionTask().measure_answers([answer], [[fair]])["field_f1"] == 1
        with pytest.raises(MalformedRowError, match="nested deeper than 100 levels"):
            ExtractionTask().bind(table({"text": "t", "fields": deep}))

    def test_rouge_is_the_library_s_in_english_and_counts_other_scripts(self) -> None:
        answer, right = "Two cats were sitting on the mats", "The cat sat on two mats"
        expected = RougeScorer(["rougeL"], use_stemmer=True).score(right, answer)["rougeL"].fmeasure
        task = SummarisationTask()
        assert task.score_answer(answer, [right])["rougeL"] == pytest.approx(expected)
        assert task.score_answer("北京", ["北京"])["rouge2"] == 1.0
        assert task.score_answer("другая", ["другой"])["rouge1"] == 0.0

    def test_without_rouge(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Said before a minute is spent on training."""
        importing = builtins.__import__

        def refuse(name, *rest):
            if name.startswith("rouge_score"):
                raise ImportError("No module named 'rouge_score'")
            return importing(name, *rest)

        monkeypatch.setattr(builtins, "__import__", refuse)
        summarisation.rouge_scorer.cache_clear()
        with pytest.raises(MissingPackageError, match=r"pip install 'lora-fsdp\[rouge\]'"):
            SummarisationTask().bind(table({"text": "a", "summary": "b"}))
