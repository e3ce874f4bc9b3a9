"""The shipped accelerate YAMLs, in an installed package as well as in a checkout."""

from __future__ import annotations

from pathlib import Path

from lora_fsdp.errors import ArgumentError, did_you_mean
from lora_fsdp.recipes import shipped_folder


def config_folder() -> Path:
    """Where the shipped YAMLs are."""
    return shipped_folder() / "accelerate_configs"


def find_config(name: str) -> Path:
    """A YAML by its path, or a shipped one by its name (`fsdp2` or `fsdp2.yaml`).

    Raises:
        ArgumentError: there is neither; the message names those that are shipped.
    """
    if Path(name).is_file():
        return Path(name)
    shipped = {path.stem: path for path in sorted(config_folder().glob("*.yaml"))}
    stem = Path(name).name.removesuffix(".yaml")
    if stem in shipped and Path(name).parent.name in ("", "accelerate_configs"):
        return shipped[stem]
    raise ArgumentError(
        f"There is no accelerate YAML {name!r}.{did_you_mean(stem, shipped)} Give a file, or one "
        f"of those shipped: {', '.join(shipped)}."
    )


def suggested_config(gpus: int) -> str:
    """The name of the shipped YAML for a machine with so many GPUs."""
    return {0: "fsdp2_cpu", 1: "single"}.get(gpus, "fsdp2")
