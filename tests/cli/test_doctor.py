"""`lora-fsdp doctor`: the command line of `train`, examined.

Run: python -m pytest tests/cli/test_doctor.py
"""

import json
import time

import pytest
import yaml

from lora_fsdp.cli.main import main
from lora_fsdp.failures import FOUND_ERRORS, WRONG_INPUT
from tests.support.ranks import CONFIGS
from tests.support.tiny import toy_table

TASK_FILE = """
from lora_fsdp import ClassificationTask, register_task

print("imported")

@register_task
class MoodTask(ClassificationTask):
    name = "mood"
    instruction = "Say how it sounds:"
    text_column = "text"
    label_column = "label"
"""


@pytest.fixture
def recipe(tmp_path, model_folder):
    toy_table(240).to_csv(tmp_path / "table.csv", index=False)
    file = tmp_path / "recipe.yaml"
    settings = {
        "model_name_or_path": str(model_folder),
        "task": "classification",
        "data_file": str(tmp_path / "table.csv"),
        "text_column": "text",
        "label_column": "label",
        "instruction": "Say how it sounds:",
        "output_dir": str(tmp_path / "run"),
        "eval_size": 60,
        "learning_rate": 1.0e-3,
    }
    file.write_text(yaml.safe_dump(settings))
    return file


@pytest.fixture
def doctor(capsys, recipe):
    def ask(*words):
        config = ["--config", recipe, "--accelerate_config", "fsdp2_cpu"]
        code = main(["doctor", *map(str, [*config, *words])])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return ask


def test_nothing_found(doctor):
    code, out, _ = doctor()
    assert code == 0
    assert out.splitlines()[-1].endswith(" rules checked, nothing found")
    assert len(out.splitlines()) == 1


def test_errors(doctor):
    """Grouped, the most severe first."""
    code, out, _ = doctor(
        "--lora_target_modules", "query", "--lora_alpha", 800, "--lora_r", 0, "--eval_size", 20
    )
    assert code == FOUND_ERRORS == 5
    lines = out.splitlines()
    headings = [line for line in lines if line in ("error", "errors", "warning", "warnings")]
    assert headings == ["error", "warning"]
    assert lines[1] == "  lora-rank"
    assert "1 error, 1 warning" in lines[-1]


def test_warnings_count_when_asked(doctor):
    assert doctor("--eval_size", 20)[0] == 0
    assert doctor("--eval_size", 20, "--strict")[0] == FOUND_ERRORS
    assert doctor("--strict")[0] == 0


def test_json(doctor, tmp_path):
    """Also where a task's own code prints."""
    file = tmp_path / "mood_task.py"
    file.write_text(TASK_FILE)
    code, out, error = doctor("--lora_r", 0, "--json", "--task_file", file, "--task", "mood")
    found = json.loads(out)
    assert code == FOUND_ERRORS
    assert found["passed"] is False
    [finding] = found["findings"]
    assert finding["rule"] == "lora-rank"
    assert finding["severity"] == "error"
    assert "--lora_r 0" in finding["sentence"]
    assert finding["fix"]
    assert "lora-rank-too-large" in found["unchecked"]
    assert "lora-rank" in found["checked"]
    assert "imported" in error


def test_narrow_terminal(doctor, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    contents = yaml.safe_load((CONFIGS / "fsdp2_cpu.yaml").read_text())
    contents["fsdp_config"] = {"fsdp_sharding_strategy": "FULL_SHARD"}
    old = tmp_path / "old.yaml"
    old.write_text(yaml.safe_dump(contents))
    code, out, _ = doctor("--accelerate_config", old, "--lora_target_modules", "query")
    assert code == FOUND_ERRORS
    assert "fsdp_version: 2" in out
    assert max(map(len, out.splitlines())) <= 60


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--lora_dropot", 8], "did you mean --lora_dropout"),
        (["--lora_r", "many"], "--lora_r"),
        (["--accelerate_config", "fsdp3"], "fsdp2"),
    ],
)
def test_what_cannot_be_read(doctor, words, expected):
    code, out, error = doctor(*words)
    assert code == WRONG_INPUT
    assert expected in error
    assert out == ""


def test_recipe_that_is_not_there(capsys):
    assert main(["doctor", "--config", "no.yaml"]) == WRONG_INPUT
    assert "no.yaml" in capsys.readouterr().err


def test_seconds_and_nothing_written(doctor, tmp_path):
    before = sorted(tmp_path.rglob("*"))
    started = time.perf_counter()
    doctor()
    assert time.perf_counter() - started < 15
    assert sorted(tmp_path.rglob("*")) == before
