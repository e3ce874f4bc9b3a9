"""Several hosts, made of network namespaces: they learn what one host with as many ranks learns.

Run (as root): python -m pytest tests/distributed/test_hosts.py
"""

from __future__ import annotations

import pytest

from tests.support.host_runs import losses_of, prepare, training_words
from tests.support.hosts import finish, hosts
from tests.support.ranks import launch_environment, run_ranks
from tests.support.runs import toy_run

pytestmark = pytest.mark.distributed
FSDP = launch_environment("fsdp2_cpu.yaml")


def run_on_rank(folder):
    run = toy_run(folder, num_train_epochs=1)
    return run["losses"], run["gradient_norms"], run["metrics"], run["fingerprint"]


@pytest.mark.parametrize("environment", [FSDP, {}], ids=["sharded", "whole"])
@pytest.mark.slow
def test_two_hosts_of_two_ranks_learn_what_one_host_of_four_does(tmp_path, environment):
    here = run_ranks(run_on_rank, tmp_path / "one", world_size=4, environment=environment)
    with hosts(2) as both:
        there = run_ranks(
            run_on_rank, tmp_path / "two", world_size=4, environment=environment, hosts=both
        )
        assert min(host.sent() for host in both) > 10_000  # it did go over the cable
    assert there == here


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["accelerate", "torchrun"])
def test_the_launchers_themselves(tmp_path, launcher):
    """As a user starts it: a command on each machine."""
    recipe = prepare(tmp_path)
    losses = []
    for count in (1, 2):
        output = tmp_path / f"run-{count}"
        with hosts(count) as all_of_them:
            processes = [
                host.start(
                    training_words(
                        launcher, all_of_them, place, recipe=recipe, output=output, ranks=4
                    )
                )
                for place, host in enumerate(all_of_them)
            ]
            printed = finish(processes, seconds=240)
        assert [process.returncode for process in processes] == [0] * count, printed
        losses.append(losses_of(output))
    assert losses[0] == losses[1]
    assert len(losses[0]) == 4
