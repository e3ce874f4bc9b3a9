"""What a text is about."""

from __future__ import annotations

from lora_fsdp.tasks.classification import ClassificationTask
from lora_fsdp.tasks.registry import register_task


@register_task
class TopicTask(ClassificationTask):
    """The topic of a text, one of those in the table."""

    name = "topic"
    description = "The topic of a text, one of those that the table names"

    instruction = (
        "Name the topic of the following text. Output exactly one topic, with no punctuation or "
        "extra text:"
    )
    layouts = (
        ("text", "topic"),
        ("text", "label"),
        ("title", "topic"),
        ("text", "category"),
        ("content", "category"),
        ("headline", "category"),
        ("article", "category"),
    )
