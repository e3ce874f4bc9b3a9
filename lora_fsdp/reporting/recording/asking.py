"""How an adapter is asked, to the token: for whoever asks it without this library."""

from __future__ import annotations

import keyword
import re
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from lora_fsdp.data.encoding import EncodedExample, Encoder
from lora_fsdp.data.rows import TaskData
from lora_fsdp.tasks.example import TEXT_PLACEHOLDER, Prompt

# Stands for the n-th placeholder while a prompt is laid out: letters of no alphabet, which no
# instruction and no template holds.
_MARKER = re.compile("\ue000(\\d+)\ue001")
_PLACEHOLDER = re.compile(r"\{([^{}]+)\}")


class AskedRun(Protocol):
    """What is looked at of a run."""

    @property
    def encoder(self) -> Encoder: ...

    @property
    def train_dataset(self) -> Sequence[EncodedExample]: ...

    @property
    def held_out(self) -> Sequence[EncodedExample]: ...

    @property
    def test_dataset(self) -> Sequence[EncodedExample]: ...


def asking(trainer: AskedRun, data: TaskData) -> dict[str, Any] | None:
    """The prompt in pieces, the answers and the end token; `None` where no row stands for others.

    Every second piece of the prompt, from the second on, is the name of what a row has there.
    """
    examples = [*data.train, *data.scored]
    if not examples:
        return None
    encoder, names = trainer.encoder, list[str]()
    if (row := data.task.placeholder_row()) is not None:
        row = _marked(row, names)
        prompt, choices = data.task.build_prompt(row), data.task.build_choices(row)
    elif any(_has_more_than_a_text(one.prompt) or one.choices for one in examples):
        return None
    else:
        first = examples[0].prompt
        prompt, choices = Prompt(first.before, _marked(TEXT_PLACEHOLDER, names), first.after), ()
    kind = data.task.answer_kind
    labels = () if kind.reading else kind.labels
    encoded = [*trainer.train_dataset, *trainer.held_out, *trainer.test_dataset]
    return {
        "prompt": _pieces(encoder.render(prompt), names),
        # Of a task whose instruction says something else in every row, one is shown of many.
        "frames": len({(one.prompt.before, one.prompt.after) for one in examples}),
        "leading_ids": encoder.leading_ids,
        "answers": dict(zip(labels, encoded[0].candidate_ids, strict=True)) if labels else None,
        "reading": kind.reading,
        "row": data.task.placeholder_row(),
        "choices": [_pieces(_as_answered(choice, encoder), names) for choice in choices],
        "after": "" if encoder.chat_template else prompt.after,
        "end_token_id": encoder.end_token_id,
        "max_length": encoder.max_length,
    }


def _has_more_than_a_text(prompt: Prompt) -> bool:
    return bool(prompt.turns or prompt.lead or prompt.tail)


def _marked(cell: Any, names: list[str]) -> Any:
    """`cell` with a marker in the place of each placeholder, whose name `names` is given."""
    if isinstance(cell, Mapping):
        return {key: _marked(value, names) for key, value in cell.items()}
    if isinstance(cell, list):
        return [_marked(value, names) for value in cell]
    if not isinstance(cell, str) or _PLACEHOLDER.fullmatch(cell) is None:
        return cell
    names.append(_name_of(cell))
    return f"\ue000{len(names) - 1}\ue001"


def _name_of(placeholder: str) -> str:
    """As a name of Python's, because it becomes a variable."""
    name = re.sub(r"\W", "_", placeholder.strip("{}"))
    return f"{name}_" if keyword.iskeyword(name) or not name.isidentifier() else name


def _pieces(text: str, names: list[str]) -> list[str]:
    pieces = _MARKER.split(text)
    pieces[1::2] = [names[int(number)] for number in pieces[1::2]]
    return pieces


def _as_answered(choice: str, encoder: Encoder) -> str:
    """A chat template ends a turn, and the answer begins the next one."""
    return choice.strip() if encoder.chat_template else choice
