"""How a base lies across ranks, and whether a CUDA graph holds what is computed with it."""

from __future__ import annotations

from dataclasses import dataclass

from lora_fsdp.compute.captured_sizes import CAPTURE_UP_TO_TOKENS
from lora_fsdp.placement.shape import ModelShape


@dataclass(frozen=True)
class Layout:
    """How a base lies across ranks.

    Attributes:
        ranks: of the run.
        hosts: machines that they are on, evenly.
        replicas: copies of what is sharded: each is shared by as many ranks.
        resident_layers: decoder layers that every rank keeps whole; all of them = nothing is
            sharded.
        whole_head: every rank keeps the output head whole, too.
        kept_until_backward: gathered layers stay until their backward.
        one_group: what is sharded is gathered all at once, not layer by layer.
        offloaded: shards lie in host memory.
        quantized: linear layers are stored in 4 bits.
        recomputed: activations are recomputed in backward.
        captured: steps are CUDA graphs where nothing is gathered within them.
        gathers_captured: they are too where layers are gathered.
    """

    ranks: int
    resident_layers: int
    whole_head: bool = False
    kept_until_backward: bool = False
    one_group: bool = False
    offloaded: bool = False
    quantized: bool = False
    recomputed: bool = False
    captured: bool = True
    gathers_captured: bool = False
    hosts: int = 1
    replicas: int = 1

    @property
    def sharers(self) -> int:
        """Ranks that share one copy."""
        return max(1, self.ranks // self.replicas)

    @property
    def reaches_over_hosts(self) -> bool:
        """Whether ranks of different hosts share a copy."""
        return self.sharers > max(1, self.ranks // self.hosts)

    @property
    def replicas_over_hosts(self) -> int:
        """Copies that lie on hosts of their own."""
        return min(self.replicas, self.hosts)

    def gathers(self, layers: int) -> bool:
        """Whether a step of a model of so many layers gathers any, from ranks or the host."""
        return self.offloaded or self.resident_layers < layers

    def resident_of(self, layers: int) -> frozenset[int]:
        """Which of so many layers every rank keeps: evenly spread ones."""
        kept = self.resident_layers
        return frozenset(index * layers // kept for index in range(kept))


def is_captured(shape: ModelShape, layout: Layout, *, tokens: float) -> bool:
    """Whether sequences of `tokens` are computed by CUDA graphs."""
    return (
        layout.captured
        and (layout.gathers_captured or not layout.gathers(shape.layers))
        and tokens <= CAPTURE_UP_TO_TOKENS
    )
