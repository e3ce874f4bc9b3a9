"""Two ranks under NCCL beside one: the same run, sharded or not, in bfloat16 and in 4 bits.

On two GPUs, or on one that both ranks use, which NCCL allows from 2.31 on if it is told to.

Run: python -m pytest -s tests/gpu/test_two_gpus.py
     NCCL_MULTI_RANK_GPU_ENABLE=1 python -m pytest -s tests/gpu/test_two_gpus.py
"""

import importlib.util
import itertools
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
RUNS = [
    (kind, *placed)
    for kind, placed in itertools.product(["float32", "bfloat16", "4bit"], PLACED)
    if kind != "4bit" or (placed[0] != "2" and importlib.util.find_spec("bitsandbytes"))
]
# Rows are packed otherwise on two GPUs: bfloat16 rounds otherwise.
TOLERANCE = {"float32": 1e-4, "bfloat16": 0.03, "4bit": 1e-3}


def base_of(kind, base):
    if kind == "4bit":
        return {"base": base, "streamed": True, "load_in_4bit": True}
    return {"dtype": getattr(torch, kind)}


def alone(folder, base, chat):
    """One GPU, without FSDP."""
    kinds = dict.fromkeys(kind for kind, *_ in RUNS)
    runs = {kind: toy_run(folder / kind, **ALONE, **base_of(kind, base)) for kind in kinds}
    return {
        "runs": runs,
        "whole": first_part(folder / "whole", ALONE, None),
        "written": train_recipe("generation", chat, folder / "written"),
    }


def together(folder, base, chat):
    """A rank of two."""
    runs = {}
    for kind, resident, step in RUNS:
        options = {**SHARED, **base_of(kind, base), "resident_layers": resident, "step": step}
        name = f"{kind}-{resident}-{step}"
        runs[kind, resident, step] = toy_run(folder / name, **options)
    return {
        "runs": runs,
        "written": train_recipe("generation", chat, folder / "written"),
    }


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What one GPU found, and what each of two."""
    folder = tmp_path_factory.mktemp("two_gpus")
    base, chat = save_base(folder / "base"), save_chat_model(folder / "chat")
    [one] = run_ranks(alone, folder / "one", base, chat, world_size=1)
    return one, run_ranks(together, folder / "two", base, chat, environment=FSDP)


@pytest.mark.parametrize(("kind", "resident", "step"), RUNS)
def test_the_same_run(found, kind, resident, step):
    """Losses and metrics of one GPU; adapters equal on both ranks, bit for bit."""
    one, two = found[0]["runs"][kind], [rank["runs"][kind, resident, step] for rank in found[1]]
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


def test_texts_are_written_under_fsdp(found):
    """And are those of one GPU."""
    for rank in found[1]:
        assert rank["written"]["written"] == found[0]["written"]["written"]
        assert rank["written"]["metrics"] == pytest.approx(found[0]["written"]["metrics"], abs=1e-4)


@pytest.mark.parametrize("reshard", ["true", "false"])
def test_gathers_are_captured(tmp_path, reshard):
    """What NCCL gathers in a graph is what is there: the losses of steps launched one by one."""
    environment = FSDP | {"FSDP_RESHARD_AFTER_FORWARD": reshard}
    losses = [
        run_ranks(steps_of, tmp_path / step, step, environment=environment)[0]
        for step in ("fused", "graph")
    ]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


def steps_of(folder, step):
    """Of rows of many lengths; their losses."""
    options = {"resident_layers": "none", "num_train_epochs": 12, "learning_rate": 1e-3}
    trainer = toy_trainer(folder, **SHARED, **options, step=step)
    assert why_gathers_not_captured(trainer.args.device) is None
    trainer.train()
    trainer.adapter.check_equal()
    return [log["loss"] for log in trainer.state.log_history if "loss" in log]


def test_resumed_on_another_number_of_gpus(found, tmp_path):
    """2, 1 and 2 GPUs, changed within epochs."""
    run_ranks(first_part, tmp_path, SHARED, 4, environment=FSDP)
    run_ranks(middle_part, tmp_path, ALONE, 8, world_size=1)
    last = run_ranks(part, tmp_path, SHARED, environment=FSDP)[0]["losses"]
    assert last == pytest.approx(found[0]["whole"]["losses"], rel=1e-4)
