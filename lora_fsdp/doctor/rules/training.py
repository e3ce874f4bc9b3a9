"""Rules over the training arguments and the output folder."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator

from lora_fsdp.doctor.case import Case
from lora_fsdp.doctor.finding import Problem, Rules
from lora_fsdp.doctor.numbers import impossible_numbers
from lora_fsdp.placement.sequences import check_sequence_length
from lora_fsdp.training.checks import check_checkpointing
from lora_fsdp.training.saving.output_folder import check_output_folder
from lora_fsdp.training.saving.run_lock import holder_of

_QUANTIZED_OPTIMIZER = re.compile(r"8bit|4bit|paged", re.IGNORECASE)


RULES = Rules()


def _precision(case: Case) -> str:
    """What of mixed precision the training arguments and the YAML ask for."""
    for name in ("fp16", "bf16"):
        if case.training.get(name):
            return name
    return case.launch.value.environment.get("ACCELERATE_MIXED_PRECISION", "no")


@RULES.error(
    "mixed-precision-fp16",
    "`--fp16`, or `mixed_precision: fp16` in the YAML: loss scaling hides small gradients.",
    "Use --dtype bfloat16 (or float32) and mixed_precision: 'no'.",
)
def _fp16(case: Case) -> Iterator[Problem]:
    if _precision(case) == "fp16" and (error := case.arguments.error) is not None:
        yield Problem(str(error))


@RULES.warning(
    "mixed-precision-bf16",
    "`--bf16`, or `mixed_precision: bf16` in the YAML: the base already is in `--dtype`.",
    "Set mixed_precision: 'no' in the YAML and leave --bf16 out.",
)
def _bf16(case: Case) -> Iterator[Problem]:
    if _precision(case) == "bf16":
        yield Problem(
            "Mixed precision bf16 runs the float32 adapter under autocast, for which the fused "
            "layers and CUDA graphs are not made: the run is slower, and no smaller."
        )


@RULES.error(
    "training-arguments",
    "Training arguments that contradict each other, or that packed sequences cannot honour.",
    "Change the argument that is named.",
)
def _refused(case: Case) -> Iterator[Problem]:
    if (error := case.arguments.error) is not None and _precision(case) != "fp16":
        yield Problem(str(error))


@RULES.error(
    "training-numbers",
    "A batch size, number of epochs, learning rate, interval or seed that no run can have.",
    "Give a number in the range that is named.",
)
def _numbers(case: Case) -> Iterator[Problem]:
    for name, value, wanted in impossible_numbers(case.arguments.value):
        yield Problem(f"--{name} {value} must be {wanted}.")


@RULES.error(
    "loss-does-not-fit",
    "`--label_smoothing_factor`, `--focal_gamma` or `--ranked_weight` for answers without such a "
    "loss (free text has no label set to smooth over), or two of them.",
    "Leave it out.",
)
def _loss_does_not_fit(case: Case) -> Iterator[Problem]:
    if (error := case.objective.error) is not None:
        yield Problem(str(error))


@RULES.error(
    "checkpointing-twice",
    "`--gradient_checkpointing` and `fsdp_activation_checkpointing` together.",
    "Keep one of the two.",
)
def _checkpointing_twice(case: Case) -> None:
    check_checkpointing(case.arguments.value, case.fsdp.value)


@RULES.error(
    "rows-too-short",
    "`--max_tokens_per_row` below `--max_length`: a packed sequence must hold the longest example.",
    "Raise --max_tokens_per_row, or leave it out.",
)
def _short_rows(case: Case) -> None:
    check_sequence_length(
        case.arguments.value.max_tokens_per_row, max_length=case.data_args.max_length
    )


@RULES.warning(
    "quantized-optimizer",
    "An 8-bit, 4-bit or paged optimizer under FSDP.",
    "Leave --optim out: fused AdamW.",
)
def _quantized_optimizer(case: Case) -> Iterator[Problem]:
    name = str(getattr(case.arguments.value.optim, "value", case.arguments.value.optim))
    if case.fsdp.value is not None and _QUANTIZED_OPTIMIZER.search(name):
        yield Problem(
            f"--optim {name} under FSDP: the adapter's optimizer state is small, is not sharded, "
            "and cannot be held still when a step is not finite, so this saves next to nothing."
        )


@RULES.warning(
    "nan-filter",
    "`--logging_nan_inf_filter true`: a synchronisation at every step.",
    "Leave it out: a run stops at the first step that is not finite.",
)
def _nan_filter(case: Case) -> Iterator[Problem]:
    if case.arguments.value.logging_nan_inf_filter:
        yield Problem(
            "--logging_nan_inf_filter true hides losses that are not finite and makes host and "
            "GPU wait for each other at every step."
        )


@RULES.error(
    "output-folder-taken",
    "`--output_dir` holds a run, or no complete checkpoint to resume from.",
    "Choose another --output_dir, --resume_from_checkpoint true, or --overwrite_output_dir true.",
)
def _folder_taken(case: Case) -> None:
    check_output_folder(case.output_dir, case.arguments.value)


@RULES.error(
    "output-folder-in-use",
    "Another run is writing into `--output_dir` now.",
    "Wait for it to end, or choose another --output_dir.",
)
def _folder_in_use(case: Case) -> Iterator[Problem]:
    if (holder := holder_of(case.output_dir)) is not None:
        yield Problem(f"{case.output_dir} is in use by {holder}.")


@RULES.error(
    "output-folder-closed",
    "`--output_dir` cannot be written to.",
    "Choose another --output_dir, or change its permissions.",
)
def _folder_closed(case: Case) -> Iterator[Problem]:
    folder = case.output_dir.absolute()
    nearest = next(place for place in (folder, *folder.parents) if place.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        yield Problem(f"--output_dir {case.output_dir} cannot be written to.")
