"""Which modules of a model an adapter's settings mean, and how that is said."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Iterator
from typing import Any, cast

from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper
from peft.utils.constants import (
    INCLUDE_LINEAR_LAYERS_SHORTHAND as ALL_LINEAR,
)
from peft.utils.constants import (
    TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING,
)
from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lora_fsdp.base.multimodal import is_multimodal, names_outside, outside_text
from lora_fsdp.errors import TargetModulesError

# In a module's or its class's name: it chooses the experts that a token goes to.
_ROUTES = re.compile(r"router|gating|top_?k", re.IGNORECASE)
_DEFAULT = ("q_proj", "v_proj")
# What reads the hidden states in attention, or in the layers that a family has instead of it.
_IN_ITS_PLACE = (
    ("q_proj", "kv_proj"),
    ("q_proj", "v_proj_current"),  # Zaya
    ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj"),  # latent attention
    ("q_proj", "kv_a_proj_with_mqa", "kv_b_proj"),
    ("q_a_proj", "q_b_proj", "kv_proj"),
    ("q_a_proj", "kv_a_proj_with_mqa"),
    ("query_key_value",),
    ("qkv_proj",),
    ("Wqkv",),
    ("c_attn",),
    ("project_q", "project_v"),
    ("query_proj", "value_proj"),
    ("query", "value"),
    ("q_lin", "v_lin"),
    ("Wq", "Wv"),
    ("q", "v"),
    ("kv_proj",),
    ("in_proj", "x_proj"),  # Mamba
    ("in_proj",),
    ("in_proj_qkv",),
)
# A module of such a name routes too where experts stand beside it.
_GATES = ("gate", "shared_expert_gate", "shared_experts_gate")


def resolve_targets(base: PreTrainedModel, config: LoraConfig) -> None:
    """Write into the settings which modules of this model are meant.

    `None`: the family's usual ones (`default_targets`). `all-linear`: every linear layer but the
    head and what routes tokens to experts; an adapter there would change which experts answer, and
    has to be asked for by name. Experts count where PEFT counts them. Of a model that also sees or
    hears, the language model is meant unless a name or pattern names another part.

    Raises:
        TargetModulesError: the model has no such layer, or a name matches nothing.
    """
    targets = config.target_modules
    if isinstance(targets, str) and targets.lower() == ALL_LINEAR:
        _resolve_all_linear(base, config)
        return
    if targets is None:
        config.target_modules = cast(Any, set(default_targets(base)))
        # As PEFT would set it, with a warning, for layers whose weights are transposed.
        config.fan_in_fan_out |= all(
            isinstance(module, Conv1D)
            for name, module in base.named_modules()
            if _is_meant(config.target_modules, name)
        )
    _check_named(base, config)
    _keep_to_text(base, config)


def default_targets(base: PreTrainedModel) -> list[str]:
    """Names of the modules that are adapted where none are named.

    `q_proj` and `v_proj` where a model has them, else those that PEFT names for its family, else
    what stands in their place in attention or in the layers that a model has instead of it.

    Raises:
        TargetModulesError: there is nothing of the kind; names the linear layers.
    """
    own = {name.rpartition(".")[2] for name in linear_modules(base)}
    family = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING.get(base.config.model_type)
    by_peft = tuple(family) if isinstance(family, list) else ()
    for names in (_DEFAULT, by_peft, *_IN_ITS_PLACE):
        if names and own.issuperset(names):
            return list(names)
    raise TargetModulesError(
        f"Which modules of {type(base).__name__} are usually adapted is not known here: name some "
        f"of its linear modules {sorted(own)} (--lora_target_modules), or all-linear."
    )


def router_modules(base: nn.Module) -> set[str]:
    """Names of the modules that choose experts, and of everything inside them."""
    found = set()
    for name, module in base.named_modules():
        parent, _, own = name.rpartition(".")
        named = _ROUTES.search(own) or _ROUTES.search(type(module).__name__)
        routes = named and not _has_experts(module)
        beside_experts = own in _GATES and _has_experts(base.get_submodule(parent))
        if parent in found or (name and (routes or beside_experts)):
            found.add(name)
    return found


def linear_modules(base: PreTrainedModel) -> list[str]:
    """Names of the language model's linear layers, without the output head and routers."""
    head, routers, others = base.get_output_embeddings(), router_modules(base), outside_text(base)
    return [
        name
        for name, module in base.named_modules()
        if isinstance(module, nn.Linear | Conv1D)
        and module is not head
        and name not in routers
        and not _is_within(name, others)
    ]


