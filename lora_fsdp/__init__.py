"""LoRA fine-tuning of causal language models under FSDP, with pluggable tasks."""

from __future__ import annotations

import importlib
import logging
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lora_fsdp.adapter.merging import merge_adapter
    from lora_fsdp.adapter.verification import verify_adapter_folder
    from lora_fsdp.arguments import (
        DataArguments,
        FineTuningArguments,
        LoraArguments,
        ModelArguments,
    )
    from lora_fsdp.data.tables import read_table as load_table
    from lora_fsdp.doctor import Machine, MachineGpu, diagnose
    from lora_fsdp.errors import DataError, LoraFsdpError
    from lora_fsdp.evaluating import Evaluation, evaluate
    from lora_fsdp.evaluation.prediction import Predictor
    from lora_fsdp.notebook import Report, launch
    from lora_fsdp.pipeline import FineTuningResult, finetune
    from lora_fsdp.reporting import write_comparison, write_report
    from lora_fsdp.scripts import parse_arguments
    from lora_fsdp.tasks import (
        ClassificationTask,
        Example,
        GenerationTask,
        MultipleChoiceTask,
        Prompt,
        Task,
        get_task,
        list_tasks,
        register_task,
    )
    from lora_fsdp.tasks.answers import AnswerKind
    from lora_fsdp.training.trainer import LoraTrainer

__all__ = [
    "AnswerKind",
    "ClassificationTask",
    "DataArguments",
    "DataError",
    "Evaluation",
    "Example",
    "FineTuningArguments",
    "FineTuningResult",
    "GenerationTask",
    "LoraArguments",
    "LoraFsdpError",
    "LoraTrainer",
    "Machine",
    "MachineGpu",
    "ModelArguments",
    "MultipleChoiceTask",
    "Predictor",
    "Prompt",
    "Report",
    "Task",
    "diagnose",
    "evaluate",
    "finetune",
    "get_task",
    "launch",
    "list_tasks",
    "load_table",
    "merge_adapter",
    "parse_arguments",
    "register_task",
    "verify_adapter_folder",
    "write_comparison",
    "write_report",
]

__version__ = "0.1.0"

# Imported when they are asked for: torch and transformers take seconds, and many a use, such as a
# help text or a list of tasks, needs neither.
_HOMES = {
    "AnswerKind": "lora_fsdp.tasks.answers",
    "ClassificationTask": "lora_fsdp.tasks",
    "DataArguments": "lora_fsdp.arguments",
    "DataError": "lora_fsdp.errors",
    "Evaluation": "lora_fsdp.evaluating",
    "Example": "lora_fsdp.tasks",
    "FineTuningArguments": "lora_fsdp.arguments",
    "FineTuningResult": "lora_fsdp.pipeline",
    "GenerationTask": "lora_fsdp.tasks",
    "LoraArguments": "lora_fsdp.arguments",
    "LoraFsdpError": "lora_fsdp.errors",
    "LoraTrainer": "lora_fsdp.training.trainer",
    "Machine": "lora_fsdp.doctor",
    "MachineGpu": "lora_fsdp.doctor",
    "ModelArguments": "lora_fsdp.arguments",
    "MultipleChoiceTask": "lora_fsdp.tasks",
    "Predictor": "lora_fsdp.evaluation.prediction",
    "Prompt": "lora_fsdp.tasks",
    "Report": "lora_fsdp.notebook",
    "Task": "lora_fsdp.tasks",
    "diagnose": "lora_fsdp.doctor",
    "evaluate": "lora_fsdp.evaluating",
    "finetune": "lora_fsdp.pipeline",
    "get_task": "lora_fsdp.tasks",
    "launch": "lora_fsdp.notebook",
    "list_tasks": "lora_fsdp.tasks",
    "load_table": "lora_fsdp.data.tables",
    "merge_adapter": "lora_fsdp.adapter.merging",
    "parse_arguments": "lora_fsdp.scripts",
    "register_task": "lora_fsdp.tasks",
    "verify_adapter_folder": "lora_fsdp.adapter.verification",
    "write_comparison": "lora_fsdp.reporting",
    "write_report": "lora_fsdp.reporting",
}
# Called otherwise where it lives.
_NAMES_THERE = {"load_table": "read_table"}


# PEFT imports it where it is installed, and on a CPU it then advises every run to install a kernel.
logging.getLogger("bitsandbytes.backends").setLevel(logging.ERROR)


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), _NAMES_THERE.get(name, name))
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
