"""The optimizers that `--optim` names: carried out exactly, or refused before the base is read."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

from packaging.version import Version
from transformers.training_args import OptimizerNames

from lora_fsdp.errors import ArgumentError, MissingPackageError

_PROJECTS = (
    "projects the gradients of whole weights to a low rank, which a LoRA adapter's have already"
)
_IN_BACKWARD = "updates weights within the backward, before gradients are summed over processes"
_SUBCLASSES = "keeps its state in tensors of a kind that a checkpoint cannot hold"

#: Refused, and why.
REFUSED = {
    "adalomo": _IN_BACKWARD,
    "adamw_anyprecision": "needs torchdistx, which is no longer developed",
    "adamw_torch_4bit": _SUBCLASSES,
    "adamw_torch_8bit": _SUBCLASSES,
    "adamw_torch_npu_fused": "is for NPUs, and training runs on CUDA GPUs and CPUs",
    "adamw_torch_xla": "is for TPUs, and training runs on CUDA GPUs and CPUs",
    "apollo_adamw": _PROJECTS,
    "apollo_adamw_layerwise": _PROJECTS,
    "galore_adafactor": _PROJECTS,
    "galore_adafactor_layerwise": _PROJECTS,
    "galore_adamw": _PROJECTS,
    "galore_adamw_8bit": _PROJECTS,
    "galore_adamw_8bit_layerwise": _PROJECTS,
    "galore_adamw_layerwise": _PROJECTS,
    "grokadamw": "does not save all of its state, so that a run could not go on as it was",
    "lomo": _IN_BACKWARD,
}
#: Those of torch and transformers themselves.
BUILT_IN = ("adafactor", "adagrad", "adamw_torch", "adamw_torch_fused", "rmsprop", "sgd")
#: The module that each of the others is in, what pip calls it, and the least version.
_BITSANDBYTES = ("bitsandbytes", "bitsandbytes", "0.50")
PACKAGES = {
    **dict.fromkeys(
        (
            "adamw_8bit", "adamw_bnb_8bit", "ademamix", "ademamix_8bit", "lion_32bit", "lion_8bit",
            "paged_adamw_32bit", "paged_adamw_8bit", "paged_ademamix_32bit", "paged_ademamix_8bit",
            "paged_lion_32bit", "paged_lion_8bit", "rmsprop_bnb", "rmsprop_bnb_32bit",
            "rmsprop_bnb_8bit",
        ),
        _BITSANDBYTES,
    ),
    **dict.fromkeys(
        ("schedule_free_adamw", "schedule_free_radam", "schedule_free_sgd"),
        ("schedulefree", "schedulefree", "1.4"),
    ),
    "stable_adamw": ("optimi", "torch-optimi", "0.2"),
}  # fmt: skip


def check_optimizer(optim: OptimizerNames | str, optim_args: str | None) -> None:
    """Refuse an optimizer that cannot be carried out here.

    Raises:
        ArgumentError: names it and says why, or which of `optim_args` is not `name=value`.
        MissingPackageError: its package is not installed, or too old.
    """
    name = OptimizerNames(optim).value
    for part in (optim_args or "").replace(" ", "").split(","):
        if optim_args and len(part.split("=")) != 2:
            raise ArgumentError(f"--optim_args must be name=value,name=value, and {part!r} is not.")
    if name in BUILT_IN:
        return
    if name not in PACKAGES:
        reason = REFUSED.get(name, "is not known to this version of lora-fsdp")
        raise ArgumentError(f"--optim {name} {reason}: use adamw_torch_fused or adamw_bnb_8bit.")
    module, package, least = PACKAGES[name]
    if find_spec(module) is None:
        raise MissingPackageError(
            f"--optim {name} needs a package that is not installed: pip install {package}"
        )
    try:
        old = Version(version(package)) < Version(least)
    except PackageNotFoundError:  # a module of another origin
        old = False
    if old:
        raise MissingPackageError(
            f"--optim {name} needs {package} {least} or newer, and {version(package)} is "
            f"installed: pip install --upgrade {package}"
        )
