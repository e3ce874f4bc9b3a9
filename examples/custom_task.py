"""A task of one's own: the subject of a support ticket, in a dozen lines.

accelerate launch examples/custom_task.py --model_name_or_path MODEL --data_file tickets.csv
"""

from lora_fsdp import ClassificationTask, finetune, parse_arguments, register_task


@register_task
class TicketTask(ClassificationTask):
    name = "ticket"
    instruction = "Which team should answer this ticket? Output exactly one word:"
    text_column = "message"
    label_column = "team"
    labels = ("billing", "delivery", "technical")


if __name__ == "__main__":
    finetune(**parse_arguments(task="ticket"))
