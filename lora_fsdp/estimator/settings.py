"""Which options of `lora-fsdp train` are settings of the estimator, and why others are not."""

from __future__ import annotations

from dataclasses import fields

from lora_fsdp.arguments import DataArguments, FineTuningArguments, LoraArguments, ModelArguments
from lora_fsdp.errors import did_you_mean

_OF_THE_ROWS = (
    "class_weights", "max_length", "chat_template", "chat_template_kwargs", "thinking", "few_shot",
)  # fmt: skip
# `fit` learns from every row that it is given and leaves the adapter in the object.
_OF_A_FOLDER = (
    "output_dir", "overwrite_output_dir", "resume_from_checkpoint", "save_", "push_to_hub", "hub_",
)  # fmt: skip
_OF_HELD_OUT_ROWS = (
    "eval_", "do_", "load_best_model_at_end", "metric_for_best_model", "greater_is_better",
    "early_stopping_", "per_device_eval_", "probe_rows", "untrained_shots",
    "generate_examples", "batch_eval_metrics",
    "prediction_loss_only", "include_for_metrics",
)  # fmt: skip
_OF_SEVERAL = ("seeds", "folds", "grid", "samples", "adapters_at_once", "max_hours")


def _own_settings() -> dict[str, type]:
    """The class of arguments that each further setting belongs to."""
    refused = (*_OF_A_FOLDER, *_OF_HELD_OUT_ROWS)
    training = [
        one.name
        for one in fields(FineTuningArguments)
        if one.init and not one.name.startswith(refused) and one.name not in _OF_SEVERAL
    ]
    model = [one.name for one in fields(ModelArguments) if one.name != "model_name_or_path"]
    return {
        **dict.fromkeys(training, FineTuningArguments),
        **{one.name: LoraArguments for one in fields(LoraArguments)},
        **dict.fromkeys(model, ModelArguments),
        **dict.fromkeys(_OF_THE_ROWS, DataArguments),
    }


#: The class of arguments that each belongs to, by its name.
SETTINGS = _own_settings()


def refusal(name: str) -> str | None:
    """Why `name` is no setting of the estimator, or `None`."""
    if name in SETTINGS:
        return None
    if name.startswith(_OF_A_FOLDER):
        return f"{name}: fit keeps the adapter in the object; write it with save_adapter(folder)."
    if name.startswith(_OF_HELD_OUT_ROWS):
        return f"{name}: fit learns from every row it is given; hold rows out with scikit-learn."
    if name in _OF_SEVERAL:
        return f"{name}: fit trains one adapter to its end; use scikit-learn's model selection."
    hint = did_you_mean(name, SETTINGS)
    return f"LoraClassifier has no setting {name!r}.{hint}"
