"""`lora-fsdp train`: accelerate, started with a YAML that fits the machine, and its noise filtered.

The launcher runs in this process, so that its failures arrive as exceptions: a user's mistake was
told by the process that found it, and a traceback of the launcher would only bury it.
"""

from __future__ import annotations

import importlib
import logging
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from lora_fsdp.arguments import DataArguments, LoraArguments, ModelArguments
from lora_fsdp.arguments.option import option
from lora_fsdp.cli.command import Command
from lora_fsdp.cli.configs import find_config, suggested_config
from lora_fsdp.failures import CRASHED, INTERRUPTED, STALLED, STOPPED, WRONG_INPUT
from lora_fsdp.options import OptionParser
from lora_fsdp.printing import say
from lora_fsdp.recipes import read_recipe

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

    from lora_fsdp.distributed.meeting import Meeting

_MODULE = "lora_fsdp.cli.training_process"

# Of several hundred: what most runs set. The texts of our own options are those in the code.
TRAINING_OPTIONS = {
    "output_dir": "Where the run is written.",
    "num_train_epochs": "How many times the rows are seen.",
    "learning_rate": "Peak learning rate.",
    "per_device_train_batch_size": "Examples per process and accumulation step.",
    "eval_strategy": "When to evaluate while training: no, steps, epoch.",
    "early_stopping_patience": "Stop when the metric (metric_for_best_model; the held-out loss "
    "when not given) has not improved in so many evaluations, and keep the best adapter. "
    "Evaluates and saves once an epoch where nothing else is asked for.",
    "save_strategy": "When to write checkpoints: no, steps, epoch, best.",
    "resume_from_checkpoint": "Go on with a run: true, or a checkpoint's folder.",
    "overwrite_output_dir": "Replace a run that output_dir already holds.",
    "logging_steps": "Log every so many steps.",
    "report_to": "Trackers to report to; none by default.",
    "price_per_hour": "GPU (or machine) price per hour; shows the run's cost so far.",
    "max_tokens_per_row": "Longest packed sequence, or batch of sequences of one example, in "
    "tokens (bounds activation memory). Not given: what half of the free GPU memory holds, "
    "from 2048 to 8192; 2048 on a CPU.",
    "seeds": "Train so many adapters that differ in their seed alone (--seed, the next one, "
    "...), each into a folder of its own: one figure with its spread.",
    "folds": "Train so many adapters, each of which leaves out another part of the rows: every "
    "row is answered by one that has not learnt from it (out_of_fold.csv).",
    "grid": "Train an adapter for every combination: learning_rate=1e-4,3e-4 lora_r=8,32, or "
    "a YAML file. The best is chosen by validation rows and measured on the held-out "
    "rows.",
    "search": "Which settings of --grid are tried to their end: all, --trials of them at random, "
    "or by successive halving (all begin, and the best third goes on at each of a few stages).",
    "trials": "Of the settings of --grid, draw so many at random (--seed); with a range, as in "
    "learning_rate=1e-4..1e-2, from between its ends.",
    "adapters_at_once": "The most adapters that share a pass over the base; 1 = one after the "
    "other. Without it 8 on a CPU, and 1 on GPUs, where more are faster and take more memory.",
    "seed": "Of the sample, the split, the order and the adapter's first values.",
}


@dataclass
class LaunchOptions:
    """How the processes are started."""

    _argument_group_name: ClassVar[str] = "launch"

    accelerate_config: str | None = option(
        None,
        "Accelerate YAML: a file, or the name of a shipped one (single, ddp, fsdp2, "
        "fsdp2_hosts, fsdp2_offload, fsdp2_cpu). Without it, what fits this machine's GPUs.",
    )
    num_processes: int | None = option(
        None, "Processes, instead of the YAML's number; one for each GPU."
    )
    num_machines: int | None = option(None, "Machines, instead of the YAML's number.")
    machine_rank: int | None = option(
        None, "Which of several machines this is: 0 for the first, each number once."
    )
    main_process_ip: str | None = option(
        None, "Address of the first of several machines (IPv4 or a name), the same on all."
    )
    main_process_port: int | None = option(
        None,
        "Port at which the processes meet: any free one; with several machines the YAML's, or "
        "29500, free on the first.",
    )
    join_seconds: float = option(60.0, "How long several machines wait for one another.")
    dry_run: bool = option(False, "Print the command that would be run, and stop.")


class TrainCommand(Command):
    """Reads its own options and hands all others on, unread, to the training processes."""

    def parser(self) -> OptionParser:
        """For the help: with the commonest options of `transformers.TrainingArguments`."""
        parser = super().parser()
        group = parser.add_argument_group(
            "training", "These, and all of transformers.TrainingArguments."
        )
        for name, text in TRAINING_OPTIONS.items():
            group.add_argument(f"--{name}", help=text)
        return parser

    def __call__(self, arguments: Sequence[str]) -> int:
        """Start the training processes and wait for them."""
        if {"-h", "--help"} & set(arguments):
            self.parser().print_help()
            return 0
        options, rest = OptionParser((LaunchOptions,)).parse_known_args(list(arguments))
        return self.run(LaunchOptions(**vars(options)), rest)


