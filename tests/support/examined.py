"""A run that the doctor finds nothing wrong with, to be broken in one place."""

from __future__ import annotations

import shutil
import time
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import IO, Any

import pandas as pd
import yaml

from lora_fsdp import DataArguments, LoraArguments, ModelArguments
from lora_fsdp.doctor import Diagnosis, Machine, MachineGpu, diagnose
from lora_fsdp.doctor.machine import installed_packages
from lora_fsdp.tasks import Task
from tests.support.ranks import CONFIGS
from tests.support.tiny import toy_table

GB = 10**9
A100 = MachineGpu("NVIDIA A100-SXM4-80GB", 85 * GB, 84 * GB, (8, 0))
RTX4090 = MachineGpu("NVIDIA GeForce RTX 4090", 25 * GB, 24 * GB, (8, 9))
T4 = MachineGpu("Tesla T4", 16 * GB, 15 * GB, (7, 5))


@cache
def _packages() -> dict[str, str]:
    """Read once: there are hundreds."""
    return installed_packages()


def machine(*gpus: MachineGpu, **other: Any) -> Machine:
    """A machine in good order with these GPUs."""
    settings: dict[str, Any] = {
        "peer_access": True,
        "driver_gpus": len(gpus),
        "driver_cuda": (13, 0) if gpus else None,
        "torch_cuda": "12.8" if gpus else None,
        "host_memory": 200 * GB,
        "disk_free": 500 * GB,
        "shared_memory": 8 * GB,
        "clock": time.time(),
        "python": "3.12.1",
        "packages": dict(_packages()),
    }
    return Machine(gpus=gpus, **{**settings, **other})


@dataclass
class ExaminedRun:
    """What the doctor is given; tests change one thing and call `examine`."""

    place: Path
    model: Path
    launch: dict[str, Any] = field(default_factory=dict)
    launch_text: str | None = None
    num_processes: int | None = None
    training: dict[str, Any] = field(default_factory=dict)
    lora: dict[str, Any] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)
    model_options: dict[str, Any] = field(default_factory=dict)
    table: pd.DataFrame = field(default_factory=lambda: toy_table(240))
    machine: Machine = field(default_factory=lambda: machine(A100, A100))
    task: Task | None = None
    lock: IO[str] | None = None

    @classmethod
    def good(cls, place: Path, model_folder: Path) -> ExaminedRun:
        """Two GPUs, FSDP2, a toy model, enough rows."""
        shutil.copytree(model_folder, place / "model")
        launch = yaml.safe_load((CONFIGS / "fsdp2.yaml").read_text())
        return cls(place, place / "model", launch=launch)

    @property
    def fsdp(self) -> dict[str, Any]:
        """The YAML's section on FSDP."""
        return self.launch["fsdp_config"]

    @property
    def output_dir(self) -> Path:
        return self.place / "run"

    def examine(self) -> Diagnosis:
        """Write the files and ask the doctor."""
        config, table = self.place / "launch.yaml", self.place / "table.csv"
        config.write_text(self.launch_text or yaml.safe_dump(self.launch))
        self.table.to_csv(table, index=False)
        task = {
            "task": "classification",
            "instruction": "Say how it sounds:",
            "text_column": "text",
            "label_column": "label",
        }
        data = {"data_file": str(table), "eval_size": 60} | ({} if self.task else task)
        return diagnose(
            model_args=ModelArguments(
                **{"model_name_or_path": str(self.model)} | self.model_options
            ),
            lora_args=LoraArguments(**self.lora),
            data_args=DataArguments(**(data | self.data)),
            training={"output_dir": str(self.output_dir)} | self.training,
            accelerate_config=config,
            num_processes=self.num_processes,
            task=self.task,
            machine=self.machine,
        )
