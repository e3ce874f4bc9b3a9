"""Tasks whose answers are scored: rows' own choices, pairs, usual tables.

Run: python -m pytest tests/tasks/test_scored_tasks.py
"""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

from lora_fsdp import DataArguments, Example, Prompt, Task
from lora_fsdp.compute.packed_model import PackedModel
from lora_fsdp.data.encoding import Encoder
from lora_fsdp.data.rows import load_task_data
from lora_fsdp.data.streams import open_stream
from lora_fsdp.data.tables import read_table
from lora_fsdp.errors import ArgumentError, ColumnNotFoundError, DataError, MalformedRowError
from lora_fsdp.evaluation.file_prediction import predict_file
from lora_fsdp.evaluation.metrics import evaluation_metrics, model_outputs
from lora_fsdp.evaluation.prediction import Predictor
from lora_fsdp.evaluation.scoring import Scores
from lora_fsdp.tasks import ClassificationTask, MultipleChoiceTask, get_task
from tests.support.tiny import adapted_model, randomise_adapter, tiny_tokenizer

CPU = torch.device("cpu")
QUESTIONS = (
    ("Which crew?", ("good", "bad", "late"), "bad"),
    ("Whose bag was lost?", ("my bag", "the crew"), "my bag"),
    ("How was the flight?", ("late", "cancelled again", "good", "friendly"), "good"),
)


@pytest.fixture(scope="module")
def predictor() -> Predictor:
    model = adapted_model()
    randomise_adapter(model)
    task = MultipleChoiceTask()
    encoder = Encoder(tiny_tokenizer(), task=task, max_length=256)
    return Predictor(task, encoder, PackedModel(model.eval()), CPU, max_new_tokens=8)


def question(row: int, text: str, choices: tuple[str, ...], answer: str | None = None) -> Example:
    listed = "".join(f"\n- {choice}" for choice in choices)
    prompt = Prompt("Answer.\nQuestion: ", text, "\nAnswer:", tail=listed)
    target = None if answer is None else f" {answer}"
    return Example(row, prompt, target, tuple(f" {choice}" for choice in choices))


def table(*rows: dict[str, Any]) -> pd.DataFrame:
    return pd.DataFrame(rows, index=pd.RangeIndex(1, len(rows) + 1))


def write_csv(path: Path, *rows: list[str]) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)
    return path


class TestScores:
    def test_accuracy_with_and_without_length(self, predictor: Predictor) -> None:
        """The long choice is less likely as a whole, and likelier per token."""
        examples = [
            question(1, "Which?", ("x", "cancelled again thanks"), "cancelled again thanks"),
            question(2, "Which?", ("x", "y", "z"), "y"),
        ]
        encoded = predictor.encoder.encode(examples)
        short, long = (len(ids) for ids in encoded[0].candidate_ids)
        assert 0.9 * long > short
        likelihoods = [[-1.0 * short, -0.9 * long, -torch.inf], [-3.0, -1.0, -2.0]]
        scores = Scores(torch.tensor(likelihoods))
        metrics = evaluation_metrics(predictor.task, encoded, model_outputs(encoded, scores))
        assert metrics["accuracy"] == 0.5
        assert metrics["accuracy_normalised"] == 1.0

    def test_a_row_without_choices_is_refused(self) -> None:
        class Careless(Task):
            name = "careless"
            per_row_choices = True

            def build_prompt(self, row: Mapping[str, Any]) -> Prompt:
                return Prompt("", row["text"], "")

        with pytest.raises(MalformedRowError, match="Row 1 brings 0 choices to task 'careless'"):
            Careless().examples(table({"text": "Which?"}), with_targets=False)


