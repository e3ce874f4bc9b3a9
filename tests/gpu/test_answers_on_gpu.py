"""Answers that are right in part, pairs and questions on a real GPU: fused and captured as eager.

Run: python -m pytest tests/gpu/test_answers_on_gpu.py
"""

import pytest
import torch

from lora_fsdp.compute.packed_model import PackedModel
from lora_fsdp.data.packing import plan_packs
from lora_fsdp.training.step.captured import CapturedStep
from lora_fsdp.training.step.eager import EagerStep
from lora_fsdp.training.step.objectives.choice import objective_of
from tests.compute.test_decoder_layer import adapted
from tests.gpu.test_fast_step_on_gpu import GPU, fused, step_of
from tests.training.test_answer_objectives import CASES, encoded_rows

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("name", CASES)
def test_captured_gradients_are_the_plain_ones(name, smoothing) -> None:
    task, encoded = encoded_rows(name)
    objective = objective_of(task, {"label_smoothing_factor": smoothing})
    trees = [objective.tree(example) for example in encoded]
    some = [pack.lay() for pack in plan_packs(trees, max_tokens=300, share_prefix=True)]
    assert len(some) > 1
    denominator = sum(objective.count(example) for example in encoded)

    def gradients(step):
        loss = step(some, denominator=denominator)
        return loss.item(), step.adapter.copy_gradients()

    plain = PackedModel(adapted("llama").to(GPU))
    expected = gradients(step_of(EagerStep, plain, objective=objective))
    assert expected[1].norm() > 0
    packed = fused()
    packed.model.train()
    captured = step_of(CapturedStep, packed, objective=objective)
    for _ in range(3):
        loss, found = gradients(captured)
        assert captured.failed is None
        assert loss == pytest.approx(expected[0], rel=1e-5)
        assert (found - expected[1]).norm() <= 1e-5 * expected[1].norm()
    assert captured.captured
