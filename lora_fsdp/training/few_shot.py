"""The untrained model with examples of training rows in its prompt: is tuning worth it?"""

from __future__ import annotations

from lora_fsdp.data.encoding import EncodedExample, Encoder
from lora_fsdp.data.few_shot import check_room, check_shots, draw_shots
from lora_fsdp.data.rows import TaskData
from lora_fsdp.errors import ArgumentError


def rows_with_shots(
    encoder: Encoder, data: TaskData, *, count: int, seed: int
) -> list[EncodedExample]:
    """The rows that are reported on, with `count` training rows as examples in their prompts.

    Raises:
        ArgumentError: the rows cannot be shown, too few can, or they do not fit; or the trained
            model's prompts show some too.
    """
    if data.shots:
        raise ArgumentError(
            "--few_shot shows examples to the untrained model as well, so it is that rival: leave "
            "out --untrained_shots."
        )
    check_shots(data.task, [*data.train, *data.scored])
    shots = draw_shots(
        encoder,
        data.train,
        count=count,
        besides=data.scored,
        seed=seed,
        option="untrained_shots",
    )
    shows = encoder.showing(shots)
    asked = shows.encode(data.reported)
    check_room(shows, asked, option="untrained_shots")
    return asked
