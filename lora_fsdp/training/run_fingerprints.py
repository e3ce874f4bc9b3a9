"""What of a run must be the same on every rank, and later where it is resumed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence

from peft import PeftModel

from lora_fsdp.adapter.ownership import trainable_parameters
from lora_fsdp.arguments import FineTuningArguments
from lora_fsdp.base.layers import base_model
from lora_fsdp.base.streaming import StoredBase
from lora_fsdp.data.encoding import EncodedExample
from lora_fsdp.distributed.launch import launch_fingerprint


def run_fingerprints(
    args: FineTuningArguments,
    model: PeftModel,
    *,
    train: Sequence[EncodedExample],
    held_out: Sequence[EncodedExample],
    stored: StoredBase | None = None,
) -> Mapping[str, str]:
    """What must be the same on every rank, by name; to be taken before the model is sharded.

    `stored` is where the base's weights are, if the model has not got them yet.
    """
    adapter = {name: list(p.shape) for name, p in trainable_parameters(model).items()}
    settings = model.peft_config[str(model.active_adapter)].to_dict()
    arguments = {f"--{k}": str(v) for k, v in args.to_dict().items() if k not in _OF_ONE_RANK}
    return {
        "the accelerate YAML's FSDP settings": launch_fingerprint(),
        "the number of training examples": str(len(train)),
        "the training examples (SHA-256)": digest_examples(train),
        "the number of held-out examples": str(len(held_out)),
        "the held-out examples (SHA-256)": digest_examples(held_out),
        "the adapter's modules (SHA-256)": _digest(adapter),
        "the LoRA settings": str(sorted((k, as_text(v)) for k, v in settings.items())),
        "the base model (SHA-256 of a sample)": _digest_base(model, stored),
        **arguments,
    }


# Arguments that may differ between ranks, because they concern one process only; and whether to go
# on, which `if_any` answers by each host's disk and the ranks agree on when training begins.
_OF_ONE_RANK = {
    "local_rank",
    "log_level",
    "log_level_replica",
    "disable_tqdm",
    "logging_dir",
    "resume_from_checkpoint",
}


def digest_examples(examples: Sequence[EncodedExample]) -> str:
    """Of the examples' tokens, and of the answers that are scored."""
    # Examples share their candidates: each set once.
    candidates = {id(example.candidate_ids): example.candidate_ids for example in examples}
    tokens = [(example.prompt_ids, example.target_ids) for example in examples]
    counted = [
        (place, example.example.weight, example.shares, example.given)
        for place, example in enumerate(examples)
        if example.shares or example.given or example.example.weight != 1
    ]
    return _digest([tokens, list(candidates.values()), *([counted] if counted else [])])


def _digest_base(model: PeftModel, stored: StoredBase | None) -> str:
    """Of the first values of every frozen parameter: a whole 7B would take a minute.

    The same whether they have been read or not.
    """
    if stored is not None:
        return _digest([*stored.first_values(8), *_quantization(model)])
    frozen = [parameter for parameter in model.parameters() if not parameter.requires_grad]
    return _digest([parameter.flatten()[:8].float().tolist() for parameter in frozen])


def _quantization(model: PeftModel) -> list[str]:
    config = getattr(base_model(model).config, "quantization_config", None)
    return [] if config is None else [str(config)]


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]


def as_text(value: object) -> str:
    """A setting as text; sets in order, since theirs differs between processes."""
    return str(sorted(value, key=str)) if isinstance(value, set) else str(value)
