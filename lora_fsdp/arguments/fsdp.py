"""The FSDP settings that are carried out; they come from the accelerate YAML only."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class FsdpSettings:
    """The FSDP2 settings of the accelerate YAML, as far as they concern a frozen base.

    Attributes:
        reshard_after_forward: free a layer's gathered weights between forward and backward.
        offload: keep the shards in host memory.
        activation_checkpointing: recompute activations in backward.
        layer_classes: class names of the layers to shard one by one; `None` = found by structure.
        wrap_layers: shard layer by layer (else the whole base is one group).
        activation_offload: keep what recomputing starts from in host memory.
        replicas: copies of the sharded base (hybrid sharding): each is shared by as many ranks.
    """

    reshard_after_forward: bool
    offload: bool
    activation_checkpointing: bool
    layer_classes: tuple[str, ...] | None
    wrap_layers: bool
    activation_offload: bool = False
    replicas: int = 1