def train(options: LaunchOptions, arguments: Sequence[str]) -> int:
    """Launch, and say in one sentence how it failed if it did."""
    command, meeting, settings = _command_and_meeting(options, arguments)
    if options.dry_run:
        say(shlex.join(["accelerate", "launch", *command]))
        return 0
    say(f"Starting: {shlex.join(['accelerate', 'launch', *command[: -len(arguments) or None]])}")
    sys.stdout.flush()
    if meeting is not None:
        from lora_fsdp.distributed.meeting import check_meeting

        check_meeting(meeting, settings=settings, seconds=options.join_seconds)
    _read_base_ahead(arguments)
    return _launch(command, again=again(options, arguments), folder=output_folder(arguments))


def launch_command_line(options: LaunchOptions, arguments: Sequence[str]) -> list[str]:
    """The arguments of `accelerate launch`.

    Raises:
        LaunchError: it would leave out something of what is asked for.
    """
    return _command_and_meeting(options, arguments)[0]


def _command_and_meeting(
    options: LaunchOptions, arguments: Sequence[str]
) -> tuple[list[str], Meeting | None, str]:
    """The command, where several machines meet before it, and what must be the same on them."""
    from torch.cuda import device_count

    from lora_fsdp.distributed.launch_files import check_can_start, launch_words, read_launch_yaml
    from lora_fsdp.distributed.meeting import meeting_of

    config, processes = launched_config(options, gpus=device_count())
    launch = check_can_start(config, processes=processes, machines=options.num_machines)
    command = launch_words(config, processes=processes, machines=options.num_machines)
    ends = ["--module", _MODULE, *arguments]
    if launch.machines == 1:
        _refuse_of_several(options)
        # The usual port may be taken by another run on this machine.
        port = options.main_process_port
        return [*command, "--main_process_port", str(0 if port is None else port), *ends], None, ""
    names = ("machine_rank", "main_process_ip", "main_process_port")
    given = {name: getattr(options, name) for name in names}
    given = {name: value for name, value in given.items() if value is not None}
    found = read_launch_yaml(config) | given
    meeting = meeting_of(
        found,
        machines=launch.machines,
        processes=launch.processes,
        is_placed="machine_rank" in found,
    )
    command += ["--machine_rank", str(meeting.place), "--main_process_ip", meeting.address]
    command += ["--main_process_port", str(meeting.port)]
    return [*command, *ends], meeting, launch.settings


def _refuse_of_several(options: LaunchOptions) -> None:
    """Refuse what one machine has no use for.

    Raises:
        LaunchError: names the option.
    """
    from lora_fsdp.errors import LaunchError

    if options.machine_rank not in (None, 0) or options.main_process_ip is not None:
        name = "main_process_ip" if options.main_process_ip is not None else "machine_rank"
        raise LaunchError(
            f"--{name} {getattr(options, name)}, but there is one machine: give --num_machines as "
            "well, or --accelerate_config fsdp2_hosts."
        )


def launched_config(options: LaunchOptions, *, gpus: int) -> tuple[Path, int | None]:
    """The accelerate YAML, and the number of processes where it is not the YAML's own."""
    machines = options.num_machines or 1
    suggested = "fsdp2_hosts" if machines > 1 and gpus else suggested_config(gpus)
    config = find_config(options.accelerate_config or suggested)
    processes = options.num_processes
    if processes is None and options.accelerate_config is None and machines * gpus > 1:
        processes = machines * gpus
    return config, processes


def again(options: LaunchOptions, arguments: Sequence[str]) -> str:
    """The command that goes on with this run, to the letter."""
    words = ["lora-fsdp", "train"]
    for name, value in vars(options).items():
        if value != getattr(LaunchOptions, name):
            words += [f"--{name}", str(value)]
    before = ""
    for word in arguments:
        name, equals, _ = word.partition("=")
        is_option = word.startswith("--")
        option = (name if is_option else before).replace("-", "_")
        before = "" if is_option and equals else option if not is_option else name
        if option == "__resume_from_checkpoint":
            continue
        secret = any(part in option for part in ("token", "secret", "password", "api_key"))
        if secret and (equals or not is_option):
            word = f"{name}=***" if is_option else "***"
        words.append(word)
    return shlex.join([*words, "--resume_from_checkpoint", "true"])


def output_folder(arguments: Sequence[str]) -> Path:
    """Where the training processes write, by the command line or its recipe."""
    return Path(given_value(arguments, "output_dir") or "runs/latest").expanduser()


