"""`lora-fsdp doctor`: what would go wrong with `lora-fsdp train`, before it costs anything."""

from __future__ import annotations

import dataclasses
import sys
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from lora_fsdp.arguments import DataArguments, LoraArguments, ModelArguments
from lora_fsdp.arguments.option import option
from lora_fsdp.cli.command import print_json
from lora_fsdp.cli.terminal import width, write
from lora_fsdp.cli.train import LaunchOptions, TrainCommand, launched_config
from lora_fsdp.failures import FOUND_ERRORS
from lora_fsdp.options import OptionParser

if TYPE_CHECKING:
    from lora_fsdp.doctor import Diagnosis, Finding


@dataclass
class DoctorOptions:
    """How findings are printed."""

    _argument_group_name: ClassVar[str] = "doctor"

    strict: bool = option(False, "Count warnings as errors.")
    json: bool = option(False, "Print JSON.")


class DoctorCommand(TrainCommand):
    """Takes the command line of `train` as it is, and reads it as a training process would."""

    def __call__(self, arguments: Sequence[str]) -> int:
        """Examine, print, and say by the exit code whether there are errors."""
        if {"-h", "--help"} & set(arguments):
            self.parser().print_help()
            return 0
        own = OptionParser((DoctorOptions, LaunchOptions))
        options, rest = own.parse_known_args(list(arguments))
        given = vars(options)
        doctor, launch = (
            cls(**{one.name: given[one.name] for one in dataclasses.fields(cls)})
            for cls in (DoctorOptions, LaunchOptions)
        )
        return self.run(doctor, launch, rest)


def doctor(options: DoctorOptions, launch: LaunchOptions, arguments: Sequence[str]) -> int:
    """Examine the run that `train` would start with the same options."""
    from lora_fsdp.arguments import FineTuningArguments
    from lora_fsdp.doctor import Machine, Severity, diagnose

    classes = (ModelArguments, LoraArguments, DataArguments, FineTuningArguments)
    model, lora, data, training = OptionParser(classes, positional="data_file").parse_values(
        arguments
    )
    settings = _settings(training, LoraArguments(**lora), DataArguments(**data))
    machine = Machine.here(output_dir=Path(training["output_dir"]))
    config, processes = launched_config(launch, gpus=len(machine.gpus))
    with _quietly():
        found = diagnose(
            model_args=ModelArguments(**model),
            lora_args=LoraArguments(**lora),
            data_args=DataArguments(**data),
            training=training,
            accelerate_config=config,
            num_processes=processes,
            machine=machine,
            settings=settings,
        )
    counted = [Severity.ERROR, *([Severity.WARNING] if options.strict else [])]
    passed = not any(found.of(severity) for severity in counted)
    if options.json:
        print_json({"passed": passed, **dataclasses.asdict(found)})
    else:
        _print(found)
    return 0 if passed else FOUND_ERRORS


def _settings(
    training: Mapping[str, Any], lora: LoraArguments, data: DataArguments
) -> dict[str, tuple[Mapping[str, Any], LoraArguments]]:
    """The settings of a sweep, by the names of their first adapters; none of one adapter.

    Raises:
        ArgumentError: there is no such sweep.
    """
    from lora_fsdp.arguments import FineTuningArguments
    from lora_fsdp.sweeps.checking import check_contradictions
    from lora_fsdp.sweeps.grid import asked_adapters, is_several

    of_sweep = ("seeds", "folds", "grid", "search", "trials", "seed", "output_dir")
    asks = FineTuningArguments(**{name: training[name] for name in of_sweep})
    if not is_several(asks):
        return {}
    check_contradictions(asks, data)
    firsts = {one.setting: one for one in reversed(asked_adapters(asks))}
    return {one.name: (one.training_values, one.adapter(lora)) for _, one in sorted(firsts.items())}


@contextmanager
def _quietly() -> Iterator[None]:
    """Keep stdout for what is found: a task's own code may print as well."""
    with redirect_stdout(sys.stderr):
        yield


def _print(found: Diagnosis) -> None:
    from lora_fsdp.doctor import Severity

    for severity in Severity:
        if findings := found.of(severity):
            write(f"{severity}s" if len(findings) > 1 else str(severity))
            for finding in findings:
                _print_finding(finding)
            write("")
    if found.unchecked:
        write(_wrapped(f"not checked: {', '.join(found.unchecked)}", indent="  "))
    counts = [_counted(found.of(severity), severity) for severity in Severity]
    said = ", ".join(filter(None, counts)) or "nothing found"
    write(f"{len(found.checked)} rules checked, {said}")


def _counted(findings: Sequence[Finding], word: str) -> str:
    if not findings:
        return ""
    return f"{len(findings)} {word}" + ("s" if len(findings) > 1 else "")


def _print_finding(finding: Finding) -> None:
    write(f"  {finding.rule}")
    write(_wrapped(finding.sentence, indent="    "))
    fix, _, block = finding.fix.partition("\n\n")
    write(_wrapped(f"-> {fix}", indent="    "))
    if block:  # lines to copy, which are left as they are
        write(textwrap.indent(block, "       "))


def _wrapped(text: str, *, indent: str) -> str:
    # Paths and options stay in one piece, to be copied.
    return textwrap.fill(
        " ".join(text.split()),
        width=width(),
        initial_indent=indent,
        subsequent_indent=indent,
        break_long_words=False,
        break_on_hyphens=False,
    )


COMMANDS = (
    DoctorCommand(
        name="doctor",
        summary="Say what would go wrong with a training run, before it costs anything.",
        examples=(
            "doctor --config recipe.yaml",
            "doctor --config recipe.yaml --accelerate_config fsdp2 --strict",
            "doctor --config recipe.yaml --json",
        ),
        options=(DoctorOptions, LaunchOptions, ModelArguments, LoraArguments, DataArguments),
        run=doctor,
        positional="data_file",
    ),
)
