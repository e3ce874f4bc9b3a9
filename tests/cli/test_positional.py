"""Names of files and folders anywhere on the command line.

Run: python -m pytest tests/cli/test_positional.py
"""

import os

import pytest

from lora_fsdp.cli.compare import COMMANDS as COMPARE
from lora_fsdp.cli.evaluate import COMMANDS as EVALUATE
from lora_fsdp.cli.main import main
from lora_fsdp.cli.merge import COMMANDS as MERGE
from lora_fsdp.cli.predict import COMMANDS as PREDICT
from lora_fsdp.cli.report import COMMANDS as REPORT
from lora_fsdp.cli.tasks import COMMANDS as TASKS
from lora_fsdp.cli.verify import COMMANDS as VERIFY
from lora_fsdp.errors import ArgumentError
from lora_fsdp.scripts import parse_arguments

TASKS_CHECK = [command for command in TASKS if command.name == "tasks check"]


def parsed(commands, *words):
    return commands[0].parser().parse(list(words))


@pytest.mark.parametrize(
    ("commands", "words", "name", "value"),
    [
        (PREDICT, ["--adapter", "runs/t1", "small.csv"], "data_file", "small.csv"),
        (PREDICT, ["--adapter", "runs/t1", "runs/t2", "no.tsv.gz"], "data_file", "no.tsv.gz"),
        (PREDICT, ["--adapter=runs/t1", "--json", "small.csv"], "data_file", "small.csv"),
        (PREDICT, ["--json", "true", "small.csv", "--adapter", "x"], "data_file", "small.csv"),
        (PREDICT, ["small.csv", "--adapter", "x"], "data_file", "small.csv"),
        (EVALUATE, ["--head", "3", "t.csv", "--json"], "data_file", "t.csv"),
        (MERGE, ["--output_dir", "out", "runs/t1"], "adapter", "runs/t1"),
        (VERIFY, ["--json", "runs/t1"], "adapter", "runs/t1"),
        (COMPARE, ["--generate", "runs/t1", "--rows", "3"], None, None),
        (REPORT, ["--output", "page.html", "runs/a", "runs/b"], "runs", ["runs/a", "runs/b"]),
        (REPORT, ["runs/a", "--json", "runs/b"], "runs", ["runs/a", "runs/b"]),
        (TASKS_CHECK, ["--task", "topic", "t.csv", "--rows", "2"], None, None),
    ],
)
def test_anywhere(commands, words, name, value):
    options = parsed(commands, *words)
    if name is None:  # not among the first class's options
        name, value = commands[0].positional, next(w for w in words if w in ("runs/t1", "t.csv"))
        options = options[::-1]
    assert getattr(options[0], name) == value


def test_behind_a_list(tmp_path, monkeypatch):
    """Nobody calls a label as a file that lies there."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "t.csv").write_text("x")
    _, data = parsed(TASKS_CHECK, "--task", "topic", "--labels", "a", "b.c", "t.csv")
    assert (data.labels, data.data_file) == (["a", "b.c"], "t.csv")
    _, data = parsed(TASKS_CHECK, "--labels", "a", "b.c", "--task", "topic")
    assert (data.labels, data.data_file) == (["a", "b.c"], None)


def test_several_files_are_one_table():
    _, data = parsed(TASKS_CHECK, "a.csv", "--task", "topic", "b.csv")
    assert data.data_file == os.pathsep.join(("a.csv", "b.csv"))


def test_in_a_recipe(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("task: topic\ndata_file: [a.csv, b.csv]\nlabels: [x, y]\n")
    _, data = parsed(TASKS_CHECK, "--config", str(recipe))
    assert (data.data_file, data.labels) == (os.pathsep.join(("a.csv", "b.csv")), ["x", "y"])
    _, data = parsed(TASKS_CHECK, "--config", str(recipe), "other.csv")
    assert data.data_file == "other.csv"


def test_for_training(monkeypatch, tmp_path):
    monkeypatch.setattr("lora_fsdp.scripts.configure_output", lambda: None)
    words = ["--task", "topic", "--bf16", "false", "--logging_first_step", "t.csv",
             "--output_dir", str(tmp_path)]  # fmt: skip
    run = parse_arguments(task="", arguments=words)
    assert run["data_args"].data_file == "t.csv"
    assert run["training_args"].logging_first_step is True


def test_the_launchers_own_options_leave_it(capsys):
    assert main(["train", "--dry_run", "t.csv", "--task", "topic", "--num_processes", "2"]) == 0
    assert "training_process t.csv --task topic" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("commands", "words", "said"),
    [
        (MERGE, ["a", "b"], "'a' and 'b' stand without an option, and one value is meant"),
        (PREDICT, ["--data_file", "a.csv", "b.csv"], "'b.csv' and --data_file are both given"),
        (PREDICT, ["--adaptr", "runs/t1", "b.csv"], r"--adaptr \(did you mean --adapter\?\)"),
    ],
)
def test_one_sentence(commands, words, said):
    with pytest.raises(ArgumentError, match=said):
        parsed(commands, *words)
