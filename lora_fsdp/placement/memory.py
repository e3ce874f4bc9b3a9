"""Bytes that a run needs on each device, part by part: for the plan, and for the run that follows.

One model for both, so that a run is placed by the numbers its plan showed. What a row keeps for
backward is counted on the model itself (`lora_fsdp.placement.counting`); constants are named below.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

from lora_fsdp.compute.attention import BLOCKS_FROM_TOKENS
from lora_fsdp.compute.captured_sizes import (
    CAPTURE_UP_TO_TOKENS,
    next_smaller,
    padded_labels,
    padded_tokens,
)
from lora_fsdp.compute.chunked_head import CHUNK
from lora_fsdp.data.workload import Work
from lora_fsdp.placement.shape import ModelShape

#: Rows longer than this gain nothing: the matrix products are as fast as they get.
LONGEST_SEQUENCE = 8192
#: Rows this long where no memory is known, and at most where layers are not fused.
USUAL_SEQUENCE = 2048
#: What the CUDA context and the libraries' kernels take, outside torch's allocator.
CONTEXT = 600_000_000
#: cuBLAS's and cuDNN's workspaces, and small things: what steps of a 7B and a 1B allocated at their
#: peak beyond the parts counted here.
WORKSPACE = 100_000_000
#: Tensors of the hidden states' width that a layer's backward holds for a while, in the same steps;
#: by whether its forward is recomputed there.
_HIDDEN_STATES_HELD = {False: 3, True: 5}


@dataclass(frozen=True)
class Placement:
    """How a base lies across ranks.

    Attributes:
        ranks: how many share it.
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


@dataclass(frozen=True)
class LargestSequence:
    """The largest rows.

    Attributes:
        tokens: of a training row.
        labels: its label tokens.
        scored: tokens of a row that is scored only.
    """

    tokens: int
    labels: int
    scored: int = 0


@dataclass(frozen=True)
class DeviceMemory:
    """Bytes at the peak of a step, on each device.

    Attributes:
        base_shard: this rank's part of what is sharded.
        resident: what every rank keeps whole.
        in_flight: layers that are gathered while they compute.
        communication: buffers that gathers write into.
        adapter: its float32 parameters, and their copies in the base's dtype.
        gradients: of the adapter, float32, and their copy while rows of a new length are captured.
        optimizer: AdamW's two moments, float32.
        activations: what a row keeps for backward, and its mask.
        logits: of the label tokens, with their gradients.
        workspace: temporary tensors and libraries' buffers.
        context: outside torch's allocator.
    """

    base_shard: int
    resident: int
    in_flight: int
    communication: int
    adapter: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    workspace: int
    context: int = CONTEXT

    @property
    def total(self) -> int:
        """What the device must have."""
        return sum(getattr(self, part.name) for part in fields(self))

    @property
    def allocated(self) -> int:
        """What torch's allocator must have."""
        return self.total - self.context


def peak_allocated(shape: ModelShape, placement: Placement, rows: LargestSequence) -> int:
    """What `torch.cuda.max_memory_allocated` will say after training, in bytes.

    A graph's tensors count when it is captured and not when it is replayed. The largest row is
    captured first, before there are moments. Then, where rows differ in length as short ones do,
    come smaller ones.
    """
    needed = device_memory(shape, placement, rows)
    if not is_captured(shape, placement, tokens=rows.tokens):
        return needed.allocated
    training = device_memory(shape, placement, replace(rows, scored=0))
    seen = [training.allocated - training.optimizer]
    if rows.tokens < BLOCKS_FROM_TOKENS:
        smaller = LargestSequence(tokens=next_smaller(rows.tokens), labels=rows.labels)
        seen.append(device_memory(shape, placement, smaller).allocated)
    if needed.activations > training.activations:  # of scoring, which is not captured
        seen.append(needed.allocated)
    return max(seen)


