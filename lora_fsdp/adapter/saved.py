"""The adapter on disk: written as a plain PEFT folder, read back and compared, loaded again."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch
from peft import PeftModel, get_peft_model_state_dict
from torch import nn
from transformers import PreTrainedModel

from lora_fsdp.adapter.folder import (
    AdapterFolder,
    find_base,
    load_with_peft,
    read_adapter_folder,
    read_adapter_tensors,
    zero_lora_b,
)
from lora_fsdp.adapter.ownership import parameters_by_adapter, trainable_parameters
from lora_fsdp.adapter.proof import Proof
from lora_fsdp.arguments import ModelArguments
from lora_fsdp.base.layers import base_model
from lora_fsdp.base.streaming import load_on_device
from lora_fsdp.errors import AdapterVerificationError


def adapter_state(model: PeftModel, adapter: str | None = None) -> dict[str, torch.Tensor]:
    """The adapter's live tensors under their names on disk. Gathers nothing: every rank has them.

    `adapter` names one of several that are trained together.

    Made from the adapter's parameters and not from `model.state_dict()`, which reshards FSDP2's
    groups: called on rank 0 alone it would set the ranks' collectives apart.
    """
    state: dict[str, torch.Tensor] = {
        name: parameter.detach() for name, parameter in _parameters_of(model, adapter).items()
    }
    # A bool, because "auto" asks the Hub about the base's vocabulary.
    return get_peft_model_state_dict(
        model, state_dict=state, adapter_name=adapter or "default", save_embedding_layers=False
    )


def _parameters_of(model: PeftModel, adapter: str | None) -> dict[str, nn.Parameter]:
    """Of `adapter`, or of all that are trained."""
    if adapter is None:
        return trainable_parameters(model)
    return parameters_by_adapter(model)[adapter]


def save_adapter(
    model: PeftModel, folder: str | Path, *, trained: bool = False, adapter: str | None = None
) -> None:
    """Write the adapter as a plain PEFT folder and prove it: what was written is what is in memory,
    and PEFT can load it.

    Args:
        model: may be sharded; rank 0 can save alone, nothing here is a collective call.
        folder: where to.
        trained: whether training has moved it, so that every `lora_B` must have values.
        adapter: which of several that are trained together; `None` = there is one.

    Raises:
        AdapterVerificationError: it holds NaN or infinity, a `lora_B` is still zero, it was not
            written as it is, or PEFT could not load it. The message names the folder.
    """
    state = adapter_state(model, adapter)
    broken = [name for name, tensor in state.items() if not tensor.isfinite().all()]
    if broken:
        raise AdapterVerificationError(
            f"The adapter is not saved to {folder}: {len(broken)} of its tensors hold NaN or "
            f"infinity (for example {broken[0]}). The run has diverged: lower --learning_rate."
        )
    if trained and (zero := zero_lora_b(state)):
        raise AdapterVerificationError(
            f"The adapter is not saved to {folder}: {len(zero)} of its lora_B are zero everywhere "
            f"although it was trained (for example {zero[0]}): their gradients do not arrive."
        )
    name = adapter or "default"
    model.save_pretrained(
        str(folder),
        state_dict=dict(_parameters_of(model, adapter)),
        safe_serialization=True,
        save_embedding_layers=False,
        selected_adapters=None if adapter is None else [name],
    )
    if name != "default":  # which alone PEFT writes into the folder itself
        for file in (Path(folder) / name).iterdir():
            file.rename(Path(folder) / file.name)
        (Path(folder) / name).rmdir()
    verify_adapter(model, folder, adapter=adapter)
    load_with_peft(read_adapter_folder(folder), base_model(model))


def verify_adapter(model: PeftModel, folder: str | Path, *, adapter: str | None = None) -> None:
    """Compare the adapter in `folder` with the live one, bit for bit.

    Raises:
        AdapterVerificationError: a tensor is missing or differs.
    """
    saved, live = read_adapter_tensors(Path(folder)), adapter_state(model, adapter)
    if saved.keys() != live.keys():
        raise AdapterVerificationError(
            f"{folder}: tensors on disk and in memory differ: {sorted(saved.keys() ^ live.keys())}"
        )
    for name, tensor in live.items():
        if not torch.equal(saved[name], tensor.detach().to("cpu")):
            raise AdapterVerificationError(f"{folder}: {name} is not what is in memory.")


def load_base_of(
    adapter: AdapterFolder,
    proof: Proof | None,
    *,
    given: str | Path | None,
    dtype: Literal["auto", "bfloat16", "float32"],
    trust_remote_code: bool,
) -> tuple[ModelArguments, PreTrainedModel, torch.device]:
    """The base of an adapter (or the one that is `given`), loaded as when it was trained.

    Raises:
        ModelNotFoundError: it is not where the adapter says.
    """
    name, revision = find_base(adapter, given=given, beside=proof.base_beside if proof else None)
    arguments = ModelArguments(
        name,
        revision,
        dtype,
        load_in_4bit=proof is not None and proof.base_in_4bit,
        trust_remote_code=trust_remote_code,
    )
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    base = load_on_device(arguments, device=device, adapter=adapter.config)
    return arguments, base, device


def load_adapter(model: PeftModel, folder: str | Path) -> None:
    """Load the adapter in `folder` into the one already attached to `model`, in place."""
    saved, live = read_adapter_tensors(Path(folder)), adapter_state(model)
    wrong = [
        name
        for name in saved.keys() | live.keys()
        if name not in saved or name not in live or saved[name].shape != live[name].shape
    ]
    if wrong:
        raise AdapterVerificationError(
            f"The adapter in {folder} has other modules or ranks than this run's "
            f"(for example {min(wrong)}): give the same lora_r and lora_target_modules."
        )
    for name, tensor in live.items():
        tensor.copy_(saved[name])
    verify_adapter(model, folder)
