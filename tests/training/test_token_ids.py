"""Tokens beyond the model's embeddings, named before anything is trained.

Run: python -m pytest tests/training/test_token_ids.py
"""

from functools import partial

import pytest

from lora_fsdp.errors import UnsupportedModelError
from tests.support.adapters import save_base
from tests.support.runs import toy_trainer
from tests.support.tiny import tiny_tokenizer


def with_tokens(**special):
    """As many tokens as the toy model has embeddings, and special ones beyond."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens([f"<|{number}|>" for number in range(len(tokenizer), 400)])
    tokenizer.add_special_tokens(special)
    return tokenizer


@pytest.mark.parametrize("streamed", [True, False])
@pytest.mark.parametrize(
    ("special", "where"), [("eos_token", r"row \d+ has"), ("pad_token", "pads")]
)
def test_token_and_row_are_named(special, where, streamed, tmp_path, monkeypatch):
    save_base(tmp_path / "base")
    tokenizer = partial(with_tokens, **{special: "<|new|>"})
    monkeypatch.setattr("tests.support.runs.tiny_tokenizer", tokenizer)
    words = rf"'<\|new\|>' \(400\), which {where}, is beyond the 400 embeddings of Llama"
    with pytest.raises(UnsupportedModelError, match=words):
        toy_trainer(tmp_path / "run", rows=8, base=tmp_path / "base", streamed=streamed)


def test_the_last_embedding_is_one(tmp_path, monkeypatch):
    monkeypatch.setattr("tests.support.runs.tiny_tokenizer", with_tokens)
    toy_trainer(tmp_path / "run", rows=8)
