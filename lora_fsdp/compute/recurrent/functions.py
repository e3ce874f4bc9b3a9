"""What recurrent layers of transformers compute along a sequence, computed along a tree.

Each stands in for the function of its name in the file of the layer's class, for the length of one
forward, and calls that function for the segments of each level of the tree. Arguments and returns
are that function's own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.nn import functional
from transformers.activations import ACT2FN

from lora_fsdp.compute.recurrent.tree import SequenceTree


def convolution(own: Callable[..., torch.Tensor], tree: SequenceTree) -> Callable[..., Any]:
    """`causal_conv1d_fn`: each token with its predecessors on its path."""

    def along_tree(
        hidden_states: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None = None,
        activation: str | None = None,
        **kwargs: object,
    ) -> torch.Tensor:
        channels, size = weight.shape
        padded = functional.pad(hidden_states[0], (0, 1)).to(weight.dtype)
        windows = padded[:, tree.windows(size)].flatten(1)[None]  # [1, C, T * size]
        out = functional.conv1d(windows, weight[:, None], bias, stride=size, groups=channels)
        if activation is not None:
            out = ACT2FN[activation](out)
        return out.to(hidden_states.dtype)

    return along_tree


def delta_rule(own: Callable[..., Any], tree: SequenceTree) -> Callable[..., Any]:
    """`torch_chunk_gated_delta_rule`, `chunk_kimi_delta_attention`.

    A token that is 0 throughout writes nothing and does not decay the state.
    """

    def along_tree(
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        g: torch.Tensor,
        beta: torch.Tensor,
        **settings: Any,
    ) -> tuple[torch.Tensor, None]:
        fixed = settings | {"output_final_state": True}

        def run(
            rows: Mapping[str, torch.Tensor], states: torch.Tensor | None
        ) -> tuple[torch.Tensor, torch.Tensor]:
            outputs, ended = own(**rows, **(fixed | {"initial_state": states}))
            return outputs, ended

        tensors = {"query": query, "key": key, "value": value, "g": g, "beta": beta}
        return tree.scan(tensors, run), None

    return along_tree


def state_space(own: Callable[..., Any], tree: SequenceTree) -> Callable[..., Any]:
    """`mamba2_chunk_scan`. A token of no time neither decays the state nor adds to it."""

    def along_tree(
        hidden_states: torch.Tensor,
        dt: torch.Tensor,
        A: torch.Tensor,
        B: torch.Tensor,
        C: torch.Tensor,
        *,
        dt_bias: torch.Tensor | None = None,
        dt_softplus: bool = False,
        dt_limit: tuple[float, float] = (0.0, float("inf")),
        **settings: Any,
    ) -> torch.Tensor:
        fixed = settings | {"return_final_states": True}

        def run(
            rows: Mapping[str, torch.Tensor], states: torch.Tensor | None
        ) -> tuple[torch.Tensor, torch.Tensor]:
            x, times, b, c = rows["x"], rows["dt"], rows["B"], rows["C"]
            outputs, ended = own(x, times, A, b, c, **(fixed | {"initial_states": states}))
            return outputs, ended

        # Here, and not for each segment: what fills one up would get the least time allowed.
        times = _times(dt, dt_bias, softplus=dt_softplus).clamp(*dt_limit)
        return tree.scan({"x": hidden_states, "dt": times, "B": B, "C": C}, run)

    return along_tree


def selective_scan(own: Callable[..., Any], tree: SequenceTree) -> Callable[..., Any]:
    """`mamba_selective_scan`, which starts from nothing: the states h and the decay are added to
    its outputs, since they are linear in h. Its own last state has no gradient in every
    implementation, so it is computed here.
    """

    def along_tree(
        hidden_states: torch.Tensor,
        dt: torch.Tensor,
        A: torch.Tensor,
        B: torch.Tensor,
        C: torch.Tensor,
        *,
        D: torch.Tensor | None = None,
        z: torch.Tensor | None = None,
        delta_bias: torch.Tensor | None = None,
        delta_softplus: bool = False,
        return_last_state: bool = False,
        **settings: Any,
    ) -> torch.Tensor:
        def run(
            rows: Mapping[str, torch.Tensor], states: torch.Tensor | None
        ) -> tuple[torch.Tensor, torch.Tensor]:
            x, times, b, c = (rows[name].transpose(1, 2) for name in ("x", "dt", "B", "C"))
            outputs = own(x, times, A, b, c, D=D, **settings)
            passed = times.float().cumsum(-1)  # [n, channels, w]
            left = (passed[..., -1:] - passed)[..., None] * A[None, :, None]
            added = (times * x).float()[..., None] * b.float().transpose(1, 2)[:, None]
            ended = (left.exp() * added).sum(2)
            if states is not None:
                decayed = (passed[..., None] * A[None, :, None]).exp() * states[:, :, None]
                outputs = outputs + (decayed * c.float().transpose(1, 2)[:, None]).sum(-1)
                ended = ended + decayed[:, :, -1]
            return outputs.transpose(1, 2), ended

        bias = None if delta_bias is None else delta_bias[:, None]
        times = _times(dt, bias, softplus=delta_softplus)
        tensors = {"x": hidden_states, "dt": times, "B": B, "C": C}
        tensors = {name: one.transpose(1, 2) for name, one in tensors.items()}
        out = tree.scan(tensors, run).transpose(1, 2)
        return out if z is None else out * functional.silu(z)

    return along_tree


def _times(dt: torch.Tensor, bias: torch.Tensor | None, *, softplus: bool) -> torch.Tensor:
    times = dt if bias is None else dt + bias.to(dt.dtype)
    return functional.softplus(times) if softplus else times


def not_at_once(own: Callable[..., Any], tree: SequenceTree) -> Callable[..., None]:
    """`mamba_inner_fn`, `mamba2_split_conv1d_scan_combined`: whole layers at once, which know no
    tree. Without a result, the layer goes on step by step.
    """
    return lambda *arguments, **settings: None


#: By the name of the function that each stands in for.
ALONG_TREE: Mapping[str, Callable[[Callable[..., Any], SequenceTree], Callable[..., Any]]] = {
    "causal_conv1d_fn": convolution,
    "torch_chunk_gated_delta_rule": delta_rule,
    "chunk_kimi_delta_attention": delta_rule,
    "mamba_selective_scan": selective_scan,
    "mamba_inner_fn": not_at_once,
    "mamba2_chunk_scan": state_space,
    "mamba2_split_conv1d_scan_combined": not_at_once,
}