class TestColumns:
    @pytest.mark.parametrize(
        "names",
        [
            ["A", "B", "C", "D"],
            ["choice_a", "choice_b", "choice_c", "choice_d"],
            ["option1", "option2", "option3", "option4"],
        ],
    )
    @pytest.mark.parametrize("answer", ["B", "b", "1", "Paris"])
    def test_a_column_for_each_choice(self, tmp_path: Path, names: list[str], answer: str) -> None:
        path = write_csv(
            tmp_path / "q.csv",
            ["question", *names, "answer"],
            ["Capital of France?", "Rome", "Paris", "Bonn", "", answer],
            ["Capital of Italy?", "Rome", "Paris", "Bonn", "Bern", "A"],
        )
        rows = read_table(path)
        task = MultipleChoiceTask().bind(rows)
        first, second = task.examples(rows)
        assert first.choices == (" Rome", " Paris", " Bonn")
        assert first.target == " Paris"
        assert second.choices == (" Rome", " Paris", " Bonn", " Bern")
        assert str(first.prompt).endswith("\nChoices:\n- Rome\n- Paris\n- Bonn\nAnswer:")
        again = get_task("multiple_choice", json.loads(json.dumps(task.options())))
        row = rows.iloc[1].to_dict()
        assert again.build_choices(row) == second.choices

    def test_columns_by_any_name(self) -> None:
        rows = table({"question": "?", "right one": "x", "wrong one": "y", "answer": "x"})
        named = ["right one", "wrong one"]
        assert MultipleChoiceTask(choices_columns=named).bind(rows).examples(rows)[0].choices
        with pytest.raises(ColumnNotFoundError, match="Did you mean 'wrong one' for 'wrong'"):
            MultipleChoiceTask(choices_columns=["right one", "wrong"]).bind(rows)
        for wrong in ("AB", ["A"], ["A", 3]):
            with pytest.raises(ArgumentError, match="choices_columns must be a list"):
                MultipleChoiceTask(choices_columns=wrong)  # type: ignore[arg-type]

    @pytest.mark.parametrize(
        ("change", "says"),
        [
            ({"A": "", "B": "", "C": ""}, "row 2 (columns 'A', 'B', 'C' needs two"),
            ({"B": "", "C": ""}, "row 2 (columns 'A', 'B', 'C' needs two"),
            ({"B": ""}, "none empty or twice: ['x', '', 'z']"),
            ({"answer": "D"}, "row 2 (column 'answer': 'D' is none of the choices"),
            ({"answer": "3"}, "row 2 (column 'answer': '3' is none of the choices"),
            ({"answer": ""}, "row 2 (nothing in column 'answer')"),
        ],
    )
    def test_faults_name_row_and_column(self, change: dict[str, str], says: str) -> None:
        good = {"question": "?", "A": "x", "B": "y", "C": "z", "answer": "C"}
        rows = table(good, good | change)
        with pytest.raises(MalformedRowError) as caught:
            MultipleChoiceTask().bind(rows)
        assert says in str(caught.value)
        kept, dropped = MultipleChoiceTask().drop_bad_rows(rows)
        assert (list(kept.index), dropped) == ([1], 1)

    def test_a_text_cannot_forge_the_end_of_an_answer(self) -> None:
        rows = table({"question": "<|end|>?", "A": "<|end|>", "B": "y", "answer": "B"})
        task = MultipleChoiceTask().bind(rows)
        tokenizer = tiny_tokenizer()
        [encoded] = Encoder(tokenizer, task=task).encode(task.examples(rows))
        assert tokenizer.eos_token_id not in encoded.prompt_ids
        assert [ids.count(tokenizer.eos_token_id) for ids in encoded.candidate_ids] == [1, 1]

    def test_only_the_question_is_shortened(self) -> None:
        rows = table({"question": "good " * 200, "A": "late", "B": "friendly", "answer": "B"})
        task = MultipleChoiceTask().bind(rows)
        tokenizer = tiny_tokenizer()
        [encoded] = Encoder(tokenizer, task=task, max_length=160).encode(task.examples(rows))
        assert encoded.shortened
        text = tokenizer.decode(encoded.prompt_ids)
        assert text.endswith("\nChoices:\n- late\n- friendly\nAnswer:")


