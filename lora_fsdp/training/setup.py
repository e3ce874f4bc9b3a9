"""What a trainer settles before it starts: arguments checked, accumulation folded, switches set."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from peft import PeftModel
from transformers.modeling_layers import GradientCheckpointingLayer

from lora_fsdp.adapter.attach import has_dropout, trainable_parameters
from lora_fsdp.arguments import FineTuningArguments
from lora_fsdp.arguments.fsdp import FsdpSettings
from lora_fsdp.base.layers import base_model
from lora_fsdp.base.streaming import StoredBase
from lora_fsdp.compute.packed_model import PackedModel
from lora_fsdp.data.encoding import EncodedExample
from lora_fsdp.data.workload import Work, measure_work
from lora_fsdp.distributed.launch import launch_fingerprint
from lora_fsdp.errors import ArgumentError
from lora_fsdp.evaluation.batched_generation import LEAST_NEW_TOKENS
from lora_fsdp.training.step.objectives.objective import Objective


def check_arguments(
    args: FineTuningArguments, settings: FsdpSettings | None, *, max_length: int
) -> None:
    """Refuse settings that contradict each other.

    Raises:
        ArgumentError: names the keys and what to do.
    """
    check_checkpointing(args, settings)
    check_sequence_length(args, max_length=max_length)


def check_checkpointing(args: FineTuningArguments, settings: FsdpSettings | None) -> None:
    """Refuse to recompute activations twice.

    Raises:
        ArgumentError: names both keys.
    """
    if args.gradient_checkpointing and settings is not None and settings.activation_checkpointing:
        raise ArgumentError(
            "Both --gradient_checkpointing and the YAML's fsdp_activation_checkpointing are set, "
            "which would recompute everything twice: keep one."
        )


def check_sequence_length(args: FineTuningArguments, *, max_length: int) -> None:
    """Refuse rows too short for an example.

    Raises:
        ArgumentError: names both lengths.
    """
    if args.max_tokens_per_row is not None and args.max_tokens_per_row < max_length:
        raise ArgumentError(
            f"--max_tokens_per_row {args.max_tokens_per_row} is less than --max_length "
            f"{max_length}: a row must hold the longest example."
        )


def check_targets(examples: Sequence[EncodedExample]) -> None:
    """Refuse training examples without an answer."""
    for example in examples:
        if not example.target_ids:
            raise ArgumentError(f"Row {example.row} has no target: it cannot be trained on.")


def check_reference(objective: Objective, model: PeftModel) -> None:
    """Refuse an objective that asks the frozen base where the adapter's start has changed that.

    Raises:
        ArgumentError: names the setting.
    """
    start = model.peft_config[str(model.active_adapter)].init_lora_weights  # type: ignore[attr-defined]
    if objective.needs_reference and start not in _STARTS_BESIDE_THE_BASE:
        raise ArgumentError(
            f"{type(objective).__name__} compares with the base, which init_lora_weights {start!r} "
            "changes when the adapter is attached: leave it out of lora_kwargs."
        )


# Of an adapter that adds nothing at first; others (PiSSA, OLoRA) take their start out of the base.
_STARTS_BESIDE_THE_BASE = (True, False, "gaussian", "eva", "orthogonal")


def work_of_run(
    args: FineTuningArguments,
    train: Sequence[EncodedExample],
    held_out: Sequence[EncodedExample],
    *,
    share_prefix: bool,
    objective: Objective,
) -> Work | None:
    """What training will compute on each rank; `None` if there is nothing to train on."""
    if not train:
        return None
    per_rank = args.per_device_train_batch_size * args.gradient_accumulation_steps
    epochs = args.num_train_epochs
    if args.max_steps > 0:
        epochs = args.max_steps * per_rank * args.world_size / len(train)
    return measure_work(
        train,
        held_out,
        examples_per_rank=per_rank,
        epochs=epochs,
        share_prefix=share_prefix,
        max_tokens_per_row=args.max_tokens_per_row,
        ranks=args.world_size,
        seed=args.seed if args.data_seed is None else args.data_seed,
        tree_of=objective.tree,
    )


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
        return not has_dropout(model)
    return args.share_prefix == "always"


def enable_checkpointing(
    packed: PackedModel, args: FineTuningArguments, settings: FsdpSettings | None
) -> None:
    """Recompute activations layer by layer, as the YAML asks for or memory.

    By transformers' own switch and not by wrapper modules, which would rename the adapter's
    parameters; `--gradient_checkpointing` is switched on by the Trainer itself. Offloaded, what a
    layer's recomputing starts from (its input) waits in host memory from forward to backward.
    """
    base = packed.base
    # transformers < 5.20 knows the switch by its old name only.
    enable = getattr(base, "activation_checkpointing_enable", base.gradient_checkpointing_enable)
    kwargs: dict[str, Any] = dict(args.gradient_checkpointing_kwargs or {})  # type: ignore[arg-type]
    # As the Trainer does: these are the switch's own, the others are torch's.
    own = {name: kwargs.pop(name) for name in ("every_n_layers", "offload") if name in kwargs}
    with packed.patches.recording(base.modules(), why="activations are recomputed in backward"):
        enable(kwargs or None, **own)
    if settings is None or not settings.activation_offload:
        return
    # transformers' own way to offload pins memory on CPUs too, which fails there.
    for module in base.modules():
        if isinstance(module, GradientCheckpointingLayer):
            checkpoint = partial(
                _keeping_input_on_host,
                module._gradient_checkpointing_func,  # type: ignore[arg-type]
                device=args.device,
            )
            packed.patches.set(
                module,
                "_gradient_checkpointing_func",
                checkpoint,
                why="what activations are recomputed from waits in host memory",
            )


def recompute_without_random_state(args: FineTuningArguments) -> None:
    """For recomputing in a CUDA graph: it cannot read the state, and holds nothing that draws."""
    kwargs = {"use_reentrant": False, "preserve_rng_state": False}
    args.gradient_checkpointing_kwargs = kwargs
    if hasattr(args, "activation_checkpointing_kwargs"):  # its name since transformers 5.20
        args.activation_checkpointing_kwargs = kwargs


def _keeping_input_on_host(
    checkpoint: Callable[..., Any], function: Callable[..., Any], *inputs: Any, device: torch.device
) -> Any:
    with torch.autograd.graph.save_on_cpu(pin_memory=device.type == "cuda"):
        return checkpoint(function, *inputs)


def longest_answer(args: FineTuningArguments, examples: Sequence[EncodedExample]) -> int:
    """How many tokens a written answer may have: what was asked for, or the longest to be learnt.

    Args:
        args: the run's.
        examples: to train on.
    """
    if args.max_new_tokens is not None:
        return args.max_new_tokens
    longest = max((len(example.target_ids) for example in examples), default=0)
    return max(LEAST_NEW_TOKENS, longest)


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
        "the training examples (SHA-256)": _digest_examples(train),
        "the number of held-out examples": str(len(held_out)),
        "the held-out examples (SHA-256)": _digest_examples(held_out),
        "the adapter's modules (SHA-256)": _digest(adapter),
        "the LoRA settings": str(sorted((k, _ordered(v)) for k, v in settings.items())),
        "the base model (SHA-256 of a sample)": _digest_base(model, stored),
        **arguments,
    }


# Arguments that may differ between ranks, because they concern one process only.
_OF_ONE_RANK = {"local_rank", "log_level", "log_level_replica", "disable_tqdm", "logging_dir"}


def _digest_examples(examples: Sequence[EncodedExample]) -> str:
    # Examples share their candidates: each set once.
    candidates = {id(example.candidate_ids): example.candidate_ids for example in examples}
    tokens = [(example.prompt_ids, example.target_ids) for example in examples]
    return _digest([tokens, list(candidates.values())])


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


def _ordered(value: object) -> str:
    """As text; sets in order, since theirs differs between processes."""
    return str(sorted(value, key=str)) if isinstance(value, set) else str(value)
