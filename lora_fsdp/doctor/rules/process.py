"""Rules over the processes that a launch would start."""

from __future__ import annotations

from collections.abc import Iterator

from lora_fsdp.distributed.launch import check_gpus_suffice, check_sharding_has_ranks
from lora_fsdp.distributed.launch_files import check_all_start
from lora_fsdp.doctor.case import Case
from lora_fsdp.doctor.finding import Problem, Rules

RULES = Rules()


@RULES.error(
    "fsdp-on-one-process",
    "An FSDP YAML, and one process, where nothing is sharded.",
    "Use accelerate_configs/single.yaml, or raise --num_processes.",
)
def _one_process(case: Case) -> None:
    if case.fsdp.value is not None and not case.training.get("allow_fsdp_on_one_process"):
        check_sharding_has_ranks(case.launch.value.processes)


@RULES.error(
    "processes-dropped",
    "Several processes, and a `distributed_type` under which accelerate starts one.",
    "Set distributed_type: MULTI_GPU or FSDP, or num_processes: 1.",
)
def _dropped(case: Case) -> None:
    check_all_start(case.launch.value)


@RULES.error(
    "more-processes-than-gpus",
    "More processes on this machine than it has GPUs.",
    "Lower --num_processes, or set use_cpu: true for a rehearsal.",
)
def _too_many_processes(case: Case) -> None:
    if case.gpus_used:
        check_gpus_suffice(case.launch.value.processes_here, len(case.machine.gpus))


@RULES.note(
    "use-cpu-missing",
    "Several processes without a GPU, and no `use_cpu: true`.",
    "Set use_cpu: true, or start from accelerate_configs/fsdp2_cpu.yaml.",
)
def _use_cpu_missing(case: Case) -> Iterator[Problem]:
    launch = case.launch.value
    if launch.processes > 1 and not case.machine.gpus and not launch.use_cpu:
        yield Problem(
            f"The accelerate YAML starts {launch.processes} processes, and this machine has no "
            "GPU. A run of this library joins them all the same; accelerate by itself would not."
        )
