"""Which training rows prompts show as examples: drawn once a run, never scored, never learnt."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lora_fsdp.data.control_tokens import ControlTokens, tokenize
from lora_fsdp.data.encoding import EncodedExample, Encoder
from lora_fsdp.errors import ArgumentError
from lora_fsdp.tasks import Example, Task
from lora_fsdp.tasks.shots import Shot


def check_shots(task: Task, rows: Sequence[Example]) -> None:
    """Refuse a task of which `--untrained_shots` makes no rival.

    Raises:
        ArgumentError: its answers are not one label of a set, or its rows are conversations.
    """
    kind = task.answer_kind
    one_label = bool(kind.labels) and not any(row.shares or row.prompt.turns for row in rows)
    if not one_label:
        raise ArgumentError(
            f"--untrained_shots shows rows with one label of a set, and those of task {task.name!r}"
            f" have another kind of answer ({kind.description}): leave it out, or train and ask "
            "with examples in the prompt (--few_shot)."
        )


def draw_shots(
    encoder: Encoder,
    rows: Sequence[Example],
    *,
    count: int,
    besides: Sequence[Example],
    seed: int,
    option: str,
    left_of_a_label: int = 0,
) -> list[Shot]:
    """`count` of the training rows, as many of each label as can be, in a random order.

    A row that has the text of one of `besides` is not drawn, and neither is one that spells a
    control token, which would steer the model from within the prompt.

    Args:
        encoder: of the run.
        rows: training rows, all with a target.
        count: how many.
        besides: the rows that are scored.
        seed: of the draw.
        option: that asked for it, for messages.
        left_of_a_label: so many different texts of each label are not drawn.

    Raises:
        ArgumentError: there are too few such rows.
    """
    kind = encoder.kind
    scored = {row.prompt.content.strip() for row in besides}
    order = np.random.default_rng(seed).permutation(len(rows)).tolist()
    template = "" if encoder.chat is None else encoder.chat.source
    controls = ControlTokens(encoder.tokenizer, template=template)
    by_label: dict[str, list[Shot]] = {}
    for place in order:
        row = rows[place]
        if row.prompt.content.strip() in scored:
            continue
        answer = kind.shown(row)
        if controls.count(tokenize(encoder.tokenizer, [f"{row.prompt.content}{answer}"])[0]):
            continue
        scored.add(row.prompt.content.strip())
        label = str(row.target) if kind.labels else ""
        by_label.setdefault(label, []).append(Shot(row.row, row.prompt, answer))
    groups = [own[: max(len(own) - left_of_a_label, 0)] for own in by_label.values()]
    # One of each label in turn; which labels have one more is left to the draw, too.
    turns = [
        shot
        for number in range(max(map(len, groups), default=0))
        for shot in (own[number] for own in groups if number < len(own))
    ]
    if len(turns) < count:
        kept = " and leave one of each label to train on" if left_of_a_label else ""
        raise ArgumentError(
            f"--{option} {count}: of {len(rows)} training rows {len(turns)} can be shown "
            f"(their text is no scored row's and spells no control token){kept}: lower it."
        )
    chosen = turns[:count]
    return [chosen[place] for place in np.random.default_rng(seed).permutation(count).tolist()]


def take_shots(
    encoder: Encoder,
    rows: Sequence[Example],
    *,
    count: int,
    besides: Sequence[Example] = (),
    seed: int,
) -> tuple[tuple[Shot, ...], list[Example]]:
    """The rows that every prompt is to show (`--few_shot`), and those that are left to train on.

    What has the text of one that is shown is not trained on: its answer would stand in its own
    prompt.

    Args:
        encoder, rows, count, besides, seed: as for `draw_shots`.

    Raises:
        ArgumentError: there are too few rows.
    """
    shots = draw_shots(
        encoder,
        rows,
        count=count,
        besides=besides,
        seed=seed,
        option="few_shot",
        left_of_a_label=1,
    )
    shown = {shot.prompt.content.strip() for shot in shots}
    return tuple(shots), [row for row in rows if row.prompt.content.strip() not in shown]


def check_room(encoder: Encoder, examples: Sequence[EncodedExample], *, option: str) -> None:
    """Refuse examples in the prompt for which rows that would fit are shortened.

    Args:
        encoder: shows them.
        examples: encoded by it.
        option: that asked for them, for the message.

    Raises:
        ArgumentError: names the row and the length that it takes.
    """
    cut = [one.example for one in examples if one.shortened]
    if not encoder.shots or not cut:
        return
    alone = encoder.showing(()).encode(cut)
    whole = [one.example for one in alone if not one.shortened]
    if not whole:
        return
    lengths = [_length(one) for one in encoder.showing(max_length=1 << 30).encode(whole)]
    longest = int(np.argmax(lengths))
    own = next(_length(one) for one in alone if one.example is whole[longest])
    raise ArgumentError(
        f"--{option} {len(encoder.shots)}: row {whole[longest].row} has {own} tokens by itself "
        f"and {lengths[longest]} with the examples before it, and --max_length is "
        f"{encoder.max_length}: raise it to {lengths[longest]} or more, or show fewer."
    )


def _length(one: EncodedExample) -> int:
    return len(one.prompt_ids) + max(map(len, one.scored_ids), default=0)
