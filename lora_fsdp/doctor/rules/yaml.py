"""Rules over the accelerate YAML."""

from __future__ import annotations

import difflib
from collections.abc import Iterator

from accelerate.commands.config.config_args import ClusterConfig
from accelerate.commands.launch import launch_command_parser
from accelerate.commands.to_fsdp2 import ARGUMENT_KEY_MAPPING

from lora_fsdp.distributed.launch import check_environment, unsupported_settings
from lora_fsdp.distributed.launch_files import as_launched, check_kind_of_launch
from lora_fsdp.doctor.case import Case
from lora_fsdp.doctor.finding import Problem, Rules
from lora_fsdp.errors import Fsdp1ConfigError

# What accelerate reads without having an option for it, and old names that it still takes.
_KNOWN_BESIDES = {"fsdp_ignored_modules"}
_OLD_NAMES = {"fp16", "dynamo_backend"}


RULES = Rules()


@RULES.error(
    "yaml-refused",
    "accelerate cannot read the YAML, or refuses it.",
    "Compare it with those in accelerate_configs/.",
)
def _refused(case: Case) -> Iterator[Problem]:
    error = case.launch_yaml.error
    if error is None and not list(_unknown_keys(case)):
        error = case.launch.error
    if error is not None:
        yield Problem(str(error))


@RULES.error(
    "yaml-unknown-key",
    "A key of the YAML that accelerate does not know, at the top or in `fsdp_config`.",
    "Remove it, or correct its spelling.",
)
def _unknown_keys(case: Case) -> Iterator[Problem]:
    contents = case.launch_yaml.value
    known = set(ClusterConfig.__dataclass_fields__) | _OLD_NAMES
    for key in sorted(set(map(str, contents)) - known):
        yield _unknown(key, known, "accelerate does not start with it")
    for key in sorted(_fsdp_keys(case) - _known_fsdp_keys()):
        yield _unknown(key, _known_fsdp_keys(), "accelerate passes over it without a word")


def _unknown(key: str, known: set[str], effect: str) -> Problem:
    nearest = difflib.get_close_matches(key, sorted(known), n=1)
    fix = f"Did you mean {nearest[0]}?" if nearest else None
    return Problem(f"The accelerate YAML has an unknown key {key!r}: {effect}.", fix)


def _known_fsdp_keys() -> set[str]:
    options = {o for action in launch_command_parser()._actions for o in action.option_strings}
    return {o.lstrip("-") for o in options if o.startswith("--fsdp_")} | _KNOWN_BESIDES


def _fsdp_keys(case: Case) -> set[str]:
    """The keys of `fsdp_config`, as accelerate completes them."""
    section = case.launch_yaml.value.get("fsdp_config") or {}
    keys = map(str, section if isinstance(section, dict) else ())
    return {key if key.startswith("fsdp") else f"fsdp_{key}" for key in keys}


@RULES.error(
    "distributed-type",
    "A `distributed_type` other than FSDP, MULTI_GPU, MULTI_CPU or NO, or a section of another.",
    "Set distributed_type: FSDP, or MULTI_GPU.",
)
def _distributed_type(case: Case) -> None:
    check_kind_of_launch(case.launch_yaml.value)


@RULES.error(
    "launch-setting-dropped",
    "A setting that nobody carries out: `dynamo_config`, or `mixed_precision: fp8`.",
    "Remove it.",
)
def _setting_dropped(case: Case) -> None:
    with as_launched(case.launch.value):
        check_environment()


@RULES.error(
    "fsdp1", "The YAML asks for FSDP1 (`fsdp_version` is 1 or left out).", "Set fsdp_version: 2."
)
def _fsdp1(case: Case) -> Iterator[Problem]:
    if isinstance(error := case.fsdp.error, Fsdp1ConfigError):
        sentence, _, equivalent = str(error).partition(" The FSDP2 equivalent:")
        yield Problem(sentence, f"Use the FSDP2 equivalent:\n\n{equivalent.strip()}")


