"""Rules over the adapter."""

from __future__ import annotations

import math
from collections.abc import Iterator

from torch import nn
from transformers.pytorch_utils import Conv1D

from lora_fsdp.base.dropout import dropout_settings
from lora_fsdp.base.layers import base_model
from lora_fsdp.doctor.case import Case
from lora_fsdp.doctor.finding import Problem, Rules

# alpha / r; the source article's is 4, and papers rarely leave 0.25 to 8.
_LARGE_SCALE = 32.0


RULES = Rules()


@RULES.error(
    "lora-refused",
    "`peft.LoraConfig` refuses `--lora_kwargs`, or a number in it is none.",
    "Give fields of peft.LoraConfig, as JSON.",
)
def _refused(case: Case) -> None:
    case.lora.check()


@RULES.error("lora-rank", "`--lora_r` below 1.", "Set it to 8, say.")
def _rank(case: Case) -> Iterator[Problem]:
    if case.lora.value.r < 1:
        yield Problem(f"--lora_r {case.lora.value.r}: an adapter needs a rank of at least 1.")


@RULES.error(
    "lora-dropout", "`--lora_dropout` outside 0 to below 1.", "Set it to 0, or to 0.1 at most."
)
def _dropout(case: Case) -> Iterator[Problem]:
    dropout = case.lora.value.lora_dropout
    if not 0 <= dropout < 1:
        yield Problem(f"--lora_dropout {dropout} is no share from 0 to below 1.")


@RULES.error(
    "target-modules",
    "`--lora_target_modules` that match nothing in the model, or that PEFT cannot adapt.",
    "Give names of its linear modules, or all-linear.",
)
def _targets(case: Case) -> Iterator[Problem]:
    settings = case.lora.value
    if settings.r < 1 or not 0 <= settings.lora_dropout < 1:
        return  # PEFT would refuse those first
    if (error := case.adapted.error) is not None:
        yield Problem(str(error))


@RULES.note(
    "target-modules-regex",
    "`target_modules` in `--lora_kwargs` is a lone string: a regular expression to PEFT.",
    "Give a list if names were meant.",
)
def _regular_expression(case: Case) -> Iterator[Problem]:
    targets = case.lora.value.target_modules
    if isinstance(targets, str) and targets != "all-linear":
        matched = case.adapted.value.targeted_module_names
        yield Problem(
            f"target_modules is the string {targets!r} and not a list: PEFT takes it as a regular "
            f"expression for whole module names; it matches {len(matched)} modules, the first "
            f"being {matched[0]}."
        )


@RULES.warning(
    "lora-rank-too-large",
    "`--lora_r` not below the smaller side of a matrix that it adapts.",
    "Lower --lora_r.",
)
def _rank_too_large(case: Case) -> Iterator[Problem]:
    rank = case.lora.value.r
    model = base_model(case.adapted.value)
    sides = [
        min(module.weight.shape)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and name.endswith(".base_layer")
    ]
    smallest = min(sides, default=rank + 1)
    if rank >= smallest:
        yield Problem(
            f"--lora_r {rank} is not below {smallest}, the smaller side of a matrix that it "
            "adapts: the update is no longer of low rank, and larger than the matrix."
        )


@RULES.error(
    "lora-alpha",
    "`--lora_alpha` of 0 or less: nothing would be learnt.",
    "Set it to one to four times --lora_r.",
)
def _alpha(case: Case) -> Iterator[Problem]:
    if not case.lora.value.lora_alpha > 0:  # also NaN
        yield Problem(
            f"--lora_alpha {case.lora.value.lora_alpha}: the update is scaled by alpha / r, so "
            "nothing would be learnt, or the wrong way round."
        )


@RULES.warning(
    "lora-scale",
    f"An update scaled (alpha / r) by more than {_LARGE_SCALE:g}.",
    "Set --lora_alpha to one to four times --lora_r.",
)
def _scale(case: Case) -> Iterator[Problem]:
    settings = case.lora.value
    if settings.r < 1:
        return
    root = math.sqrt(settings.r) if settings.use_rslora else settings.r
    scale = settings.lora_alpha / root
    if scale > _LARGE_SCALE:
        yield Problem(
            f"--lora_alpha {settings.lora_alpha:g} at --lora_r {settings.r} scales the update by "
            f"{scale:g}: training is likely to diverge."
        )


@RULES.warning(
    "learning-rate-diverges",
    "`--learning_rate` above the size of the adapter's first values, with an optimizer that moves "
    "each value by about the learning rate.",
    "Lower --learning_rate: 1e-4 to 2e-3 is usual.",
)
def _learning_rate(case: Case) -> Iterator[Problem]:
    arguments = case.arguments.value
    # As PEFT draws A by default; others begin otherwise.
    if case.lora.value.init_lora_weights is not True or "adam" not in str(arguments.optim).lower():
        return
    widths = [
        value.shape[1]
        for name, value in case.adapted.value.named_parameters()
        if ".lora_A." in name
    ]
    if widths and arguments.learning_rate > (bound := 1 / math.sqrt(max(widths))):
        yield Problem(
            f"--learning_rate {arguments.learning_rate:g}: Adam moves each value of the adapter by "
            f"about that much a step, and A begins within ±{bound:.2g}: the first steps replace "
            "it, and training is likely to diverge."
        )


@RULES.note(
    "dropout-with-shared-prefix",
    "`--share_prefix always` with dropout.",
    "Set --lora_dropout 0 for exact gradients, or --share_prefix auto.",
)
def _shared_dropout(case: Case) -> Iterator[Problem]:
    if case.arguments.value.share_prefix != "always":
        return
    rates = {"--lora_dropout": case.lora.value.lora_dropout}
    rates |= dropout_settings(case.skeleton.value.config)
    if dropping := [f"{name} {rate:g}" for name, rate in rates.items() if rate > 0]:
        yield Problem(
            f"--share_prefix always with {', '.join(dropping)}: gradients stay unbiased, but the "
            "examples of a packed sequence share the prefix's dropout masks."
        )


@RULES.note(
    "lora-on-head",
    "The adapter is on the output head: its logits are not computed chunk by chunk.",
    "Leave the head out of --lora_target_modules if memory is scarce.",
)
def _on_head(case: Case) -> Iterator[Problem]:
    head = base_model(case.adapted.value).get_output_embeddings()
    if head is not None and any(parameter.requires_grad for parameter in head.parameters()):
        yield Problem(
            "The adapter is on the output head, which therefore cannot run chunk by chunk: the "
            "logits of all supervised tokens are in memory at once."
        )
