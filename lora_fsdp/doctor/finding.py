"""What the doctor says: rules, what trips them, and how bad that is."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

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


@dataclass(frozen=True)
class Rule:
    """One thing that the doctor looks at.

    Attributes:
        name: its id.
        severity: of what it finds.
        meaning: what it finds, for the documentation.
        fix: what to do about it.
        check: gives the problems of a case; raises `UnknownFactError` where it cannot be checked.
    """

    name: str
    severity: Severity
    meaning: str
    fix: str
    check: Callable[[Case], Iterator[Problem]]


@dataclass(frozen=True)
class Finding:
    """A problem that a rule has found."""

    rule: str
    severity: Severity
    sentence: str
    fix: str
