"""Kinds of answers, a file each: what is scored, what that makes of a row, how it is measured."""

from lora_fsdp.tasks.answers.closed_set import ClosedSet
from lora_fsdp.tasks.answers.distribution import Distribution
from lora_fsdp.tasks.answers.free_text import FreeText
from lora_fsdp.tasks.answers.kind import AnswerKind, ModelOutputs, Section
from lora_fsdp.tasks.answers.numbers import Numbers
from lora_fsdp.tasks.answers.ordered import OrderedScores
from lora_fsdp.tasks.answers.own_choices import OwnChoices
from lora_fsdp.tasks.answers.pairs import Pairs
from lora_fsdp.tasks.answers.questions import Question, Questions
from lora_fsdp.tasks.answers.several_labels import SeveralLabels

__all__ = [
    "AnswerKind",
    "ClosedSet",
    "Distribution",
    "FreeText",
    "ModelOutputs",
    "Numbers",
    "OrderedScores",
    "OwnChoices",
    "Pairs",
    "Question",
    "Questions",
    "Section",
    "SeveralLabels",
]
