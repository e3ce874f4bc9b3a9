"""All rules over a run that has not started yet."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lora_fsdp.arguments import DataArguments, LoraArguments, ModelArguments
from lora_fsdp.doctor.case import Case
from lora_fsdp.doctor.fact import UnknownFactError
from lora_fsdp.doctor.finding import Finding, Problem, Rule, Severity
from lora_fsdp.doctor.machine import Machine
from lora_fsdp.doctor.rules import (
    data,
    gpu,
    lora,
    machine,
    memory,
    model,
    process,
    training,
    yaml,
)
from lora_fsdp.errors import LoraFsdpError
from lora_fsdp.tasks import Task

#: By subject, in the order in which a run would meet them.
RULES: Mapping[str, Sequence[Rule]] = {
    "Launch": (*yaml.RULES, *process.RULES),
    "Training arguments": training.RULES,
    "Model": model.RULES,
    "Adapter": lora.RULES,
    "Rows": data.RULES,
    "Memory": (*memory.RULES, *gpu.RULES),
    "Machine": machine.RULES,
}


#: The subjects in which settings of a sweep differ.
OF_SETTINGS = ("Training arguments", "Adapter")


@dataclass(frozen=True)
class Diagnosis:
    """What the rules say.

    Attributes:
        findings: the most severe first.
        checked: ids of the rules that could be checked.
        unchecked: ids of those that could not, since something they need is itself wrong, or is
            only known when the run starts.
    """

    findings: Sequence[Finding]
    checked: Sequence[str]
    unchecked: Sequence[str]

    def of(self, severity: Severity) -> list[Finding]:
        """The findings of a severity."""
        return [finding for finding in self.findings if finding.severity is severity]


def diagnose(
    *,
    model_args: ModelArguments,
    lora_args: LoraArguments,
    data_args: DataArguments,
    training: Mapping[str, Any],
    accelerate_config: str | Path,
    num_processes: int | None = None,
    task: Task | None = None,
    machine: Machine | None = None,
    settings: Mapping[str, tuple[Mapping[str, Any], LoraArguments]] | None = None,
) -> Diagnosis:
    """Examine a run before anything expensive: no weights are read and no process is started.

    Not for use inside a training process, whose accelerate state it would reset.

    Args:
        model_args, lora_args, data_args: as for `finetune`.
        training: keyword arguments of `FineTuningArguments`, which need not accept them.
        accelerate_config: the YAML that it is to be launched with.
        num_processes: instead of the YAML's number.
        task: stands in for `data_args.task`.
        machine: where it is to run; `None` = here.
        settings: of a sweep, by name: the arguments that differ from `training`, and the adapter's.
            Training arguments and adapter are examined for each of them.
    """
    case = Case(
        model_args=model_args,
        lora_args=lora_args,
        data_args=data_args,
        training=training,
        accelerate_config=Path(accelerate_config),
        num_processes=num_processes,
        task=task,
        machine=machine or Machine.here(output_dir=Path(str(training.get("output_dir") or "."))),
    )
    cases = {
        name: replace(case, training={**training, **values}, lora_args=adapter)
        for name, (values, adapter) in (settings or {}).items()
    }
    return _examined(case, cases)


def _examined(case: Case, settings: Mapping[str, Case]) -> Diagnosis:
    findings: list[Finding] = []
    checked, unchecked = [], []
    of_settings = [rule for subject in OF_SETTINGS for rule in RULES[subject]]
    for rule in (rule for rules in RULES.values() for rule in rules):
        try:
            if settings and rule in of_settings:
                findings += _findings_of_settings(rule, settings)
            else:
                findings += _findings(rule, case)
            checked.append(rule.name)
        except UnknownFactError:
            unchecked.append(rule.name)
    order = list(Severity)
    findings.sort(key=lambda finding: order.index(finding.severity))
    return Diagnosis(findings, checked, unchecked)


def _findings_of_settings(rule: Rule, settings: Mapping[str, Case]) -> list[Finding]:
    """Each problem once, with the names of those that have it where not all do."""
    found: dict[Finding, list[str]] = {}
    for name, case in settings.items():
        for finding in _findings(rule, case):
            found.setdefault(finding, []).append(name)
    return [
        finding
        if len(names) == len(settings)
        else replace(finding, sentence=f"{', '.join(names)}: {finding.sentence}")
        for finding, names in found.items()
    ]


def _findings(rule: Rule, case: Case) -> list[Finding]:
    try:
        problems = list(rule.check(case) or ())
    except LoraFsdpError as error:
        problems = [Problem(str(error))]
    return [
        Finding(rule.name, rule.severity, problem.sentence, problem.fix or rule.fix)
        for problem in problems
    ]
