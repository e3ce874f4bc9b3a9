"""Decoder layers compiled by torch."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn


def compile_layers(layers: Iterable[nn.Module]) -> None:
    """Let torch compile each layer at its first forward, once for all row lengths."""
    for layer in layers:
        layer.compile(dynamic=True)
