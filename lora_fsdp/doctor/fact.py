"""Facts of a case: each is worked out once, and may turn out to be an error."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any, Generic, TypeVar

from lora_fsdp.errors import LoraFsdpError

T = TypeVar("T")


class UnknownFactError(Exception):
    """A fact that cannot be worked out; the rule that owns it says why."""


class Fact(Generic[T]):
    """The result of `find`, or the error of this library that it raised.

    Attributes:
        error: what `find` raised; `None` if it returned, or if a fact that it needs is unknown.
    """

    def __init__(self, find: Callable[[], T]) -> None:
        self.error: LoraFsdpError | None = None
        self._found: list[T] = []
        try:
            self._found.append(find())
        except UnknownFactError:
            return
        except LoraFsdpError as error:
            self.error = error

    def check(self) -> None:
        """Raise the error, if there is one."""
        if self.error is not None:
            raise self.error

    @property
    def value(self) -> T:
        """The result.

        Raises:
            UnknownFactError: there is none.
        """
        if not self._found:
            raise UnknownFactError
        return self._found[0]


def fact(find: Callable[[Any], T]) -> cached_property[Fact[T]]:
    """A method as a cached property: the fact that it finds."""
    found = cached_property(lambda case: Fact(lambda: find(case)))
    found.__doc__ = find.__doc__
    return found
