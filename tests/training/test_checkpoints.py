"""Saving, resuming and the best checkpoint, under FSDP2 on two ranks.

Run: python -m pytest tests/training/test_checkpoints.py
"""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from peft import PeftModel
from safetensors.numpy import load_file

from lora_fsdp.adapter.saved import adapter_state
from lora_fsdp.errors import AdapterVerificationError
from tests.support.ranks import RankError, launch_environment, run_ranks
from tests.support.runs import toy_run, toy_trainer
from tests.support.tiny import tiny_model

pytestmark = pytest.mark.distributed

FSDP = launch_environment("fsdp2_cpu.yaml")
BASE = {"per_device_train_batch_size": 4, "num_train_epochs": 3}


def run(output_dir, options):
    return toy_run(output_dir, **BASE | options)


@pytest.mark.parametrize("state_dict_type", ["FULL_STATE_DICT", "SHARDED_STATE_DICT"])
def test_saved_is_live_and_small(tmp_path, state_dict_type):
    environment = FSDP | {"FSDP_STATE_DICT_TYPE": state_dict_type}
    options = {"save_strategy": "steps", "save_steps": 4}
    result = run_ranks(run, tmp_path, options, environment=environment)[0]
    saved = load_file(tmp_path / "final" / "adapter_model.safetensors")
    assert saved.keys() == result["adapter"].keys()
    for name, tensor in saved.items():
        np.testing.assert_array_equal(tensor, result["adapter"][name])
    assert all(np.any(saved[name]) for name in saved if "lora_B" in name)
    # Nothing of the base in any checkpoint: all of one is adapter, Adam's two moments, and state.
    adapter = sum(tensor.nbytes for tensor in saved.values())
    written = sum(
        file.stat().st_size
        for file in (tmp_path / "checkpoint-4").iterdir()
        if file.suffix in {".safetensors", ".pt", ".bin", ".pth"}
    )
    assert written < 3 * adapter + 300_000
    assert not list(tmp_path.rglob("pytorch_model*"))


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A run without checkpoints: its folder and its result."""
    folder = tmp_path_factory.mktemp("plain")
    return folder, run_ranks(run, folder, {}, environment=FSDP)[0]


def test_peft_alone_loads_it(plain):
    folder, result = plain
    loaded = PeftModel.from_pretrained(tiny_model(), str(folder / "final"))
    for name, tensor in adapter_state(loaded).items():
        np.testing.assert_array_equal(tensor.numpy(), result["adapter"][name])


@pytest.fixture(scope="module", params=[0.0, 0.3], ids=lambda dropout: f"dropout {dropout}")
def uninterrupted(request, tmp_path_factory):
    """Three epochs of three steps, saved at every step; the folder, the options and the result."""
    options = {"save_strategy": "steps", "save_steps": 1, "dropout": request.param}
    folder = tmp_path_factory.mktemp("whole")
    return folder, options, run_ranks(run, folder, options, environment=FSDP)[0]


@pytest.mark.parametrize("stop", [3, 4, 5], ids=["mid-epoch", "later", "second-epoch"])
def test_resumed_run_equals_uninterrupted_run(tmp_path, uninterrupted, stop):
    """From what there was after step `stop`; test_resume.py has runs that really end there."""
    folder, options, whole = uninterrupted
    for step in range(1, stop + 1):
        shutil.copytree(folder / f"checkpoint-{step}", tmp_path / "cut" / f"checkpoint-{step}")
    resume = options | {"resume": True}
    resumed = run_ranks(run, tmp_path / "cut", resume, environment=FSDP)[0]
    assert resumed["steps"] == whole["steps"] == 9
    assert resumed["losses"] == whole["losses"]
    assert resumed["fingerprint"] == whole["fingerprint"]
    assert resumed["metrics"] == whole["metrics"]


def test_best_checkpoint_by_the_tasks_metric(tmp_path):
    options = {
        "save_strategy": "steps",
        "eval_strategy": "steps",
        "save_steps": 2,
        "eval_steps": 2,
        "load_best_model_at_end": True,
        "metric_for_best_model": "macro_f1",
        "greater_is_better": True,
        "save_total_limit": 1,
    }
    results = run_ranks(run, tmp_path, options, environment=FSDP)
    scores = {
        entry["step"]: entry["eval_macro_f1"]
        for entry in results[0]["history"][:-1]
        if "eval_macro_f1" in entry
    }
    # One confusion matrix an evaluation, of all 13 held-out rows (the last is `toy_run`'s own).
    assert results[0]["confusion"] == results[1]["confusion"] == dict.fromkeys((2, 4, 6, 8, 9), 13)
    best = max(scores.values())
    assert results[0]["metrics"]["eval_macro_f1"] == best
    first_best = min(step for step, score in scores.items() if score == best)
    assert results[0]["best"].endswith(f"checkpoint-{first_best}")
    saved = load_file(Path(results[0]["best"]) / "adapter_model.safetensors")
    for rank in results:
        for name, tensor in saved.items():
            np.testing.assert_array_equal(rank["adapter"][name], tensor)


def test_evaluation_reports_every_label(plain):
    folder, result = plain
    metrics = result["metrics"]
    for name in ("eval_loss", "eval_accuracy", "eval_macro_f1", "eval_f1/positive"):
        assert name in metrics
    arguments = json.loads((folder / "final" / "training_args.json").read_text())
    assert arguments["per_device_train_batch_size"] == 4
    assert not list(folder.rglob("training_args.bin"))


def frozen_run(output_dir):
    trainer = toy_trainer(output_dir, num_train_epochs=1)
    trainer.adapter.sum_gradients = lambda: [
        p.grad.zero_() for name, p in trainer.adapter.parameters.items() if ".0." in name
    ]
    trainer.train()


def test_adapter_that_does_not_move_stops_the_run(tmp_path):
    with pytest.raises(RankError, match="did not move in the first") as caught:
        run_ranks(frozen_run, tmp_path, world_size=1)
    assert caught.value.kind == AdapterVerificationError.__name__


def drifting_run(output_dir):
    import torch.distributed as dist

    trainer = toy_trainer(output_dir, **BASE | {"num_train_epochs": 1})
    trainer.train()
    if dist.get_rank() == 1:
        next(iter(trainer.adapter.parameters.values())).data += 1e-3
    trainer.save_model(f"{output_dir}/final")


def test_ranks_that_drifted_apart_cannot_save(tmp_path):
    with pytest.raises(RankError, match="differ in the adapter's weights"):
        run_ranks(drifting_run, tmp_path, environment=FSDP)
    assert not (tmp_path / "final").exists()