def given_value(arguments: Sequence[str], option: str) -> str | None:
    """An option of the training processes, by the command line or its recipe."""
    recipe, given = None, None
    for word, following in pairwise([*arguments, ""]):
        name, equals, value = word.partition("=")
        if name == "--config":
            recipe = value if equals else following
        elif name in (f"--{option}", f"--{option.replace('_', '-')}"):
            given = value if equals else following
    if given is None and recipe is not None:
        options = read_recipe(recipe, options=[option], others_allowed=True)
        given = options[0].partition("=")[2] if options else None
    return given


def _read_base_ahead(arguments: Sequence[str]) -> None:
    """Have the base's files read while the processes import, which are told so."""
    if (model := given_value(arguments, "model_name_or_path")) is not None:
        from lora_fsdp.base.reading.ahead import READ_AHEAD, read_ahead

        read_ahead(model, revision=given_value(arguments, "model_revision") or "main")
        os.environ[READ_AHEAD] = "1"


def what_is_left(folder: Path, again: str) -> str:
    """Which checkpoint a run that was interrupted has, and the command that goes on from it."""
    from lora_fsdp.training.saving.checkpoints import find_damage, list_checkpoints

    whole = (one for one in list_checkpoints(folder) if find_damage(one, hashes=False) is None)
    newest = next(whole, None)
    if newest is None:
        return (
            f"{folder} has no checkpoint yet: with --save_strategy steps --save_steps 100 a run "
            "leaves one every 100 steps."
        )
    return f"The newest checkpoint is {newest}. Go on with:\n{again}"


def _launch(command: Sequence[str], *, again: str, folder: Path) -> int:
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    # The launcher reports its processes' ends at length; below they are one sentence.
    importlib.import_module("torch.distributed.run")
    for name in list(logging.root.manager.loggerDict):  # each has a level of its own
        if name.startswith("torch.distributed.elastic"):
            logging.getLogger(name).setLevel(logging.CRITICAL)
    # Imported here: `--help` needs none of it.
    import psutil

    from lora_fsdp.training.logging.time_spent import STARTED

    os.environ[STARTED] = str(psutil.Process().create_time())
    try:
        launch_command(launch_command_parser().parse_args(list(command)))
    except ChildFailedError as error:
        return _explain(*_cause(error.failures))
    except subprocess.CalledProcessError as error:
        return _explain_code(error.returncode, "the training process")
    except (KeyboardInterrupt, SignalException) as stop:
        say(f"lora-fsdp train: stopped. {what_is_left(folder, again)}", file=sys.stderr)
        on_request = isinstance(stop, SignalException) and stop.sigval == signal.SIGTERM
        return STOPPED if on_request else INTERRUPTED
    return 0


def _cause(failures: Mapping[int, ProcessFailure]) -> tuple[int, ProcessFailure]:
    """Rank and end of the process that failed first.

    The launcher ends the others by SIGTERM, and counts times in whole seconds: within one second
    any of them may come first.
    """
    earliest = min(failure.timestamp for failure in failures.values())
    at_once = {rank: one for rank, one in failures.items() if one.timestamp <= earliest + 1}
    first = min(
        at_once,
        key=lambda rank: (at_once[rank].exitcode == -signal.SIGTERM, at_once[rank].timestamp),
    )
    return first, failures[first]


def _explain(rank: int, failure: ProcessFailure) -> int:
    return _explain_code(failure.exitcode, f"process {rank}")


def _explain_code(code: int, who: str) -> int:
    """Say what the process could not say itself; returns our own exit code."""
    if code in (WRONG_INPUT, STOPPED, INTERRUPTED):
        return code
    if code == -signal.SIGKILL:
        reason = f"{who} was killed (SIGKILL), most often because host memory ran out"
    elif code < 0:
        reason = f"{who} was ended by {signal.Signals(-code).name}"
    elif code == STALLED:  # no traceback: the thread that ends such a process prints its stacks
        reason = (
            f"{who} was ended because a process made no progress (exit code {code}); where each "
            "one was last seen, and the file with its stacks, stand in the StalledRankError above"
        )
    else:
        reason = f"{who} failed with exit code {code}; its traceback is above, if it left one"
    say(f"lora-fsdp train: {reason}.", file=sys.stderr)
    return STALLED if code == STALLED else CRASHED


COMMANDS = (
    TrainCommand(
        name="train",
        summary="Train an adapter, on the GPUs there are or as a rehearsal on the CPU.",
        examples=(
            "train tweets.csv --task sentiment \\\n"
            "      --model_name_or_path ./models/SmolLM2-135M-Instruct --output_dir runs/mine",
            "train --config recipe.yaml --learning_rate 1e-3",
            "train --accelerate_config fsdp2 --num_processes 4 --config recipe.yaml",
            "train --config recipe.yaml --resume_from_checkpoint true",
        ),
        options=(LaunchOptions, ModelArguments, LoraArguments, DataArguments),
        run=train,
        positional="data_file",
    ),
)
