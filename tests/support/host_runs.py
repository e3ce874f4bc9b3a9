"""A training on several hosts, by the commands that a user gives on each."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from tests.support.hosts import Host
from tests.support.ranks import CONFIGS
from tests.support.tiny import tiny_model, tiny_tokenizer, toy_table

PORT = 29500
TASK = """
from lora_fsdp import ClassificationTask, register_task


@register_task
class OnHosts(ClassificationTask):
    name = "on-hosts"
    description = "How it sounds"
    instruction = "Say how it sounds:"
    text_column = "text"
    label_column = "label"
    labels = ("negative", "neutral", "positive")
"""


def prepare(folder: Path, *, rows: int = 60, **changes: Any) -> Path:
    """A model, a table, a task and the recipe that names them; returns the recipe."""
    tiny_model().save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    toy_table(rows).to_csv(folder / "rows.csv", index=False)
    (folder / "on_hosts_task.py").write_text(TASK)
    recipe = {
        "model_name_or_path": str(folder / "model"),
        "task": "on-hosts",
        "task_file": str(folder / "on_hosts_task.py"),
        "data_file": str(folder / "rows.csv"),
        "lora_r": 4,
        "lora_target_modules": ["all-linear"],
        "per_device_train_batch_size": 4,
        "num_train_epochs": 1,
        "logging_steps": 1,
        "save_strategy": "no",
        "seed": 3,
        "generate_examples": 0,
    }
    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe | changes))
    return file


def hosts_yaml(file: Path, *, name: str = "fsdp2_cpu.yaml", **changes: Any) -> Path:
    """A shipped YAML with what several hosts need."""
    file.write_text(yaml.safe_dump(yaml.safe_load((CONFIGS / name).read_text()) | changes))
    return file


def training_words(
    launcher: str, hosts: Sequence[Host], place: int, *, recipe: Path, output: Path, ranks: int
) -> list[str]:
    """The command for the host at `place`, of a training on so many ranks in all."""
    program = ["-m", "lora_fsdp.cli.training_process"]
    options = ["--config", str(recipe), "--output_dir", str(output)]
    if launcher == "torchrun":
        words = ["--nnodes", len(hosts), "--nproc_per_node", ranks // len(hosts)]
        words += ["--node_rank", place, "--master_addr", hosts[0].address, "--master_port", PORT]
        started = ["-m", "torch.distributed.run", *map(str, words)]
    else:
        file = hosts_yaml(
            recipe.parent / f"{len(hosts)}-hosts.yaml",
            num_machines=len(hosts),
            num_processes=ranks,
            main_process_ip=hosts[0].address,
            main_process_port=PORT,
        )
        started = ["-m", "accelerate.commands.launch", "--config_file", str(file)]
        started += ["--machine_rank", str(place)]
    return [sys.executable, *started, *program, *options]


def losses_of(output: Path) -> list[float]:
    """Of every step of a finished run."""
    text = (output / "log_history.jsonl").read_text()
    lines = [json.loads(line) for line in text.splitlines()]
    return [line["loss"] for line in lines if "loss" in line]
