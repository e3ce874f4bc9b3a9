"""What a user wants."""

from __future__ import annotations

from lora_fsdp.tasks.classification import ClassificationTask
from lora_fsdp.tasks.registry import register_task


@register_task
class IntentTask(ClassificationTask):
    """The intent behind a user's message, one of those in the table."""

    name = "intent"
    description = "What a user's message asks for, one of the intents in the table"

    instruction = (
        "Name the intent of the following message. Output exactly one intent, with no punctuation "
        "or extra text:"
    )
    layouts = (
        ("text", "intent"),
        ("text", "label"),
        ("utterance", "intent"),
        ("query", "intent"),
        ("message", "intent"),
        ("text", "category"),
    )
