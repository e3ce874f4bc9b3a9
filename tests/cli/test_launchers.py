"""The files that start a run on several machines, read by what will read them.

Run: python -m pytest tests/cli/test_launchers.py
"""

from __future__ import annotations

import ast
import os
import re
import shlex
import shutil
import subprocess
import sys

import pytest
import yaml

from lora_fsdp.cli.launchers import LAUNCHERS
from lora_fsdp.cli.main import main
from lora_fsdp.cli.train import LaunchOptions, TrainCommand
from lora_fsdp.cli.training_process import take_accelerate_config
from lora_fsdp.distributed.launch import read_fsdp_settings
from lora_fsdp.errors import LaunchError
from lora_fsdp.options import OptionParser
from tests.support.host_runs import losses_of, prepare
from tests.support.hosts import ROOT, clean_environment


def written(tmp_path, launcher, *words):
    folder = tmp_path / "ticket"
    command = ["init", "ticket", "--folder", str(folder), "--launcher", launcher, *words]
    assert main(command) == 0
    [file] = [path for path in folder.iterdir() if path.name.endswith(LAUNCHERS[launcher].ending)]
    return file


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_every_file_is_filled_in(tmp_path, launcher, capsys):
    file = written(tmp_path, launcher, "--num_machines", "3", "--gpus_per_machine", "4")
    text = file.read_text()
    assert not re.search(r"@[A-Z]+@", text)
    assert str(file) in text.splitlines()[2 if launcher == "ray" else 1] + text.splitlines()[0]
    assert f"then: {LAUNCHERS[launcher].command.format(file=file)}" in capsys.readouterr().out
    accelerate = yaml.safe_load((file.parent / "ticket_accelerate.yaml").read_text())
    assert accelerate["parallelism_config"]["parallelism_config_dp_replicate_size"] == 2


def shell_of(file, launcher):
    if launcher in ("slurm", "torchrun"):
        return file.read_text()
    contents = yaml.safe_load(file.read_text())
    return contents["run"] if launcher == "skypilot" else contents["spec"]["trainer"]["command"][2]


@pytest.mark.parametrize("launcher", ["slurm", "torchrun", "skypilot", "kubeflow"])
def test_bash_reads_it(tmp_path, launcher):
    text = shell_of(written(tmp_path, launcher), launcher)
    done = subprocess.run(["bash", "-n"], input=text, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


# What each engine tells its machines; the words of the command are those of this one.
VARIABLES = {
    "slurm": {"SLURM_JOB_NUM_NODES": "2", "SLURM_NODEID": "1", "SLURM_JOB_NODELIST": "gpu[1-2]"},
    "skypilot": {
        "SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2",
        "SKYPILOT_NUM_NODES": "2",
        "SKYPILOT_NUM_GPUS_PER_NODE": "8",
        "SKYPILOT_NODE_RANK": "1",
    },
    "kubeflow": {
        "PET_NNODES": "2",
        "PET_NODE_RANK": "1",
        "PET_MASTER_ADDR": "10.0.0.1",
        "PET_MASTER_PORT": "29500",
    },
}


@pytest.mark.parametrize("launcher", VARIABLES)
def test_it_starts_the_entry_with_options_that_it_takes(tmp_path, launcher):
    """The script runs; a program of ours in the place of lora-fsdp says what it was given."""
    text = shell_of(written(tmp_path, launcher), launcher)
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, line in {
        "lora-fsdp": 'printf "%s\\n" "$@"',
        # As many names as fill a pipe: whoever leaves after the first ends the program that prints.
        "scontrol": "printf '10.0.0.%d\\n' $(seq 20000)",
        "srun": 'shift; exec "$@"',
    }.items():
        (programs / name).write_text(f"#!/bin/bash\n{line}\n")
        (programs / name).chmod(0o755)
    done = subprocess.run(
        ["bash"],
        input=text,
        capture_output=True,
        text=True,
        check=True,
        env={"PATH": f"{programs}:/usr/bin:/bin", **VARIABLES[launcher]},
    )
    command, *words = done.stdout.splitlines()
    assert command == "train"
    options, rest = OptionParser((LaunchOptions,)).parse_known_args(words)
    assert (options.num_machines, options.num_processes, options.machine_rank) == (2, 16, 1)
    assert (options.main_process_ip, options.main_process_port) == ("10.0.0.1", 29500)
    assert rest[:1] == ["--config"]
    assert rest[-2:] == ["--resume_from_checkpoint", "if_any"]
    assert isinstance(TrainCommand, type)


def test_sbatch_reads_slurm_s_lines(tmp_path):
    file = written(tmp_path, "slurm")
    lines = [line for line in file.read_text().splitlines() if line.startswith("#SBATCH ")]
    assert all(re.fullmatch(r"#SBATCH --[a-z-]+(=\S+)?", line) for line in lines)
    if shutil.which("sbatch") is None:
        pytest.skip("sbatch is not installed: its lines were looked at, and not read by Slurm")
    done = subprocess.run(
        ["sbatch", "--test-only", str(file)], capture_output=True, text=True, check=False
    )
    if re.search("controller|configuration source", done.stderr):
        pytest.skip(f"no Slurm controller answers: {done.stderr.strip()}")
    # What the cluster there cannot give (its nodes, its GPUs) is no fault of the file.
    assert done.returncode == 0 or "allocation failure" in done.stderr, done.stderr


def test_skypilot_reads_its_task(tmp_path):
    file = written(tmp_path, "skypilot")
    contents = yaml.safe_load(file.read_text())
    assert contents["num_nodes"] == 2
    sky = pytest.importorskip("sky", reason="SkyPilot is not installed: only read as YAML")
    task = sky.Task.from_yaml(str(file))
    assert task.num_nodes == 2


def test_kubeflow_reads_its_job(tmp_path):
    file = written(tmp_path, "kubeflow")
    contents = yaml.safe_load(file.read_text())
    assert (contents["apiVersion"], contents["kind"]) == (
        "trainer.kubeflow.org/v1alpha1",
        "TrainJob",
    )
    models = pytest.importorskip(
        "kubeflow_trainer_api.models", reason="kubeflow-trainer-api is not installed: read as YAML"
    )
    job = models.TrainerV1alpha1TrainJob.from_dict(contents)
    assert job.spec.trainer.num_nodes == 2
    again = job.to_dict()
    assert again["spec"]["trainer"] == contents["spec"]["trainer"]
    assert again["spec"]["runtimeRef"]["name"] == "torch-distributed"


def test_python_reads_ray_s_script(tmp_path):
    text = written(tmp_path, "ray").read_text()
    tree = ast.parse(text)
    assert {node.name for node in tree.body if isinstance(node, ast.FunctionDef)} == {
        "train",
        "start",
    }


def test_torchrun_reads_its_options(tmp_path):
    from torch.distributed.run import get_args_parser

    text = written(tmp_path, "torchrun").read_text().replace("\\\n", " ")
    start = "exec python -m lora_fsdp.cli.torchrun "
    [line] = [one for one in text.splitlines() if one.startswith(start)]
    words = shlex.split(line.removeprefix(start))
    options = get_args_parser().parse_args(words)
    assert (options.nnodes, options.nproc_per_node, options.max_restarts) == ("1:2", "8", 100)
    assert (options.module, options.training_script) == (True, "lora_fsdp.cli.training_process")
    script = options.training_script_args
    assert script[script.index("--examples_per_step") + 1] == str(8 * 16)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--launcher", "slrum"], "Did you mean 'slurm'?"),
        (["--launcher", "slurm", "--num_machines", "0"], "--num_machines must be 1 or more"),
        (["--launcher", "ray", "--gpus_per_machine", "-1"], "--gpus_per_machine must be 1 or more"),
        (["--launcher", "ray", "--folder", "a b"], "cannot stand in a launcher's file"),
    ],
)
def test_wrong_words(tmp_path, monkeypatch, capsys, words, said):
    monkeypatch.chdir(tmp_path)
    assert main(["init", "ticket", *words]) == 2
    assert said in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


