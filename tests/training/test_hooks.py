"""Every hook of the installed Trainer is called, or refused by its name.

Run: python -m pytest tests/training/test_hooks.py
"""

import functools
import inspect
from collections import Counter

import pytest
from transformers import Trainer

from lora_fsdp import LoraTrainer
from lora_fsdp.errors import ArgumentError
from lora_fsdp.training.hooks import UNUSED_ATTRIBUTES, UNUSED_METHODS
from tests.support.runs import toy_trainer
from tests.support.tiny import toy_table

# What the Trainer's owner calls, and a run does not.
FOR_ITS_OWNER = {
    "end",
    "get_learning_rates",
    "get_num_trainable_parameters",
    "get_optimizer_group",
    "hyperparameter_search",
    "log_metrics",
    "metrics_format",
    "pop_callback",
    "save_metrics",
    "save_state",
}
# Called where a run pushes to the Hub.
ON_THE_HUB = {"_push_from_checkpoint", "create_model_card", "init_hf_repo", "push_to_hub"}


def methods():
    """Names of the installed Trainer's methods."""
    names = [name for name in dir(Trainer) if not name.startswith("__")]
    return [name for name in names if callable(getattr(Trainer, name))]


@pytest.fixture(scope="module")
def called(tmp_path_factory):
    """How often each method is called while a run trains, saves, evaluates, predicts, resumes."""
    calls = Counter()

    def counted(name):
        method = inspect.getattr_static(LoraTrainer, name)
        inner = getattr(method, "__func__", method)

        @functools.wraps(inner)
        def call(*arguments, **options):
            calls[name] += 1
            return inner(*arguments, **options)

        return type(method)(call) if isinstance(method, staticmethod | classmethod) else call

    folder = tmp_path_factory.mktemp("run")
    settings = {"rows": 16, "num_train_epochs": 1, "save_strategy": "steps", "save_steps": 1}
    best = {
        "eval_strategy": "steps",
        "eval_steps": 1,
        "load_best_model_at_end": True,
        "metric_for_best_model": "eval_accuracy",
    }
    with pytest.MonkeyPatch.context() as patch:
        for name in methods():
            patch.setattr(LoraTrainer, name, counted(name))
        trainer = toy_trainer(folder, **settings, **best)
        trainer.train()
        trainer.predict(trainer.task.examples(toy_table(4)))
        trainer.save_model()
        toy_trainer(folder, **settings, **best).train(resume_from_checkpoint=True)
    return calls


@pytest.mark.parametrize("name", methods())
def test_every_method_is_called_or_refused(called, name):
    if name in UNUSED_METHODS:
        assert called[name] == 0
        with pytest.raises(ArgumentError, match=rf"Mine\.{name} would never .* Instead, \w+"):
            type("Mine", (LoraTrainer,), {name: lambda self: None})
    else:
        assert called[name] or name in FOR_ITS_OWNER | ON_THE_HUB


def test_no_name_is_refused_that_the_trainer_lost():
    assert set(UNUSED_METHODS) <= set(methods())


def test_a_mixin_is_refused_as_well():
    mixin = type("Weighted", (), {"compute_loss": lambda self, model, inputs: None})
    for bases in ((mixin, LoraTrainer), (LoraTrainer, type("Other", (mixin, Trainer), {}))):
        with pytest.raises(ArgumentError, match=r"Mine\.compute_loss .*\(objective="):
            type("Mine", bases, {})


def test_what_is_called_may_be_overridden(tmp_path):
    class Mine(LoraTrainer):
        def log(self, logs, start_time=None):
            logs["mine"] = 1.0
            super().log(logs, start_time)

    trainer = toy_trainer(tmp_path, rows=8, num_train_epochs=1)
    trainer.__class__ = Mine
    trainer.train()
    assert all(entry["mine"] == 1.0 for entry in trainer.state.log_history)


@pytest.mark.parametrize("name", [*UNUSED_ATTRIBUTES, "compute_loss", "prediction_step"])
@pytest.mark.parametrize("act", ["train", "evaluate", "predict"])
def test_what_is_assigned_and_not_used_is_refused(toys, name, act):
    before = vars(toys).copy()
    setattr(toys, name, lambda *arguments, **options: {})
    given = [toys.task.examples(toy_table(4))] if act == "predict" else []
    with pytest.raises(ArgumentError, match=rf"LoraTrainer\.{name} was assigned.* Instead, "):
        getattr(toys, act)(*given)
    assert toys.state.global_step == 0
    vars(toys).clear()
    vars(toys).update(before)


@pytest.fixture(scope="module")
def toys(tmp_path_factory):
    return toy_trainer(tmp_path_factory.mktemp("toys"), rows=8)


def test_every_argument_of_the_trainer_that_is_assigned_is_known():
    """A newer Trainer's argument is looked at before it is passed over."""
    used = {
        "args",
        "callbacks",
        "eval_dataset",
        "model",
        "optimizer_cls_and_kwargs",
        "optimizers",
        "processing_class",
        "self",
        "train_dataset",
    }
    arguments = set(inspect.signature(Trainer.__init__).parameters)
    assert arguments - used <= set(UNUSED_ATTRIBUTES)
