"""Bases and adapters on disk, for the tests that read folders."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from transformers import PreTrainedModel

from lora_fsdp.adapter.attach import attach_adapter
from lora_fsdp.adapter.saved import save_adapter
from tests.support.tiny import randomise_adapter, tiny_model, tiny_tokenizer

PROMPT = torch.tensor([[5, 6, 7, 8, 9, 120, 33]])


def save_base(
    folder: Path, kind: str = "llama", *, dtype: torch.dtype = torch.float32, **options: Any
) -> Path:
    """A toy base with its tokenizer; `options` go to `save_pretrained`."""
    tiny_model(kind, dtype=dtype).save_pretrained(folder, **options)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def adapted(base: PreTrainedModel, kind: str = "llama", **options: Any) -> PeftModel:
    """`base` with an adapter that is not zero."""
    settings: dict[str, Any] = {
        "r": 4,
        "target_modules": "all-linear",
        "fan_in_fan_out": kind == "gpt2",
        "task_type": "CAUSAL_LM",
    }
    model = attach_adapter(base, LoraConfig(**{**settings, **options}))
    randomise_adapter(model)
    return model.eval()


def save_plain_adapter(folder: Path, base: Path, kind: str = "llama", **options: Any) -> PeftModel:
    """A plain PEFT folder for `base`; returns the model whose adapter it is."""
    from transformers import AutoModelForCausalLM

    model = adapted(AutoModelForCausalLM.from_pretrained(base), kind, **options)
    save_adapter(model, folder)
    return model


def logits(model: torch.nn.Module) -> torch.Tensor:
    """Of a fixed prompt, in float32."""
    with torch.no_grad():
        return model(input_ids=PROMPT, use_cache=False).logits.float()


def edit_json(file: Path, **changes: Any) -> None:
    """Change keys of a JSON file."""
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def seal(folder: Path) -> None:
    """Write an adapter's manifest anew, as if its files had been saved as they are now."""
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["sha256"]
    for name, entry in manifest["files"].items():
        contents = (folder / name).read_bytes()
        entry |= {"bytes": len(contents), "sha256": hashlib.sha256(contents).hexdigest()}
    digest = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
    (folder / "manifest.json").write_text(json.dumps({"sha256": digest, **manifest}))
