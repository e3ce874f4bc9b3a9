"""Seconds that a run will take: what its GPUs compute, read, receive and launch.

A prediction and no promise: the rates below come from measurements on one H100 and one H200
(docs/planning.md shows them beside what was predicted), and other GPUs are taken to reach the same
shares of their data sheets.
"""

from __future__ import annotations

import math
from functools import partial

from lora_fsdp.data.workload import Work
from lora_fsdp.placement.gpus import Gpu
from lora_fsdp.placement.layout import Layout, is_captured
from lora_fsdp.placement.network import (
    gathered_bytes,
    gathers,
    gathers_of_a_layer,
    host_traffic,
    seconds_of_gradients,
    seconds_of_weights,
)
from lora_fsdp.placement.shape import ModelShape

# Share of the data sheet's operations that a long sequence's matmuls reach, with the norms,
# rotations and activations between them; fused layers or not.
_SHARE = {True: 0.74, False: 0.57}
# Tokens at which matmuls reach half of that, as their tiles and weights weigh on short sequences.
_HALF_AT_TOKENS = 164
# How many times longer than a matmul's an operation of attention takes.
_ATTENTION_FACTOR = 2.8
# Share of the data sheet's bandwidth at which weights are unpacked; in a captured step, where a
# part of it runs beside the matmuls, at which they seem to be.
_COPY_SHARE = {True: 0.81, False: 0.71}
# An adapter's part in a layer: its few small kernels; or how often it reads or writes the layer's
# inputs and outputs, and the share of the data sheet's operations that matmuls this thin reach.
_ADAPTER_SECONDS = 3e-5
_ADAPTER_COPIES = 5.3
_ADAPTER_SHARE = 0.28
# What the CPU needs to launch a layer's forward and backward where no graph was captured.
_LAUNCH_SECONDS = {True: 3.4e-3, False: 4.7e-3}
# What FSDP adds to that for each time that a layer is gathered, on two H200 of a host whose CPU was
# rather slow.
_GATHER_SECONDS = 2.7e-3
# What a layer's kernels wait for one another in a captured graph.
_GRAPH_SECONDS = 4e-5
# On a CPU, how often what a forward keeps passes through memory: written and read by what follows,
# and read again, with a gradient written and read for each of it, in backward.
_FORWARD_COPIES = 2.0
_BACKWARD_COPIES = 3.0
# Outside forward and backward: the optimizer, the logs.
_STEP_SECONDS = 1.5e-3


def step_seconds(
    shape: ModelShape,
    layout: Layout,
    work: Work,
    gpu: Gpu,
    *,
    sequence_tokens: int,
    link: float = math.inf,
) -> float:
    """One optimizer step: the slowest of what happens at once, and what does not.

    Args:
        shape, layout, work, gpu: of the run.
        sequence_tokens: longest packed sequence.
        link: bytes per second that a host can send to others.
    """
    sequences = max(1.0, work.step_tokens / sequence_tokens)
    if gpu.is_cpu:
        return _cpu_step_seconds(shape, layout, work, gpu, sequences=sequences)
    computing = _computing(shape, layout, gpu, work=work, sequences=sequences)
    layers = sequences * shape.layers * _passes(layout) / 2
    captured = is_captured(shape, layout, tokens=work.step_tokens / sequences)
    if captured:
        computing += layers * _GRAPH_SECONDS
        launching = 0.0
    else:
        launching = layers * _LAUNCH_SECONDS[shape.is_fused] + _GATHER_SECONDS * gathers(
            shape, layout, sequences=sequences
        )
    traffic = host_traffic(shape, layout, sequences=sequences)
    receiving = max(
        sequences * _receiving(shape, layout, gpu), seconds_of_weights(traffic, layout, link=link)
    )
    summing = seconds_of_gradients(traffic, layout, link=link)
    if captured:  # within a graph a layer's gather was measured to stand beside the computing
        return computing + receiving + summing + _STEP_SECONDS
    return max(computing, launching, receiving) + summing + _STEP_SECONDS


def part_seconds(
    shape: ModelShape,
    layout: Layout,
    work: Work,
    gpu: Gpu,
    *,
    sequence_tokens: int,
    link: float = math.inf,
) -> dict[str, float]:
    """Seconds of what a run's GPUs compute, by the names under which a run notes what it took.

    `train`: optimizer steps; `score`: the held-out examples before and after training, and the
    training rows that the probe reads; `evaluate`: the held-out ones while training.
    """
    training = work.steps * step_seconds(
        shape, layout, work, gpu, sequence_tokens=sequence_tokens, link=link
    )
    length = float(sequence_tokens)
    forward = partial(forward_seconds, shape, layout, gpu, length=length)
    scoring = forward(tokens=work.forward_tokens / layout.ranks)
    once = forward(tokens=work.scored_once / layout.ranks)
    return {"train": training, "score": scoring, "evaluate": work.evaluations * once}


