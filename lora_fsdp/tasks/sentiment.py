"""Sentiment of tweets, the task of the tutorial that this library grew from."""

from __future__ import annotations

from lora_fsdp.tasks.classification import ClassificationTask
from lora_fsdp.tasks.registry import register_task


@register_task
class SentimentTask(ClassificationTask):
    """Sentiment of a tweet in one word; the label set is read from the data."""

    name = "sentiment"
    description = "Sentiment of tweets in one word, with the labels of the table"

    # The wording matters: a base model answers freely otherwise.
    instruction = (
        "Analyze the sentiment of the following tweet. "
        "Output exactly one word, with no punctuation or extra text:"
    )
    layouts = (("content", "sentiment"), ("text", "airline_sentiment"), ("text", "sentiment"))
