"""What a model itself drops at random while it trains, beside its adapter."""

from __future__ import annotations

from transformers import PretrainedConfig

# Of heads, encoders and adapters that a causal language model does not run.
_ELSEWHERE = ("classifier", "summary", "encoder", "lsh", "adapter")


def dropout_settings(config: PretrainedConfig) -> dict[str, float]:
    """The model's dropout rates above 0, by the name of their setting.

    Args:
        config: the model's; settings of its text model count.
    """
    settings = config.get_text_config().to_dict()
    return {
        name: float(value)
        for name, value in settings.items()
        if "drop" in name
        and not name.startswith(_ELSEWHERE)
        and isinstance(value, int | float)
        and value > 0
    }
