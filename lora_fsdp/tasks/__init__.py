"""What is learnt: tasks turn rows into prompts and targets, and answers into metrics."""

from lora_fsdp.tasks.base import Example, Prompt, Task
from lora_fsdp.tasks.classification import ClassificationTask
from lora_fsdp.tasks.registry import TaskInfo, get_task, list_tasks, register_task
from lora_fsdp.tasks.sentiment import SentimentTask

__all__ = [
    "ClassificationTask",
    "Example",
    "Prompt",
    "SentimentTask",
    "Task",
    "TaskInfo",
    "get_task",
    "list_tasks",
    "register_task",
]
