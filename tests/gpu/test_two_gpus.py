"""Several ranks under NCCL beside one: the same run, sharded or not, in bfloat16 and in 4 bits.

On two, four and eight GPUs, each number where there are so many; two ranks also on a GPU that both
use, which NCCL allows from 2.31 on if it is told to.

Run: python -m pytest -s tests/gpu/test_two_gpus.py
     python -m pytest -s tests/gpu/test_two_gpus.py -k 4-ranks
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

pytestmark = [pytest.mark.gpu, pytest.mark.distributed]
FSDP = launch_environment("fsdp2.yaml")
GPUS = torch.cuda.device_count()
EXAMPLES = 8  # of a step
ALONE = {"per_device_train_batch_size": EXAMPLES}


def enough(ranks):
    """Whether so many ranks can meet here."""
    return ranks <= GPUS or (ranks == 2 and GPUS and "NCCL_MULTI_RANK_GPU_ENABLE" in os.environ)


RANKS = [
    pytest.param(
        ranks,
        id=f"{ranks}-ranks",
        marks=pytest.mark.skipif(
            not enough(ranks), reason=f"needs {ranks} CUDA GPUs, and {GPUS} are here"
        ),
    )
    for ranks in (2, 4, 8)
]
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


def shared(ranks):
    """A step's examples, divided among so many ranks."""
    return {"per_device_train_batch_size": EXAMPLES // ranks}


def together(folder, kind, base, ranks):
    """A rank of several; every placement in turn."""
    runs = {}
    for resident, step in PLACED:
        placed = {"resident_layers": resident, "step": step}
        options = {**shared(ranks), **base_of(kind, base), **placed}
        runs[resident, step] = toy_run(folder / f"{resident}-{step}", **options)
    return runs


@pytest.fixture(scope="module", params=KINDS)
def one_gpu(request, tmp_path_factory):
    """The kind of base, a folder with one, and what one GPU found."""
    folder = tmp_path_factory.mktemp(request.param)
    base = save_base(folder / "base")
    [one] = run_ranks(alone, folder / "one", request.param, base, world_size=1)
    return request.param, base, one


@pytest.fixture(scope="module", params=RANKS)
def ranks(request):
    """How many."""
    return request.param


@pytest.fixture(scope="module")
def found(ranks, one_gpu, tmp_path_factory):
    """The kind of base, what one GPU found, and what each of several ranks."""
    kind, base, one = one_gpu
    folder = tmp_path_factory.mktemp(f"{kind}-{ranks}")
    several = run_ranks(together, folder, kind, base, ranks, world_size=ranks, environment=FSDP)
    return kind, one, several


@pytest.mark.parametrize(("resident", "step"), PLACED)
def test_the_same_run(found, resident, step):
    """Losses and metrics of one GPU; adapters equal on all ranks, bit for bit."""
    kind, one, ranks = found
    several = [rank[resident, step] for rank in ranks]
    first, tolerance = several[0], TOLERANCE[kind]
    assert [rank["step"] for rank in several] == [step] * len(several)
    assert first["losses"] == pytest.approx(one["losses"], rel=tolerance)
    assert first["losses"][-1] < first["losses"][0]
    assert first["metrics"]["eval_loss"] == pytest.approx(
        one["metrics"]["eval_loss"], rel=tolerance
    )
    assert first["adapter"].keys() == one["adapter"].keys()
    for other in several[1:]:
        assert other["metrics"] == first["metrics"]
        for name, values in first["adapter"].items():
            assert np.array_equal(values, other["adapter"][name]), name
    if kind == "float32":
        assert first["metrics"] == pytest.approx(one["metrics"], rel=tolerance)
    print(
        f"\n{kind}, {resident} resident, {step}: {one['losses']}, by {len(several)} "
        f"{first['losses']}"
    )


def test_texts_are_written_under_fsdp(tmp_path, ranks):
    """And are those of one GPU."""
    chat = save_chat_model(tmp_path / "chat")
    [one] = run_ranks(train_recipe, "generation", chat, tmp_path / "one", world_size=1)
    several = run_ranks(
        train_recipe,
        "generation",
        chat,
        tmp_path / "several",
        world_size=ranks,
        environment=FSDP,
    )
    for rank in several:
        assert rank["written"] == one["written"]
        assert rank["metrics"] == pytest.approx(one["metrics"], abs=1e-4)


@pytest.mark.parametrize("reshard", ["true", "false"])
def test_gathers_are_captured(tmp_path, reshard, ranks):
    """What NCCL gathers in a graph is what is there: the losses of steps launched one by one."""
    environment = FSDP | {"FSDP_RESHARD_AFTER_FORWARD": reshard}
    fused, graph = (
        run_ranks(steps_of, tmp_path / step, step, ranks, world_size=ranks, environment=environment)
        for step in ("fused", "graph")
    )
    assert graph[0]["losses"] == pytest.approx(fused[0]["losses"], rel=1e-5)
    # Ranks' sequences are padded to one size, so it may be a single one.
    assert graph[0]["captured"]
    assert all(rank["captured"] == graph[0]["captured"] for rank in graph)
    assert any(rank["rows"] != graph[0]["rows"] for rank in graph)


def steps_of(folder, step, ranks):
    """Of rows of many lengths: their losses, and what was captured for them."""
    options = {"resident_layers": "none", "num_train_epochs": 12, "learning_rate": 1e-3}
    trainer = toy_trainer(folder, **shared(ranks), **options, step=step)
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


def test_resumed_on_another_number_of_gpus(tmp_path, ranks):
    """N, 1 and N / 2 GPUs (of two: two), changed within epochs."""
    last = max(2, ranks // 2)
    [whole] = run_ranks(first_part, tmp_path / "whole", ALONE, None, world_size=1)
    folder = tmp_path / "parts"
    run_ranks(first_part, folder, shared(ranks), 4, world_size=ranks, environment=FSDP)
    run_ranks(middle_part, folder, ALONE, 8, world_size=1)
    ended = run_ranks(part, folder, shared(last), world_size=last, environment=FSDP)
    assert ended[0]["losses"] == pytest.approx(whole["losses"], rel=1e-4)
