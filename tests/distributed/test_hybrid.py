"""Hybrid sharding on two hosts: who holds what, and what crosses between them.

Run (as root): python -m pytest tests/distributed/test_hybrid.py
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback

from lora_fsdp.distributed.launch import check_mesh, read_fsdp_settings
from lora_fsdp.distributed.status import fsdp_status
from lora_fsdp.errors import FsdpSettingError
from tests.support.hosts import hosts
from tests.support.ranks import RankError, launch_environment, run_ranks
from tests.support.runs import toy_run, toy_trainer
from tests.support.tiny import tiny_model

pytestmark = pytest.mark.distributed
CPU = {"ACCELERATE_USE_CPU": "true"}
HYBRID = launch_environment("fsdp2_hosts.yaml") | CPU
FULL = launch_environment("fsdp2.yaml") | CPU
LAYOUTS = {"hybrid": HYBRID, "full shard": FULL, "resident": CPU}


def placed(folder):
    trainer = toy_trainer(folder)
    base = trainer.model.get_base_model()
    meshes = {
        (p.device_mesh.shape, p.device_mesh.mesh_dim_names, str(p.device_mesh.mesh.tolist()))
        for p in base.parameters()
        if isinstance(p, DTensor)
    }
    row = {
        tuple(p.device_mesh["shard"].mesh.tolist())
        for p in base.parameters()
        if isinstance(p, DTensor)
    }
    status = fsdp_status(trainer.model, traffic=trainer.host_traffic)
    return len(meshes), next(iter(meshes))[:2], row, status


def test_the_mesh_is_hosts_by_ranks_of_a_host(tmp_path):
    with hosts(2) as both:
        found = run_ranks(placed, tmp_path, world_size=4, environment=HYBRID, hosts=both)
    for rank, (count, mesh, row, _) in enumerate(found):
        assert count == 1
        assert mesh == ((2, 2), ("replicate", "shard"))
        assert row == {(0, 1) if rank < 2 else (2, 3)}  # the ranks of its own host
    status = found[0][3]
    whole = sum(p.numel() for p in tiny_model().parameters())
    assert [one.host for one in status.ranks] == [0, 0, 1, 1]
    assert [one.base_parameters for one in status.ranks] == [whole // 2] * 4
    assert status.mesh == {"replicate": 2, "shard": 2}
    text = str(status)
    assert "4 process(es) on 2 hosts" in text
    assert "2 copies of what is sharded, each in shards of 2 ranks" in text
    assert "0.0 MB of the base's weights" in text
    assert "rank  host  device" in text


class Counter(TrainerCallback):
    """Bytes that this host has sent when each step begins."""

    def __init__(self):
        self.sent = []

    def on_step_begin(self, args, state, control, **kwargs):
        lines = Path("/proc/thread-self/net/dev").read_text().splitlines()
        [line] = [line for line in lines if line.strip().startswith("eth0:")]
        self.sent.append(int(line.split(":")[1].split()[8]))


def counted(folder):
    counter = Counter()
    trainer = toy_trainer(
        folder,
        rows=96,
        max_steps=8,
        per_device_train_batch_size=3,
        callbacks=[counter],
        logging_steps=100,
        logging_first_step=False,
        lora_r=64,
    )
    trainer.train()
    # The first step also checks that the adapter has moved.
    steps = len(counter.sent) - 2
    return trainer.host_traffic, (counter.sent[-1] - counter.sent[1]) / steps, os.environ["RANK"]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_bytes_of_a_step_are_those_predicted(tmp_path, layout):
    with hosts(2) as both:
        found = run_ranks(counted, tmp_path, world_size=4, environment=LAYOUTS[layout], hosts=both)
    for traffic, sent, rank in found:
        assert (traffic.weights > 0) == (layout == "full shard")
        assert sent == pytest.approx(traffic.total, rel=0.1), rank


def learnt(folder):
    run = toy_run(folder)
    return run["losses"], run["metrics"], run["fingerprint"]


@pytest.mark.slow
def test_hybrid_learns_what_full_sharding_does(tmp_path):
    with hosts(2) as both:
        hybrid = run_ranks(learnt, tmp_path / "a", world_size=4, environment=HYBRID, hosts=both)
    full = run_ranks(learnt, tmp_path / "b", world_size=4, environment=FULL)
    assert hybrid == full


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"DP_REPLICATE_SIZE": "3"}, "3 copies .* x 2 .* are 6, but there are 4 processes"),
        ({"TP_SIZE": "2"}, "tp_size: 2 is not supported"),
        ({"CP_SIZE": "2"}, "cp_size: 2 is not supported"),
        ({"SP_SIZE": "4"}, "sp_size: 4 is not supported"),
        ({"DP_SHARD_SIZE": "0"}, "dp_shard_size: 0 must be 1 or more"),
        ({"DP_REPLICATE_SIZE": "two"}, "dp_replicate_size: two is no whole number"),
    ],
)
def test_a_mesh_that_cannot_be(monkeypatch, changes, words):
    for name, value in HYBRID.items():
        monkeypatch.setenv(name, value)
    for name, value in changes.items():
        monkeypatch.setenv(f"PARALLELISM_CONFIG_{name}", value)

    def both():
        read_fsdp_settings()
        check_mesh(4)

    with pytest.raises(FsdpSettingError, match=words):
        both()


def test_ranks_that_are_not_those_of_the_mesh(tmp_path):
    with pytest.raises(RankError, match="dp_shard_size") as caught:
        run_ranks(placed, tmp_path, world_size=2, environment=HYBRID)
    assert caught.value.kind == "FsdpSettingError"
