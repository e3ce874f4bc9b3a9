"""With what a run was made: versions, devices, the command that started it."""

from __future__ import annotations

import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import psutil
import torch

from lora_fsdp.printing import is_secret_name, without_secrets

_PACKAGES = (
    "torch",
    "transformers",
    "accelerate",
    "peft",
    "trl",
    "datasets",
    "safetensors",
    "scikit-learn",
    "pandas",
)
_PACKAGE_FOLDER = Path(__file__).resolve().parents[1]


def environment() -> dict[str, object]:
    """Versions and devices of this process, JSON-ready."""
    # Here, because the package is still being imported when this module is.
    from lora_fsdp import __version__

    return {
        "lora_fsdp": __version__,
        "lora_fsdp_commit": source_commit(_PACKAGE_FOLDER),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in _PACKAGES},
        "cuda": torch.version.cuda,
        "devices": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
        or [f"CPU, {platform.machine()}, {psutil.cpu_count()} cores"],
    }


def source_commit(package: Path) -> str | None:
    """The git commit of the checkout that holds `package`, with "+changes" if files differ.

    `None` for an installed package, and where git is not installed.
    """
    # Only a checkout of this package: an environment may lie inside another project's checkout.
    if not (package.parent / ".git").exists():
        return None

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(package.parent), *arguments]
        return subprocess.run(
            command, capture_output=True, text=True, check=True, timeout=10
        ).stdout.strip()

    try:
        commit = git("rev-parse", "--short=12", "HEAD")
        changed = git("status", "--porcelain", "--untracked-files=no", "--", package.name)
    except (OSError, subprocess.SubprocessError):
        return None
    return f"{commit}+changes" if changed else commit


def launch_command() -> list[str] | None:
    """The command that started this run, launcher included; secrets in it are masked.

    `None` where there is none to repeat: a notebook, an interactive session, `python -c`.
    """
    script = sys.argv[0]
    if not Path(script).is_file():
        return None
    command = [sys.executable, *sys.argv]
    try:
        for parent in psutil.Process().parents():
            line = parent.cmdline()
            if script not in line:
                break
            command = line
    except psutil.Error:
        # A parent that ended, or is not ours to read: the launcher cannot be told.
        return _masked(command)
    return _masked(command)


def _masked(command: list[str]) -> list[str]:
    masked: list[str] = []
    hide_next = False
    for word in command:
        name, equals, value = word.partition("=")
        is_option = word.startswith("-") and is_secret_name(name)
        if hide_next and not (is_option or word.startswith("--")):
            masked.append("***")
        elif equals and word.startswith("-"):
            masked.append(f"{name}={'***' if is_option else without_secrets(value)}")
        else:
            masked.append(without_secrets(word))
        hide_next = is_option and not equals
    return masked


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
