"""Some of a task's questions, asked as they were trained: with the same answers as beside the rest.

Run: python -m pytest tests/evaluation/test_some_questions.py
"""

import numpy as np
import pandas as pd
import pytest

from lora_fsdp import Predictor
from lora_fsdp.cli.main import main
from lora_fsdp.data.rows import load_task_data
from lora_fsdp.errors import ArgumentError
from tests.support.built_in import data_arguments, save_chat_model, train_recipe


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("questions")
    train_recipe("questions", save_chat_model(folder / "base"), folder / "run")
    return folder / "run"


def test_answers_are_those_of_all_questions_together(run, tmp_path, capsys):
    whole = Predictor.from_adapter(run)
    columns = list(whole.task.answer_columns())
    chosen = [columns[2], columns[0]]
    some = Predictor.from_adapter(run, questions=chosen)
    assert list(some.task.answer_columns()) == [columns[0], columns[2]]
    data = load_task_data(data_arguments("questions"), seed=0)
    kinds = whole.task.answer_kind, some.task.answer_kind
    by_all, by_some = (
        kind.probabilities_by_question(predictor.outputs(kind_rows(predictor, data)))
        for kind, predictor in zip(kinds, (whole, some), strict=True)
    )
    for place, name in enumerate(columns):
        if name in chosen:
            own = [columns[0], columns[2]].index(name)
            np.testing.assert_allclose(by_some[own], by_all[place], atol=1e-5)
    table = tmp_path / "new.csv"
    texts = [one.prompt.text for one in data.held_out]
    pd.DataFrame({"text": texts}).to_csv(table, index=False)
    words = ["predict", str(table), "--adapter", str(run), "--output", str(tmp_path / "out.csv")]
    assert main([*words, "--questions", *chosen]) == 0
    written = pd.read_csv(tmp_path / "out.csv")
    asked = {name.removeprefix("answer/") for name in written if name.startswith("answer/")}
    assert asked == set(chosen)
    assert not any(name.startswith("options/") for name in written)
    capsys.readouterr()


def kind_rows(predictor, data):
    """The rows without their answers."""
    table = pd.DataFrame({"text": [one.prompt.text for one in data.held_out]})
    return predictor.task.examples(table, with_targets=False)


def test_an_unknown_question_is_refused_with_the_nearest_before_the_base_is_read(run):
    name = next(iter(Predictor.from_adapter(run).task.answer_columns()))
    wrong = f"{name}x"
    with pytest.raises(ArgumentError, match=f"no question '{wrong}'. Did you mean '{name}'"):
        Predictor.from_adapter(run, base="/no/such/base", questions=[wrong])
    with pytest.raises(ArgumentError, match="There are '"):
        Predictor.from_adapter(run, base="/no/such/base", questions=["zzzz"])
    for given in ([], [name, name]):
        with pytest.raises(ArgumentError, match="one question or more, each once"):
            Predictor.from_adapter(run, base="/no/such/base", questions=given)


def test_a_task_of_one_question_has_none_to_leave_out(tmp_path):
    from lora_fsdp.tasks import SentimentTask

    with pytest.raises(ArgumentError, match="asks one question"):
        SentimentTask().only(["late"])
