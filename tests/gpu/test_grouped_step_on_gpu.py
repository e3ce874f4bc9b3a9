"""Several adapters in one captured pass against each part by itself, on a GPU.

Run: python -m pytest tests/gpu/test_grouped_step_on_gpu.py
"""

import pytest
import torch
from torch.nn.attention import SDPBackend

from lora_fsdp.training.step import graph_recording
from tests.support.several import DIFFERENT, several
from tests.support.tiny import toy_table
from tests.training.test_grouped_step import ALIKE, differences, with_each

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]


def parameters_of(together):
    return {
        member.plan.name: {
            name.replace(f".{member.adapter_name}.", ".default."): value.detach().cpu().numpy()
            for name, value in member.adapter.parameters.items()
        }
        for member in together.members
    }


@pytest.mark.parametrize(
    ("kind", "targets"),
    [
        ("llama", None),
        ("llama", ["q_proj", "v_proj"]),
        ("qwen3", ["k_proj"]),
        ("gpt2", ["c_attn", "c_proj"]),
    ],
)
def test_captured_steps_give_what_each_part_gives_by_itself(kind, targets, tmp_path):
    members = with_each(DIFFERENT, optim="sgd", num_train_epochs=4)
    if targets is not None:
        members = with_each(members, target_modules=targets, fan_in_fan_out=kind == "gpt2")
    by_part, grouped = (several(tmp_path, members, kind=kind, step=s) for s in ("eager", "auto"))
    assert by_part.grouped is None
    for one in (by_part, grouped):
        one.train()
    assert grouped.grouped.recorder.failed is None
    assert grouped.grouped.recorder.recorded > 1
    found = differences(parameters_of(by_part), parameters_of(grouped))
    assert all(difference <= 1e-5 for difference in found.values()), found
    for mine, its in zip(grouped.members, by_part.members, strict=True):
        assert [one["loss"] for one in mine.log] == pytest.approx(
            [one["loss"] for one in its.log], rel=1e-4
        )


def gradients_of(together, shares):
    together.grouped.gradients(shares)
    return [member.adapter.gradients.clone() for member in together.members]


def test_other_rows_of_one_leave_the_gradients_of_others_to_the_bit(tmp_path, monkeypatch):
    """In parts of the same sizes: with another number of tokens, cuBLAS may round otherwise.

    Fast kernels of attention add in whatever order in their backward, even of equal inputs.
    """
    monkeypatch.setattr(graph_recording, "_ATTENTION", [SDPBackend.MATH])
    together = several(tmp_path, ALIKE)
    for _ in range(2):
        assert together.make_step(together.members)
    together.settle()
    shares = [member.share() for member in together.members]
    for _ in range(3):  # launched, recorded, replayed
        before = gradients_of(together, shares)
    assert together.grouped.recorder.failed is None
    again = gradients_of(together, shares)
    assert all(map(torch.equal, before, again))
    sizes = list(together.grouped.sizes)
    others = several(tmp_path, ALIKE, tables={"seed-1": toy_table(24, seed=77)})
    other = next(
        share
        for share in map(others.members[1].steps.__getitem__, range(3))
        if len(share.sequences[0]) <= sizes[-1].tokens - 1
    )
    after = gradients_of(together, [shares[0], other, shares[2]])
    assert together.grouped.sizes == sizes
    assert torch.equal(before[0], after[0])
    assert torch.equal(before[2], after[2])
    assert not torch.equal(before[1], after[1])


def test_one_that_diverges_stops_alone(tmp_path):
    members = with_each(ALIKE, num_train_epochs=3)
    whole = several(tmp_path, members)
    members["seed-1"] |= {"learning_rate": 1e30}
    diverged = several(tmp_path, members)
    for one in (whole, diverged):
        one.train()
    assert "not finite at step" in diverged.members[1].stopped
    assert all(torch.isfinite(p).all() for p in diverged.members[1].adapter.parameters.values())
    found = differences(parameters_of(whole), parameters_of(diverged))
    assert found["seed-0"] <= 1e-3
    assert found["seed-2"] <= 1e-3
    assert diverged.members[0].log[-1]["loss"] == pytest.approx(
        whole.members[0].log[-1]["loss"], rel=1e-3
    )
