"""A folder like that of a user who follows the pages: a checkout, models, tables, a recipe."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pandas as pd

from tests.support.documented import ROOT
from tests.support.readers_tables import write_readers_tables

MODELS = (
    ".cache/default/smollm2-135m-instruct",
    "models/SmolLM2-135M-Instruct",
    "models/deepseek-llm-7b-base",
    "models/base",
    "MODEL",
)
# Of the Hub's model, whose weights a plan does not need.
DEEPSEEK_7B = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 102400,
    "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 30,
    "num_attention_heads": 32, "num_key_value_heads": 32, "max_position_embeddings": 4096,
}  # fmt: skip


def make_checkout(folder: Path, model: Path) -> None:
    """Fill `folder`: `model` is behind every name, and tables have some dozens of rows."""
    for name in ("examples", "accelerate_configs", "lora_fsdp"):
        (folder / name).symlink_to(ROOT / name)
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, folder)
    for name in MODELS:
        shutil.copytree(model, folder / name)
    _write_tables(folder)
    (folder / "recipe.yaml").write_text(
        "model_name_or_path: models/SmolLM2-135M-Instruct\ntask: sentiment\ndata_file: tweets.csv\n"
    )
    _fill_hub_cache(folder / "hub", model, name="deepseek-ai/deepseek-llm-7b-base")


def set_up(folder: Path) -> None:
    """What `make` sets up, in the order that it goes by, with this Python in the environment."""
    program = folder / ".venv" / "bin" / "lora-fsdp"
    program.parent.mkdir(parents=True)
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m lora_fsdp "$@"\n')
    program.chmod(0o755)
    (program.parent / "python").symlink_to(sys.executable)
    (folder / ".venv" / ".installed").touch()
    (folder / ".cache" / "default" / ".prepared").touch()


def _write_tables(folder: Path) -> None:
    tweets = pd.DataFrame(
        {
            "text": [f"flight {n} was {'late and bad' if n % 2 else 'good'}" for n in range(60)],
            "sentiment": ["negative" if n % 2 else "positive" for n in range(60)],
        }
    )
    teams = ["billing", "delivery", "technical"]
    tickets = pd.DataFrame(
        {
            "message": [f"help with the {teams[n % 3]} of order {n}" for n in range(60)],
            "team": [teams[n % 3] for n in range(60)],
        }
    )
    tables = {
        "tweets": tweets,
        ".cache/default/airline_tweets": tweets,
        "tickets": tickets,
        "new": tweets.head(5),
        "new_tickets": tickets.head(5),
        "pool": tweets[["text"]],
        # Its labels under other names too, in one place none that is known.
        "test": tweets.head(8).assign(
            label=tweets["sentiment"][:8], team=["?", *tweets["sentiment"][1:8]]
        ),
    }
    for name, table in tables.items():
        table.to_csv(folder / f"{name}.csv", index=False)
    tweets.head(5).rename(columns={"text": "body"}).to_parquet(folder / "new.parquet")
    write_readers_tables(folder)


def _fill_hub_cache(cache: Path, model: Path, *, name: str) -> None:
    """As after an earlier look at the Hub's config and tokenizer: a plan then needs no network."""
    kept, commit = cache / f"models--{name.replace('/', '--')}", "0" * 40
    (kept / "refs").mkdir(parents=True)
    (kept / "refs" / "main").write_text(commit)
    snapshot = kept / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text(json.dumps(DEEPSEEK_7B))
    for file in model.glob("tokenizer*"):
        shutil.copy(file, snapshot)
