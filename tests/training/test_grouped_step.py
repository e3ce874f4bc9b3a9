"""Several adapters in one pass of fixed shapes: each as if it were alone.

On a CPU everything is launched that a GPU replays as CUDA graphs.

Run: python -m pytest tests/training/test_grouped_step.py
"""

import re

import numpy as np
import pytest
import torch

from lora_fsdp.training.saving.state_file import read_state, write_state
from tests.support.several import DIFFERENT, parameters_of, several
from tests.support.tiny import toy_table

#: Whose parts stay of one size, whatever their rows.
ALIKE = {f"seed-{seed}": {"seed": seed, "num_train_epochs": 1} for seed in range(3)}
_ONE_OF_ALIKE = "seed-1"


def with_each(members, **settings):
    return {name: own | settings for name, own in members.items()}


def differences(one, other):
    """Of each adapter, relative, the largest of all its matrices."""
    return {
        name: max(
            float(np.linalg.norm(value - other[name][key]) / np.linalg.norm(value))
            for key, value in own.items()
        )
        for name, own in one.items()
    }


def assert_same_bits(one, other, *, names):
    for name in names:
        assert one[name].keys() == other[name].keys()
        for key, value in one[name].items():
            np.testing.assert_array_equal(value, other[name][key], err_msg=f"{name} {key}")


@pytest.mark.parametrize(
    ("kind", "targets", "optimizer", "tolerance"),
    [
        ("llama", None, "sgd", 1e-6),
        ("llama", ["q_proj", "v_proj"], "sgd", 1e-6),
        ("gpt2", ["c_attn", "c_proj"], "sgd", 1e-6),
        # It divides each number by its own size, so the smallest gradients' rounding counts too.
        ("qwen3", ["k_proj"], "adamw_torch_fused", 1e-4),
    ],
)
def test_each_adapter_equals_what_it_is_part_by_part(kind, targets, optimizer, tolerance, tmp_path):
    """And so its run alone (`test_adapters_together`)."""
    members = with_each(DIFFERENT, optim=optimizer)
    if targets is not None:
        members = with_each(members, target_modules=targets, fan_in_fan_out=kind == "gpt2")
    by_part, grouped = (several(tmp_path, members, kind=kind, grouped=g) for g in (False, True))
    assert bool(grouped.grouped.grouped.layers) == (kind != "gpt2")
    for one in (by_part, grouped):
        one.train()
    found = differences(parameters_of(by_part), parameters_of(grouped))
    assert all(difference <= tolerance for difference in found.values()), found
    assert grouped.passes == by_part.passes
    # Where only attention is adapted, padding is left out of the rest.
    assert any(size.rows for size in grouped.grouped.sizes) == (
        kind != "gpt2" and targets is not None
    )
    for mine, its in zip(grouped.members, by_part.members, strict=True):
        assert mine.step == its.step == its.last == len(mine.log)
        for one, other in zip(mine.log, its.log, strict=True):
            assert one == pytest.approx(other, rel=2e-5)


def test_gradients_are_those_of_each_part_by_itself(tmp_path):
    """Also in steps of several sequences, of which some adapters have fewer."""
    members = DIFFERENT | {"one": DIFFERENT["one"] | {"per_device_train_batch_size": 24}}
    by_part, grouped = (
        several(tmp_path, members, grouped=g, max_tokens_per_row=128) for g in (False, True)
    )
    # A step made, so that no B is zero.
    assert grouped.make_step(grouped.members)
    grouped.settle()
    parameters = parameters_of(grouped)
    for member in by_part.members:
        for name, value in member.adapter.parameters.items():
            found = parameters[member.plan.name][name.replace(member.adapter_name, "default")]
            value.data.copy_(torch.from_numpy(found))
    shares = [member.share() for member in by_part.members]
    assert len({len(share.sequences) for share in shares}) > 1
    losses = by_part.gradients(by_part.members)
    torch.testing.assert_close(grouped.grouped.gradients(shares), losses)
    for mine, its in zip(grouped.members, by_part.members, strict=True):
        expected = its.adapter.gradients
        difference = mine.adapter.gradients - expected
        assert expected.norm() > 0
        assert difference.norm() <= 1e-6 * expected.norm()


