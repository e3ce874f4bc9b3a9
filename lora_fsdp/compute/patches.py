"""What is changed on a model's objects: through one mechanism, listed, and undone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, MutableMapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import nn

_ABSENT = object()


@dataclass(frozen=True)
class Patch:
    """One attribute that has another value than it had.

    Attributes:
        target: the object.
        attribute: the attribute's name.
        value: what it is now.
        why: the purpose, in words.
        undo: puts back what was there before.
    """

    target: object
    attribute: str
    value: object
    why: str
    undo: Callable[[], None]


class Patches:
    """The patches of one model, in the order in which they were made."""

    def __init__(self) -> None:
        self.made: list[Patch] = []

    def set(self, target: object, attribute: str, value: object, *, why: str) -> None:
        """Give `target` the attribute, until `undo`."""
        before = vars(target).get(attribute, _ABSENT)
        setattr(target, attribute, value)
        self._note(target, attribute, vars(target), before=before, why=why)

    @contextmanager
    def for_now(self, target: object, attribute: str, value: object, *, why: str) -> Iterator[None]:
        """Give `target` the attribute for the length of the block."""
        self.set(target, attribute, value, why=why)
        patch = self.made[-1]
        try:
            yield
        finally:
            self.made.remove(patch)
            patch.undo()

    @contextmanager
    def recording(self, modules: Iterable[nn.Module], *, why: str) -> Iterator[None]:
        """Note what others' code sets on `modules` within the block, hooks too, as if `set` had."""
        before = [(module, _attributes(module)) for module in modules]
        yield
        for module, attributes in before:
            for owner, old in attributes:
                for name in [name for name in owner if owner[name] is not old.get(name, _ABSENT)]:
                    self._note(module, name, owner, before=old.get(name, _ABSENT), why=why)

    def before_forward(self, module: nn.Module, hook: Callable[..., None], *, why: str) -> None:
        """Call `hook` before every forward of `module`, until `undo`."""
        handle = module.register_forward_pre_hook(hook)
        self.made.append(Patch(module, "forward_pre_hook", hook, why, handle.remove))

    def undo(self) -> None:
        """Put everything back, the latest first."""
        while self.made:
            self.made.pop().undo()

    def __str__(self) -> str:
        """A line for each kind of patch: what is changed, on how many objects, and why."""
        counts = Counter((type(p.target).__name__, p.attribute, p.why) for p in self.made)
        return "\n".join(
            f"{kind}.{attribute}{f' ({count} times)' if count > 1 else ''}: {why}"
            for (kind, attribute, why), count in counts.items()
        )

    def _note(
        self,
        target: object,
        name: Any,
        owner: MutableMapping[Any, Any],
        *,
        before: object,
        why: str,
    ) -> None:
        """Note what `owner` (the target's attributes, or hooks of a kind) has as `name`."""

        def undo() -> None:
            if before is _ABSENT:
                owner.pop(name, None)
            else:
                owner[name] = before

        attribute = name if isinstance(name, str) else "hook"  # hooks have numbers for names
        self.made.append(Patch(target, attribute, owner[name], why, undo))


def _attributes(module: nn.Module) -> list[tuple[MutableMapping[Any, Any], dict[Any, Any]]]:
    """The module's attributes, each dictionary among them (of hooks), and what they hold now."""
    own = vars(module)
    inner = [value for value in own.values() if isinstance(value, dict)]
    return [(owner, dict(owner)) for owner in (own, *inner)]
