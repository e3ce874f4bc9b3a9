"""`lora-fsdp train` through real launches: one sentence for a mistake, a traceback for a bug.

Run: python -m pytest tests/cli/test_train.py
"""

import os
import re
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from lora_fsdp.arguments import DataArguments
from lora_fsdp.cli.train import (
    LaunchOptions,
    _cause,
    _explain_code,
    again,
    launch_command_line,
    output_folder,
    what_is_left,
)
from lora_fsdp.data.rows import load_task_data
from lora_fsdp.errors import ArgumentError
from lora_fsdp.training.saving.run_lock import LOCK_FILE
from tests.support.runs import toy_trainer
from tests.support.tiny import toy_table

ROOT = Path(__file__).resolve().parents[2]
LAUNCHER_NOISE = ("Traceback", "torch.distributed.elastic", "ChildFailedError", "Root Cause")


def child(*arguments, cwd=ROOT, **variables):
    keep = {k: v for k, v in os.environ.items() if not k.startswith(("FSDP_", "ACCELERATE_"))}
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=cwd,
        env={**keep, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", **variables},
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )


def train(*arguments, **variables):
    return child("-m", "lora_fsdp", "train", *arguments, **variables)


@pytest.fixture
def options(tmp_path, model_folder):
    table = tmp_path / "table.csv"
    toy_table(24).to_csv(table, index=False)
    return [
        "--model_name_or_path", model_folder, "--task", "classification", "--data_file", table,
        "--text_column", "text", "--label_column", "label", "--instruction", "Say how it sounds:",
        "--output_dir", tmp_path / "run", "--max_steps", 2, "--save_strategy", "no",
        "--eval_size", 6, "--max_length", 128,
    ]  # fmt: skip


class TestGoingOn:
    """What Ctrl-C leaves the user with."""

    @pytest.mark.parametrize(
        ("given", "words"),
        [
            (["--learning_rate", "1"], "--learning_rate 1"),
            (["--labels", "a b", "c", "--max_steps=2"], "--labels 'a b' c --max_steps=2"),
            (["--resume_from_checkpoint", "true", "--seed", "1"], "--seed 1"),
            (["--resume_from_checkpoint=runs/a", "--seed=1"], "--seed=1"),
            (["--resume-from-checkpoint", "--seed", "1"], "--seed 1"),
            (["--hub_token", "hf_x", "--seed", "1"], "--hub_token '***' --seed 1"),
            (["--hub_token=hf_x", "--seed", "1"], "'--hub_token=***' --seed 1"),
        ],
    )
    def test_the_command_is_the_one_that_was_given(self, given, words):
        options = LaunchOptions(accelerate_config="ddp", num_processes=4)
        launch = "--accelerate_config ddp --num_processes 4"
        expected = f"lora-fsdp train {launch} {words} --resume_from_checkpoint true"
        assert again(options, given) == expected

    def test_the_folder_is_that_of_the_run(self, tmp_path):
        recipe = tmp_path / "recipe.yaml"
        recipe.write_text("output_dir: runs/recipe\nseed: 3\n")
        assert output_folder([]) == Path("runs/latest")
        assert output_folder(["--config", str(recipe)]) == Path("runs/recipe")
        assert output_folder([f"--config={recipe}", "--output_dir", "a"]) == Path("a")
        assert output_folder(["--output_dir=a", "--output_dir", "b"]) == Path("b")

    def test_the_newest_whole_checkpoint_is_named(self, tmp_path):
        assert "has no checkpoint yet: with --save_strategy" in what_is_left(tmp_path, "again")
        toy_trainer(tmp_path, rows=8, max_steps=2, save_strategy="steps", save_steps=1).train()
        newest = tmp_path / "checkpoint-2"
        assert what_is_left(tmp_path, "go on") == (
            f"The newest checkpoint is {newest}. Go on with:\ngo on"
        )
        (newest / "task.json").unlink()
        assert "checkpoint-1. Go on" in what_is_left(tmp_path, "go on")


