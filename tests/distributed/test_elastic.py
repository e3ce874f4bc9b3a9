"""A host dies; the others go on from the last checkpoint, and no row is lost or seen twice.

Run (as root): python -m pytest tests/distributed/test_elastic.py
"""

from __future__ import annotations

import json
import signal
import sys
import time

import pytest

from lora_fsdp.arguments import FineTuningArguments
from lora_fsdp.errors import ArgumentError
from tests.support.elastic_hosts import ElasticHosts
from tests.support.elastic_run import RESULT, SIZES, Sizes, check_ledger, lines_of
from tests.support.hosts import hosts
from tests.support.ranks import run_ranks


def words(hosts_, folder, *, seconds):
    return [
        sys.executable, "-m", "lora_fsdp.cli.torchrun",
        "--nnodes", f"1:{len(hosts_)}", "--nproc_per_node", "1", "--max_restarts", "10",
        "--rdzv_id", "toy", "--rdzv_backend", "c10d", "--rdzv_endpoint", "host0:29500",
        "--rdzv_conf", "join_timeout=60,last_call_timeout=3,is_host="
        "{is_host},keep_alive_interval=1,keep_alive_max_attempt=10",
        "--module", "tests.support.elastic_run",
        str(folder / "run"), str(folder / "ledger"), str(seconds),
    ]  # fmt: skip


def start(hosts_, place, folder, *, seconds):
    (folder / "ledger").mkdir(exist_ok=True)
    is_host = "1" if place == 0 else "0"
    given = [word.replace("{is_host}", is_host) for word in words(hosts_, folder, seconds=seconds)]
    log = folder / f"host{place}-{time.monotonic_ns()}.log"
    return hosts_[place].start(given, log=log)


def wait_for_step(folder, step, *, ranks, seconds):
    until = time.monotonic() + seconds
    while not any(
        one["step"] >= step and one["ranks"] == ranks for one in lines_of(folder / "ledger")
    ):
        assert time.monotonic() < until, f"no step {step} on {ranks} ranks: {logs(folder)}"
        time.sleep(0.1)


def logs(folder):
    return "\n".join(file.read_text()[-3000:] for file in sorted(folder.glob("host*.log")))


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.parametrize("way", ["killed", "cut off"])
def test_a_host_dies_and_the_other_goes_on(tmp_path, way):
    with hosts(2) as both:
        processes = [start(both, place, tmp_path, seconds=0.5) for place in range(2)]
        wait_for_step(tmp_path, 4, ranks=2, seconds=120)
        died = time.monotonic()
        if way == "killed":
            both[1].kill()
        else:
            both[1].cut()
        wait_for_step(tmp_path, 4, ranks=1, seconds=90)
        noticed = time.monotonic() - died
        assert noticed < 60, noticed
        assert processes[0].wait(timeout=120) == 0, logs(tmp_path)
        both[1].kill()
    check_ledger(lines_of(tmp_path / "ledger"))
    assert {line["ranks"] for line in lines_of(tmp_path / "ledger")} == {1, 2}
    losses = json.loads((tmp_path / "run" / RESULT).read_text())["losses"]
    whole = uninterrupted(tmp_path / "whole")
    assert len(losses) == SIZES.steps
    assert losses == pytest.approx(whole, rel=1e-3)


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.parametrize("way", ["killed while saving", "cut off", "half open"])
def test_a_lost_host_comes_back(tmp_path, way):
    """Lost in a step or in a save; the other goes on, the lost one joins it, and both finish."""
    sizes = Sizes(rows=48, epochs=30, examples=12, save_steps=2, stall_seconds=10.0)
    with hosts(2) as both:
        run = ElasticHosts(both, tmp_path / "run", sizes, apart=False, seconds=0.3)
        try:
            for place in range(2):
                run.start(place)
            assert run.wait(lambda: made(run, ranks=2), seconds=120), run.logs()
            if way == "killed while saving":
                assert run.wait(run.is_saving, seconds=60)
            lost = time.monotonic_ns()
            {"cut off": run.cut, "half open": run.mute}.get(way, run.kill)(1)
            assert run.wait(lambda: made(run, ranks=1, after=lost), seconds=90), run.logs()
            run.replace(1)
            back = time.monotonic_ns()
            run.start(1)
            assert run.wait(lambda: made(run, ranks=2, after=back), seconds=90), run.logs()
            assert run.finish(seconds=240) == 0  # nobody had to start it anew
            run.check_ledger()
        finally:
            for place in range(2):
                run.kill(place)


def made(run, *, ranks, after=0):
    """Steps on so many ranks, of attempts that began after a time."""
    return [line for line in run.lines(after=after) if line["ranks"] == ranks]


def uninterrupted(folder):
    folder.mkdir()
    with hosts(1) as one:
        process = start(one, 0, folder, seconds=0)
        assert process.wait(timeout=120) == 0, logs(folder)
    check_ledger(lines_of(folder / "ledger"))
    return json.loads((folder / "run" / RESULT).read_text())["losses"]


@pytest.mark.distributed
@pytest.mark.slow
def test_sigterm_leaves_a_checkpoint_in_ten_seconds(tmp_path):
    """As engines stop a machine: SIGTERM to its launcher, and SIGKILL half a minute later."""
    with hosts(2) as both:
        processes = [start(both, place, tmp_path, seconds=0.2) for place in range(2)]
        wait_for_step(tmp_path, 5, ranks=2, seconds=120)
        before = {path.name for path in (tmp_path / "run").glob("checkpoint-*")}
        began = time.monotonic()
        processes[1].send_signal(signal.SIGTERM)
        while {path.name for path in (tmp_path / "run").glob("checkpoint-*[0-9]")} <= before:
            assert time.monotonic() - began < 10, logs(tmp_path)
            time.sleep(0.05)
        for process in processes:
            process.send_signal(signal.SIGTERM)
            process.wait(timeout=60)


def divided(folder, examples, batch):
    arguments = FineTuningArguments(
        output_dir=str(folder), examples_per_step=examples, per_device_train_batch_size=batch
    )
    return arguments.per_device_train_batch_size, arguments.gradient_accumulation_steps


@pytest.mark.distributed
def test_a_step_keeps_its_examples_on_any_number_of_ranks(tmp_path):
    for ranks, wanted in ((1, (2, 12)), (2, (2, 6)), (4, (2, 3)), (3, (2, 4))):
        found = run_ranks(divided, tmp_path, 24, 2, world_size=ranks)
        assert found == [wanted] * ranks
    assert run_ranks(divided, tmp_path, 6, 4, world_size=2) == [(3, 1)] * 2


def test_a_step_that_cannot_be_divided(tmp_path):
    with pytest.raises(ArgumentError, match="--examples_per_step 0 cannot be divided"):
        FineTuningArguments(output_dir=str(tmp_path), examples_per_step=0)
    with pytest.raises(ArgumentError, match="remove --gradient_accumulation_steps"):
        FineTuningArguments(
            output_dir=str(tmp_path), examples_per_step=8, gradient_accumulation_steps=2
        )


def test_going_on_if_there_is_anything(tmp_path):
    def asked():
        arguments = FineTuningArguments(
            output_dir=str(tmp_path / "run"), resume_from_checkpoint="if_any"
        )
        return arguments.resume_from_checkpoint

    assert asked() is None
    (tmp_path / "run" / "checkpoint-4.partial").mkdir(parents=True)
    assert asked() is None
    (tmp_path / "run" / "checkpoint-4").mkdir()
    assert asked() is True
