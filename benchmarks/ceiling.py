"""The matmul throughput of a decoder layer alone, the ceiling of what training can reach."""

from __future__ import annotations

import json
import sys

import torch
from triton.testing import do_bench

from benchmarks.workload import SHAPES


def matrix_ceiling(model: str, tokens: int) -> float:
    """TFLOP/s of one layer's matmuls over `tokens` tokens, forward and for the input's gradient."""
    config = SHAPES[model]
    hidden, inner = config.hidden_size, config.intermediate_size
    heads = config.num_key_value_heads * (hidden // config.num_attention_heads)
    shapes = [(hidden, hidden), (heads, hidden), (heads, hidden), (hidden, hidden)]
    shapes += [(inner, hidden), (inner, hidden), (hidden, inner)]
    weights = [torch.randn(s, device="cuda", dtype=torch.bfloat16) for s in shapes]
    inputs = {
        width: torch.randn(tokens, width, device="cuda", dtype=torch.bfloat16)
        for width in {side for shape in shapes for side in shape}
    }
    milliseconds = flops = 0.0
    for weight in weights:
        out, into = weight.shape
        milliseconds += do_bench(lambda w=weight, i=into: inputs[i] @ w.t(), return_mode="median")
        milliseconds += do_bench(lambda w=weight, o=out: inputs[o] @ w, return_mode="median")
        flops += 4.0 * tokens * out * into
    return flops / milliseconds / 1e9


if __name__ == "__main__":
    print(json.dumps({length: matrix_ceiling(sys.argv[1], int(length)) for length in sys.argv[2:]}))
