"""Bytes that a run needs on each device, part by part: for the plan, and for the run that follows.

One model for both, so that a run is placed by the numbers its plan showed. What a sequence keeps
for backward is counted on the model itself (`lora_fsdp.sizing.counting`).
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

from lora_fsdp.compute.attention import BLOCKS_FROM_TOKENS
from lora_fsdp.compute.captured_sizes import next_smaller, padded_labels, padded_tokens
from lora_fsdp.compute.chunked_head import CHUNK
from lora_fsdp.placement.hardware import CONTEXT
from lora_fsdp.placement.layout import Layout, is_captured
from lora_fsdp.placement.shape import ModelShape

#: cuBLAS's and cuDNN's workspaces, and small things: what steps of a 7B and a 1B allocated at their
#: peak beyond the parts counted here.
WORKSPACE = 100_000_000
#: Tensors of the hidden states' width that a layer's backward holds for a while, in the same steps;
#: by whether its forward is recomputed there.
_HIDDEN_STATES_HELD = {False: 3, True: 5}


@dataclass(frozen=True)
class LargestSequence:
    """The largest packed sequences.

    Attributes:
        tokens: of one that is trained on.
        labels: its label tokens.
        scored: tokens of one that is scored only.
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
        gradients: of the adapter, float32, and their copy while a new length is captured.
        optimizer: AdamW's two moments, float32.
        activations: what a sequence keeps for backward, and its mask.
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


def peak_allocated(shape: ModelShape, layout: Layout, largest: LargestSequence) -> int:
    """What `torch.cuda.max_memory_allocated` will say after training, in bytes.

    A graph's tensors count when it is captured and not when it is replayed. The largest
    sequence is captured first, before there are moments. Then, where sequences differ in length as
    short ones do, come smaller ones.
    """
    needed = device_memory(shape, layout, largest)
    if not is_captured(shape, layout, tokens=largest.tokens):
        return needed.allocated
    training = device_memory(shape, layout, replace(largest, scored=0))
    seen = [training.allocated - training.optimizer]
    if largest.tokens < BLOCKS_FROM_TOKENS:
        smaller = LargestSequence(tokens=next_smaller(largest.tokens), labels=largest.labels)
        seen.append(device_memory(shape, layout, smaller).allocated)
    if needed.activations > training.activations:  # of scoring, which is not captured
        seen.append(needed.allocated)
    return max(seen)


def device_memory(shape: ModelShape, layout: Layout, largest: LargestSequence) -> DeviceMemory:
    """The parts of a step's peak."""
    computing = _computing(shape, layout, largest)
    if layout.one_group or not shape.head_parameters or not layout.gathers(shape.layers):
        return computing
    # Before there are activations, embeddings that are a group of their own are gathered.
    embedding = shape.itemsize * shape.embedding_parameters
    looking_up = replace(
        computing,
        in_flight=embedding,
        communication=embedding,
        activations=0,
        logits=0,
        workspace=WORKSPACE,
    )
    return max(computing, looking_up, key=lambda memory: memory.total)


def _computing(shape: ModelShape, layout: Layout, largest: LargestSequence) -> DeviceMemory:
    """The parts while layers and head compute."""
    layer = shape.layer_bytes(quantized=layout.quantized)
    base = shape.base_bytes(quantized=layout.quantized)
    whole = not layout.gathers(shape.layers)
    resident = base if whole else layout.resident_layers * layer + _kept_head(shape, layout)
    sharded = 0 if whole else -(-(base - resident) // layout.sharers)
    unpacked = shape.itemsize * shape.largest_linear if layout.quantized else 0
    in_flight, communication, unpacked = _gathered(
        shape, layout, layer=layer, rest=base - resident, whole=whole, unpacked=unpacked
    )
    captured = is_captured(shape, layout, tokens=largest.tokens)
    if captured:
        tokens, labels = padded_tokens(largest.tokens), padded_labels(largest.labels)
        largest = replace(largest, tokens=tokens, labels=labels)
    mask = shape.itemsize * largest.tokens**2 if largest.tokens < BLOCKS_FROM_TOKENS else 0
    trained = mask + shape.saved_bytes(largest.tokens, recomputed=layout.recomputed)
    # Scoring keeps nothing: one layer's tensors, and the next one's while they are freed.
    scored = shape.saved_bytes(largest.scored, recomputed=False) // shape.layers
    # Logits in the base's dtype and in float32, and the float32 ones of the chunk before.
    logits = (8 + shape.itemsize) * min(largest.labels, CHUNK) * shape.vocabulary_size
    if layout.recomputed:  # a layer's activations come after the logits are gone
        logits -= min(logits, shape.saved_bytes(largest.tokens, recomputed=False) // shape.layers)
    held = _HIDDEN_STATES_HELD[layout.recomputed] * shape.hidden_size * largest.tokens
    return DeviceMemory(
        base_shard=0 if layout.offloaded else sharded,
        resident=resident,
        in_flight=in_flight,
        communication=communication,
        adapter=(4 + shape.itemsize) * shape.adapter_parameters,
        gradients=(8 if captured else 4) * shape.adapter_parameters,
        optimizer=8 * shape.adapter_parameters,
        activations=max(trained, scored),
        logits=logits,
        workspace=WORKSPACE
        + shape.itemsize * held
        # The head's weight is not packed: weights are unpacked before and after it.
        + max(0, unpacked - logits),
    )


def _gathered(
    shape: ModelShape, layout: Layout, *, layer: int, rest: int, whole: bool, unpacked: int
) -> tuple[int, int, int]:
    """Bytes of what is gathered, of the buffer it is gathered into, and of what is unpacked then,
    at the moment when they are the most; `layer` is one layer's, `rest` what is not resident.
    """
    if whole:
        return 0, 0, unpacked
    if layout.one_group:
        return rest, rest, unpacked
    # A head of its own is a group of its own; a tied one is in the root group, which stays.
    head = shape.itemsize * (shape.head_parameters or shape.embedding_parameters)
    tied = not shape.head_parameters
    if _kept_head(shape, layout):
        head = 0
    if layout.kept_until_backward:
        return rest, layer if tied else max(layer, head), unpacked
    # One layer computes while the next is gathered.
    moments = [(2 * layer + head * tied, layer, unpacked)]
    if not tied:  # the head computes, and the last layer is still there
        moments.append((layer + head, head, 0))
    return max(moments, key=sum)


def _kept_head(shape: ModelShape, layout: Layout) -> int:
    """Bytes of the output head that every rank keeps beside its layers."""
    return shape.itemsize * shape.head_parameters if layout.whole_head else 0