def targets_in_words(model: PeftModel) -> str:
    """Such as `LoRA r 8 on q_proj, v_proj of 30 layers: 60 modules`."""
    config = cast(LoraConfig, model.peft_config[str(model.active_adapter)])
    parts = [
        _counted(names, kind)
        for names, kind in (
            (model.targeted_module_names, "module"),
            (model.targeted_parameter_names, "parameter"),
        )
        if names
    ]
    said = f"LoRA r {config.r} on {'; '.join(parts)}"
    for rank, names in sorted(_other_ranks(model, config).items()):
        said += f"; r {rank} on {', '.join(names)}"
    if config.modules_to_save:
        said += f"; trained whole: {', '.join(sorted(config.modules_to_save))}"
    return said


def _other_ranks(model: PeftModel, config: LoraConfig) -> dict[int, dict[str, None]]:
    """Names of what has another rank than the settings' `r`, by that rank."""
    found: dict[int, dict[str, None]] = {}
    for name, module in model.named_modules():
        rank = module.r.get(str(model.active_adapter)) if isinstance(module, LoraLayer) else None
        if rank not in (None, config.r):
            own = module.parameter_name if isinstance(module, ParamWrapper) else _own_name(name)
            found.setdefault(rank, {})[own] = None
    return found


def _counted(names: Iterable[str], kind: str) -> str:
    listed = list(names)
    own = dict.fromkeys(_own_name(name) for name in listed)
    layers = {match[0] for name in listed if (match := re.match(r".*?\.\d+(?=\.|$)", name))}
    of_layers = f" of {len(layers)} layer{'s' * (len(layers) > 1)}" if layers else ""
    return f"{', '.join(own)}{of_layers}: {len(listed)} {kind}{'s' * (len(listed) > 1)}"


def _own_name(name: str) -> str:
    """A module's or a parameter's name without the path; a `weight` is called by its module."""
    parts = name.split(".")
    return ".".join(parts[-2:]) if parts[-1] == "weight" else parts[-1]


def _has_experts(module: nn.Module) -> bool:
    return any("expert" in name for name, _ in module.named_children() if name not in _GATES)


def _resolve_all_linear(base: PreTrainedModel, config: LoraConfig) -> None:
    linear, routers = linear_modules(base), router_modules(base)
    stored = [name for name, _ in base.named_parameters()]
    # What PEFT makes of the word: for some families also the parameters that hold all experts'
    # weights, and the router's.
    by_peft = copy.deepcopy(config)
    convert_peft_config_for_transformers(by_peft, base, None)
    experts = {
        target
        for target in by_peft.target_parameters or ()
        for name in stored
        if f".{name}".endswith(f".{target}") and name.rpartition(".")[0] not in routers
    }
    if not linear and not experts:
        raise TargetModulesError(
            f"{type(base).__name__} has no linear layers that all-linear could mean: name modules "
            "(--lora_target_modules)."
        )
    # A layer of an expert's name outside the experts can only be adapted as a parameter there.
    taken_over = _meant_as_experts(base, config, linear)
    if parameters := experts | {f"{name}.weight" for name in taken_over}:
        config.target_parameters = sorted(parameters | set(config.target_parameters or ()))
    modules = set(linear) - taken_over
    config.target_modules = _in_text(base, modules) if is_multimodal(base) else cast(Any, modules)


