"""The untrained model with examples of training rows in its prompt: is tuning worth it?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from lora_fsdp.data.control_tokens import ControlTokens, tokenize
from lora_fsdp.data.encoding import EncodedExample, Encoder
from lora_fsdp.data.rows import TaskData
from lora_fsdp.errors import ArgumentError
from lora_fsdp.tasks import Example, Prompt, Task

_BETWEEN = "\n\n"


def check_shots(task: Task, rows: Sequence[Example]) -> None:
    """Refuse a task whose rows cannot be shown as examples.

    Raises:
        ArgumentError: its answers are not one label of a set, or its rows are conversations.
    """
    kind = task.answer_kind
    one_label = bool(kind.labels) and not any(row.shares or row.prompt.turns for row in rows)
    if not one_label:
        raise ArgumentError(
            f"--untrained_shots shows rows with one label of a set, and those of task {task.name!r}"
            f" have another kind of answer ({kind.description}): leave it out."
        )


def draw_shots(
    encoder: Encoder,
    rows: Sequence[Example],
    *,
    count: int,
    besides: Sequence[Example],
    seed: int,
) -> list[Example]:
    """`count` of the training rows, as many of each label as can be, in a random order.

    A row that has the text of one of `besides` is not drawn, and neither is one that spells a
    control token, which would steer the model from within the prompt.

    Args:
        encoder: of the run.
        rows: training rows, all with a target.
        count: how many.
        besides: the rows that are scored.
        seed: of the draw.

    Raises:
        ArgumentError: there are too few such rows.
    """
    scored = {row.prompt.content.strip() for row in besides}
    order = np.random.default_rng(seed).permutation(len(rows)).tolist()
    template = "" if encoder.chat is None else encoder.chat.source
    controls = ControlTokens(encoder.tokenizer, template=template)
    by_label: dict[str, list[Example]] = {}
    for place in order:
        row = rows[place]
        if row.prompt.content.strip() in scored:
            continue
        if controls.count(tokenize(encoder.tokenizer, [f"{row.prompt.content}{row.target}"])[0]):
            continue
        scored.add(row.prompt.content.strip())
        by_label.setdefault(str(row.target), []).append(row)
    # One of each label in turn; which labels have one more is left to the draw, too.
    turns = [
        row
        for number in range(max(map(len, by_label.values()), default=0))
        for row in (own[number] for own in by_label.values() if number < len(own))
    ]
    if len(turns) < count:
        raise ArgumentError(
            f"--untrained_shots {count}: of {len(rows)} training rows {len(turns)} can be shown "
            "(their text is no scored row's and spells no control token): lower it."
        )
    chosen = turns[:count]
    return [chosen[place] for place in np.random.default_rng(seed).permutation(count).tolist()]


def shown_before(prompt: Prompt, shots: Sequence[Example]) -> Prompt:
    """`prompt` with the shots and their answers before its own row, its instruction once."""
    head, line, cue = prompt.before.rpartition("\n")
    shown = "".join(
        f"{cue}{shot.prompt.lead}{shot.prompt.text}{shot.prompt.tail}{shot.prompt.after}"
        f"{shot.target}{_BETWEEN}"
        for shot in shots
    )
    return replace(prompt, before=f"{head}{line}{shown}{cue}")


def encode_with_shots(
    encoder: Encoder, rows: Sequence[Example], shots: Sequence[Example]
) -> list[EncodedExample]:
    """Token ids of `rows` with the shots in their prompts, which all begin with them.

    Raises:
        ArgumentError: a row does not fit with them; the message has the numbers.
    """
    alone = encoder.encode(rows)
    asked = [replace(row, prompt=shown_before(row.prompt, shots)) for row in rows]
    # What is never shortened may be longer than the limit: measured without one.
    free = Encoder(
        encoder.tokenizer,
        task=encoder.task,
        max_length=1 << 30,
        chat_template=encoder.chat_template,
        chat_template_kwargs=None if encoder.chat is None else encoder.chat.arguments,
        thinking="auto" if encoder.chat is None else encoder.chat.thinking,
    )
    lengths = [
        len(one.prompt_ids) + max(map(len, one.scored_ids), default=0) for one in free.encode(asked)
    ]
    longest = int(np.argmax(lengths))
    if lengths[longest] > encoder.max_length:
        own = len(alone[longest].prompt_ids) + max(map(len, alone[longest].scored_ids), default=0)
        raise ArgumentError(
            f"--untrained_shots {len(shots)}: row {rows[longest].row} has {own} tokens by itself "
            f"and {lengths[longest]} with the examples before it, and --max_length is "
            f"{encoder.max_length}: raise it to {lengths[longest]} or more, or show fewer."
        )
    return encoder.encode(asked)


def rows_with_shots(
    encoder: Encoder, data: TaskData, *, count: int, seed: int
) -> list[EncodedExample]:
    """The rows that are reported on, with `count` training rows as examples in their prompts.

    Raises:
        ArgumentError: the rows cannot be shown, too few can, or they do not fit.
    """
    check_shots(data.task, [*data.train, *data.scored])
    shots = draw_shots(encoder, data.train, count=count, besides=data.scored, seed=seed)
    return encode_with_shots(encoder, data.reported, shots)
