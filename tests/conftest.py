"""Small real parts that the tests share: a tokenizer, tiny models, a task. No network."""

import os

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# What `make test` leaves here would change what tests see of a user's own `make`.
os.environ.pop("MAKEFLAGS", None)
os.environ.pop("MAKELEVEL", None)

import gc
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from tests.support.tiny import tiny_model, tiny_tokenizer


def pytest_addoption(parser: pytest.Parser) -> None:
    """Tests that are asked for by name."""
    parser.addoption(
        "--installs", action="store_true", help="run the documentation's pip lines too"
    )


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that start processes first: the long ones, at whose end a worker would wait."""
    starts = {item.path for item in items if item.get_closest_marker("distributed")}
    items.sort(key=lambda item: item.path not in starts)


def pytest_collection_finish() -> None:
    """Leave what was imported out of every later garbage collection.

    A training ends with one, which would walk through all of torch and transformers: most of a toy
    training's time.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return tiny_tokenizer()


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved toy model with its tokenizer; not to be written to."""
    folder = tmp_path_factory.mktemp("model")
    tiny_model().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder
