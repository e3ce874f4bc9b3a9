"""`lora-fsdp plan`: memory, time and cost of a run on GPUs one has not rented yet."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from lora_fsdp.arguments import DataArguments, LoraArguments, ModelArguments
from lora_fsdp.cli.command import print_json, required
from lora_fsdp.cli.configs import find_config, suggested_config
from lora_fsdp.cli.terminal import table_text, write, write_words
from lora_fsdp.cli.train import LaunchOptions, TrainCommand
from lora_fsdp.errors import ArgumentError
from lora_fsdp.options import OptionParser
from lora_fsdp.printing import cost_text

if TYPE_CHECKING:
    from lora_fsdp.data.workload import Work
    from lora_fsdp.placement.request import Request
    from lora_fsdp.placement.whole_job import Machine
    from lora_fsdp.planning.plan import Plan
    from lora_fsdp.sweeps.plan import SweepPlan


@dataclass
class PlanOptions:
    """Which GPUs, and how much is to be trained."""

    _argument_group_name: ClassVar[str] = "plan"

    gpus: list[str] = field(
        default_factory=lambda: ["2xRTX4090", "1xA100", "1xH100"],
        metadata={
            "help": "GPUs to look at, such as 2xRTX4090 8xH100; or 2xCPU, two processes of this "
            "machine, which is measured for a moment."
        },
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
    hosts: int | None = field(
        default=None,
        metadata={"help": "Machines, each with the GPUs of --gpus; 1 when not given."},
    )
    link: str | None = field(
        default=None,
        metadata={"help": "What a machine can send to others: 10Gbit when not given."},
    )
    read_rate: str | None = field(
        default=None,
        metadata={
            "help": "How fast the base's files are read there, such as 500MB/s from a disk; 1GB/s "
            "when not given, and on this machine's CPU what is measured."
        },
    )
    json: bool = field(default=False, metadata={"help": "Print JSON."})


class PlanCommand(TrainCommand):
    """Takes the command line of `train`, so that a recipe is planned for as it would be run."""

    def __call__(self, arguments: Sequence[str]) -> int:
        """Count, compare, print."""
        if {"-h", "--help"} & set(arguments):
            self.parser().print_help()
            return 0
        own = OptionParser((PlanOptions, LaunchOptions))
        given, rest = own.parse_known_args(list(arguments))
        options, launch = (
            cls(**{one.name: getattr(given, one.name) for one in fields(cls)})
            for cls in (PlanOptions, LaunchOptions)
        )
        return self.run(options, launch, rest)


def plan(options: PlanOptions, launch: LaunchOptions, arguments: Sequence[str]) -> int:
    """Count, compare, print; 0 also where nothing fits, as that is an answer."""
    from lora_fsdp.arguments import FineTuningArguments

    classes = (ModelArguments, LoraArguments, DataArguments, FineTuningArguments)
    model, lora, data, training = OptionParser(classes, positional="data_file").parse_values(
        arguments
    )
    model_args, data_args = ModelArguments(**model), DataArguments(**data)
    required(
        model_args.model_name_or_path,
        "--model_name_or_path",
        "a model folder, a name on the Hub, or a size such as 70B",
    )
    _refuse_impossible(options, training, max_length=data_args.max_length)
    from lora_fsdp.planning.plan_text import accelerate_yaml, plan_as_json
    from lora_fsdp.sweeps.grid import asked_adapters, is_several
    from lora_fsdp.sweeps.plan import plan_sweep

    arguments_of_run = FineTuningArguments(**training)
    several = is_several(arguments_of_run)
    if several:
        asked_adapters(arguments_of_run)  # a mistake in the grid is said before anything is read
    make = _planner(options, launch, model_args, data_args)
    lora_args = LoraArguments(**lora)
    found = make(training, lora_args)
    sweep = None
    if several:
        sweep = plan_sweep(
            arguments_of_run,
            lora_args,
            plan=found,
            plan_of=lambda other, adapter: make({**training, **other}, adapter),
        )
    if options.output is not None and found.best is not None:
        _write_yaml(Path(options.output), accelerate_yaml(found, found.best))
    if options.json:
        own = {"sweep": None if sweep is None else sweep.to_json()} if several else {}
        print_json(plan_as_json(found) | own)
    else:
        _print(found, options.output)
        if several:
            _print_sweep(sweep)
    return 0


def _planner(
    options: PlanOptions,
    launch: LaunchOptions,
    model_args: ModelArguments,
    data_args: DataArguments,
) -> Callable[[Mapping[str, Any], LoraArguments], Plan]:
    """Plans a run of these training arguments, by name, and of an adapter's."""
    from lora_fsdp.adapter.attach import lora_config
    from lora_fsdp.planning.models import planned_config
    from lora_fsdp.planning.plan import make_plan
    from lora_fsdp.planning.question import question_of_recipe
    from lora_fsdp.sizing.machine import job_of

    config = planned_config(
        model_args.model_name_or_path,
        revision=model_args.model_revision,
        trust_remote_code=model_args.trust_remote_code,
    )
    hosts, link = _network(options, launch)
    on_cpu = _is_on_cpu(options, hosts=hosts)
    machine = _machine(options, model_args, on_cpu=on_cpu)
    suggested = suggested_config if hosts == 1 else lambda gpus: "fsdp2_hosts"

    def make(training: Mapping[str, Any], lora: LoraArguments) -> Plan:
        question = question_of_recipe(
            config,
            model_args=model_args,
            adapter=lora_config(lora),
            training=training,
            work=_work(options, training, model_args, data_args),
            yaml_for=lambda gpus: find_config(
                launch.accelerate_config or suggested(0 if on_cpu and gpus > 1 else gpus)
            ),
            shipped={name: find_config(name) for name in ("fsdp2", "fsdp2_offload")},
            is_open=launch.accelerate_config is None,
            hosts=hosts,
            on_cpu=on_cpu,
            machine=machine,
            job=job_of(model_args.model_name_or_path),
        )
        price = training["price_per_hour"]
        return make_plan(question, gpus=options.gpus, price_per_hour=price, hosts=hosts, link=link)

    return make


def _print_sweep(sweep: SweepPlan | None) -> None:
    from lora_fsdp.planning.plan_text import duration

    for line in ["Nothing fits for any adapter."] if sweep is None else sweep.lines(duration):
        write_words(line)


def _network(options: PlanOptions, launch: LaunchOptions) -> tuple[int, float]:
    """Machines, and bytes per second that each can send to others.

    Raises:
        ArgumentError: they cannot be so many, or the speed is none.
    """
    from lora_fsdp.placement.gpus import parse_link

    given = options.hosts if options.hosts is not None else launch.num_machines
    hosts = 1 if given is None else given
    if hosts < 1:
        raise ArgumentError(f"--hosts {hosts}: at least one machine is needed.")
    if hosts == 1 and options.link is not None:
        raise ArgumentError(f"--link {options.link} is between machines: give --hosts as well.")
    return hosts, parse_link(options.link or "10Gbit")


def _is_on_cpu(options: PlanOptions, *, hosts: int) -> bool:
    """Whether this machine's CPU is planned for.

    Raises:
        ArgumentError: beside GPUs, or on several machines.
    """
    from lora_fsdp.placement.gpus import parse_cpu

    cpus = [text for text in options.gpus if parse_cpu(text) is not None]
    if cpus and (len(cpus) < len(options.gpus) or hosts > 1):
        raise ArgumentError(
            f"--gpus {' '.join(options.gpus)}: CPU is this machine's, and its base is in another "
            "dtype than on GPUs: plan for it alone, and for one machine."
        )
    return bool(cpus)


def _machine(options: PlanOptions, model_args: ModelArguments, *, on_cpu: bool) -> Machine:
    from lora_fsdp.placement.gpus import parse_link
    from lora_fsdp.placement.whole_job import RENTED

    rate = None
    if options.read_rate is not None:
        rate = parse_link(
            options.read_rate,
            option="read_rate",
            what="how fast files are read",
            examples="500MB/s or 2GB/s",
        )
    if on_cpu:
        from lora_fsdp.sizing.machine import machine_here

        return machine_here(model_args.model_name_or_path, read_rate=rate)
    if rate is None:
        return RENTED
    source = f"assumed: it starts in {RENTED.start:.0f} s; files are read at {options.read_rate}"
    return replace(RENTED, read_rate=rate, source=source)


def _write_yaml(file: Path, text: str) -> None:
    try:
        file.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ArgumentError(f"--output {file} cannot be written: {error.strerror}.") from error


def _refuse_impossible(
    options: PlanOptions, training: Mapping[str, Any], *, max_length: int
) -> None:
    from lora_fsdp.placement.sequences import check_sequence_length

    for name in (
        "num_train_epochs",
        "per_device_train_batch_size",
        "gradient_accumulation_steps",
        "max_tokens_per_row",
        "examples",
        "tokens_per_example",
        "label_tokens_per_example",
    ):
        value = {**training, **vars(options)}[name]
        if value is not None and not 0 < value < float("inf"):
            raise ArgumentError(f"--{name} must be more than 0, not {value}.")
    check_sequence_length(training["max_tokens_per_row"], max_length=max_length)


def _work(
    options: PlanOptions,
    training: Mapping[str, Any],
    model_args: ModelArguments,
    data_args: DataArguments,
) -> Callable[[int, Request], Work]:
    """From the task's rows if there are any, or from the numbers given for them."""
    from lora_fsdp.data.workload import given_work, measure_work, probed_rows

    if options.examples is not None:
        if options.tokens_per_example is None:
            raise ArgumentError("--examples needs --tokens_per_example as well.")
        examples = options.examples
        # Longer texts are shortened, as a run would.
        tokens = min(options.tokens_per_example, data_args.max_length)
        return lambda ranks, request: given_work(
            training,
            examples=examples,
            tokens_per_example=tokens,
            label_tokens_per_example=options.label_tokens_per_example,
            ranks=ranks,
        )
    if not data_args.task:
        raise ArgumentError(
            "Nothing says how much is trained: give --task with --data_file, or --examples and "
            "--tokens_per_example."
        )
    from lora_fsdp.arguments.training import chooses_checkpoint
    from lora_fsdp.base.loading import load_tokenizer
    from lora_fsdp.data.rows import encoder_of, load_task_data, settled_rows
    from lora_fsdp.training.step.objectives.choice import objective_of

    data = load_task_data(data_args, seed=training["seed"], choosing=chooses_checkpoint(training))
    tokenizer = load_tokenizer(model_args)
    data = settled_rows(data_args, data, lambda: tokenizer, seed=training["seed"])
    encoder = encoder_of(data_args, tokenizer, task=data.task, shots=data.shots)
    train, held_out = encoder.encode(data.train), encoder.encode(data.scored)
    tree_of = objective_of(data.task, training).tree
    return lambda ranks, request: measure_work(
        training,
        train,
        held_out,
        ranks=ranks,
        share_prefix=request.shares_prefix,
        packing=request.packing_choice.packing,
        tree_of=tree_of,
        probed=probed_rows(data.task, training["probe_rows"], len(train)),
    )


def _print(found: Plan, output: str | None) -> None:
    from lora_fsdp.planning.plan_text import (
        SUMMARY_HEADINGS,
        duration,
        options_for,
        part_rows,
        summary_rows,
        weights_of,
        whole_job,
    )

    shape, work = found.shape, found.work
    write_words(
        f"{found.model}: {shape.class_name}, {shape.parameters / 1e9:.2f} billion parameters, "
        f"adapter {shape.adapter_parameters / 1e6:.2f} million"
    )
    write_words(
        f"{work.examples:.0f} examples, {work.examples_per_rank} a step and GPU, "
        f"{work.step_tokens:.0f} tokens of which {work.step_labels:.0f} are learnt"
    )
    columns = len(SUMMARY_HEADINGS) - all(one.cost is None for one in found.candidates)
    rows = [row[:columns] for row in summary_rows(found)]
    write(table_text(SUMMARY_HEADINGS[:columns], rows))
    for note in found.notes:
        write_words(f"note: {note}")
    best = found.best
    if best is None:
        write("Nothing fits.")
        return
    cost = "" if best.cost is None else f", costs {cost_text(best.cost)}"
    write("")
    write_words(
        f"{_chosen(found)}: {best.count} x {best.gpu.name}, {best.strategy}, "
        f"{weights_of(best)}: {duration(best.seconds)}{cost}"
    )
    write_words(whole_job(best, found))
    write(table_text(("on each GPU", "GB"), part_rows(best)))
    if found.hosts > 1:
        _print_links(found)
    if options := options_for(best, shipped=found.shipped):
        write(f"options of lora-fsdp train: {' '.join(options)}")
        if "plan.yaml" in options and output is None:
            write("plan.yaml is written by this command with --output plan.yaml")
    if output is not None:
        write(f"accelerate YAML: {output}")


def _chosen(found: Plan) -> str:
    """What the best strategy is the best of."""
    if found.best is None or found.best.leaves_a_margin:
        return "Fastest that fits"
    return "Fastest of those that fit, each with little to spare"


def _print_links(found: Plan) -> None:
    """What crosses between machines, and the fastest layout by the speed of their network."""
    from lora_fsdp.placement.gpus import GIGABIT
    from lora_fsdp.planning.links import USUAL_LINKS, fastest, why_fastest
    from lora_fsdp.planning.plan_text import link_rows, weights_of

    speeds = [f"{link / GIGABIT:.0f} Gbit/s" for link in USUAL_LINKS]
    write(f"\nOver the network between {found.hosts} hosts, an optimizer step:")
    write(table_text(("strategy", "base", "a host sends", *speeds), link_rows(found)))
    for link in sorted({found.link, *USUAL_LINKS}):
        if (best := fastest(found.candidates, link)) is not None:
            one = best.candidate
            write(
                f"{link / GIGABIT:g} Gbit/s: {one.count} x {one.gpu.name}, {one.strategy}, "
                f"{weights_of(one)}: {why_fastest(best, found.candidates)}"
            )


COMMANDS = (
    PlanCommand(
        name="plan",
        summary="Say what a run will need and cost, on GPUs not rented yet.",
        examples=(
            "plan --config recipe.yaml --gpus 2xRTX4090 1xH100 --price_per_hour 2",
            "plan --model_name_or_path deepseek-ai/deepseek-llm-7b-base --examples 4500 \\\n"
            "      --tokens_per_example 59 --gpus 2xRTX4090",
            "plan --model_name_or_path 70B --examples 1000 --tokens_per_example 500 \\\n"
            "      --gpus 8xH100 --hosts 2 --link 10Gbit",
            "plan --model_name_or_path 70B --examples 1000 --tokens_per_example 500 \\\n"
            "      --gpus 2xRTX4090 --output plan.yaml",
        ),
        options=(PlanOptions, LaunchOptions, ModelArguments, LoraArguments, DataArguments),
        run=plan,
        positional="data_file",
    ),
)
