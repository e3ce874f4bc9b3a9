"""LoRA fine-tuning of causal language models under FSDP, with pluggable tasks."""

from __future__ import annotations

import importlib
import logging
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lora_fsdp.arguments import (
        DataArguments,
        FineTuningArguments,
        LoraArguments,
        ModelArguments,
    )
    from lora_fsdp.errors import LoraFsdpError
    from lora_fsdp.estimator import LoraClassifier
    from lora_fsdp.evaluation.prediction import Predictor
    from lora_fsdp.pipeline import FineTuningResult, finetune
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
    from lora_fsdp.training.trainer import LoraTrainer

__all__ = [
    "ClassificationTask",
    "DataArguments",
    "Example",
    "FineTuningArguments",
    "FineTuningResult",
    "GenerationTask",
    "LoraArguments",
    "LoraClassifier",
    "LoraFsdpError",
    "LoraTrainer",
    "ModelArguments",
    "MultipleChoiceTask",
    "Predictor",
    "Prompt",
    "Task",
    "finetune",
    "get_task",
    "list_tasks",
    "register_task",
]

__version__ = "0.1.0"

# Imported when they are asked for: torch and transformers take seconds, and many a use, such as a
# help text or a list of tasks, needs neither.
_HOMES = {
    "ClassificationTask": "lora_fsdp.tasks",
    "DataArguments": "lora_fsdp.arguments",
    "Example": "lora_fsdp.tasks",
    "FineTuningArguments": "lora_fsdp.arguments",
    "FineTuningResult": "lora_fsdp.pipeline",
    "GenerationTask": "lora_fsdp.tasks",
    "LoraArguments": "lora_fsdp.arguments",
    "LoraClassifier": "lora_fsdp.estimator",
    "LoraFsdpError": "lora_fsdp.errors",
    "LoraTrainer": "lora_fsdp.training.trainer",
    "ModelArguments": "lora_fsdp.arguments",
    "MultipleChoiceTask": "lora_fsdp.tasks",
    "Predictor": "lora_fsdp.evaluation.prediction",
    "Prompt": "lora_fsdp.tasks",
    "Task": "lora_fsdp.tasks",
    "finetune": "lora_fsdp.pipeline",
    "get_task": "lora_fsdp.tasks",
    "list_tasks": "lora_fsdp.tasks",
    "register_task": "lora_fsdp.tasks",
}


# PEFT imports it where it is installed, and on a CPU it then advises every run to install a kernel.
logging.getLogger("bitsandbytes.backends").setLevel(logging.ERROR)


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
