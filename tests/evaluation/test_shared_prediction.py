"""A table that several processes answer: each its chunks, one output, as one process writes it.

Run: python -m pytest tests/evaluation/test_shared_prediction.py
"""

from __future__ import annotations

import subprocess
import sys
import time

import pandas as pd
import pytest

from lora_fsdp.distributed.workers import Workers
from tests.support.host_runs import prepare
from tests.support.hosts import ROOT, clean_environment, finish, hosts
from tests.support.tiny import toy_table

pytestmark = pytest.mark.distributed


def command(launcher, adapter, table, output):
    words = ["-m", "lora_fsdp", "predict", str(table), "--adapter", str(adapter)]
    words += ["--task_file", str(adapter.parent / "on_hosts_task.py"), "--output", str(output)]
    return [sys.executable, *launcher, *words, "--chunk_rows", "8"]


def torchrun(processes, *others):
    return ["-m", "torch.distributed.run", "--nproc_per_node", str(processes), *others]


def run(words):
    return subprocess.run(
        words, cwd=ROOT, env=clean_environment(), capture_output=True, text=True, timeout=280,
        check=False,
    )  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shared")
    recipe = prepare(folder, rows=40, max_steps=1)
    words = ["-m", "lora_fsdp.cli.training_process", "--config", str(recipe)]
    done = run([sys.executable, *words, "--output_dir", str(folder / "run")])
    assert done.returncode == 0, done.stderr
    table = folder / "new.csv"
    toy_table(61, seed=4)[["text"]].to_csv(table, index=False)
    alone = folder / "alone.csv"
    assert run(command([], folder / "run", table, alone)).returncode == 0
    return folder / "run", table, alone.read_bytes()


@pytest.mark.slow
def test_two_processes_write_what_one_does(trained, tmp_path):
    adapter, table, alone = trained
    output = tmp_path / "answers.csv"
    done = run(command(torchrun(2, "--standalone"), adapter, table, output))
    assert done.returncode == 0, done.stderr
    assert output.read_bytes() == alone
    assert done.stdout.count("61 rows answered") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["answers.csv"]
    again = run(command(torchrun(2, "--standalone"), adapter, table, output))
    assert again.returncode != 0
    assert "is already there" in again.stderr


@pytest.mark.slow
def test_two_hosts_go_on_where_they_were_killed(trained, tmp_path):
    adapter, table, alone = trained
    output, partial = tmp_path / "answers.csv", tmp_path / "answers.csv.partial"

    def start(both):
        launchers = [
            torchrun(1, "--nnodes", "2", "--node_rank", str(place), "--master_addr",
                     both[0].address, "--master_port", "29500")
            for place in range(2)
        ]  # fmt: skip
        return [
            host.start(command(launcher, adapter, table, output))
            for host, launcher in zip(both, launchers, strict=True)
        ]

    with hosts(2) as both:
        start(both)
        until = time.monotonic() + 120
        while not list(partial.glob("0*.csv")):
            assert time.monotonic() < until
            time.sleep(0.01)
        for host in both:
            host.kill()
    assert not output.exists()
    left = {file.name: file.stat().st_mtime_ns for file in partial.glob("0*.csv")}
    assert left
    with hosts(2) as both:
        printed = finish(processes := start(both), seconds=200)
    assert [process.returncode for process in processes] == [0, 0], printed
    assert output.read_bytes() == alone
    assert "of them by an earlier call" in printed[0]


@pytest.mark.slow
def test_ray_data_gives_the_same_answers(trained, tmp_path):
    pytest.importorskip(
        "ray.data", reason="pip install 'ray[data]' to test examples/ray_predict.py"
    )
    adapter, table, _ = trained
    alone = pd.read_csv(table.parent / "alone.csv")
    pd.read_csv(table).to_parquet(tmp_path / "new.parquet", index=False)
    words = [sys.executable, "examples/ray_predict.py", tmp_path / "new.parquet", adapter]
    words += [tmp_path / "answers", "2", adapter.parent / "on_hosts_task.py"]
    done = run([str(word) for word in words])
    assert done.returncode == 0, done.stderr
    found = pd.read_parquet(tmp_path / "answers").sort_values("text", ignore_index=True)
    wanted = alone.sort_values("text", ignore_index=True)
    pd.testing.assert_frame_equal(found, wanted, check_dtype=False, rtol=1e-4)


def test_who_does_what():
    three = [Workers(rank, 3) for rank in range(3)]
    for part in range(10):
        assert sum(one.does(part) for one in three) == 1
    assert Workers.of_launcher({}) == Workers()
    assert Workers.of_launcher({"WORLD_SIZE": "4", "RANK": "1"}) == Workers()  # of no launcher
