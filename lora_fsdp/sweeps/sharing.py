"""Which adapters share a pass over the base, which are trained one after the other, and why."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

from peft import LoraConfig
from transformers import PretrainedConfig

from lora_fsdp.arguments import FineTuningArguments
from lora_fsdp.base.dropout import dropout_settings
from lora_fsdp.compute.shared_pass import why_apart

#: Arguments that a shared pass honours, or that say nothing about how an adapter is trained. Any
#: other that is not as it is by default has its adapter trained by itself, which honours it.
_HONOURED = frozenset(
    {
        "output_dir", "overwrite_output_dir", "do_train", "do_eval", "do_predict",
        "per_device_train_batch_size", "gradient_accumulation_steps", "learning_rate",
        "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm",
        "num_train_epochs", "max_steps", "lr_scheduler_type", "lr_scheduler_kwargs",
        "warmup_steps", "warmup_ratio", "logging_steps", "save_strategy", "save_steps",
        "save_total_limit", "seed", "data_seed", "optim", "optim_args", "share_prefix",
        "max_tokens_per_row", "resident_layers", "stall_seconds", "drift_check_steps", "use_cpu",
        "disable_tqdm", "run_name", "local_rank", "max_new_tokens", "temperature",
        "resume_from_checkpoint", "step", "allow_fsdp_on_one_process", "logging_dir",
        "log_level", "log_level_replica", "log_on_each_node", "seeds", "folds", "grid", "search",
        "trials", "adapters_at_once", "probe_rows", "accelerator_config",
        "per_device_eval_batch_size",
    }
)  # fmt: skip
# On a CPU. Measured: a pass of 3 adapters of a 135M, 4 tweets each, took 0.88 of their turns' time
# (benchmarks/results/cpu-adapters-135m.json).
_AT_ONCE = 8
_OPTIMIZERS = ("adamw_torch", "adamw_torch_fused", "sgd")


@dataclass(frozen=True)
class Groups:
    """How the adapters of a run are trained.

    Attributes:
        together: names of those that share a pass, a list for each pass.
        apart: the others by name, and why each is trained by itself.
    """

    together: list[list[str]]
    apart: Mapping[str, str]

    def __str__(self) -> str:
        """A line for each group and for each reason, as it is said before a run."""
        lines = [
            f"  {len(names)} adapters at once over one pass of the base: {', '.join(names)}"
            for names in self.together
        ]
        for reason in dict.fromkeys(self.apart.values()):
            names = [name for name, why in self.apart.items() if why == reason]
            lines.append(f"  one after the other: {', '.join(names)} ({reason})")
        return "\n".join(lines)


def group(
    members: Mapping[str, tuple[FineTuningArguments, LoraConfig]],
    *,
    base: PretrainedConfig,
    at_once: int | None,
    on_gpu: bool = False,
    why_all_apart: str | None = None,
) -> Groups:
    """Divide adapters into those that share a pass and the others.

    Args:
        members: arguments and settings of each adapter, by its name.
        base: the base's config.
        at_once: the most that share one pass; `None` = what is faster.
        on_gpu: whether they are trained on GPUs.
        why_all_apart: why none can share a pass, if something else says so.
    """
    for_all = why_all_apart or why_base_apart(base)
    if at_once == 1:
        for_all = "--adapters_at_once 1"
    elif at_once is None and on_gpu:
        # Measured: a captured pass of 8 took 1.2 (7B) to 4 times (135M) less time than their turns
        # (benchmarks/results/h200-adapters.json). How many the memory holds is not known here.
        for_all = for_all or (
            "a pass of several takes their memory together: --adapters_at_once 8 asks for it, and "
            "on a GPU it is faster"
        )
    at_once = at_once or _AT_ONCE
    apart: dict[str, str] = {}
    for name, (arguments, config) in members.items():
        reason = for_all or why_arguments_apart(arguments) or why_apart(config)
        if reason is not None:
            apart[name] = reason
    sharing = [name for name in members if name not in apart]
    if len(sharing) == 1:
        apart[sharing.pop()] = "no other shares a pass with it"
    # Groups of about one size: a last one of one adapter would share nothing.
    count = -(-len(sharing) // at_once)
    size = -(-len(sharing) // count) if count else 0
    return Groups([sharing[i : i + size] for i in range(0, len(sharing), size or 1)], apart)


def why_base_apart(config: PretrainedConfig) -> str | None:
    """Why adapters of this base cannot share a pass; `None` if they can."""
    if str(config._attn_implementation) != "sdpa":
        return f"the base runs {config._attn_implementation} attention"
    dropped = dropout_settings(config)
    if dropped or bool(getattr(config.get_text_config(), "attention_dropout", None)):
        return "the base itself drops values while it trains"
    return None


def why_arguments_apart(arguments: FineTuningArguments) -> str | None:
    """Why an adapter with these arguments is trained by itself; `None` if it can share a pass."""
    reference = FineTuningArguments(output_dir=str(arguments.output_dir))
    for one in fields(arguments):
        if one.name not in _HONOURED and one.init:
            value = getattr(arguments, one.name)
            if value != getattr(reference, one.name):
                return f"--{one.name} {_value(value)}"
    if arguments.step not in ("auto", "eager"):
        return f"--step {arguments.step}"
    if arguments.mixed_precision != "no":
        return f"mixed precision {arguments.mixed_precision}"
    if _value(arguments.optim) not in _OPTIMIZERS:
        return f"--optim {_value(arguments.optim)}"
    if _value(arguments.lr_scheduler_type) == "reduce_lr_on_plateau":
        return "--lr_scheduler_type reduce_lr_on_plateau"
    if _value(arguments.save_strategy) == "best":
        return "--save_strategy best"
    fractions: Sequence[str] = ("logging_steps", "save_steps")
    for name in fractions:
        if 0 < getattr(arguments, name) < 1:
            return f"--{name} as a share"
    return None


def _value(value: object) -> str:
    """An enum's value as it stands on the command line."""
    return str(getattr(value, "value", value))