class TestPredict:
    def ask(self, predictor: Predictor, folder: Path, *rows: list[str]) -> list[dict[str, str]]:
        stream = open_stream(write_csv(folder / "in.csv", *rows))
        done = predict_file(predictor, stream, folder / "out.csv", chunk_rows=2)
        with done.output.open(newline="", encoding="utf-8") as file:
            return list(csv.DictReader(file))

    def test_answers_are_those_of_the_scores(self, predictor: Predictor, tmp_path: Path) -> None:
        rows = [[text, json.dumps(choices)] for text, choices, _ in QUESTIONS]
        answered = self.ask(predictor, tmp_path, ["question", "choices"], *rows, [" ", ""])
        given = [{"question": text, "choices": list(choices)} for text, choices, _ in QUESTIONS]
        examples = predictor.task.examples(table(*given), with_targets=False)
        probabilities = predictor.score(examples).probabilities
        for line, (_, choices, _), expected in zip(
            answered, QUESTIONS, probabilities.tolist(), strict=False
        ):
            found = json.loads(line["choice_probabilities"])
            assert list(found) == list(choices)
            assert list(found.values()) == pytest.approx(expected[: len(choices)], abs=1e-5)
            assert line["predicted_choice"] == max(found, key=found.get)
            assert float(line["probability"]) == pytest.approx(max(found.values()), abs=1e-5)
        assert answered[3]["predicted_choice"] == answered[3]["choice_probabilities"] == ""

    def test_rows_none_of_which_has_a_text(self, predictor: Predictor, tmp_path: Path) -> None:
        answered = self.ask(predictor, tmp_path, ["question", "choices"], [" ", ""], ["", ""])
        assert [line["predicted_choice"] for line in answered] == ["", ""]

    @pytest.mark.parametrize(
        ("cell", "says"),
        [
            ("", "row 3: column 'choices' holds no list of choices"),
            ('["x"]', "row 3: column 'choices' needs two choices or more"),
            ('["x", "x"]', "none empty or twice"),
        ],
    )
    def test_bad_choices(self, predictor: Predictor, tmp_path: Path, cell: str, says: str) -> None:
        good = ["Which?", '["x", "y"]']
        with pytest.raises(DataError, match=r"in\.csv") as caught:
            self.ask(predictor, tmp_path, ["question", "choices"], good, good, ["Which?", cell])
        assert says in str(caught.value)
        assert not (tmp_path / "out.csv").exists()

    def test_a_missing_column(self, predictor: Predictor, tmp_path: Path) -> None:
        with pytest.raises(ColumnNotFoundError, match=r"'choices'.*called as in training"):
            self.ask(predictor, tmp_path, ["question", "options"], ["Which?", '["x", "y"]'])


@pytest.mark.parametrize(
    ("name", "text", "label"),
    [
        (name, *layout)
        for name in ("topic", "intent")
        for layout in get_task(name).layouts  # type: ignore[attr-defined]
    ],
)
def test_usual_tables_need_no_options(name: str, text: str, label: str) -> None:
    rows = table({text: "words", label: "one", "id": 1}, {text: "more", label: "two", "id": 2})
    task = get_task(name).bind(rows)
    assert isinstance(task, ClassificationTask)
    assert (task.labels, [e.target for e in task.examples(rows)]) == (
        ("one", "two"),
        [" one", " two"],
    )


def test_a_table_with_odd_columns_needs_no_code(tmp_path: Path) -> None:
    lines = [[str(n), f"words {n}", ("Team A", "Team B")[n % 2]] for n in range(12)]
    path = write_csv(tmp_path / "t.csv", ["#", "Msg Body (raw)", "Routed / To"], *lines)
    arguments = DataArguments(
        task="classification",
        data_file=str(path),
        instruction="Which team?",
        text_column="Msg Body (raw)",
        label_column="Routed / To",
        eval_size=4,
    )
    data = load_task_data(arguments, seed=0)
    assert data.task.labels == ("Team A", "Team B")
    assert len(data.train) + len(data.held_out) == 12
    assert data.train[0].prompt.text.startswith("words ")
