"""Several adapters over one pass of the base, against one after the other.

    python -m benchmarks.adapters --model smollm2 --dtype float32 --adapters 4 --examples 4
    python -m benchmarks.adapters        # on a GPU: the table of three shapes, and of one in 4 bits

Every adapter sees the same number of examples a step in every arm: `turns` is this library's own
run of one adapter with the step that it chooses by itself (on a GPU a captured one), and T times
that for T adapters; `eager` is a pass that is computed part by part; `grouped` a pass of parts of
one size, on a GPU as CUDA graphs. Prints a line for each, and all as JSON with `--output`: the
median seconds of a step of all T adapters.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
import transformers
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
_WARM_UP = 20
# Of the table: as many as the longest run of steps needs.
_ROWS = 1000
ARMS = ("turns", "eager", "grouped")
#: What a GPU is measured with; `:4bit` = the linear layers are stored in 4 bits.
SHAPES = ("smollm2", "llama-1b", "deepseek-7b", "deepseek-7b:4bit")


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


def together_seconds(work: Workload, adapters: int, *, grouped: bool) -> dict[str, Any]:
    """A step of all adapters over one pass."""
    task, examples = task_and_examples(work)
    encoder = Encoder(load_tokenizer(work), task=task, max_length=512)
    encoded = encoder.encode(examples[:_ROWS])
    plans = [
        MemberPlan(f"seed-{seed}", settings_of(work, "auto", seed), adapter_of(work), encoded)
        for seed in range(adapters)
    ]
    trained = AdaptersTogether(
        load_model(work),
        settings_of(work, "auto"),
        plans=plans,
        encoder=encoder,
        grouped=grouped,
    )
    trained.model.train()
    seconds = []
    for _ in range(work.steps + _WARM_UP):
        began = time.perf_counter()
        # Ends by reading the losses: of a grouped pass those of the step before.
        trained.make_step(trained.members)
        seconds.append(time.perf_counter() - began)
    trained.settle()
    found: dict[str, Any] = {"seconds": round(median(seconds[_WARM_UP:]), 5)}
    if trained.grouped is not None:
        recorder = trained.grouped.recorder
        found["fused layers"] = len(trained.grouped.grouped.layers)
        found["sizes"] = [list(size) for size in trained.grouped.sizes]
        found["graphs"] = recorder and (recorder.failed or recorder.recorded)
        found["host seconds"] = round(_host_seconds(trained), 5)
        trained.grouped.release()
    return found


def _host_seconds(trained: AdaptersTogether) -> float:
    """Of laying out a step of all adapters."""
    began = time.perf_counter()
    for member in trained.members:
        member.share()
    return time.perf_counter() - began


def alone_seconds(work: Workload) -> dict[str, Any]:
    """A step of one adapter's run."""
    task, examples = task_and_examples(work)
    clock = StepClock()
    trainer = LoraTrainer(
        model=load_model(work),
        args=settings_of(work, "auto"),
        task=task,
        processing_class=load_tokenizer(work),
        train_dataset=examples[:_ROWS],
        peft_config=adapter_of(work),
        callbacks=[clock],
    )
    trainer.train()
    seconds = median(clock.seconds()[_WARM_UP:])
    return {"seconds": round(seconds, 5), "step": str(trainer.placement.step)}


def measure(work: Workload, counts: list[int], arms: list[str]) -> dict[str, Any]:
    """All figures of one shape."""
    found: dict[str, Any] = {
        "model": work.model,
        "dtype": work.dtype,
        "in_4bit": work.in_4bit,
        "examples": work.examples,
        "steps": work.steps,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "threads": torch.get_num_threads(),
        "alone": {},
        "together": {},
    }
    if "turns" in arms:
        found["alone"] = _with_peak(alone_seconds(work))
    for adapters in counts:
        for arm in (one for one in ARMS[1:] if one in arms):
            one = _with_peak(together_seconds(work, adapters, grouped=arm == "grouped"))
            if found["alone"]:
                turns = adapters * found["alone"]["seconds"]
                one["times faster than turns"] = round(turns / one["seconds"], 2)
            found["together"].setdefault(str(adapters), {})[arm] = one
    return found


def lines(found: dict[str, Any]) -> list[str]:
    """The figures in words."""
    name = f"{found['model']} {'4 bits' if found['in_4bit'] else found['dtype']}"
    alone = found["alone"]
    return [
        f"{name:>24} {count:>3} x  turns {1e3 * int(count) * alone.get('seconds', 0):8.1f} ms  "
        + "  ".join(
            f"{arm} {1e3 * one['seconds']:8.1f} ms ({one.get('times faster than turns', 0)} x)"
            for arm, one in arms.items()
        )
        for count, arms in found["together"].items()
    ]


def _with_peak(found: dict[str, Any]) -> dict[str, Any]:
    """And the memory's peak; nothing is left of what was measured."""
    if torch.cuda.is_available():
        found["peak_gb"] = round(torch.cuda.max_memory_allocated() / 1e9, 2)
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
    parser.add_argument("--model", nargs="+", default=list(SHAPES))
    parser.add_argument("--data", default=".cache/default")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--adapters", type=int, nargs="+", default=[8])
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--examples", type=int, default=8)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--output", type=Path, help="a JSON file for all figures")
    given = vars(parser.parse_args())
    models, counts, arms, output = (
        given.pop(name) for name in ("model", "adapters", "arms", "output")
    )
    results = []
    for name in models:
        model, _, packed = name.partition(":")
        work = replace(Workload(**given), model=model, in_4bit=packed == "4bit")
        results.append(measure(work, counts, arms))
        print("\n".join(lines(results[-1])), flush=True)
        if output is not None:
            command = " ".join(sys.argv[1:])
            said = {"command": f"python -m benchmarks.adapters {command}", "shapes": results}
            output.write_text(json.dumps(said, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
