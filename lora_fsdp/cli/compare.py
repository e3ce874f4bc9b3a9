"""`lora-fsdp compare`: base against tuned on held-out rows of a finished run."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from lora_fsdp.arguments.option import option
from lora_fsdp.cli.adapter import AdapterOptions, load_predictor
from lora_fsdp.cli.command import Command, print_json
from lora_fsdp.cli.terminal import width, write


@dataclass
class CompareOptions:
    """How many rows, and what is asked."""

    rows: int = option(10, "How many held-out rows.")
    generate: bool = option(False, "Let both generate text freely, too.")
    temperature: float = option(0.0, "Sampling temperature of free generation; 0 = greedy.")
    seed: int = option(0, "Seed of the sample.")
    json: bool = option(False, "Print JSON.")


def compare(options: CompareOptions, adapter: AdapterOptions) -> int:
    """Both models' answers, and whether the adapter answers as it did in training."""
    from lora_fsdp.adapter.folder import CONFIG_FILE
    from lora_fsdp.evaluation.adapter_comparison import (
        compare_on_held_out,
        held_out_file,
        is_checkpoint,
    )

    if (Path(adapter.adapter) / CONFIG_FILE).is_file():  # before a weight is read
        held_out_file(adapter.adapter)
    predictor = load_predictor(adapter)
    from lora_fsdp.evaluation.comparison import format_generated
    from lora_fsdp.evaluation.outputs import format_predictions_table

    found = compare_on_held_out(
        predictor,
        adapter.adapter,
        rows=options.rows,
        seed=options.seed,
        generate=options.generate,
        temperature=options.temperature,
    )
    if options.json:
        print_json(dataclasses.asdict(found))
        return 0
    write(format_predictions_table(found.rows, width=width()))
    for entry in found.written:
        write(format_generated(entry))
    of_run = "final adapter" if is_checkpoint(adapter.adapter) else "own evaluation"
    write(f"{found.agreeing} of {len(found.rows)} answers are those of the run's {of_run}.")
    return 0


COMMANDS = (
    Command(
        name="compare",
        summary="Set the base's answers beside the tuned model's, on held-out rows.",
        examples=(
            "compare runs/mine",
            "compare runs/mine --rows 5 --generate --temperature 0.7",
        ),
        options=(CompareOptions, AdapterOptions),
        run=compare,
        positional="adapter",
    ),
)
