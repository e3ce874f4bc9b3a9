"""The plan of a mixture of experts in 4 bits, as docs/memory.md has it.

Run: python -m pytest tests/planning/test_plan_of_experts.py
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import Qwen3MoeConfig

from lora_fsdp.cli.main import main

PAGE = Path(__file__).parents[2] / "docs" / "memory.md"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the config of Qwen3-30B-A3B, and no weights."""
    folder = tmp_path_factory.mktemp("experts")
    Qwen3MoeConfig(
        vocab_size=151_936,
        hidden_size=2048,
        intermediate_size=6144,
        num_hidden_layers=48,
        num_attention_heads=32,
        num_key_value_heads=4,
        head_dim=128,
        moe_intermediate_size=768,
        num_experts=128,
        num_experts_per_tok=8,
        tie_word_embeddings=False,
        architectures=["Qwen3MoeForCausalLM"],
    ).save_pretrained(folder)
    return folder


def test_what_the_page_says_of_it(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [
        "plan",
        "--model_name_or_path",
        str(folder),
        "--load_in_4bit",
        "true",
        "--json",
        "true",
    ]
    rows = ["--examples", "4500", "--tokens_per_example", "59", "--gpus", "2xRTX4090"]
    assert main([*words, *rows]) == 0
    found = {one["strategy"]: one for one in json.loads(capsys.readouterr().out)["candidates"]}
    whole, sharded = found["resident"], found["full shard"]
    assert whole["fits"]
    assert sharded["fits"]
    text = " ".join(PAGE.read_text(encoding="utf-8").split())
    base = whole["bytes"]["resident"] / 1e9
    assert (
        f"{base:.1f} GB of base, {whole['bytes']['total'] / 1e9:.1f} GB in all on one GPU, "
        f"{sharded['bytes']['total'] / 1e9:.1f} GB on each of two that share it"
    ) in text
