"""Several adapters in one captured pass against each part by itself, on a GPU.

Run: python -m pytest tests/gpu/test_grouped_step_on_gpu.py
"""

import pytest
import torch

from tests.support.several import DIFFERENT, several
from tests.support.tiny import toy_table
from tests.training.test_grouped_step import (
    ALIKE,
    assert_same_bits,
    differences,
    with_each,
)

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


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gpt2"])
def test_captured_steps_give_what_each_part_gives_by_itself(kind, tmp_path):
    members = with_each(DIFFERENT, optim="sgd", num_train_epochs=4)
    if kind == "gpt2":
        members = with_each(members, target_modules=["c_attn", "c_proj"], fan_in_fan_out=True)
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


def test_others_are_left_as_they_are_to_the_bit_and_nan_stops_one_alone(tmp_path):
    changes = {
        "none": (ALIKE, {}),
        "rows": (ALIKE, {"seed-1": toy_table(24, seed=77)}),
        "nan": ({**ALIKE, "seed-1": ALIKE["seed-1"] | {"learning_rate": 1e38}}, {}),
    }
    found = {}
    for name, (members, tables) in changes.items():
        members = with_each(members, num_train_epochs=4)
        together = several(tmp_path / name, members, tables=tables)
        together.train()
        assert together.grouped.recorder.failed is None
        found[name] = parameters_of(together)
    assert "not finite at step" in together.members[1].stopped
    for name in ("rows", "nan"):
        assert_same_bits(found["none"], found[name], names=["seed-0", "seed-2"])
