"""The page of models says what is measured, and names every family.

Run: python -m pytest tests/compute/test_models_page.py
"""

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from benchmarks.models import PAGE, measure, page_lines, page_reasons, tiny_config
from lora_fsdp.compute.packed_model import PackedModel

TEXT = PAGE.read_text(encoding="utf-8")
LINES, REASONS = page_lines(TEXT), page_reasons(TEXT)


@pytest.mark.parametrize("family", ["llama", "gemma2", "lfm2"])
def test_a_line_is_what_is_measured(family):
    assert str(measure(family)) == LINES[family]


def test_every_family_is_in_the_table_or_has_a_reason():
    assert set(LINES) | set(REASONS) == set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    assert not set(LINES) & set(REASONS)


def test_the_table_is_long_and_good():
    good = [line for line in LINES.values() if line.endswith("| equal | yes | yes |")]
    assert len(good) >= 110
    assert f"{len(LINES)} families" in TEXT


def test_a_layer_that_scales_by_position_is_not_fused():
    """Ministral 3 has Llama's modules, and scales the queries of far positions."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config("ministral3"), dtype=torch.float32)
    fusing = PackedModel(model.requires_grad_(False)).fuse()
    assert not fusing.is_fused
    assert "computes something else" in fusing.reason
