"""Rows that are shown with their answers in every prompt (few-shot examples)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from lora_fsdp.tasks.example import Prompt

_BETWEEN = "\n\n"
_SYSTEM = "system"
_TEXTS = ("before", "text", "after", "lead", "tail")


@dataclass(frozen=True, slots=True)
class Shot:
    """A row and its right answer, as prompts show them.

    Attributes:
        row: its number, for messages and reports.
        prompt: the row's own.
        answer: what follows it (`AnswerKind.shown`).
    """

    row: int
    prompt: Prompt
    answer: str


def shown_before(prompt: Prompt, shots: Sequence[Shot], *, as_turns: bool = False) -> Prompt:
    """`prompt` with the shots before its own row: all prompts of a run begin alike.

    Args:
        prompt: of a row.
        shots: in their order.
        as_turns: each is a message of the user and one of the assistant, behind the row's own
            system message; what a shot has as such is left out. Otherwise they are texts before the
            row's, under one instruction where all have the same.
    """
    if not shots:
        return prompt
    if as_turns:
        return replace(prompt, turns=_with_turns(prompt, shots))
    if any(shot.prompt.before != prompt.before for shot in shots):
        whole = "".join(f"{shot.prompt.message}{shot.answer}{_BETWEEN}" for shot in shots)
        return replace(prompt, before=f"{whole}{prompt.before}")
    # The last line says what a row is ("Input: "), and what stands above it is said once.
    stem = prompt.before.rstrip("\n")
    head, line, cue = stem.rpartition("\n")
    cue += prompt.before[len(stem) :]
    shown = "".join(
        f"{cue}{shot.prompt.lead}{shot.prompt.text}{shot.prompt.tail}{shot.prompt.after}"
        f"{shot.answer}{_BETWEEN}"
        for shot in shots
    )
    return replace(prompt, before=f"{head}{line}{shown}{cue}")


def _with_turns(prompt: Prompt, shots: Sequence[Shot]) -> tuple[tuple[str, str], ...]:
    first = prompt.turns[:1] if prompt.turns and prompt.turns[0][0] == _SYSTEM else ()
    shown = [
        turn
        for shot in shots
        for turn in (
            *(one for one in shot.prompt.turns if one[0] != _SYSTEM),
            ("user", shot.prompt.message),
            ("assistant", shot.answer.strip()),
        )
    ]
    return (*first, *shown, *prompt.turns[len(first) :])


def shots_as_json(shots: Sequence[Shot]) -> list[dict[str, Any]]:
    """As `shots_of_json` reads them."""
    return [asdict(shot) for shot in shots]


def shots_of_json(found: object) -> tuple[Shot, ...]:
    """What `shots_as_json` gave.

    Raises:
        ValueError: it is something else; the message says in a few words what is wrong.
    """
    if not isinstance(found, list):
        raise ValueError("no list of rows")
    return tuple(_shot_of(number, one) for number, one in enumerate(found, start=1))


def _shot_of(number: int, found: object) -> Shot:
    if not isinstance(found, Mapping):
        raise ValueError(f"entry {number} is no object")
    row, prompt, answer = found.get("row"), found.get("prompt"), found.get("answer")
    if not isinstance(row, int) or isinstance(row, bool) or not isinstance(answer, str):
        raise ValueError(f"entry {number} lacks its row or its answer")
    if not isinstance(prompt, Mapping) or set(prompt) != {*_TEXTS, "turns"}:
        raise ValueError(f"entry {number} has no prompt in its parts")
    texts, turns = {name: prompt[name] for name in _TEXTS}, prompt["turns"]
    are_turns = isinstance(turns, list) and all(
        isinstance(one, list) and len(one) == 2 and all(isinstance(part, str) for part in one)
        for one in turns
    )
    if not are_turns or not all(isinstance(text, str) for text in texts.values()):
        raise ValueError(f"entry {number} has a prompt whose parts are no texts")
    return Shot(row, Prompt(**texts, turns=tuple((role, text) for role, text in turns)), answer)