def forward_seconds(
    shape: ModelShape, layout: Layout, gpu: Gpu, *, tokens: float, length: float
) -> float:
    """Forwards alone of one rank's `tokens`, in sequences of `length` tokens."""
    if not gpu.is_cpu:
        return 2.0 * shape.active_parameters * tokens / (gpu.flops * _SHARE[shape.is_fused])
    sequences = tokens / max(length, 1.0)
    attending = 4.0 * length * tokens * shape.hidden_size * shape.layers
    multiplying = (2.0 * shape.active_parameters * tokens + attending) / gpu.flops
    passed = _FORWARD_COPIES * shape.saved_bytes(int(length), recomputed=False) * sequences
    receiving = sequences * _receiving(shape, layout, gpu) / gathers_of_a_layer(layout)
    return multiplying + passed / gpu.bandwidth + receiving


def _cpu_step_seconds(
    shape: ModelShape, layout: Layout, work: Work, gpu: Gpu, *, sequences: float
) -> float:
    """One optimizer step on a CPU, where nothing happens beside anything else."""
    passes, tokens = _passes(layout), work.step_tokens
    length = tokens / sequences
    layers = passes * 2.0 * shape.active_parameters * tokens
    head = 6.0 * shape.hidden_size * shape.vocabulary_size * work.step_labels
    # All pairs of a sequence, as its mask is dense: two matmuls in forward and five in backward.
    attending = (passes - 1.0 + 2.5) * 4.0 * length * tokens * shape.hidden_size * shape.layers
    multiplying = (layers + head + attending) / gpu.flops
    copies = _FORWARD_COPIES * passes / 2.0 + _BACKWARD_COPIES
    passed = copies * shape.saved_bytes(int(length), recomputed=False) * sequences
    return multiplying + passed / gpu.bandwidth + sequences * _receiving(shape, layout, gpu)


def _passes(layout: Layout) -> float:
    """Times that a step goes through every layer."""
    return 3.0 if layout.recomputed else 2.0


def _computing(
    shape: ModelShape, layout: Layout, gpu: Gpu, *, work: Work, sequences: float
) -> float:
    """Seconds of the GPU. The frozen weights have no gradient, so a matmul costs 2 operations a
    weight and token in forward and 2 in backward, and 2 more where it is recomputed.
    """
    passes = _passes(layout)
    tokens, length = work.step_tokens, work.step_tokens / sequences
    layers = passes * 2.0 * shape.active_parameters * tokens
    # The head gives its gradient at once: 3 matmuls.
    head = 6.0 * shape.hidden_size * shape.vocabulary_size * work.step_labels
    # Causal attention: half a square of tokens, two matmuls in forward and five in backward.
    attention = (passes - 1.0 + 2.5) * 2.0 * length * tokens * shape.hidden_size * shape.layers
    rate = gpu.flops * _SHARE[shape.is_fused]
    multiplying = (layers + head) / (rate * length / (length + _HALF_AT_TOKENS))
    reading = sequences * passes * 2.0 * shape.read_parameters / gpu.bandwidth
    # 4-bit weights are read and written as bfloat16, before they are read as any weight.
    unpacking = 0.0
    if layout.quantized:
        share = _COPY_SHARE[is_captured(shape, layout, tokens=length)]
        unpacked = 2.5 * shape.linear_parameters * shape.layers
        unpacking = sequences * passes * unpacked / (gpu.bandwidth * share)
    adapting = passes / 2.0 * _adapting(shape, gpu, tokens=tokens, sequences=sequences)
    return max(multiplying, reading) + _ATTENTION_FACTOR * attention / rate + unpacking + adapting


def _adapting(shape: ModelShape, gpu: Gpu, *, tokens: float, sequences: float) -> float:
    """Seconds of the adapter's matmuls, forward and backward."""
    launching = sequences * shape.adapted_linears * _ADAPTER_SECONDS
    copying = _ADAPTER_COPIES * 2.0 * tokens * shape.adapted_width / gpu.bandwidth
    multiplying = 6.0 * tokens * shape.adapter_parameters / (gpu.flops * _ADAPTER_SHARE)
    return max(launching, copying + multiplying)


def _receiving(shape: ModelShape, layout: Layout, gpu: Gpu) -> float:
    """Seconds in which a rank receives what it lacks for one sequence, from the host and others."""
    own = 1 / layout.sharers
    seconds = (1 - own) / gpu.link + (own / gpu.host_link if layout.offloaded else 0.0)
    return gathered_bytes(shape, layout) * seconds
