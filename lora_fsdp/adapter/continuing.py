"""A run that goes on with a saved adapter: its settings, its base, its values."""

from __future__ import annotations

import logging
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel

from lora_fsdp.adapter.folder import AdapterFolder, read_adapter_folder
from lora_fsdp.adapter.proof import check_base, read_proof
from lora_fsdp.adapter.saved import adapter_state
from lora_fsdp.adapter.settings import check_settings
from lora_fsdp.arguments import LoraArguments
from lora_fsdp.base.fingerprints import BaseFingerprint
from lora_fsdp.errors import AdapterVerificationError, ArgumentError

logger = logging.getLogger(__name__)

# Options of the adapter, and their names in PEFT.
_SETTINGS = {
    "lora_r": "r",
    "lora_alpha": "lora_alpha",
    "lora_dropout": "lora_dropout",
    "lora_target_modules": "target_modules",
}


def adapter_to_continue(name: str | Path) -> AdapterFolder:
    """The adapter in a folder.

    Raises:
        ArgumentError: there is no such folder.
        AdapterVerificationError, UnsafeFileError, UnsupportedAdapterError: it is none that can be
            read.
    """
    folder = Path(name).expanduser()
    if not folder.is_dir():
        raise ArgumentError(
            f"--adapter_name_or_path {name}: there is no such folder. Give that of a run, or of an "
            "adapter that PEFT has saved; one on the Hub is to be downloaded first."
        )
    adapter = read_adapter_folder(folder)
    adapter.config.base_model_name_or_path = None  # where it lay then; PEFT warns of another place
    return adapter


def config_to_continue(arguments: LoraArguments) -> LoraConfig:
    """The settings of the adapter that `arguments` name to go on with.

    Raises:
        ArgumentError: options contradict them, or they would not be carried out.
    """
    adapter = adapter_to_continue(str(arguments.adapter_name_or_path))
    config, defaults = adapter.config, LoraArguments()
    given = {
        name: getattr(arguments, option)
        for option, name in _SETTINGS.items()
        if getattr(arguments, option) != getattr(defaults, option)
    }
    given |= dict(arguments.lora_kwargs or {})  # type: ignore[arg-type]
    for name, value in given.items():
        own = getattr(config, name, None)
        if _comparable(value) != _comparable(own):
            option = next((o for o, n in _SETTINGS.items() if n == name), f"lora_kwargs {name}")
            raise ArgumentError(
                f"--{option} {value} contradicts the adapter {adapter.path}, whose {name} is "
                f"{_comparable(own)}: leave it out, since a run that goes on has its adapter's."
            )
    check_settings(config)
    return config


def check_base_of_start(adapter: AdapterFolder, found: BaseFingerprint, *, base: str) -> None:
    """Prove that an adapter was trained on this base, as far as its folder says.

    Raises:
        BaseMismatchError: it was trained on another; the message names both.
        AdapterVerificationError: its proof is damaged.
    """
    proof = read_proof(adapter.path)
    if proof is None:
        logger.warning(
            "%s has no proof.json: that it was trained on %s is not known, only that it fits.",
            adapter.path,
            base,
        )
        return
    check_base(proof, found, adapter=adapter.path, base=base)


def load_start(model: PeftModel, adapter: AdapterFolder) -> None:
    """Give the adapter that is attached to `model` the saved one's values.

    Raises:
        AdapterVerificationError: it has other modules or shapes.
    """
    live = adapter_state(model)
    wrong = [
        name
        for name in adapter.tensors.keys() | live.keys()
        if name not in adapter.tensors
        or name not in live
        or adapter.tensors[name].shape != live[name].shape
    ]
    if wrong:
        raise AdapterVerificationError(
            f"The adapter {adapter.path} does not fit this base: {min(wrong)} is missing on one "
            "side, or of another shape."
        )
    with torch.no_grad():
        for name, tensor in live.items():
            tensor.copy_(adapter.tensors[name])
    logger.info(
        "Going on with the adapter %s (rank %s, alpha %s) and a new optimizer.",
        adapter.path, adapter.config.r, adapter.config.lora_alpha,
    )  # fmt: skip


def _comparable(value: object) -> object:
    """Names as PEFT keeps them: in any order, one or a list of one."""
    if isinstance(value, list | tuple | set):
        return sorted(map(str, value)) if len(value) != 1 else str(next(iter(value)))
    return value
