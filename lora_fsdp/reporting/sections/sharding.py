"""How the base lay over the ranks: what the run read off the live model, its settings in words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lora_fsdp.reporting.run_files import RunFiles

_PARTS = ("ranks", "groups", "base_parameters", "base_dtype", "adapter_dtype")
#: The fields of `FsdpSettings` in the YAML's words, where they are on and where they are off.
_IN_WORDS = {
    "wrap_layers": (
        "Each layer is a group of its own and is gathered by itself.",
        "The whole base is one group and is gathered at once.",
    ),
    "reshard_after_forward": (
        "A gathered layer is freed after its forward pass and gathered again for backward.",
        "A gathered layer is kept until its backward pass.",
    ),
    "offload": (
        "The shards are kept in host memory.",
        "The shards are kept on the devices that compute.",
    ),
    "activation_checkpointing": (
        "Activations are computed again in the backward pass.",
        "Activations are kept for the backward pass.",
    ),
    "activation_offload": ("What recomputing starts from is kept in host memory.", None),
}


def sharding(run: RunFiles) -> dict[str, Any] | None:
    """The FSDP status, JSON-ready; `settings` are sentences. `None` if the run did not note it."""
    status = (run.record or {}).get("fsdp")
    if status is None:
        return None
    return {**{key: status[key] for key in _PARTS}, "settings": _sentences(status["settings"])}


def _sentences(settings: Mapping[str, Any] | None) -> list[str]:
    """What the accelerate YAML asked for."""
    if not settings:
        return []
    said = [words[not settings[name]] for name, words in _IN_WORDS.items() if name in settings]
    if settings.get("layer_classes"):
        said.append(f"Groups are layers of class {', '.join(settings['layer_classes'])}.")
    replicas = int(settings.get("replicas", 1))
    if replicas > 1:
        said.append(f"There are {replicas} copies of the sharded base (hybrid sharding).")
    return [sentence for sentence in said if sentence is not None]