class TestYamlOfALauncherThatReadsNone:
    @pytest.fixture(autouse=True)
    def no_launcher(self, monkeypatch):
        kept = dict(os.environ)
        for name in list(os.environ):
            if name.startswith(("ACCELERATE_", "FSDP_", "PARALLELISM_CONFIG_")):
                monkeypatch.delenv(name)
        yield
        os.environ.clear()
        os.environ.update(kept)

    def test_a_copy_for_each_machine_that_is_there(self, monkeypatch):
        for name, value in {"WORLD_SIZE": 24, "LOCAL_WORLD_SIZE": 8, "GROUP_WORLD_SIZE": 3}.items():
            monkeypatch.setenv(name, str(value))
        rest = take_accelerate_config(["--a", "1", "--accelerate_config", "fsdp2_hosts", "--b"])
        assert rest == ["--a", "1", "--b"]
        assert read_fsdp_settings().replicas == 3

    def test_accelerate_has_read_one(self, monkeypatch):
        monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "NO")
        with pytest.raises(LaunchError, match="give it --config_file"):
            take_accelerate_config(["--accelerate_config", "fsdp2"])

    def test_the_last_word(self):
        with pytest.raises(LaunchError, match="name a YAML after it"):
            take_accelerate_config(["--accelerate_config"])


RAY_RUN = """
import ray
ray.init(num_cpus=4, include_dashboard=False)
text = open({file!r}).read()
whole = "    start()\\n"
assert text.endswith(whole)
given = "    start(workers=2, use_gpu=False, options={options!r}, storage={storage!r})"
exec(compile(text.removesuffix(whole) + given, {file!r}, "exec"))
"""


@pytest.mark.slow
def test_ray_runs_its_script_with_two_workers(tmp_path):
    pytest.importorskip("ray.train", reason="Ray is not installed: its script was only parsed")
    file = written(tmp_path, "ray")
    recipe, output = prepare(tmp_path), tmp_path / "run"
    options = ["--config", str(recipe), "--output_dir", str(output)]
    options += ["--accelerate_config", "fsdp2_cpu", "--resume_from_checkpoint", "if_any"]
    program = RAY_RUN.format(file=str(file), options=options, storage=str(tmp_path / "ray"))
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
        env=clean_environment() | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(losses_of(output)) == 7  # 54 rows, 4 for each of two processes
    assert "2 process(es)" in done.stdout + done.stderr
