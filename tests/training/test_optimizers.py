"""Every name of `--optim`: trains and goes on exactly, or is refused before the base is read.

Run: python -m pytest -m "slow or not slow" tests/training/test_optimizers.py
"""

import importlib.util

import numpy as np
import pytest
import torch
from transformers import TrainerCallback
from transformers.training_args import OptimizerNames

from lora_fsdp import FineTuningArguments
from lora_fsdp.adapter.saved import adapter_state
from lora_fsdp.arguments.optimizers import BUILT_IN, PACKAGES, REFUSED
from lora_fsdp.errors import ArgumentError, MissingPackageError
from tests.support.ranks import launch_environment, run_ranks
from tests.support.runs import toy_trainer
from tests.support.tiny import tiny_model

NAMES = [name.value for name in OptimizerNames]
QUICK = {"adamw_torch", "sgd", "adafactor", "adamw_bnb_8bit", "schedule_free_radam"}
WORKING = [
    pytest.param(name, marks=() if name in QUICK else pytest.mark.slow)
    for name in NAMES
    if name not in REFUSED
]


class Stop(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == 2


def run(folder, resume=None, callbacks=(), **settings):
    defaults = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    trainer = toy_trainer(
        folder,
        rows=16,
        per_device_train_batch_size=4,
        callbacks=list(callbacks),
        **{**defaults, **settings},
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_every_name_is_in_one_list():
    listed = [*BUILT_IN, *PACKAGES, *REFUSED]
    assert len(listed) == len(set(listed))
    assert set(NAMES) <= set(listed)


@pytest.mark.parametrize("name", [name for name in NAMES if name in REFUSED])
def test_what_cannot_be_is_refused_by_name(tmp_path, name):
    with pytest.raises(ArgumentError, match=rf"--optim {name} \w+ .*: use adamw_torch_fused"):
        FineTuningArguments(output_dir=str(tmp_path), optim=name)


@pytest.mark.parametrize("name", [name for name in NAMES if name in PACKAGES])
def test_a_missing_package_is_named_as_pip_calls_it(tmp_path, name, monkeypatch):
    found = importlib.util.find_spec
    module, package, _ = PACKAGES[name]
    monkeypatch.setattr(
        "lora_fsdp.arguments.optimizers.find_spec",
        lambda asked: None if asked == module else found(asked),
    )
    with pytest.raises(MissingPackageError, match=rf"--optim {name} .*pip install {package}$"):
        FineTuningArguments(output_dir=str(tmp_path), optim=name)


def test_an_old_package_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("lora_fsdp.arguments.optimizers.version", lambda package: "0.1")
    with pytest.raises(MissingPackageError, match=r"bitsandbytes 0\.50 or newer, and 0\.1 is"):
        FineTuningArguments(output_dir=str(tmp_path), optim="adamw_8bit")


@pytest.mark.parametrize("text", ["momentum", "momentum=0.9,nesterov", "a=b=c"])
def test_arguments_of_the_optimizer_are_pairs(tmp_path, text):
    with pytest.raises(ArgumentError, match="--optim_args must be name=value"):
        FineTuningArguments(output_dir=str(tmp_path), optim="sgd", optim_args=text)


@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
@pytest.mark.parametrize("name", WORKING)
@pytest.mark.slow
def test_it_trains_and_goes_on_exactly(tmp_path, name):
    if name in PACKAGES and importlib.util.find_spec(PACKAGES[name][0]) is None:
        pytest.skip(f"{PACKAGES[name][1]} is not installed")
    # RAdam, schedule-free, begins to move at the sixth step.
    steps = {"max_steps": 8} if name == "schedule_free_radam" else {}
    whole = run(tmp_path / "whole", optim=name, **steps)
    run(tmp_path / "parts", optim=name, callbacks=[Stop()], **steps)
    resumed = run(tmp_path / "parts", resume=True, optim=name, **steps)
    assert losses(resumed) == losses(whole)
    assert resumed.adapter.fingerprint() == whole.adapter.fingerprint()
    assert np.isfinite(losses(whole)).all()


class Averaged(torch.optim.Optimizer):
    """SGD that answers with the mean of all its weights: `train` and `eval` swap them."""

    def __init__(self, params, lr):
        super().__init__(params, {"lr": lr, "steps": 0, "averaged": False})

    def step(self, closure=None):
        for group in self.param_groups:
            assert not group["averaged"], "a step on the averaged weights"
            group["steps"] += 1
            for one in group["params"]:
                one.data.add_(one.grad, alpha=-group["lr"])
                mean = self.state[one].setdefault("other", torch.zeros_like(one))
                mean.lerp_(one.data, 1 / group["steps"])

    def train(self):
        self._swap(averaged=False)

    def eval(self):
        self._swap(averaged=True)

    def _swap(self, *, averaged):
        for group in self.param_groups:
            if group["averaged"] == averaged or not group["steps"]:
                continue
            group["averaged"] = averaged
            for one in group["params"]:
                kept = one.data.clone()
                one.data.copy_(self.state[one]["other"])
                self.state[one]["other"].copy_(kept)


def averaged_run(folder, resume=None, callbacks=(), **settings):
    """As `run`, with the averaging optimizer; and every adapter after a step, as it trains."""
    seen = []

    class Keep(TrainerCallback):
        def on_optimizer_step(self, args, state, control, **kwargs):
            seen.append({k: v.clone() for k, v in adapter_state(kwargs["model"]).items()})

    trainer = toy_trainer(
        folder, rows=16, max_steps=4, per_device_train_batch_size=4, save_strategy="steps",
        save_steps=2, callbacks=[Keep(), *callbacks], **settings,
    )  # fmt: skip
    trainer.optimizer_cls_and_kwargs = (Averaged, {"lr": 0.5})
    trainer.train(resume_from_checkpoint=resume)
    return trainer, seen


def mean_of(adapters):
    return {name: torch.stack([one[name] for one in adapters]).mean(0) for name in adapters[0]}


def assert_close(adapter, expected):
    assert adapter.keys() == expected.keys()
    for name, value in adapter.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-7)


def test_weights_that_answer_are_evaluated_saved_and_left(tmp_path):
    evaluated = {"eval_strategy": "steps", "eval_steps": 1}
    trainer, seen = averaged_run(tmp_path / "a", **evaluated)
    assert_close(adapter_state(trainer.model), mean_of(seen))
    logged = [e["eval_loss"] for e in trainer.state.log_history if "eval_loss" in e]
    assert trainer.evaluate()["eval_loss"] == logged[-1]
    trainer.save_model(str(tmp_path / "final"))
    for folder, adapters in (("a/checkpoint-2", seen[:2]), ("final", seen)):
        from safetensors.torch import load_file

        saved = load_file(tmp_path / folder / "adapter_model.safetensors")
        assert_close(saved, mean_of(adapters))
    # Looking at it more often changes nothing of the training.
    unseen, others = averaged_run(tmp_path / "b")
    for one, other in zip(seen, others, strict=True):
        assert_close(one, other)
    assert unseen.evaluate()["eval_loss"] == pytest.approx(logged[-1], rel=1e-6)


def test_averaged_weights_go_on_exactly(tmp_path):
    whole, _ = averaged_run(tmp_path / "whole")
    averaged_run(tmp_path / "parts", callbacks=[Stop()])
    resumed, _ = averaged_run(tmp_path / "parts", resume=True)
    assert losses(resumed) == losses(whole)
    assert resumed.adapter.fingerprint() == whole.adapter.fingerprint()


def on_a_rank(folder):
    trainer, seen = averaged_run(folder, eval_strategy="steps", eval_steps=1)
    assert_close(adapter_state(trainer.model), mean_of(seen))
    return losses(trainer), trainer.adapter.fingerprint()


@pytest.mark.distributed
def test_two_ranks_average_alike(tmp_path):
    environment = launch_environment("fsdp2_cpu.yaml")
    first, second = run_ranks(on_a_rank, tmp_path / "two", environment=environment)
    assert first == second


@pytest.fixture(scope="module")
def toys(tmp_path_factory):
    return toy_trainer(tmp_path_factory.mktemp("toys"), rows=8)


def test_a_search_is_refused_in_a_sentence(toys):
    with pytest.raises(ArgumentError, match=r"no hyperparameter_search.*: start a run for each"):
        toys.hyperparameter_search(n_trials=2)
    toys.model_init = lambda trial: tiny_model()
    with pytest.raises(ArgumentError, match=r"model_init was assigned.*start a run for each"):
        toys.train()