def _meant_as_experts(
    base: PreTrainedModel, config: LoraConfig, targets: Iterable[str]
) -> set[str]:
    """Those of the names that PEFT takes for parameters which hold all experts' weights.

    So it does in some families, in which the experts were modules of these names once.
    """
    converted = copy.deepcopy(config)
    converted.target_modules = cast(Any, set(targets))
    try:
        convert_peft_config_for_transformers(converted, base, None)
    except ValueError as error:
        raise TargetModulesError(f"PEFT cannot adapt {type(base).__name__}: {error}") from error
    return set(targets) - set(cast(set[str], converted.target_modules))


def _check_named(base: PreTrainedModel, config: LoraConfig) -> None:
    names = [name for name, _ in base.named_modules() if name]
    missing = list(_missing(config.target_modules, names))
    if missing and not isinstance(config.target_modules, str):
        missing = sorted(
            set(missing) - _meant_as_experts(base, config, config.target_modules or ())
        )
    if missing:
        raise TargetModulesError(
            f"LoRA target modules {missing} match nothing in {type(base).__name__}. Its linear "
            f"modules are {_linear_names(base)}; --lora_target_modules all-linear adapts all but "
            "the head."
        )
    for name in router_modules(base):
        module = base.get_submodule(name)
        own_forward = (
            isinstance(module, nn.Linear) and type(module).forward is not nn.Linear.forward
        )
        if own_forward and _is_meant(config.target_modules, name):
            raise TargetModulesError(
                f"LoRA target modules take in {name}, a {type(module).__name__}, which returns "
                "more than its linear map, so that no adapter can be added to it: leave it out."
            )


def _keep_to_text(base: PreTrainedModel, config: LoraConfig) -> None:
    """Narrow names to the language model of one that also sees or hears, unless they say more."""
    others = outside_text(base)
    if not is_multimodal(base) or names_outside(config, others):
        return
    meant = [name for name, _ in base.named_modules() if _is_meant(config.target_modules, name)]
    if of_text := {name for name in meant if not _is_within(name, others)}:
        config.target_modules = _in_text(base, of_text)


def _in_text(base: PreTrainedModel, names: set[str]) -> Any:
    """Modules of the language model, said so that no module of another part is meant.

    The other parts need not be there now, and are where the adapter will be loaded.
    """
    decoder = base.get_decoder()
    path = next(name for name, module in base.named_modules() if module is decoder)
    leaves = sorted({name.rpartition(".")[2] for name in names})
    pattern = rf"{path.replace('.', chr(92) + '.')}.*\.({'|'.join(leaves)})"
    found = {name for name, _ in base.named_modules() if re.fullmatch(pattern, name)}
    return pattern if found == names else names


def _is_within(name: str, parts: Iterable[str]) -> bool:
    return any(name == part or name.startswith(f"{part}.") for part in parts)


def _missing(targets: object, names: list[str]) -> Iterator[str]:
    if isinstance(targets, str):  # to PEFT a plain string is a regular expression
        try:
            if not any(_is_meant(targets, name) for name in names):
                yield targets
        except re.error as error:
            raise TargetModulesError(
                f"LoRA target_modules {targets!r} is no regular expression ({error}), as which "
                "PEFT takes a plain string: give a list of names."
            ) from error
        return
    for target in sorted(cast(set[str], targets or ())):
        if not any(_is_meant({target}, name) for name in names):
            yield target


def _is_meant(targets: object, name: str) -> bool:
    if isinstance(targets, str):
        return re.fullmatch(targets, name) is not None
    return any(f".{name}".endswith(f".{target}") for target in cast(set[str], targets or ()))


def _linear_names(base: PreTrainedModel) -> list[str]:
    return sorted(
        {
            name.rpartition(".")[2]
            for name, module in base.named_modules()
            if isinstance(module, nn.Linear | Conv1D)
        }
    )
