"""A model that is planned for: a folder, a name on the Hub, or a size; its config, no weights."""

from __future__ import annotations

import re
from pathlib import Path

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from transformers import AutoConfig, LlamaConfig, PretrainedConfig

from lora_fsdp.base.folders import read_json_object
from lora_fsdp.base.loading import LOADING_ERRORS
from lora_fsdp.errors import ModelNotFoundError, UnsupportedModelError

_NEEDED = ("hidden_size", "num_hidden_layers", "vocab_size")
_SIZE = re.compile(r"(\d+(?:\.\d+)?)B", re.IGNORECASE)
# Widths of Llama-70B, from which others of the same shape are scaled.
_LLAMA = {
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
}


def planned_config(
    name: str, *, revision: str = "main", trust_remote_code: bool = False
) -> PretrainedConfig:
    """The config of a model folder, of a Hub name, or of a dense model of a size such as `70B`.

    Raises:
        ModelNotFoundError: there is no such model.
        UnsupportedModelError: its config lacks what the model's size depends on.
    """
    if match := _SIZE.fullmatch(name.strip()):
        return dense_config(float(match[1]) * 1e9)
    folder = Path(name).expanduser()
    if not folder.is_dir():
        folder = _downloaded(name, revision)
    if not (folder / "config.json").is_file():
        raise ModelNotFoundError(f"The folder {folder} holds no model (config.json is missing).")
    written = read_json_object(folder, "config.json")
    try:
        config = AutoConfig.from_pretrained(str(folder), trust_remote_code=trust_remote_code)
    except (OSError, *LOADING_ERRORS) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UnsupportedModelError(f"{folder / 'config.json'} cannot be read: {reason}") from error
    _refuse_defaults(written, config, folder / "config.json")
    return config


def dense_config(parameters: float) -> LlamaConfig:
    """A dense model of Llama-70B's shape, made larger or smaller to about so many parameters."""
    scale = (parameters / 70e9) ** (1 / 3)
    heads = max(8, round(_LLAMA["num_attention_heads"] * scale / 8) * 8)
    hidden = heads * 128
    inner = round(hidden * 3.5)
    of_layer = hidden * (2 * hidden + 2 * 1024 + 3 * inner)
    embeddings = 2 * _LLAMA["vocab_size"] * hidden
    return LlamaConfig(
        **{
            **_LLAMA,
            "hidden_size": hidden,
            "intermediate_size": inner,
            "num_attention_heads": heads,
            "num_hidden_layers": max(1, round((parameters - embeddings) / of_layer)),
        }
    )


def _downloaded(name: str, revision: str) -> Path:
    """The folder of a Hub model's config.json alone."""
    try:
        return Path(hf_hub_download(name, "config.json", revision=revision)).parent
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise ModelNotFoundError(
            f"There is no model folder {Path(name).absolute()}, the Hub gives no model {name!r} "
            f"({str(error).splitlines()[0]}), and it is no size such as 70B."
        ) from error


def _refuse_defaults(written: dict[str, object], config: PretrainedConfig, file: Path) -> None:
    """transformers fills what a config lacks with its own defaults: another model's sizes."""
    nested = written.get("text_config")
    stored = {**written, **(nested if isinstance(nested, dict) else {})}
    names = config.get_text_config().attribute_map
    missing = [key for key in _NEEDED if key not in stored and names.get(key) not in stored]
    if missing:
        raise UnsupportedModelError(
            f"{file} lacks {', '.join(missing)}: the model's size cannot be known from it."
        )
