"""Several adapters at once: each as if it were alone.

Run: python -m pytest tests/training/test_adapters_together.py
"""

import re

import numpy as np
import pytest
from transformers import set_seed

from lora_fsdp import LoraTrainer
from lora_fsdp.adapter.ownership import trainable_parameters
from lora_fsdp.errors import (
    ArgumentError,
    DamagedCheckpointError,
    ResumeMismatchError,
    TrainingInterrupted,
)
from lora_fsdp.training.watching import interruption
from tests.support.ranks import launch_environment, run_ranks
from tests.support.several import DIFFERENT, parameters_of, several, toy_encoder, toy_plan
from tests.support.tiny import tiny_model, tiny_tokenizer, toy_table

FSDP = launch_environment("fsdp2_cpu.yaml")


def train_alone(output_dir, name):
    """By the library's trainer."""
    encoder = toy_encoder()
    plan = toy_plan(encoder, name, output_dir, step="eager", **DIFFERENT[name])
    base = tiny_model()
    set_seed(plan.args.seed)
    trainer = LoraTrainer(
        model=base,
        args=plan.args,
        task=encoder.task,
        processing_class=tiny_tokenizer(),
        train_dataset=[example.example for example in plan.train],
        peft_config=plan.config,
        max_length=128,
    )
    trainer.train()
    return trainer


def train_on_ranks(output_dir, batch_size, members, resume=False, **common):
    """All adapters with so many examples a rank and step; what a test may want to compare."""
    together = several(
        output_dir,
        {n: s | {"per_device_train_batch_size": batch_size} for n, s in members.items()},
        **common,
    )
    together.train(resume=resume)
    return {
        "parameters": parameters_of(together),
        "losses": {m.plan.name: [entry["loss"] for entry in m.log] for m in together.members},
        "fingerprint": together.adapters.fingerprint(),
        "passes": together.passes,
        "stopped": {m.plan.name: m.stopped for m in together.members},
    }


def assert_same_bits(one, other, *, names=DIFFERENT):
    for name in names:
        assert one[name].keys() == other[name].keys()
        for key, value in one[name].items():
            np.testing.assert_array_equal(value, other[name][key], err_msg=f"{name} {key}")


@pytest.fixture(scope="module")
def together(tmp_path_factory):
    found = several(tmp_path_factory.mktemp("together"))
    found.train()
    return found


@pytest.mark.parametrize("name", DIFFERENT)
def test_each_adapter_equals_its_run_alone(name, together, tmp_path):
    """1e-6 is what is promised; on one thread it is the same bits."""
    trainer = train_alone(tmp_path, name)
    alone = {key: value.detach() for key, value in trainable_parameters(trainer.model).items()}
    found = parameters_of(together)[name]
    assert alone.keys() == found.keys()
    for key, value in alone.items():
        difference = np.linalg.norm(value.numpy() - found[key])
        assert difference <= 1e-6 * np.linalg.norm(value.numpy()), key
    history = [entry for entry in trainer.state.log_history if "loss" in entry]
    [member] = [one for one in together.members if one.plan.name == name]
    assert member.step == trainer.state.global_step == len(history) == len(member.log)
    for mine, its in zip(member.log, history, strict=True):
        for key in ("loss", "grad_norm", "learning_rate", "epoch"):
            assert mine[key] == pytest.approx(its[key], rel=1e-5), key


def test_the_base_is_run_once_a_step_for_all(together):
    assert together.passes == max(member.last for member in together.members)


def test_other_rows_of_one_leave_the_others_as_they_are_to_the_bit(together, tmp_path):
    other = several(tmp_path, tables={"two": toy_table(24, seed=77)})
    other.train()
    before, after = parameters_of(together), parameters_of(other)
    assert_same_bits(before, after, names=["one", "three"])
    assert any((before["two"][key] != value).any() for key, value in after["two"].items())


def test_one_that_diverges_stops_alone_and_is_named(together, tmp_path, caplog):
    members = {**DIFFERENT, "two": DIFFERENT["two"] | {"learning_rate": 1e38, "warmup_steps": 0}}
    found = several(tmp_path, members)
    found.train()
    one, two, three = found.members
    assert two.stopped is not None
    assert re.search(r"not finite at step [2-9] of 8", two.stopped)
    assert "two stops: its" in caplog.text
    assert "The others go on" in caplog.text
    for other in (one, three):
        assert other.stopped is None
        assert other.step == other.last
    assert_same_bits(parameters_of(together), parameters_of(found), names=["one", "three"])


def test_a_checkpoint_holds_all_and_resuming_is_exact(together, tmp_path):
    # One of them is finished by then.
    interrupted = several(tmp_path, save_strategy="steps", save_steps=7)
    interrupted.train()
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-7"]
    resumed = several(tmp_path, save_strategy="steps", save_steps=7)
    resumed.train(resume=True)
    assert resumed.passes == 2  # steps 8 and 9
    assert_same_bits(parameters_of(together), parameters_of(resumed))
    assert [m.log for m in resumed.members] == [m.log for m in together.members]


def test_a_checkpoint_of_other_adapters_is_refused(tmp_path):
    several(tmp_path, save_strategy="steps", save_steps=5).train()
    other = {**DIFFERENT, "two": DIFFERENT["two"] | {"learning_rate": 1e-4}}
    with pytest.raises(ResumeMismatchError, match=r"two: --learning_rate \(0.003 in the"):
        several(tmp_path, other).train(resume=True)
    state = next(tmp_path.glob("checkpoint-5/adapters_state*"))
    state.write_bytes(state.read_bytes()[:-4])
    with pytest.raises(DamagedCheckpointError, match="no whole checkpoint"):
        several(tmp_path).train(resume=True)


def test_a_stop_that_is_asked_for_leaves_a_checkpoint(together, tmp_path, monkeypatch):
    monkeypatch.setattr(interruption, "POLL_SECONDS", 0.001)
    asked = several(tmp_path, max_hours=1e-7)
    with pytest.raises(TrainingInterrupted, match=r"3 adapters stopped after step \d"):
        asked.train()
    assert len(list(tmp_path.glob("checkpoint-*"))) == 1
    resumed = several(tmp_path)
    resumed.train(resume=True)
    assert_same_bits(parameters_of(together), parameters_of(resumed))


def test_adapters_without_rows_are_refused(tmp_path):
    with pytest.raises(ArgumentError, match="no training examples"):
        several(tmp_path, {"one": {"rows": []}})


@pytest.mark.distributed
def test_two_ranks_train_the_same(tmp_path):
    members = {name: dict(DIFFERENT[name]) for name in DIFFERENT}
    [one] = run_ranks(train_on_ranks, tmp_path / "one", 6, members, world_size=1)
    for environment, name in ((FSDP, "sharded"), (None, "whole")):
        ranks = run_ranks(train_on_ranks, tmp_path / name, 3, members, environment=environment)
        assert ranks[0]["fingerprint"] == ranks[1]["fingerprint"]
        assert ranks[0]["passes"] == one["passes"]
        for member, losses in one["losses"].items():
            np.testing.assert_allclose(ranks[0]["losses"][member], losses, rtol=2e-5)
