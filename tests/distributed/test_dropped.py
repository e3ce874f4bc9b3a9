"""Nothing of what a YAML or the launcher asks for is dropped without a word.

Run: python -m pytest tests/distributed/test_dropped.py
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from lora_fsdp.cli.train import LaunchOptions, launch_command_line
from lora_fsdp.distributed.launch import check_environment, check_not_left_alone
from lora_fsdp.distributed.launch_files import check_can_start, read_launch
from lora_fsdp.errors import FsdpDroppedError, LaunchError

ROOT = Path(__file__).resolve().parents[2]
FSDP2 = {"fsdp_version": 2, "fsdp_cpu_ram_efficient_loading": False}

DROPPED = {
    "MULTI_CPU": ({"distributed_type": "MULTI_CPU", "use_cpu": True}, "2 processes were asked"),
    "NO": ({"distributed_type": "NO"}, "2 processes were asked"),
    "no type": ({"use_cpu": True, "distributed_type": "NO"}, "2 processes were asked"),
    "DEEPSPEED": ({"distributed_type": "DEEPSPEED"}, "DEEPSPEED is not one that"),
    "MEGATRON_LM": ({"distributed_type": "MEGATRON_LM"}, "MEGATRON_LM is not one that"),
    "XLA": ({"distributed_type": "XLA"}, "XLA is not one that"),
    "dynamo": ({"dynamo_config": {"dynamo_backend": "INDUCTOR"}}, "dynamo_backend INDUCTOR"),
    "fsdp left out": ({"fsdp_config": FSDP2}, "has a fsdp_config, which .* MULTI_GPU leaves out"),
    "deepspeed left out": ({"deepspeed_config": {"zero_stage": 3}}, "has a deepspeed_config"),
    "sagemaker": ({"compute_environment": "AMAZON_SAGEMAKER"}, "compute_environment"),
}


def written(tmp_path, **changes):
    file = tmp_path / "launch.yaml"
    settings = {
        "compute_environment": "LOCAL_MACHINE",
        "distributed_type": "MULTI_GPU",
        "mixed_precision": "no",
        "num_machines": 1,
        "num_processes": 2,
    }
    file.write_text(yaml.safe_dump(settings | changes))
    return file


@pytest.mark.parametrize("name", DROPPED)
def test_what_would_be_dropped_is_refused_before_a_process_starts(tmp_path, name):
    changes, words = DROPPED[name]
    file = written(tmp_path, **changes)
    with pytest.raises(LaunchError, match=words):
        check_can_start(file, processes=None)
    with pytest.raises(LaunchError, match=words):
        launch_command_line(LaunchOptions(accelerate_config=str(file)), [])


@pytest.mark.parametrize("kind", ["NO", "MULTI_CPU"])
def test_one_process_is_what_these_types_start(tmp_path, kind):
    file = written(tmp_path, distributed_type=kind, num_processes=1)
    check_can_start(file, processes=None)
    with pytest.raises(FsdpDroppedError, match="4 processes were asked"):
        check_can_start(file, processes=4)


@pytest.mark.parametrize("changes", [{}, {"distributed_type": "FSDP", "fsdp_config": FSDP2}])
def test_what_is_carried_out_starts(tmp_path, changes):
    file = written(tmp_path, use_cpu=True, **changes)
    check_can_start(file, processes=None)
    assert read_launch(file, processes=None).processes == 2


@pytest.mark.parametrize("file", sorted((ROOT / "accelerate_configs").glob("*.yaml")), ids=str)
def test_ours_start(file):
    check_can_start(file, processes=None)


SCRIPT = """
from lora_fsdp.distributed.launch import check_environment, check_not_left_alone
from lora_fsdp.errors import LaunchError
try:
    check_environment()
    check_not_left_alone()
    print("runs")
except LaunchError as error:
    print(f"refused: {error}")
"""


@pytest.mark.parametrize(
    ("words", "changes", "said"),
    [
        (["--num_processes", "2", "--cpu"], None, "refused: Several processes were asked for"),
        ([], {"distributed_type": "MULTI_CPU"}, "refused: Several processes were asked for"),
        ([], {"distributed_type": "NO"}, "refused: Several processes were asked for"),
        (["--num_processes", "1", "--cpu"], None, "runs"),
        (["--num_processes", "1"], {"distributed_type": "NO"}, "runs"),
        (
            ["--num_processes", "1", "--cpu", "--dynamo_backend", "inductor"],
            None,
            "refused: dynamo",
        ),
    ],
)
def test_a_script_of_ones_own_under_accelerate_launch(tmp_path, words, changes, said):
    script = tmp_path / "mine.py"
    script.write_text(SCRIPT)
    file = [] if changes is None else ["--config_file", str(written(tmp_path, **changes))]
    keep = {k: v for k, v in os.environ.items() if not k.startswith(("FSDP_", "ACCELERATE_"))}
    done = subprocess.run(
        [sys.executable, "-m", "accelerate.commands.launch", *file, *words, str(script)],
        env={**keep, "PYTHONPATH": str(ROOT), "HF_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.stdout.startswith(said), done.stdout + done.stderr


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--num_processes", "1", "--cpu"], "runs"),
        (["--num_processes", "2", "--cpu"], "refused: Several processes were asked for"),
    ],
)
@pytest.mark.slow
def test_an_address_exported_by_the_shell_is_no_request(tmp_path, words, said):
    """A cluster's login shell exports where processes would meet."""
    script = tmp_path / "mine.py"
    script.write_text(SCRIPT)
    keep = {k: v for k, v in os.environ.items() if not k.startswith(("FSDP_", "ACCELERATE_"))}
    exported = {"MASTER_ADDR": "node17.cluster", "MASTER_PORT": "23456"}
    done = subprocess.run(
        [sys.executable, "-m", "accelerate.commands.launch", *words, str(script)],
        env={**keep, **exported, "PYTHONPATH": str(ROOT), "HF_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.stdout.startswith(said), done.stdout + done.stderr


def test_fp8_is_refused(monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp8")
    with pytest.raises(LaunchError, match="mixed_precision: fp8"):
        check_environment()


def test_joined_processes_are_not_alone(monkeypatch):
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "NO")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    check_not_left_alone()
