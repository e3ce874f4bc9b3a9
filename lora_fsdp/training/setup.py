"""What a trainer settles before it starts: arguments checked, accumulation folded, switches set."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Mapping, Sequence

from peft import PeftModel

from lora_fsdp.arguments import FineTuningArguments
from lora_fsdp.data.encoding import EncodedExample
from lora_fsdp.distributed.launch import FsdpSettings, launch_fingerprint
from lora_fsdp.errors import ArgumentError
from lora_fsdp.modeling.adapters import base_model


def check_arguments(
    args: FineTuningArguments, settings: FsdpSettings | None, *, max_length: int
) -> None:
    """Refuse settings that contradict each other.

    Raises:
        ArgumentError: names the keys and what to do.
    """
    if args.gradient_checkpointing and settings is not None and settings.activation_checkpointing:
        raise ArgumentError(
            "Both --gradient_checkpointing and the YAML's fsdp_activation_checkpointing are set, "
            "which would recompute everything twice: keep one."
        )
    if args.max_tokens_per_row < max_length:
        raise ArgumentError(
            f"--max_tokens_per_row {args.max_tokens_per_row} is less than --max_length "
            f"{max_length}: a row must hold the longest example."
        )


def check_targets(examples: Sequence[EncodedExample]) -> None:
    """Refuse training examples without an answer."""
    for example in examples:
        if not example.target_ids:
            raise ArgumentError(f"Row {example.row} has no target: it cannot be trained on.")


def fold_accumulation(args: FineTuningArguments) -> FineTuningArguments:
    """A copy with accumulation folded into the batch, which packed rows make needless."""
    folded = copy.copy(args)
    folded.per_device_train_batch_size *= args.gradient_accumulation_steps
    folded.gradient_accumulation_steps = 1
    folded._n_gpu = min(args.n_gpu, 1)  # several GPUs are used by several processes
    return folded


def shares_prefix(args: FineTuningArguments, model: PeftModel) -> bool:
    """Whether training rows compute their prompts' common prefix once."""
    if args.share_prefix == "auto":
        config = model.peft_config[str(model.active_adapter)]
        return getattr(config, "lora_dropout", 0.0) == 0.0
    return args.share_prefix == "always"


def enable_checkpointing(model: PeftModel, settings: FsdpSettings | None) -> None:
    """Recompute activations layer by layer if the YAML asks for it.

    By transformers' own switch and not by wrapper modules, which would rename the adapter's
    parameters; `--gradient_checkpointing` is switched on by the Trainer itself.
    """
    if settings is None or not settings.activation_checkpointing:
        return
    base = base_model(model)
    # transformers < 5.20 knows the switch by its old name only.
    enable = getattr(base, "activation_checkpointing_enable", base.gradient_checkpointing_enable)
    enable()


def run_fingerprints(
    args: FineTuningArguments, examples: Sequence[EncodedExample]
) -> Mapping[str, str]:
    """What must be the same on every rank, by name."""
    tokens = [(example.prompt_ids, example.target_ids) for example in examples]
    digest = hashlib.sha256(json.dumps(tokens).encode()).hexdigest()
    return {
        "the accelerate YAML's FSDP settings": launch_fingerprint(),
        "the number of training examples": str(len(examples)),
        "the training examples (SHA-256)": digest[:16],
        "--seed and --data_seed": f"{args.seed} {args.data_seed}",
        "the examples of a step": str(
            args.per_device_train_batch_size * args.gradient_accumulation_steps
        ),
        "--max_tokens_per_row": str(args.max_tokens_per_row),
        "--share_prefix": args.share_prefix,
    }