@pytest.mark.slow
@pytest.mark.parametrize("config", ["single", "fsdp2_cpu"])
def test_ctrl_c_gives_the_prompt_back_and_says_how_to_go_on(tmp_path, options, config):
    """To all processes of the terminal, as a terminal sends it."""
    words = [*options, "--save_strategy", "steps", "--save_steps", 5, "--max_steps", 100000]
    command = ["-m", "lora_fsdp", "train", "--accelerate_config", config, *words]
    keep = {k: v for k, v in os.environ.items() if not k.startswith(("FSDP_", "ACCELERATE_"))}
    process = subprocess.Popen(
        [sys.executable, *map(str, command)],
        cwd=ROOT, env={**keep, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""},
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True,
        # As in a terminal: of a shell's job in the background, children would ignore Ctrl-C.
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    try:
        until = time.monotonic() + 300
        while not (tmp_path / "run" / "checkpoint-5").is_dir() and time.monotonic() < until:
            assert process.poll() is None
            time.sleep(0.1)
        os.killpg(process.pid, signal.SIGINT)
        begun = time.monotonic()
        _, error = process.communicate(timeout=60)
        seconds = time.monotonic() - begun
    finally:
        process.kill()
    assert process.returncode == 130, error
    assert seconds < 5 * max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1))
    assert not [noise for noise in (*LAUNCHER_NOISE, "torch", "Error") if noise in error], error
    found = re.search(r"The newest checkpoint is (\S+)\. Go on with:\n(lora-fsdp .*)", error)
    assert found, error
    assert Path(found[1]).parent == tmp_path / "run"
    assert found[2].endswith("--resume_from_checkpoint true")


class TestCommandLine:
    def test_options_of_the_launch_and_of_the_run(self):
        options = LaunchOptions(accelerate_config="ddp", num_processes=4)
        command = launch_command_line(options, ["--learning_rate", "1"])
        place = command.index("--module")
        assert command[:4] == [
            "--config_file", str(ROOT / "accelerate_configs/ddp.yaml"), "--num_processes", "4",
        ]  # fmt: skip
        assert command[place + 2 :] == ["--learning_rate", "1"]

    def test_unknown_yaml(self):
        with pytest.raises(ArgumentError, match="those shipped"):
            launch_command_line(LaunchOptions(accelerate_config="nothing"), [])

    def test_dry_run_chooses_for_the_machine(self):
        done = train("--dry_run", "--config", "recipe.yaml")
        assert done.returncode == 0
        assert "accelerate_configs/fsdp2_cpu.yaml" in done.stdout
        assert done.stdout.rstrip().endswith("--config recipe.yaml")


@pytest.mark.distributed
class TestTwoProcesses:
    def test_a_run(self, options, tmp_path):
        done = train(*options, "--logging_steps", 1, "--price_per_hour", 100)
        assert done.returncode == 0, done.stderr
        assert "FSDP status: 2 process(es)" in done.stdout
        [first, _] = [line for line in done.stdout.splitlines() if line.startswith("step ")]
        wanted = r"step 1/2  loss .*  examples/s \d.*  tokens/s \d.*  ETA 0:00:\d\d  cost \d"
        assert re.match(wanted, first), first
        assert f"lora-fsdp predict --adapter {tmp_path / 'run'}" in done.stdout
        assert "\r" not in done.stderr + done.stdout  # no bars without a terminal
        assert done.stderr == ""  # nor anything that a stranger would wonder about
        assert not (tmp_path / "run" / LOCK_FILE).exists()

    def test_a_mistake_is_one_sentence(self, options):
        options[options.index("--text_column") + 1] = "txet"
        done = train(*options)
        assert done.returncode == 2
        assert done.stderr.count("\n") == 1
        assert done.stderr.startswith("ColumnNotFoundError: ")
        assert "Did you mean 'text'" in done.stderr
        assert "Traceback" not in done.stdout

    @pytest.mark.slow
    def test_also_when_accelerate_launch_is_used(self, options):
        """The launcher adds its own lines; ours comes once before them, and in their summary."""
        options[options.index("--text_column") + 1] = "txet"
        done = child(
            "-m", "accelerate.commands.launch", "--config_file",
            "accelerate_configs/fsdp2_cpu.yaml", "--main_process_port", "0",
            "examples/sentiment.py", *options,
        )  # fmt: skip
        ours, _, launchers = done.stderr.partition("torch/distributed/elastic")
        assert ours.count("ColumnNotFoundError") == 1
        assert "Root Cause" in launchers
        assert "ColumnNotFoundError" in launchers.partition("Root Cause")[2]

    @pytest.mark.slow
    def test_a_mistake_of_one_process_alone_is_told_once(self, options, tmp_path):
        """The other process then fails for a reason of no interest, or is ended."""
        task = tmp_path / "one_rank_task.py"
        task.write_text(
            "import os\nfrom lora_fsdp.errors import DataError\n"
            "if os.environ.get('RANK') == '1':\n    raise DataError('only here')\n"
        )
        done = train(*options, "--task_file", task)
        assert done.returncode == 2
        assert done.stderr == "DataError: only here\n"

    @pytest.mark.slow
    def test_a_process_that_is_killed(self, options, tmp_path):
        task = tmp_path / "killer_task.py"
        task.write_text(
            "import os, signal\nif os.environ.get('RANK') == '1':\n"
            "    os.kill(os.getpid(), signal.SIGKILL)\n"
        )
        done = train(*options, "--task_file", task)
        assert done.returncode == 1
        last = done.stderr.strip().splitlines()[-1]
        assert last.startswith("lora-fsdp train: process 1 was killed (SIGKILL)")
        assert not any(noise in done.stderr for noise in LAUNCHER_NOISE[1:])


