"""A packed sequence's tree as a recurrent layer walks it: segment by segment, states handed on."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from lora_fsdp.data.packing import PackedSequence, Segment


@dataclass(frozen=True)
class Level:
    """Segments that begin where those of the level before end, computed at once.

    Attributes:
        tokens: [n, w] int64, the place of each segment's tokens in the sequence, filled up on the
            right with the number of its tokens, T.
        parents: [n] int64, the segment of the level before that each goes on from; `None` at the
            root.
    """

    tokens: torch.Tensor
    parents: torch.Tensor | None

    def to(self, there: Callable[[torch.Tensor], torch.Tensor]) -> Level:
        """The same, each tensor brought `there`."""
        return Level(there(self.tokens), None if self.parents is None else there(self.parents))


class SequenceTree:
    """The paths of a packed sequence of T tokens, for layers that hand a state along them.

    A layer's convolution sees a token's predecessors on its path (`windows`), and its recurrence
    starts each segment from the state in which the one before it ended (`scan`): what examples
    share is computed once, and gradients of all that follows flow back through its state.

    Args:
        sequence: the packed sequence; nothing is read back from its device.
    """

    def __init__(self, sequence: PackedSequence) -> None:
        self.device = sequence.tokens.device
        self.length = len(sequence)
        chains = _chains(sequence.segments)
        self.levels = self._levels(chains)
        self._predecessors = self._of_tokens(chains)
        self._windows: dict[int, torch.Tensor] = {}
        places = torch.full((self.length + 1,), sum(level.tokens.numel() for level in self.levels))
        start = 0
        for level in self.levels:
            flat = level.tokens.flatten()
            places[flat] = torch.arange(start, start + len(flat))
            start += len(flat)
        places[-1] = start
        # What only fills the sequence up is in no segment: it is given the zero at the end.
        self._places = self._there(places[: self.length])
        self.levels = [
            Level(
                self._there(one.tokens), None if one.parents is None else self._there(one.parents)
            )
            for one in self.levels
        ]

    def windows(self, size: int) -> torch.Tensor:
        """[T, size]: each token's `size` - 1 predecessors and itself, T where there is none."""
        if size not in self._windows:
            before = torch.cat([self._predecessors, torch.tensor([self.length])])
            columns = [torch.arange(self.length)]
            while len(columns) < size:
                columns.insert(0, before[columns[0]])
            self._windows[size] = self._there(torch.stack(columns, dim=1))
        return self._windows[size]

    def scan(
        self,
        tensors: Mapping[str, torch.Tensor],
        run: Callable[
            [Mapping[str, torch.Tensor], torch.Tensor | None], tuple[torch.Tensor, torch.Tensor]
        ],
    ) -> torch.Tensor:
        """Run a recurrence along the tree, level by level.

        Args:
            tensors: what it is computed from, each [1, T, ...], by name.
            run: a level's [n, w, ...] and the states [n, ...] that its segments start from (`None`
                = none) to its outputs [n, w, ...] and the states that they end in. Shorter segments
                are filled up with zeros, which must leave the state as it is.

        Returns:
            the outputs, [1, T, ...].
        """
        padded = {
            name: torch.cat([one[0], torch.zeros_like(one[0, :1])]) for name, one in tensors.items()
        }
        states: torch.Tensor | None = None
        outputs: list[torch.Tensor] = []
        for level in self.levels:
            if level.parents is not None and states is not None:
                states = states.index_select(0, level.parents)
            rows = {name: one[level.tokens] for name, one in padded.items()}
            given, states = run(rows, states)
            outputs.append(given.flatten(0, 1))
        outputs.append(torch.zeros_like(outputs[0][:1]))
        return torch.cat(outputs).index_select(0, self._places)[None]

    def _levels(self, chains: Sequence[Chain]) -> list[Level]:
        levels: list[Level] = []
        of_depth: list[list[Chain]] = []
        for chain in chains:  # parents first
            while len(of_depth) <= chain.depth:
                of_depth.append([])
            chain.row = len(of_depth[chain.depth])
            of_depth[chain.depth].append(chain)
        for depth, members in enumerate(of_depth):
            width = max(len(chain.tokens) for chain in members)
            rows = [
                [*chain.tokens, *[self.length] * (width - len(chain.tokens))] for chain in members
            ]
            parents = [chain.parent.row for chain in members if chain.parent is not None]
            levels.append(Level(torch.tensor(rows), torch.tensor(parents) if depth else None))
        return levels

    def _of_tokens(self, chains: Sequence[Chain]) -> torch.Tensor:
        """[T], the place of each token's predecessor on its path; T where there is none."""
        before = torch.full((self.length,), self.length)
        for chain in chains:
            tokens = torch.tensor(chain.tokens)
            before[tokens[1:]] = tokens[:-1]
            if chain.parent is not None:
                before[tokens[0]] = chain.parent.tokens[-1]
        return before

    def _there(self, tensor: torch.Tensor) -> torch.Tensor:
        if self.device.type != "cuda":
            return tensor.to(self.device)
        return tensor.pin_memory().to(self.device, non_blocking=True)


@dataclass(eq=False)
class Chain:
    """Tokens one after another on every path that they are on.

    Attributes:
        tokens: their places in the sequence.
        parent: what they follow; `None` = nothing.
        depth: how many chains stand before it on its path.
        row: its place in its level.
    """

    tokens: list[int]
    parent: Chain | None
    depth: int
    row: int = 0


def _chains(segments: Sequence[Segment]) -> list[Chain]:
    """The segments, joined where one goes on from another that nothing else goes on from."""
    by_name = {(segment.example, segment.answer): segment for segment in segments}

    def parent_of(segment: Segment) -> Segment | None:
        for name in ((segment.example, 0), (0, 0)):
            if name != (segment.example, segment.answer) and name in by_name:
                return by_name[name]
        return None

    children: dict[Segment | None, int] = {}
    for segment in segments:
        parent = parent_of(segment)
        children[parent] = children.get(parent, 0) + 1
    found: list[Chain] = []
    chain_of: dict[Segment, Chain] = {}
    for segment in segments:
        tokens = list(range(segment.start, segment.start + segment.length))
        parent = parent_of(segment)
        before = None if parent is None else chain_of[parent]
        if before is not None and children[parent] == 1:
            before.tokens += tokens
            chain_of[segment] = before
            continue
        depth = 0 if before is None else before.depth + 1
        chain_of[segment] = Chain(tokens, before, depth)
        found.append(chain_of[segment])
    return found
