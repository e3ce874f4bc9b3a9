"""Two ranks under NCCL beside one: the same run, sharded or not, in bfloat16 and in 4 bits.

On two GPUs, or on one that both ranks use, which NCCL allows from 2.31 on if it is told to.

Run: python -m pytest -s tests/gpu/test_two_gpus.py
     NCCL_MULTI_RANK_GPU_ENABLE=1 python -m pytest -s tests/gpu/test_two_gpus.py
"""

import importlib.util
import os

import numpy as np
import pytest
import torch

from lora_fsdp.distributed.captured_gathers import why_gathers_not_captured
from tests.support.adapters import save_base
from tests.support.built_in import save_chat_model, train_recipe
from tests.support.ranks import launch_environment, run_ranks
from tests.support.runs import toy_run, toy_trainer
from tests.training.test_resume import first_part, middle_part, part

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.distributed,
    pytest.mark.skipif(
        torch.cuda.device_count() < (1 if os.environ.get("NCCL_MULTI_RANK_GPU_ENABLE") else 2),
        reason="needs two CUDA GPUs",
    ),
]
FSDP = launch_environment("fsdp2.yaml")
ALONE, SHARED = {"per_device_train_batch_size": 8}, {"per_device_train_batch_size": 4}
# What is resident, and the step: what gathers, gathers in graphs too.
PLACED = [("none", "fused"), ("none", "graph"), ("2", "fused"), ("2", "graph"), ("all", "graph")]
# Rows are packed otherwise on two GPUs: bfloat16 rounds otherwise.
TOLERANCE = {"float32": 1e-4, "bfloat16": 0.03, "4bit": 1e-3}
needs_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="needs bitsandbytes"
)
KINDS = ["float32", "bfloat16", pytest.param("4bit", marks=needs_bitsandbytes)]


def base_of(kind, base):
    if kind == "4bit":
        return {"base": base, "streamed": True, "load_in_4bit": True}
    return {"dtype": getattr(torch, kind)}


def alone(folder, kind, base):
    """One GPU, without FSDP."""
    return toy_run(folder, **ALONE, **base_of(kind, base))


def together(folder, kind, base):
    """A rank of two; every placement in turn."""
    runs = {}
    for resident, step in PLACED:
        options = {**SHARED, **base_of(kind, base), "resident_layers": resident, "step": step}
        runs[resident, step] = toy_run(folder / f"{resident}-{step}", **options)
    return runs


@pytest.fixture(scope="module", params=KINDS)
def found(request, tmp_path_factory):
    """The kind of base, what one GPU found, and what each rank of two."""
    folder = tmp_path_factory.mktemp(request.param)
    base = save_base(folder / "base")
    [one] = run_ranks(alone, folder / "one", request.param, base, world_size=1)
    two = run_ranks(together, folder / "two", request.param, base, environment=FSDP)
    return request.param, one, two


@pytest.mark.parametrize(("resident", "step"), PLACED)
def test_the_same_run(found, resident, step):
    """Losses and metrics of one GPU; adapters equal on both ranks, bit for bit."""
    kind, one, ranks = found
    two = [rank[resident, step] for rank in ranks]
    tolerance = TOLERANCE[kind]
    assert [rank["step"] for rank in two] == [step] * 2
    assert two[0]["losses"] == pytest.approx(one["losses"], rel=tolerance)
    assert two[0]["losses"][-1] < two[0]["losses"][0]
    assert two[0]["metrics"] == two[1]["metrics"]
    assert two[0]["metrics"]["eval_loss"] == pytest.approx(
        one["metrics"]["eval_loss"], rel=tolerance
    )
    assert two[0]["adapter"].keys() == one["adapter"].keys()
    for name, values in two[0]["adapter"].items():
        assert np.array_equal(values, two[1]["adapter"][name]), name
    if kind == "float32":
        assert two[0]["metrics"] == pytest.approx(one["metrics"], rel=tolerance)
    print(f"\n{kind}, {resident} resident, {step}: {one['losses']}, by two {two[0]['losses']}")


def test_texts_are_written_under_fsdp(tmp_path):
    """And are those of one GPU."""
    chat = save_chat_model(tmp_path / "chat")
    [one] = run_ranks(train_recipe, "generation", chat, tmp_path / "one", world_size=1)
    for rank in run_ranks(train_recipe, "generation", chat, tmp_path / "two", environment=FSDP):
        assert rank["written"] == one["written"]
        assert rank["metrics"] == pytest.approx(one["metrics"], abs=1e-4)


@pytest.mark.parametrize("reshard", ["true", "false"])
def test_gathers_are_captured(tmp_path, reshard):
    """What NCCL gathers in a graph is what is there: the losses of steps launched one by one."""
    environment = FSDP | {"FSDP_RESHARD_AFTER_FORWARD": reshard}
    fused, graph = (
        run_ranks(steps_of, tmp_path / step, step, environment=environment)
        for step in ("fused", "graph")
    )
    assert graph[0]["losses"] == pytest.approx(fused[0]["losses"], rel=1e-5)
    assert graph[0]["captured"] == graph[1]["captured"]
    assert graph[0][
        "captured"
    ]  # ranks' sequences are padded to one size, so it may be a single one
    assert graph[0]["rows"] != graph[1]["rows"]


def steps_of(folder, step):
    """Of rows of many lengths: their losses, and what was captured for them."""
    options = {"resident_layers": "none", "num_train_epochs": 12, "learning_rate": 1e-3}
    trainer = toy_trainer(folder, **SHARED, **options, step=step)
    assert why_gathers_not_captured(trainer.args.device) is None
    rows, run = [], trainer.step.run
    trainer.step.run = lambda row, **others: rows.append(row.size) or run(row, **others)
    trainer.train()
    trainer.adapter.check_equal()
    return {
        "losses": [log["loss"] for log in trainer.state.log_history if "loss" in log],
        "captured": getattr(trainer.step, "captured", []),
        "rows": rows,
    }


def test_resumed_on_another_number_of_gpus(tmp_path):
    """2, 1 and 2 GPUs, changed within epochs."""
    [whole] = run_ranks(first_part, tmp_path / "whole", ALONE, None, world_size=1)
    run_ranks(first_part, tmp_path / "parts", SHARED, 4, environment=FSDP)
    run_ranks(middle_part, tmp_path / "parts", ALONE, 8, world_size=1)
    last = run_ranks(part, tmp_path / "parts", SHARED, environment=FSDP)[0]["losses"]
    assert last == pytest.approx(whole["losses"], rel=1e-4)
