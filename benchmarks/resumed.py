"""A toy run stopped and resumed on N, one, and half as many ranks, beside one that is not stopped.

    python -m benchmarks.resumed --ranks 4 --output resumed.json

On so many GPUs under NCCL, or on CPUs under gloo where there are none. The toy run has 12 steps of
8 examples, 24 rows, and is stopped within its epochs; sharded as `accelerate_configs/fsdp2.yaml`.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

import torch

from tests.support.ranks import launch_environment, run_ranks
from tests.training.test_resume import first_part, middle_part, part

#: Examples of a step; numbers of ranks divide it.
EXAMPLES = 8


def resumed(ranks: int, folder: Path) -> dict[str, list[float] | list[int]]:
    """The losses of a run that changes its ranks, and of one that does not."""
    yaml = "fsdp2.yaml" if torch.cuda.is_available() else "fsdp2_cpu.yaml"
    shards = launch_environment(yaml)

    def on(count: int) -> dict[str, object]:
        return {"world_size": count, "environment": shards if count > 1 else None}

    def share(count: int) -> dict[str, int]:
        return {"per_device_train_batch_size": EXAMPLES // count}

    numbers = [ranks, 1, max(1, ranks // 2)]
    [whole] = run_ranks(first_part, folder / "whole", share(1), None, **on(1))
    run_ranks(first_part, folder / "parts", share(numbers[0]), 4, **on(numbers[0]))
    run_ranks(middle_part, folder / "parts", share(numbers[1]), 8, **on(numbers[1]))
    last = run_ranks(part, folder / "parts", share(numbers[2]), **on(numbers[2]))[0]
    return {"ranks": numbers, "losses": last["losses"], "losses_of_one": whole["losses"]}


def difference(found: dict[str, list[float]]) -> float:
    """The largest relative difference of a step's loss; infinite if there are other steps."""
    pairs = list(zip(found["losses"], found["losses_of_one"], strict=False))
    if not pairs or len(found["losses"]) != len(found["losses_of_one"]):
        return float("inf")
    return max(abs(one - other) / abs(other) for one, other in pairs)


def main() -> None:
    """Run it, print and write what it found."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--ranks", type=int, default=2, choices=(2, 4, 8))
    parser.add_argument("--output", type=Path)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = resumed(asked.ranks, Path(folder))
    found["loss_difference"] = difference(found)
    print(json.dumps(found))
    if asked.output:
        asked.output.write_text(json.dumps(found) + "\n")
    sys.exit(0 if found["loss_difference"] < 1e-4 else 1)


if __name__ == "__main__":
    main()
