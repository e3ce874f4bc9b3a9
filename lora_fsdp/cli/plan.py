"""`lora-fsdp plan`: memory, time and cost of a run on GPUs one has not rented yet."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from lora_fsdp.arguments import DataArguments, LoraArguments, ModelArguments
from lora_fsdp.cli.command import Command, print_json, required
from lora_fsdp.cli.terminal import table_text, write
from lora_fsdp.errors import ArgumentError

if TYPE_CHECKING:
    from lora_fsdp.data.workload import Work
    from lora_fsdp.planning.plan import Plan


@dataclass
class PlanOptions:
    """Which GPUs, and how much is to be trained."""

    gpus: list[str] = field(
        default_factory=lambda: ["2xRTX4090", "1xA100", "1xH100"],
        metadata={"help": "GPUs to look at, such as 2xRTX4090 8xH100."},
    )
    price_per_hour: float | None = field(
        default=None, metadata={"help": "Price of one GPU for an hour."}
    )
    num_train_epochs: float = field(default=3.0, metadata={"help": "How often rows are seen."})
    per_device_train_batch_size: int = field(
        default=8, metadata={"help": "Examples per process and accumulation step."}
    )
    gradient_accumulation_steps: int = field(
        default=1, metadata={"help": "Accumulation steps of an optimizer step."}
    )
    max_tokens_per_row: int | None = field(
        default=None, metadata={"help": "Longest packed row in tokens; not given: by memory."}
    )
    examples: int | None = field(
        default=None, metadata={"help": "Training rows, instead of --task and --data_file."}
    )
    tokens_per_example: float | None = field(
        default=None, metadata={"help": "Tokens of a row with its answer, if --examples is given."}
    )
    label_tokens_per_example: float = field(
        default=2.0, metadata={"help": "Tokens of its answer, if --examples is given."}
    )
    output: str | None = field(
        default=None, metadata={"help": "Write the fastest fitting strategy as accelerate YAML."}
    )
    seed: int = field(default=42, metadata={"help": "Of the sample and the split."})
    json: bool = field(default=False, metadata={"help": "Print JSON."})


def plan(
    options: PlanOptions,
    model_args: ModelArguments,
    lora_args: LoraArguments,
    data_args: DataArguments,
) -> int:
    """Count, compare, print; 0 also where nothing fits, as that is an answer."""
    name = required(
        model_args.model_name_or_path,
        "--model_name_or_path",
        "a model folder, a name on the Hub, or a size such as 70B",
    )
    _refuse_impossible(options)
    from lora_fsdp.adapter.attach import lora_config
    from lora_fsdp.planning.models import planned_config
    from lora_fsdp.planning.plan import make_plan
    from lora_fsdp.planning.plan_text import accelerate_yaml, plan_as_json

    config = planned_config(
        name,
        revision=model_args.model_revision,
        trust_remote_code=model_args.trust_remote_code,
    )
    found = make_plan(
        name,
        config,
        adapter=lora_config(lora_args),
        work=_work(options, model_args, lora_args, data_args),
        gpus=options.gpus,
        price_per_hour=options.price_per_hour,
        trust_remote_code=model_args.trust_remote_code,
    )
    if options.output is not None and found.best is not None:
        _write_yaml(Path(options.output), accelerate_yaml(found, found.best))
    if options.json:
        print_json(plan_as_json(found))
    else:
        _print(found, options.output)
    return 0


def _write_yaml(file: Path, text: str) -> None:
    try:
        file.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ArgumentError(f"--output {file} cannot be written: {error.strerror}.") from error


def _refuse_impossible(options: PlanOptions) -> None:
    for name in (
        "num_train_epochs",
        "per_device_train_batch_size",
        "gradient_accumulation_steps",
        "max_tokens_per_row",
        "examples",
        "tokens_per_example",
        "label_tokens_per_example",
    ):
        value = getattr(options, name)
        if value is not None and not 0 < value < float("inf"):
            raise ArgumentError(f"--{name} must be more than 0, not {value}.")


def _work(
    options: PlanOptions,
    model_args: ModelArguments,
    lora_args: LoraArguments,
    data_args: DataArguments,
) -> Work:
    """From the task's rows if there are any, or from the numbers given for them."""
    from lora_fsdp.data.workload import given_work, measure_work

    per_rank = options.per_device_train_batch_size * options.gradient_accumulation_steps
    if options.examples is not None:
        if options.tokens_per_example is None:
            raise ArgumentError("--examples needs --tokens_per_example as well.")
        return given_work(
            examples=options.examples,
            tokens_per_example=options.tokens_per_example,
            label_tokens_per_example=options.label_tokens_per_example,
            examples_per_rank=per_rank,
            epochs=options.num_train_epochs,
            max_tokens_per_row=options.max_tokens_per_row,
        )
    if not data_args.task:
        raise ArgumentError(
            "Nothing says how much is trained: give --task with --data_file, or --examples and "
            "--tokens_per_example."
        )
    from lora_fsdp.base.loading import load_tokenizer
    from lora_fsdp.data.encoding import Encoder
    from lora_fsdp.data.rows import load_task_data

    data = load_task_data(data_args, seed=options.seed)
    encoder = Encoder(
        load_tokenizer(model_args),
        task=data.task,
        max_length=data_args.max_length,
        chat_template=data_args.chat_template,
    )
    return measure_work(
        encoder.encode(data.train),
        encoder.encode(data.held_out),
        examples_per_rank=per_rank,
        epochs=options.num_train_epochs,
        share_prefix=lora_args.lora_dropout == 0.0,
        max_tokens_per_row=options.max_tokens_per_row,
    )


