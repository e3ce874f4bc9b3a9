"""A plug-in that registers a taken name when it is imported."""

from lora_fsdp.tasks import ClassificationTask, register_task


@register_task
class Taken(ClassificationTask):
    """Would stand in for the built-in task."""

    name = "sentiment"
