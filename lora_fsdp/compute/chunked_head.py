"""Log-probabilities of many label tokens without all their logits at once.

The logits of 4,096 tokens over a vocabulary of 102,400 take 1.7 GB in float32, and autograd keeps
several such tensors. Here the head runs on a chunk of tokens at a time, and what the backward needs
of a chunk, the gradient of each log-probability for its own hidden state, is worked out at once, so
nothing is computed twice. After Liger's fused linear cross-entropy (arXiv 2410.10989), but exact
for any weights of the tokens, since each log-probability depends on one hidden state only.
"""

# autograd.Function's forward and backward take what each function needs.
# mypy: disable-error-code="override, no-untyped-call, no-untyped-def"

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.autograd import Function
from torch.nn import functional

#: Label tokens whose logits exist at the same time.
CHUNK = 1024


def log_probs_forward(
    head: nn.Linear, label_ids: torch.Tensor
) -> Callable[[torch.Tensor], torch.Tensor]:
    """A `forward` for `head` that gives log-probabilities, [1, L, 1], instead of logits.

    The head's forward is replaced, and the head is called as before, so that FSDP gathers its
    weight as for any forward.

    Args:
        head: the output head, frozen.
        label_ids: [L], the label token of each hidden state the head will be given.
    """

    def forward(hidden: torch.Tensor) -> torch.Tensor:
        log_probs: torch.Tensor = _HeadLogProbs.apply(hidden[0], head.weight, head.bias, label_ids)
        return log_probs[None, :, None]

    return forward


class _HeadLogProbs(Function):
    @staticmethod
    def forward(ctx: Any, hidden, weight, bias, label_ids):
        wide = torch.promote_types(hidden.dtype, torch.float32)
        log_probs = hidden.new_empty(len(hidden), dtype=wide)
        gradients = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        for start in range(0, len(hidden), CHUNK):
            chunk = slice(start, start + CHUNK)
            labels = label_ids[chunk, None]
            scores = functional.linear(hidden[chunk], weight, bias).to(wide)
            scores = torch.log_softmax(scores, dim=-1)
            log_probs[chunk] = scores.gather(1, labels)[:, 0]
            if gradients is not None:  # of a log-probability for its logits: one-hot - softmax
                scores = scores.exp_()
                scores.scatter_add_(1, labels, -torch.ones_like(scores[:, :1]))
                torch.mm(scores.to(hidden.dtype), weight, out=gradients[chunk])
        if gradients is not None:
            ctx.save_for_backward(gradients)
        return log_probs

    @staticmethod
    def backward(ctx: Any, gradient):
        (gradients,) = ctx.saved_tensors
        return (gradients * -gradient[:, None]).to(gradients.dtype), None, None, None