def _print(found: Plan, output: str | None) -> None:
    from lora_fsdp.planning.plan_text import (
        SUMMARY_HEADINGS,
        duration,
        options_for,
        part_rows,
        summary_rows,
        weights_of,
    )

    shape, work = found.shape, found.work
    write(
        f"{found.model}: {shape.class_name}, {shape.parameters / 1e9:.2f} billion parameters, "
        f"adapter {shape.adapter_parameters / 1e6:.2f} million"
    )
    write(
        f"{work.examples:.0f} examples, {work.examples_per_rank} a step and GPU, "
        f"{work.step_tokens:.0f} tokens of which {work.step_labels:.0f} are learnt"
    )
    write(table_text(SUMMARY_HEADINGS, summary_rows(found)))
    for note in found.notes:
        write(f"note: {note}")
    best = found.best
    if best is None:
        write("Nothing fits.")
        return
    cost = "" if best.cost is None else f", costs {best.cost:.2f}"
    write(
        f"\nFastest that fits: {best.count} x {best.gpu.name}, {best.strategy}, "
        f"{weights_of(best)}: {duration(best.seconds)}{cost}; loading the model comes on top"
    )
    write(table_text(("on each GPU", "GB"), part_rows(best)))
    if options := options_for(best):
        write(f"options of lora-fsdp train: {' '.join(options)}")
    if output is not None:
        write(f"accelerate YAML: {output}")


COMMANDS = (
    Command(
        name="plan",
        summary="Say what a run will need and cost, on GPUs not rented yet.",
        examples=(
            "plan --config recipe.yaml --gpus 2xRTX4090 1xH100 --price_per_hour 2",
            "plan --model_name_or_path deepseek-ai/deepseek-llm-7b-base --examples 4500 \\\n"
            "      --tokens_per_example 59 --gpus 2xRTX4090",
            "plan --model_name_or_path 70B --examples 1000 --tokens_per_example 500 \\\n"
            "      --gpus 2xRTX4090 --output plan.yaml",
        ),
        options=(PlanOptions, ModelArguments, LoraArguments, DataArguments),
        run=plan,
        shares_recipe=True,
    ),
)
