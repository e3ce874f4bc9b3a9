"""Which adapters share a pass. Run: python -m pytest tests/sweeps/test_sharing.py"""

import pytest
from peft import LoraConfig
from transformers import LlamaConfig

from lora_fsdp import FineTuningArguments
from lora_fsdp.sweeps.sharing import group


def grouped(tmp_path, **settings):
    members = {
        f"seed-{seed}": (FineTuningArguments(output_dir=str(tmp_path), seed=seed), LoraConfig())
        for seed in range(10)
    }
    return group(members, base=LlamaConfig(attn_implementation="sdpa"), **settings)


@pytest.mark.parametrize(
    ("settings", "passes", "reason"),
    [
        ({"at_once": None}, [5, 5], None),
        ({"at_once": 4}, [4, 4, 2], None),
        ({"at_once": 4, "on_gpu": True}, [4, 4, 2], None),
        ({"at_once": 1}, [], "--adapters_at_once 1"),
        ({"at_once": None, "on_gpu": True}, [], "--adapters_at_once 8 asks for it"),
        ({"at_once": None, "why_all_apart": "it is odd"}, [], "it is odd"),
        ({"at_once": 4, "why_all_apart": "it is odd"}, [], "it is odd"),
    ],
)
def test_who_shares_a_pass(settings, passes, reason, tmp_path):
    found = grouped(tmp_path, **settings)
    assert [len(names) for names in found.together] == passes
    if reason is not None:
        assert len(found.apart) == 10
        assert all(reason in why for why in found.apart.values())
