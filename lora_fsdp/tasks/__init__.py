"""What is learnt: tasks turn rows into prompts and targets, and answers into metrics."""

from lora_fsdp.tasks.alpaca import AlpacaTask
from lora_fsdp.tasks.base import Task
from lora_fsdp.tasks.chat import ChatTask
from lora_fsdp.tasks.classification import ClassificationTask
from lora_fsdp.tasks.columns import ColumnTask
from lora_fsdp.tasks.example import Example, Prompt
from lora_fsdp.tasks.extraction import ExtractionTask
from lora_fsdp.tasks.generation import GenerationTask
from lora_fsdp.tasks.inference import InferenceTask
from lora_fsdp.tasks.intent import IntentTask
from lora_fsdp.tasks.multilabel import MultilabelTask
from lora_fsdp.tasks.multiple_choice import MultipleChoiceTask
from lora_fsdp.tasks.preference import PreferenceTask
from lora_fsdp.tasks.question_answering import QuestionAnsweringTask
from lora_fsdp.tasks.questions import QuestionsTask
from lora_fsdp.tasks.rating import RatingTask
from lora_fsdp.tasks.registry import TaskInfo, get_task, list_tasks, register_task
from lora_fsdp.tasks.regression import RegressionTask
from lora_fsdp.tasks.sentiment import SentimentTask
from lora_fsdp.tasks.soft_classification import SoftClassificationTask
from lora_fsdp.tasks.summarisation import SummarisationTask
from lora_fsdp.tasks.topic import TopicTask

__all__ = [
    "AlpacaTask",
    "ChatTask",
    "ClassificationTask",
    "ColumnTask",
    "Example",
    "ExtractionTask",
    "GenerationTask",
    "InferenceTask",
    "IntentTask",
    "MultilabelTask",
    "MultipleChoiceTask",
    "PreferenceTask",
    "Prompt",
    "QuestionAnsweringTask",
    "QuestionsTask",
    "RatingTask",
    "RegressionTask",
    "SentimentTask",
    "SoftClassificationTask",
    "SummarisationTask",
    "Task",
    "TaskInfo",
    "TopicTask",
    "get_task",
    "list_tasks",
    "register_task",
]
