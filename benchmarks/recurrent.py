"""What following the tree gains a hybrid model: several answers scored, and one learnt, a prompt.

    python -m benchmarks.recurrent

A model of Qwen3.5's layers with random weights (8 layers of width 512, three of four recurrent) on
the CPU in float32: 8 prompts of 100 tokens of which 40 are common, three answers of 3 tokens each.
Computed with every answer behind its own prompt, in batches of one length (`--packing never`), and
in one packed sequence whose states follow the tree (`--packing auto`), in turns; medians. Prints
tokens and seconds of each and their ratio, and the largest difference of the log-probabilities.
Takes half a minute on two cores. A GPU with its kernels was not measured.
"""

from __future__ import annotations

import argparse
import json
import logging
import time
import warnings
from pathlib import Path
from statistics import median

import torch
import transformers
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

from lora_fsdp.compute.packed_model import PackedModel
from lora_fsdp.data.packing import Batch, Pack, PackedSequence, Packing, Tree

SHAPE = {
    "vocab_size": 32_000,
    "hidden_size": 512,
    "intermediate_size": 1536,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "linear_num_key_heads": 8,
    "linear_num_value_heads": 8,
    "linear_key_head_dim": 64,
    "linear_value_head_dim": 64,
    "max_position_embeddings": 2048,
}


def main() -> None:
    """Measure, print and store."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--output", type=Path, help="a JSON file for the figures")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.manual_seed(0)
    model = get_peft_model(
        AutoModelForCausalLM.from_config(AutoConfig.for_model("qwen3_5_text", **SHAPE)),
        LoraConfig(r=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"),
    )
    found = {
        "device": f"CPU, {torch.get_num_threads()} threads",
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "scoring, three answers a prompt": measured(model, trees(answers=3), options.rounds),
        "training, one answer a prompt": measured(
            model, trees(answers=1), options.rounds, backward=True
        ),
    }
    print(json.dumps(found, indent=2))
    if options.output is not None:
        options.output.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


def trees(*, answers: int) -> list[Tree]:
    """8 prompts of 100 tokens, 40 of them common, with answers of 3 tokens."""
    draw = torch.Generator().manual_seed(1)

    def ids(length: int) -> list[int]:
        return torch.randint(SHAPE["vocab_size"], (length,), generator=draw).tolist()

    common = ids(40)
    return [Tree(common + ids(60), [ids(3) for _ in range(answers)]) for _ in range(8)]


def measured(
    model: torch.nn.Module, given: list[Tree], rounds: int, *, backward: bool = False
) -> dict[str, float]:
    """Both ways in turns."""
    ways = {
        Packing.BATCHED: Batch(given).lay(),
        Packing.PACKED: Pack(given, share_prefix=True).lay(),
    }
    seconds: dict[Packing, list[float]] = {way: [] for way in ways}
    log_probs: dict[Packing, torch.Tensor] = {}
    for _ in range(rounds + 1):
        for way, sequence in ways.items():
            began = time.perf_counter()
            log_probs[way] = computed(model, way, sequence, backward=backward)
            seconds[way].append(time.perf_counter() - began)
    apart, packed = (median(seconds[way][1:]) for way in (Packing.BATCHED, Packing.PACKED))
    difference = (log_probs[Packing.BATCHED] - log_probs[Packing.PACKED]).abs().max()
    return {
        "tokens apart": len(ways[Packing.BATCHED]),
        "tokens packed": len(ways[Packing.PACKED]),
        "seconds apart": round(apart, 4),
        "seconds packed": round(packed, 4),
        "ratio": round(apart / packed, 2),
        "largest difference in nats": float(f"{difference.item():.1e}"),
    }


def computed(
    model: torch.nn.Module, way: Packing, sequence: PackedSequence, *, backward: bool
) -> torch.Tensor:
    """Log-probabilities of all label tokens, with a backward pass if that is asked for."""
    with PackedModel(model) as packed, torch.set_grad_enabled(backward):
        packed.packing = way
        log_probs = packed.label_log_probs(sequence)
        if backward:
            (-log_probs.mean()).backward()
            model.zero_grad()
        return log_probs.detach()


if __name__ == "__main__":
    main()
