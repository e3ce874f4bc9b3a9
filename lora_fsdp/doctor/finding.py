"""What the doctor says: rules, what trips them, and how bad that is."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from lora_fsdp.doctor.case import Case


class Severity(StrEnum):
    """How bad a finding is.

    An error stops the run, or makes it another one than was asked for. A warning costs quality,
    time or money. A note is about something unusual that works.
    """

    ERROR = "error"
    WARNING = "warning"
    NOTE = "note"


@dataclass(frozen=True)
class Problem:
    """What is wrong in one case.

    Attributes:
        sentence: what is wrong with which value.
        fix: what to do; `None` = what the rule says.
    """

    sentence: str
    fix: str | None = None


Check = Callable[["Case"], Iterable[Problem] | None]
C = TypeVar("C", bound=Check)


@dataclass(frozen=True)
class Rule:
    """One thing that the doctor looks at.

    Attributes:
        name: its id.
        severity: of what it finds.
        meaning: what it finds, for the documentation.
        fix: what to do about it.
        check: gives the problems of a case, or raises the error that the run would raise; raises
            `UnknownFactError` where it cannot be checked.
    """

    name: str
    severity: Severity
    meaning: str
    fix: str
    check: Check


class Rules(list[Rule]):
    """The rules of a subject. `error`, `warning` and `note` decorate the check of a rule."""

    def error(self, name: str, meaning: str, fix: str) -> Callable[[C], C]:
        """A rule that finds errors."""
        return self._adds(name, Severity.ERROR, meaning, fix)

    def warning(self, name: str, meaning: str, fix: str) -> Callable[[C], C]:
        """A rule that finds what warrants a warning."""
        return self._adds(name, Severity.WARNING, meaning, fix)

    def note(self, name: str, meaning: str, fix: str) -> Callable[[C], C]:
        """A rule that finds what is worth a note."""
        return self._adds(name, Severity.NOTE, meaning, fix)

    def _adds(self, name: str, severity: Severity, meaning: str, fix: str) -> Callable[[C], C]:
        def add(check: C) -> C:
            self.append(Rule(name, severity, meaning, fix, check))
            return check

        return add


@dataclass(frozen=True)
class Finding:
    """A problem that a rule has found."""

    rule: str
    severity: Severity
    sentence: str
    fix: str