@pytest.fixture(scope="module")
def alike(tmp_path_factory):
    found = several(tmp_path_factory.mktemp("alike"), ALIKE, grouped=True)
    found.train()
    return found


def test_other_rows_of_one_leave_the_others_as_they_are_to_the_bit(alike, tmp_path):
    other = several(tmp_path, ALIKE, tables={_ONE_OF_ALIKE: toy_table(24, seed=77)}, grouped=True)
    other.train()
    assert alike.grouped.sizes == other.grouped.sizes
    before, after = parameters_of(alike), parameters_of(other)
    assert_same_bits(before, after, names=["seed-0", "seed-2"])
    changed = before[_ONE_OF_ALIKE], after[_ONE_OF_ALIKE]
    assert any((changed[0][key] != value).any() for key, value in changed[1].items())


def test_one_that_diverges_stops_alone_and_keeps_its_last_finite_values(alike, tmp_path, caplog):
    diverging = {"learning_rate": 1e38, "num_train_epochs": 3}
    members = {**ALIKE, _ONE_OF_ALIKE: ALIKE[_ONE_OF_ALIKE] | diverging}
    found = several(tmp_path, members, grouped=True)
    found.train()
    stopped = found.members[1]
    assert re.search(r"not finite at step [2-9] of 9", stopped.stopped)
    assert stopped.step == int(re.search(r"step (\d)", stopped.stopped)[1]) - 1
    assert stopped.step == len(stopped.log)
    [steps] = {float(one["step"]) for one in stopped.optimizer.state.values()}
    assert steps == stopped.step
    assert "seed-1 stops: its" in caplog.text
    assert_same_bits(parameters_of(alike), parameters_of(found), names=["seed-0", "seed-2"])


def test_updates_are_those_of_each_ones_own_optimizer(tmp_path):
    settings = with_each(DIFFERENT, weight_decay=0.1, max_grad_norm=0.5)
    settings["two"] |= {"adam_beta2": 0.9, "max_grad_norm": 0.0, "adam_epsilon": 1e-3}
    grouped = several(tmp_path, settings, grouped=True)
    assert grouped.make_step(grouped.members)  # whose state is taken over in the next ones
    grouped.settle()
    own = []
    for one in grouped.members:
        values = {n: p.detach().clone() for n, p in one.adapter.parameters.items()}
        own.append(values)
        optimizer = type(one.optimizer)(list(values.values()))
        write_state(tmp_path / "state", one.optimizer.state_dict())
        optimizer.load_state_dict(read_state(tmp_path / "state"))
        for name, value in values.items():
            value.grad = torch.randn(value.shape)
            one.adapter.parameters[name].grad.copy_(value.grad)
        limit = one.plan.args.max_grad_norm
        if limit:
            torch.nn.utils.clip_grad_norm_(list(values.values()), limit)
        optimizer.step()
    grouped.grouped._updates()
    for values, one in zip(own, grouped.members, strict=True):
        for name, value in values.items():
            torch.testing.assert_close(
                one.adapter.parameters[name].detach(), value, rtol=1e-6, atol=1e-8
            )


def test_resuming_gives_the_same_bits(alike, tmp_path):
    several(tmp_path, ALIKE, grouped=True, save_strategy="steps", save_steps=2).train()
    resumed = several(tmp_path, ALIKE, grouped=True)
    resumed.train(resume=True)
    assert resumed.passes == alike.passes - 2
    assert_same_bits(parameters_of(alike), parameters_of(resumed), names=ALIKE)
    assert [one.log for one in resumed.members] == [one.log for one in alike.members]


def test_scoring_computes_as_before_training(alike):
    """What a grouped pass changed on the model is at work in such a pass only."""
    member = alike.members[0]
    sequence = member.share().sequences[0]
    with torch.no_grad(), alike.only(member):
        found = alike.packed.label_log_probs(sequence)
    [expected] = alike.shared.label_log_probs([sequence], [member.adapter_name])
    torch.testing.assert_close(found, expected)
    alike.packed.undo()
    assert not str(alike.packed.patches)
