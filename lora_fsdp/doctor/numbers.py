"""Training arguments that are numbers, and the range in which a run can start."""

from __future__ import annotations

import math
from collections.abc import Iterator

from lora_fsdp.arguments import FineTuningArguments

_ABOVE_ZERO = ("per_device_train_batch_size", "gradient_accumulation_steps", "learning_rate")
_LARGEST_SEED = 2**32 - 1  # NumPy's


def impossible_numbers(arguments: FineTuningArguments) -> Iterator[tuple[str, float, str]]:
    """For each number that no run can have: its name, its value, and what it must be."""
    above_zero = list(_ABOVE_ZERO)
    if arguments.max_steps <= 0:
        above_zero.append("num_train_epochs")
    if str(getattr(arguments.save_strategy, "value", arguments.save_strategy)) == "steps":
        above_zero.append("save_steps")
    for name in above_zero:
        value = getattr(arguments, name)
        if not (value > 0 and math.isfinite(value)):
            yield name, value, "more than 0"
    if not 0 <= arguments.seed <= _LARGEST_SEED:
        yield "seed", arguments.seed, f"from 0 to {_LARGEST_SEED}"
