"""What crosses the network between hosts in an optimizer step, and how long that takes.

Ranks are numbered host by host, and NCCL and gloo pass large tensors round in a ring: one neighbour
of the ring is on the next host. Of an all-gather of S bytes over N ranks a host sends (N-1)/N S,
of an all-reduce twice that, however many ranks it has. Counted is what the ranks send; frames and
headers come on top (3 to 6 %).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from lora_fsdp.placement.layout import Layout
from lora_fsdp.placement.shape import ModelShape

# Of a link's bits, those left for data by frames and headers: 1448 of 1538 bytes on Ethernet.
_PAYLOAD = 0.94
# From one host to the next and back into a rank's hands: TCP over a data centre's Ethernet. Taken
# from no measurement of ours.
_HOP_SECONDS = 3e-5


@dataclass(frozen=True)
class HostTraffic:
    """Bytes that each host sends to others in one optimizer step.

    Attributes:
        gradients: of the adapter, summed over all ranks.
        weights: of the base, gathered over groups of ranks that reach over hosts.
        gathers: how many gathers those are.
    """

    gradients: float
    weights: float
    gathers: float

    @property
    def total(self) -> float:
        """All of it."""
        return self.gradients + self.weights


NO_TRAFFIC = HostTraffic(0.0, 0.0, 0.0)


def host_traffic(shape: ModelShape, layout: Layout, *, sequences: float) -> HostTraffic:
    """What a step of so many packed sequences a rank sends; nothing where there is one host."""
    if layout.hosts == 1:
        return NO_TRAFFIC
    summed = 2.0 * _share_sent(layout.ranks) * 4 * shape.adapter_parameters
    if not layout.reaches_over_hosts or not layout.gathers(shape.layers):
        return HostTraffic(summed, 0.0, 0.0)
    weights = sequences * _share_sent(layout.sharers) * gathered_bytes(shape, layout)
    return HostTraffic(summed, weights, gathers(shape, layout, sequences=sequences))


def seconds_of_gradients(traffic: HostTraffic, layout: Layout, *, link: float) -> float:
    """How long the adapter's gradients take, which nothing hides; `link` in bytes a second."""
    if layout.hosts == 1:
        return 0.0
    hops = 2 * math.ceil(math.log2(layout.hosts))  # NCCL's trees, where messages are small
    return traffic.gradients / (link * _PAYLOAD) + hops * _HOP_SECONDS


def seconds_of_weights(traffic: HostTraffic, layout: Layout, *, link: float) -> float:
    """How long gathers take, behind which a step computes."""
    hops = traffic.gathers * (layout.hosts // layout.replicas_over_hosts - 1)
    return traffic.weights / (link * _PAYLOAD) + hops * _HOP_SECONDS


def gathers(shape: ModelShape, layout: Layout, *, sequences: float) -> float:
    """How often a step gathers layers."""
    gathered = shape.layers if layout.offloaded else shape.layers - layout.resident_layers
    if layout.one_group:
        gathered = min(gathered, 1)
    return sequences * gathers_of_a_layer(layout) * gathered


def gathers_of_a_layer(layout: Layout) -> float:
    """For one sequence, if it is sharded."""
    return 1.0 if layout.kept_until_backward or layout.one_group else 2.0


def gathered_bytes(shape: ModelShape, layout: Layout) -> float:
    """What is whole on a rank at some time of one sequence and was not before, in bytes."""
    if not layout.gathers(shape.layers):
        return 0.0
    sharded = shape.base_bytes(quantized=layout.quantized) - (
        layout.resident_layers * shape.layer_bytes(quantized=layout.quantized)
    )
    if layout.whole_head:
        sharded -= shape.itemsize * shape.head_parameters
    passes = gathers_of_a_layer(layout)
    # Embeddings are gathered once a sequence; tied ones stay in the root group.
    return passes * sharded - (passes - 1.0) * shape.itemsize * shape.embedding_parameters


def _share_sent(ranks: int) -> float:
    """Of a tensor that goes round in a ring, what each rank sends on."""
    return (ranks - 1) / ranks
