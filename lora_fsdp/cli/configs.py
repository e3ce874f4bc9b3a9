"""The shipped accelerate YAMLs, in an installed package as well as in a checkout."""

from __future__ import annotations

import difflib
from pathlib import Path

from lora_fsdp.errors import ArgumentError


def config_folder() -> Path:
    """Where the shipped YAMLs are: `setup.py` puts them into the package when it is built."""
    package = Path(__file__).resolve().parents[1]
    installed = package / "accelerate_configs"
    return installed if installed.is_dir() else package.parent / "accelerate_configs"


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
    nearest = difflib.get_close_matches(stem, shipped, n=1)
    hint = f" Did you mean {nearest[0]!r}?" if nearest else ""
    raise ArgumentError(
        f"There is no accelerate YAML {name!r}.{hint} Give a file, or one of those shipped: "
        f"{', '.join(shipped)}."
    )


def suggested_config(gpus: int) -> str:
    """The name of the shipped YAML for a machine with so many GPUs."""
    return {0: "fsdp2_cpu", 1: "single"}.get(gpus, "fsdp2")
