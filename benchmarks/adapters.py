"""Several adapters over one pass of the base, against one after the other.

    python -m benchmarks.adapters --model smollm2 --dtype float32 --adapters 4 --examples 4
    python -m benchmarks.adapters --model deepseek-7b --adapters 8      # on a GPU

Every adapter sees the same number of examples a step in both. "One after the other" is this
library's own run of one adapter, with the step that it chooses by itself (on a GPU a captured one)
and with the eager one; its time for T adapters is T times that of one. Prints one JSON object: the
median seconds of a step of all T adapters.
"""

from __future__ import annotations

import argparse
import gc
import json
import tempfile
import time
from statistics import median
from typing import Any

import torch
from peft import LoraConfig

from benchmarks.workload import (
    SEED,
    StepClock,
    Workload,
    load_model,
    load_tokenizer,
    task_and_examples,
)
from lora_fsdp import FineTuningArguments, LoraTrainer
from lora_fsdp.data.encoding import Encoder
from lora_fsdp.training.together.loop import AdaptersTogether
from lora_fsdp.training.together.members import MemberPlan

# Steps that are not counted: allocations, captures.
_WARM_UP = 3


def settings_of(work: Workload, step: str, seed: int = SEED) -> FineTuningArguments:
    """Of one adapter's run."""
    return FineTuningArguments(
        output_dir=tempfile.mkdtemp(),
        per_device_train_batch_size=work.examples,
        max_steps=work.steps + _WARM_UP,
        learning_rate=1e-4,
        logging_steps=10_000,
        save_strategy="no",
        disable_tqdm=True,
        seed=seed,
        step=step,
        max_tokens_per_row=2048,
    )


def adapter_of(work: Workload) -> LoraConfig:
    """An adapter's settings."""
    return LoraConfig(
        r=work.rank, lora_alpha=32, target_modules=work.targets, task_type="CAUSAL_LM"
    )


def together_seconds(work: Workload, adapters: int) -> float:
    """A step of all adapters over one pass."""
    task, examples = task_and_examples(work)
    encoder = Encoder(load_tokenizer(work), task=task, max_length=512)
    encoded = encoder.encode(examples)
    plans = [
        MemberPlan(f"seed-{seed}", settings_of(work, "eager", seed), adapter_of(work), encoded)
        for seed in range(adapters)
    ]
    trained = AdaptersTogether(
        load_model(work), settings_of(work, "eager"), plans=plans, encoder=encoder
    )
    trained.model.train()
    seconds = []
    for _ in range(work.steps + _WARM_UP):
        began = time.perf_counter()
        trained.make_step(trained.members)  # ends by reading the losses
        seconds.append(time.perf_counter() - began)
    return median(seconds[_WARM_UP:])


def alone_seconds(work: Workload, step: str) -> tuple[float, str]:
    """A step of one adapter's run, and which step it was."""
    task, examples = task_and_examples(work)
    clock = StepClock()
    trainer = LoraTrainer(
        model=load_model(work),
        args=settings_of(work, step),
        task=task,
        processing_class=load_tokenizer(work),
        train_dataset=examples,
        peft_config=adapter_of(work),
        callbacks=[clock],
    )
    trainer.train()
    return median(clock.seconds()[_WARM_UP:]), str(trainer.placement.step)


def measure(work: Workload, counts: list[int]) -> dict[str, Any]:
    """All figures."""
    found: dict[str, Any] = {
        "model": work.model,
        "dtype": work.dtype,
        "in_4bit": work.in_4bit,
        "examples": work.examples,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "threads": torch.get_num_threads(),
        "alone": {},
        "together": {},
    }
    for step in ("auto", "eager"):
        seconds, chosen = alone_seconds(work, step)
        found["alone"][chosen] = round(seconds, 5)
        _forget()
    for adapters in counts:
        seconds = together_seconds(work, adapters)
        found["together"][adapters] = {
            "seconds": round(seconds, 5),
            **{
                f"times faster than {adapters} x {step}": round(adapters * one / seconds, 2)
                for step, one in found["alone"].items()
            },
        }
        if torch.cuda.is_available():
            peak = torch.cuda.max_memory_allocated() / 1e9
            found["together"][adapters]["peak_gb"] = round(peak, 2)
        _forget()
    return found


def _forget() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--data", default=".cache/default")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--in_4bit", action="store_true")
    parser.add_argument("--adapters", type=int, nargs="+", default=[8])
    parser.add_argument("--examples", type=int, default=8)
    parser.add_argument("--steps", type=int, default=20)
    given = vars(parser.parse_args())
    counts = given.pop("adapters")
    print(json.dumps(measure(Workload(**given), counts), indent=2))


if __name__ == "__main__":
    main()