@pytest.mark.parametrize(
    ("code", "ours", "words"),
    [
        (2, 2, ""),  # the process has told what was wrong
        (130, 130, ""),
        (1, 1, "its traceback is above, if it left one"),
        (70, 70, "stand in the StalledRankError above"),
        (-11, 1, "was ended by SIGSEGV"),
    ],
)
def test_how_a_process_ended(capsys, code, ours, words):
    assert _explain_code(code, "process 1") == ours
    error = capsys.readouterr().err
    assert words in error
    assert bool(error) == bool(words)


class TestOneProcess:
    @pytest.mark.slow
    def test_a_bug_keeps_its_traceback(self, options, tmp_path):
        task = tmp_path / "odd_task.py"
        task.write_text(
            "from lora_fsdp import ClassificationTask, register_task\n"
            "@register_task\nclass OddTask(ClassificationTask):\n    name = 'odd'\n"
            "    def build_prompt(self, row):\n        return 1 / 0\n"
        )
        options[options.index("--task") + 1] = "odd"
        done = train(*options, "--task_file", task, "--accelerate_config", "single")
        assert done.returncode == 1
        assert "ZeroDivisionError" in done.stderr
        assert "return 1 / 0" in done.stderr
        assert done.stderr.strip().splitlines()[-1].startswith("lora-fsdp train: ")


def test_small_table_with_the_recipe_of_make_sentiment(tmp_path):
    """`make sentiment ARGS="--data_file my.csv"`."""
    recipe = yaml.safe_load((ROOT / "examples/recipes/sentiment-default.yaml").read_text())
    table = tmp_path / "my.csv"
    toy_table(30).rename(columns={"label": "sentiment"}).to_csv(table, index=False)
    for file, rows in ((table, (18, 12)), (ROOT / recipe["data_file"], (600, 400))):
        if not file.is_file():  # the embedded default, where it is not prepared
            continue
        arguments = DataArguments(
            task=recipe["task"],
            data_file=str(file),
            max_rows=recipe["max_rows"],
            eval_size=recipe["eval_size"],
        )
        data = load_task_data(arguments, seed=0)
        assert (len(data.train), len(data.held_out)) == rows


@pytest.mark.parametrize(
    ("ends", "first"),
    [
        ({0: (-15, 100), 1: (1, 100)}, 1),  # the launcher ended process 0
        ({0: (-15, 100), 1: (1, 101)}, 1),
        ({0: (1, 100), 1: (-15, 100)}, 0),
        ({0: (1, 101), 1: (-9, 100)}, 1),
        ({0: (-15, 100), 1: (-9, 130)}, 0),  # ended from outside; the launcher killed the other
        ({0: (1, 130), 1: (-9, 100)}, 1),
    ],
)
def test_the_cause_is_what_failed_first(ends, first):
    failures = {
        rank: SimpleNamespace(exitcode=code, timestamp=time) for rank, (code, time) in ends.items()
    }
    assert _cause(failures) == (first, failures[first])
