"""LoRA fine-tuning of causal language models under FSDP, with pluggable tasks."""

from lora_fsdp.arguments import DataArguments, FineTuningArguments, LoraArguments, ModelArguments
from lora_fsdp.errors import LoraFsdpError
from lora_fsdp.pipeline import FineTuningResult, finetune
from lora_fsdp.tasks import (
    ClassificationTask,
    Example,
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
    "LoraArguments",
    "LoraFsdpError",
    "LoraTrainer",
    "ModelArguments",
    "Prompt",
    "Task",
    "finetune",
    "get_task",
    "list_tasks",
    "register_task",
]

__version__ = "0.1.0"
