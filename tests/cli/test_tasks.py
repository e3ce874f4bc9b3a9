"""`lora-fsdp tasks`: what a task makes of a table. Run: python -m pytest tests/cli/test_tasks.py"""

import json
import shutil

import pandas as pd
import pytest

from lora_fsdp.cli.main import main
from tests.support.tiny import toy_table

OPTIONS = ["--task", "classification", "--text_column", "text", "--label_column", "label",
           "--instruction", "Say how it sounds:"]  # fmt: skip

TASK_FILE = """
from lora_fsdp import ClassificationTask, register_task

@register_task
class MoodTask(ClassificationTask):
    name = "mood"
    description = "How it sounds"
    instruction = "Mood:"
    text_column = "text"
    label_column = "label"
"""


def run(capsys, *words):
    code = main([str(word) for word in words])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.fixture
def table(tmp_path):
    def write(frame):
        file = tmp_path / "table.csv"
        frame.to_csv(file, index=False)
        return file

    return write


def check(capsys, file, *more):
    code, out, error = run(capsys, "tasks", "check", file, *OPTIONS, *more, "--json")
    assert code == 0, error
    return json.loads(out)


class TestList:
    def test_text_and_json(self, capsys):
        assert "sentiment" in run(capsys, "tasks", "list")[1]
        listed = json.loads(run(capsys, "tasks", "list", "--json")[1])
        assert {"classification", "sentiment"} <= {task["name"] for task in listed}

    def test_task_file(self, capsys, tmp_path):
        file = tmp_path / "mood_task.py"
        file.write_text(TASK_FILE)
        assert "How it sounds" in run(capsys, "tasks", "list", "--task_file", file)[1]
        shown = json.loads(run(capsys, "tasks", "show", "mood", "--task_file", file, "--json")[1])
        assert shown["instruction"] == "Mood:"
        assert shown["labels"] is None

    @pytest.mark.parametrize(
        ("text", "words"), [("1 / 0", "ZeroDivisionError"), ("import nothing_here", "nothing_here")]
    )
    def test_task_file_that_breaks(self, capsys, tmp_path, text, words):
        file = tmp_path / "broken_task.py"
        file.write_text(text)
        code, _, error = run(capsys, "tasks", "list", "--task_file", file)
        assert code == 2
        assert words in error
        assert str(file) in error

    def test_task_file_that_is_not_there(self, capsys, tmp_path):
        assert run(capsys, "tasks", "list", "--task_file", tmp_path / "no.py")[0] == 2

    def test_show_unknown(self, capsys):
        code, _, error = run(capsys, "tasks", "show", "sentimnet")
        assert code == 2
        assert "Did you mean 'sentiment'" in error


class TestCheck:
    def test_what_is_learnt_is_marked_token_by_token(self, capsys, table, model_folder):
        """The end token, too: without it the model would not know when to stop."""
        code, out, _ = run(
            capsys, "tasks", "check", table(toy_table(30)), *OPTIONS, "--rows", 1,
            "--model_name_or_path", model_folder,
        )  # fmt: skip
        assert code == 0
        heading, instruction, _, answer = out.splitlines()[:4]
        assert instruction == "Instruction: Say how it sounds:"
        assert answer.startswith("Output:[ ")
        assert answer.endswith("][<|end|>]")
        assert heading.endswith(f"{answer.count('[')} learnt")
        learnt = "".join(part.rstrip("]") for part in answer.split("[")[1:])
        assert learnt.removesuffix("<|end|>").strip() in ("negative", "neutral", "positive")

    def test_numbers(self, capsys, table, model_folder):
        found = check(
            capsys, table(toy_table(30)), "--model_name_or_path", model_folder, "--rows", 4
        )
        assert found["training_rows"] + found["held_out_rows"] == 30
        counts = {label: sum(rows) for label, rows in found["balance"].items()}
        assert counts == {"negative": 10, "neutral": 10, "positive": 10}
        assert found["shortened"] == 0
        assert len(found["rows"]) == 4
        row = found["rows"][0]
        assert row["prompt"].startswith("Instruction: Say how it sounds:\nInput: ")
        assert row["supervised_token_ids"][-1] == 0  # the toy tokenizer's end token

    def test_shortened_rows_are_counted_and_warned_of(self, capsys, table, model_folder):
        frame = toy_table(30)
        frame["text"] = frame["text"] * 8
        found = check(
            capsys, table(frame), "--model_name_or_path", model_folder, "--max_length", 60
        )
        assert found["shortened"] == 30
        assert any("--max_length" in warning for warning in found["warnings"])

    def test_without_a_model_tokens_are_not_counted(self, capsys, table):
        found = check(capsys, table(toy_table(30)))
        assert found["shortened"] is None
        assert "supervised_token_ids" not in found["rows"][0]

    def test_warnings(self, capsys, table):
        frame = pd.DataFrame(
            {
                "text": [f"text {i}" for i in range(300)] + ["odd one", "odd one", "x", "y"],
                "label": ["a"] * 150 + ["b"] * 150 + ["a", "b", "A", "rare"],
            }
        )
        found = check(capsys, table(frame))
        warnings = " ".join(found["warnings"])
        assert "Fewer than 10 training rows: 'A', 'rare'" in warnings
        assert "No held-out row" in warnings
        assert "differ in case or blanks only: 'A', 'a'" in warnings
        assert "1 texts occur with more than one answer" in warnings
        assert "judge by macro_f1" in warnings
        assert (found["repeated"], found["contradicting"]) == (2, 1)

    def test_labels_that_collide(self, capsys, table, model_folder, tmp_path):
        frame = toy_table(30)
        frame["label"] = frame["label"].replace({"neutral": "Positive"})
        blind = tmp_path / "model"
        shutil.copytree(model_folder, blind)
        tokenizer = json.loads((blind / "tokenizer.json").read_text())
        tokenizer["normalizer"] = {"type": "Lowercase"}
        (blind / "tokenizer.json").write_text(json.dumps(tokenizer))
        code, _, error = run(
            capsys, "tasks", "check", table(frame), *OPTIONS, "--model_name_or_path", str(blind)
        )
        assert code == 2
        assert "'Positive' and 'positive'" in error

    def test_bad_rows_are_named(self, capsys, table):
        frame = toy_table(30)
        frame.loc[7, "text"] = " "
        code, _, error = run(capsys, "tasks", "check", table(frame), *OPTIONS)
        assert code == 2
        assert "row 7 (no text)" in error
        assert check(capsys, table(frame), "--on_bad_rows", "drop")["left_out"] == 1

    def test_the_recipe_of_a_training_run_serves(self, capsys, table, tmp_path):
        recipe = tmp_path / "recipe.yaml"
        recipe.write_text(
            f"task: sentiment\ndata_file: {table(toy_table(30))}\nlabel_column: label\n"
            "learning_rate: 2.0e-4\nlora_r: 8\n"
        )
        code, out, error = run(capsys, "tasks", "check", "--config", recipe, "--rows", "1")
        assert code == 0, error
        assert "27 training rows, 3 held out" in out

    def test_small_file_with_a_recipe_made_for_a_large_one(self, capsys, table):
        code, _, error = run(capsys, "tasks", "check", table(toy_table(30)), *OPTIONS,
                             "--eval_size", 500)  # fmt: skip
        assert code == 2
        assert "--eval_size" in error
        assert "30 rows" in error
