"""The FSDP status: its counts are those of the live model.

Run: python -m pytest tests/distributed/test_status.py
"""

import pytest
import torch

from lora_fsdp.adapter.ownership import trainable_parameters
from lora_fsdp.distributed.status import fsdp_status
from tests.support.ranks import launch_environment, run_ranks
from tests.support.runs import toy_trainer
from tests.support.tiny import tiny_model


def sizes():
    return sum(p.numel() for p in tiny_model().parameters())


def test_one_process_without_fsdp(tmp_path):
    trainer = toy_trainer(tmp_path)
    status = fsdp_status(trainer.model)
    [rank] = status.ranks
    adapter = sum(p.numel() for p in trainable_parameters(trainer.model).values())
    assert status.groups == {}
    assert rank.base_parameters == status.base_parameters == sizes()
    assert rank.base_bytes == 4 * sizes()
    assert (rank.adapter_parameters, rank.adapter_bytes) == (adapter, 4 * adapter)
    assert (rank.rank, rank.device) == (0, "cpu")
    assert (status.base_dtype, status.adapter_dtype) == ("float32", "float32")
    text = str(status)
    assert "1 process(es)" in text
    assert "whole on every rank" in text


def test_bf16_base(tmp_path):
    status = fsdp_status(toy_trainer(tmp_path, dtype=torch.bfloat16).model)
    assert status.base_dtype == "bfloat16"
    assert status.adapter_dtype == "float32"
    assert status.ranks[0].base_bytes == 2 * sizes()


def status_of(folder, kind):
    return fsdp_status(toy_trainer(folder, kind=kind).model)


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("kind", "groups"),
    [
        (
            "llama",
            {"LlamaForCausalLM": 1, "LlamaDecoderLayer": 3, "Embedding": 1, "Linear": 1},
        ),
        ("llama-tied", {"LlamaForCausalLM": 1, "LlamaDecoderLayer": 3}),
    ],
)
def test_two_ranks(tmp_path, kind, groups):
    environment = launch_environment("fsdp2_cpu.yaml")
    first, second = run_ranks(status_of, tmp_path, kind, environment=environment)
    assert first == second
    assert [rank.rank for rank in first.ranks] == [0, 1]
    assert first.groups == groups
    whole = sum(p.numel() for p in tiny_model(kind).parameters())
    assert first.base_parameters == whole
    assert sum(rank.base_parameters for rank in first.ranks) == whole
    assert sum(rank.base_bytes for rank in first.ranks) == 4 * whole
    assert first.ranks[0].base_parameters == whole // 2
    assert first.ranks[0].adapter_parameters == first.ranks[1].adapter_parameters > 0
    text = str(first)
    assert "2 process(es)" in text
    assert "3 x LlamaDecoderLayer" in text
    assert "replicated on every rank" in text


@pytest.mark.distributed
def test_two_ranks_without_fsdp(tmp_path):
    first, _ = run_ranks(status_of, tmp_path, "llama")
    assert first.groups == {}
    assert [rank.base_parameters for rank in first.ranks] == [first.base_parameters] * 2