def device_memory(shape: ModelShape, placement: Placement, rows: LargestSequence) -> DeviceMemory:
    """The parts of a step's peak."""
    layer = shape.layer_bytes(quantized=placement.quantized)
    base = shape.base_bytes(quantized=placement.quantized)
    whole = placement.resident_layers >= shape.layers and not placement.offloaded
    resident = base if whole else placement.resident_layers * layer + _kept_head(shape, placement)
    sharded = 0 if whole else -(-(base - resident) // placement.ranks)
    unpacked = 2 * shape.largest_linear if placement.quantized else 0
    in_flight, communication, unpacked = _gathered(
        shape, placement, layer=layer, rest=base - resident, whole=whole, unpacked=unpacked
    )
    captured = is_captured(shape, placement, tokens=rows.tokens)
    if captured:
        tokens, labels = padded_tokens(rows.tokens), padded_labels(rows.labels)
        rows = replace(rows, tokens=tokens, labels=labels)
    mask = 2 * rows.tokens**2 if rows.tokens < BLOCKS_FROM_TOKENS else 0
    trained = mask + shape.saved_bytes(rows.tokens, recomputed=placement.recomputed)
    # Scoring keeps nothing: one layer's tensors, and the next one's while they are freed.
    scored = shape.saved_bytes(rows.scored, recomputed=False) // shape.layers
    # bfloat16 and float32 logits, and the float32 ones of the chunk before.
    logits = 10 * min(rows.labels, CHUNK) * shape.vocabulary_size
    if placement.recomputed:  # a layer's activations come after the logits are gone
        logits -= min(logits, shape.saved_bytes(rows.tokens, recomputed=False) // shape.layers)
    computing = DeviceMemory(
        base_shard=0 if placement.offloaded else sharded,
        resident=resident,
        in_flight=in_flight,
        communication=communication,
        adapter=6 * shape.adapter_parameters,
        gradients=(8 if captured else 4) * shape.adapter_parameters,
        optimizer=8 * shape.adapter_parameters,
        activations=max(trained, scored),
        logits=logits,
        workspace=WORKSPACE
        + 2 * _HIDDEN_STATES_HELD[placement.recomputed] * shape.hidden_size * rows.tokens
        # The head's weight is not packed: weights are unpacked before and after it.
        + max(0, unpacked - logits),
    )
    if whole or placement.one_group or not shape.head_parameters:
        return computing
    # Before there are activations, embeddings that are a group of their own are gathered.
    embedding = 2 * shape.embedding_parameters
    looking_up = replace(
        computing,
        in_flight=embedding,
        communication=embedding,
        activations=0,
        logits=0,
        workspace=WORKSPACE,
    )
    return max(computing, looking_up, key=lambda memory: memory.total)


def _gathered(
    shape: ModelShape, placement: Placement, *, layer: int, rest: int, whole: bool, unpacked: int
) -> tuple[int, int, int]:
    """Bytes of what is gathered, of the buffer it is gathered into, and of what is unpacked then,
    at the moment when they are the most.

    Args:
        shape, placement: of the base.
        layer: bytes of one layer.
        rest: of all that is not resident.
        whole: nothing is sharded.
        unpacked: of the largest product's weight, where weights are packed.
    """
    if whole:
        return 0, 0, unpacked
    if placement.one_group:
        return rest, rest, unpacked
    # A head of its own is a group of its own; a tied one is in the root group, which stays.
    head = 2 * (shape.head_parameters or shape.embedding_parameters)
    tied = not shape.head_parameters
    if _kept_head(shape, placement):
        head = 0
    if placement.kept_until_backward:
        return rest, layer if tied else max(layer, head), unpacked
    # One layer computes while the next is gathered.
    moments = [(2 * layer + head * tied, layer, unpacked)]
    if not tied:  # the head computes, and the last layer is still there
        moments.append((layer + head, head, 0))
    return max(moments, key=sum)


def _kept_head(shape: ModelShape, placement: Placement) -> int:
    """Bytes of the output head that every rank keeps beside its layers."""
    return 2 * shape.head_parameters if placement.whole_head else 0


def with_head_placed(shape: ModelShape, placement: Placement, rows: LargestSequence) -> Placement:
    """`placement` with the output head whole on every rank, if that takes less at the peak.

    A gathered head is there twice, and on few ranks its shard is a large part of it: with large
    vocabularies that is the peak. What is offloaded stays in host memory.
    """
    sharded = placement.resident_layers < shape.layers and not placement.offloaded
    if not sharded or placement.one_group or not shape.head_parameters:
        return placement
    whole = replace(placement, whole_head=True)
    needed = [device_memory(shape, one, rows).allocated for one in (whole, placement)]
    return whole if needed[0] <= needed[1] else placement


def is_captured(shape: ModelShape, placement: Placement, *, tokens: float) -> bool:
    """Whether rows of `tokens` are computed by CUDA graphs."""
    gathers = placement.resident_layers < shape.layers
    return (
        placement.captured
        and (placement.gathers_captured or not gathers)
        and not placement.offloaded
        and tokens <= CAPTURE_UP_TO_TOKENS
    )


def can_capture(shape: ModelShape, *, recomputed: bool) -> bool:
    """Whether a graph can hold the model's step: what recomputes must draw no random numbers, and
    only fused layers do without keeping their state.
    """
    return not recomputed or (shape.is_fused and not shape.drops)


def largest_sequence(work: Work, longest: int) -> LargestSequence:
    """The largest row where none is longer than `longest`; all a step's tokens, if they are fewer.

    Rows that are scored are filled up to `longest`, or end with the held-out rows.
    """
    tokens = min(longest, work.largest_step)
    share = min(1.0, tokens / work.step_tokens)
    return LargestSequence(
        tokens=tokens,
        labels=max(1, round(work.step_labels * share)),
        scored=min(longest, round(work.scored_tokens / 2)),
    )


def layers_that_fit(
    shape: ModelShape, placement: Placement, rows: LargestSequence, *, free: int
) -> int:
    """How many layers every rank can keep whole within `free` bytes, context not counted; what else
    `placement` says stays.
    """
    for layers in range(shape.layers, 0, -1):
        kept = with_head_placed(shape, replace(placement, resident_layers=layers), rows)
        if device_memory(shape, kept, rows).allocated <= free:
            return layers
    return 0


def longest_sequence(
    shape: ModelShape,
    *,
    free: int,
    longest_example: int,
    recomputed: bool,
    most: int = LONGEST_SEQUENCE,
) -> int:
    """Row length in tokens that fits half of `free` bytes.

    Args:
        shape: of the model.
        free: bytes left beside the base.
        longest_example: in tokens; a row holds at least one example.
        recomputed: whether activations are recomputed in backward.
        most: tokens that a row has at most, whatever fits.
    """
    left = (free - WORKSPACE - 22 * shape.adapter_parameters) // 2
    length = most
    while length > longest_example and shape.saved_bytes(length, recomputed=recomputed) > left:
        length -= 64
    return max(length, longest_example)