@RULES.error(
    "fsdp1-and-fsdp2-keys",
    "The YAML has keys of FSDP1 and of FSDP2; one kind is passed over.",
    "Keep the keys of FSDP2: fsdp_reshard_after_forward instead of fsdp_sharding_strategy.",
)
def _mixed_keys(case: Case) -> Iterator[Problem]:
    section = case.launch_yaml.value.get("fsdp_config")
    if not isinstance(section, dict):
        return
    # Those that accelerate's own converter renames or leaves out are FSDP1's.
    old = {key for key, new in ARGUMENT_KEY_MAPPING.items() if key != new}
    if str(section.get("fsdp_version", 1)) == "2":
        if found := sorted(_fsdp_keys(case) & old):
            yield Problem(
                f"fsdp_version is 2, but {', '.join(found)} {_belong(found)} to FSDP1 and would be "
                "passed over."
            )
    elif isinstance(section.get("fsdp_reshard_after_forward"), bool):
        yield Problem(
            "fsdp_reshard_after_forward: true or false belongs to FSDP2, but fsdp_version is "
            f"{section.get('fsdp_version', 'left out, which means 1')}.",
            "Set fsdp_version: 2.",
        )


def _belong(keys: list[str]) -> str:
    return "belongs" if len(keys) == 1 else "belong"


@RULES.error(
    "fsdp-value-refused",
    "accelerate refuses a value in `fsdp_config`.",
    "Compare it with accelerate_configs/fsdp2.yaml.",
)
def _value_refused(case: Case) -> None:
    case.plugin.check()


def _unsupported(key: str, name: str, meaning: str, fix: str) -> None:
    """A rule for one of the settings that a run refuses."""

    @RULES.error(name, meaning, fix)
    def check(case: Case) -> Iterator[Problem]:
        plugin = case.plugin.value
        with as_launched(case.launch.value):
            reason = None if plugin is None else unsupported_settings(plugin).get(key)
        if reason:
            yield Problem(reason)


_unsupported(
    "fsdp_auto_wrap_policy",
    "fsdp-size-based-wrap",
    "`fsdp_auto_wrap_policy: SIZE_BASED_WRAP`, which cuts through layers.",
    "Set it to TRANSFORMER_BASED_WRAP.",
)
_unsupported(
    "fsdp_ignored_modules",
    "fsdp-ignored-modules",
    "`fsdp_ignored_modules`, which the library itself sets.",
    "Remove it.",
)
_unsupported(
    "parallelism_config",
    "parallelism-config",
    "A `parallelism_config` with a size other than those of hybrid sharding.",
    "Keep `dp_replicate_size` (machines) and `dp_shard_size` (GPUs of each), the others at 1.",
)


@RULES.note(
    "fsdp-state-dict-type",
    "`fsdp_state_dict_type`, which does not matter: no save gathers the base.",
    "Leave it out.",
)
def _state_dict_type(case: Case) -> Iterator[Problem]:
    if case.fsdp.value is not None and "fsdp_state_dict_type" in _fsdp_keys(case):
        yield Problem(
            "fsdp_state_dict_type has no effect: the adapter is complete on every rank and is "
            "saved without a gather, whatever it says."
        )


@RULES.note(
    "fsdp-cpu-ram-efficient-loading",
    "`fsdp_cpu_ram_efficient_loading: true`, which does not matter: each rank reads its shards.",
    "Leave it out.",
)
def _efficient_loading(case: Case) -> Iterator[Problem]:
    name = "fsdp_cpu_ram_efficient_loading"
    asked = case.plugin.value is not None and case.plugin.value.cpu_ram_efficient_loading
    if asked and name in _fsdp_keys(case):
        yield Problem(
            f"{name} has no effect: each rank reads its shards of the base from the files, and "
            "nothing is sent from the first rank to the others."
        )
