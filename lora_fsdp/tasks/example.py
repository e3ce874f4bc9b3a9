"""A row as the model gets it: what it is given, and what it must continue with."""

from __future__ import annotations

from dataclasses import dataclass

#: What stands for a row's text where a prompt is shown without a row.
TEXT_PLACEHOLDER = "{text}"


@dataclass(frozen=True, slots=True)
class Prompt:
    """What the model is given: the author's words around a row's. Only `text` is ever shortened.

    `before` and `after` hold the instruction and the cue for the answer; what is the same in every
    row of a task should stand in `before`, where a packed sequence computes it once. They may hold
    control tokens. What comes from a row belongs in the other parts, where a control token that it
    spells is taken as the letters it is.

    Attributes:
        before: the author's words before the row's.
        text: the row's text, of which the end is cut if the prompt is too long.
        after: the author's words after the row's.
        lead, tail: what else of the row stands right before and after `text`, never shortened.
        turns: (role, content) of the messages before this one; for chat templates only.
    """

    before: str
    text: str
    after: str
    lead: str = ""
    tail: str = ""
    turns: tuple[tuple[str, str], ...] = ()

    @property
    def message(self) -> str:
        """The prompt without the turns before it."""
        return f"{self.before}{self.lead}{self.text}{self.tail}{self.after}"

    @property
    def content(self) -> str:
        """All that comes from the row, which tells rows apart."""
        return "\n".join([*(text for _, text in self.turns), f"{self.lead}{self.text}{self.tail}"])

    def __str__(self) -> str:
        return "".join(f"{role}: {text}\n" for role, text in self.turns) + self.message


@dataclass(frozen=True, slots=True)
class Example:
    """One row, ready to be tokenised.

    Attributes:
        row: number of the row in its table (1 = first data row), for messages and reports.
        prompt: what the model is given.
        target: exactly what it must continue with (for most prompts it starts with a
            space); `None` for a row without an answer, which can be predicted but not trained on.
        choices: the targets among which this row's answer is, if they are its own and not those of
            the task's label set; empty otherwise.
        references: further right answers of a free-text row, for its metrics.
        shares: how right each of the kind of answer's candidates is, from 0 to 1, where more than
            one may be; empty = the target alone.
        weight: how much the row counts in the training loss, beside the others.
    """

    row: int
    prompt: Prompt
    target: str | None
    choices: tuple[str, ...] = ()
    references: tuple[str, ...] = ()
    shares: tuple[float, ...] = ()
    weight: float = 1.0
