"""`init` looks at a table and a machine, and what it prints runs as printed.

Run: python -m pytest tests/cli/test_init.py
"""

import shlex

import pytest
import yaml

from lora_fsdp.cli.configs import find_config
from lora_fsdp.cli.init import _for_gpus
from lora_fsdp.cli.main import main
from tests.data.chat_templates import PLAIN, tokenizer_with


def rows(count=30, *, separator=","):
    lines = [f"the flight {n} was late{separator}{'ab'[n % 2]}" for n in range(count)]
    return "\n".join([f"message{separator}team", *lines]) + "\n"


@pytest.fixture
def init(capsys, model_folder):
    """Runs `init` with a model that is there."""

    def start(*words):
        return run(capsys, "init", *words, "--model_name_or_path", model_folder)

    return start


def run(capsys, *words):
    code = main([str(word) for word in words])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def printed(out, begin):
    [line] = [line for line in out.splitlines() if line.startswith(begin)]
    return shlex.split(line.removeprefix(begin))


@pytest.mark.parametrize("folder", [".", "my tickets"])
def test_a_table_alone(capsys, init, tmp_path, monkeypatch, folder):
    """Columns guessed; the command that it prints is run, and what it starts is looked at."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tickets-2024.csv").write_text(rows(separator=";"))
    code, out, error = init("tickets-2024.csv", "--folder", folder)
    assert code == 0, error
    assert "30 rows; 2 labels: 'a', 'b'. Columns: text is 'message' (by its name)" in out
    next_words = printed(out, "next: ")
    assert next_words[0] == "lora-fsdp"
    code, out_of_check, error = run(capsys, *next_words[1:])
    assert code == 0, error
    assert "task tickets_2024" in out_of_check
    code, _, error = run(capsys, *printed(out, "then: ")[1:], "--dry_run")
    assert code == 0, error
    recipe = yaml.safe_load((tmp_path / folder / "tickets_2024.yaml").read_text())
    assert recipe["data_file"] == ("tickets-2024.csv" if folder == "." else "../tickets-2024.csv")
    assert recipe["task_file"] == "tickets_2024_task.py"


def test_what_it_prints_runs_from_elsewhere(capsys, init, tmp_path, monkeypatch):
    (tmp_path / "tickets.csv").write_text(rows())
    code, out, error = init(tmp_path / "tickets.csv", "--folder", tmp_path)
    assert code == 0, error
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    code, _, error = run(capsys, *printed(out, "next: ")[1:])
    assert code == 0, error


@pytest.mark.parametrize(
    ("gpus", "config"), [(0, "fsdp2_cpu"), (1, "single"), (2, "fsdp2"), (4, "fsdp2")]
)
def test_the_yaml_fits_the_machine(init, tmp_path, monkeypatch, gpus, config):
    monkeypatch.setattr("torch.cuda.device_count", lambda: gpus)
    (tmp_path / "t.csv").write_text(rows())
    assert init("t", "--data_file", tmp_path / "t.csv", "--folder", tmp_path)[0] == 0
    found = yaml.safe_load((tmp_path / "t_accelerate.yaml").read_text())
    shipped = yaml.safe_load(find_config(config).read_text())
    assert found == shipped | ({"num_processes": gpus} if gpus > 1 else {})
    assert found.get("use_cpu", False) is (gpus == 0)


def test_a_rehearsal_that_was_asked_for_stays_one():
    text = find_config("fsdp2_cpu").read_text()
    assert _for_gpus(text, 8) == text


def test_rows_that_cannot_be_used_are_left_out(capsys, init, tmp_path):
    (tmp_path / "t.csv").write_text(rows() + ",a\nno team,\n")
    code, out, _ = init(tmp_path / "t.csv", "--folder", tmp_path)
    assert code == 0
    assert "32 rows, 2 of them without text or label" in out
    assert run(capsys, *printed(out, "next: ")[1:])[0] == 0


def test_a_table_for_another_task(capsys, init, tmp_path):
    turns = '[{"role": "user", "content": "a%d"}, {"role": "assistant", "content": "b"}]'
    lines = [f'{{"messages": {turns % n}}}' for n in range(20)]
    (tmp_path / "talk.jsonl").write_text("\n".join(lines))
    code, out, error = init(tmp_path / "talk.jsonl", "--folder", tmp_path)
    assert code == 0, error
    recipe = yaml.safe_load((tmp_path / "talk.yaml").read_text())
    assert (recipe["task"], recipe["chat_template"]) == ("chat", True)
    assert not (tmp_path / "talk_task.py").exists()
    tokenizer_with(PLAIN).save_pretrained(tmp_path / "chat")
    words = [*printed(out, "next: ")[1:], "--model_name_or_path", tmp_path / "chat"]
    assert run(capsys, *words)[0] == 0


def test_columns_that_are_not_plain(init, tmp_path):
    (tmp_path / "t.csv").write_text("a,b\n1,2\n3,4\n")
    code, _, error = init(tmp_path / "t.csv", "--folder", tmp_path)
    assert code == 2
    assert "Name them with --text_column and --label_column. The table has 'a', 'b'" in error
    assert [file.name for file in tmp_path.iterdir()] == ["t.csv"]


def test_a_table_that_is_missing(init, tmp_path):
    code, _, error = init("t", "--data_file", tmp_path / "t.csv")
    assert code == 2
    assert "There is no data file" in error


def test_without_a_table_it_says_where_the_rows_go(capsys, init, tmp_path):
    code, out, _ = init("ticket", "--folder", tmp_path)
    assert code == 0
    assert f"first: put your rows into {tmp_path / 'data.csv'} (columns text and label)" in out
    (tmp_path / "data.csv").write_text(rows().replace("message,team", "text,label"))
    assert run(capsys, *printed(out, "next: ")[1:])[0] == 0
