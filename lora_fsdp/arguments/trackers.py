"""The trackers that `--report_to` names: known to transformers, and installed."""

from __future__ import annotations

from collections.abc import Sequence

from lora_fsdp.errors import ArgumentError, MissingPackageError, did_you_mean

# Those that we have seen our figures in; each package is called as its tracker is.
PACKAGES = ("tensorboard", "trackio", "wandb", "mlflow")


def check_trackers(names: Sequence[str]) -> None:
    """Refuse a tracker that would only fail when the base has been loaded.

    Raises:
        ArgumentError: there is no such tracker; the message suggests the nearest.
        MissingPackageError: its package is not installed.
    """
    if not names:
        return
    # Slow to import, and wanted by few runs.
    from transformers.integrations.integration_utils import (
        INTEGRATION_TO_CALLBACK,
        get_available_reporting_integrations,
    )

    for name in names:
        if name not in INTEGRATION_TO_CALLBACK:
            raise ArgumentError(
                f"--report_to {name}: there is no such tracker."
                f"{did_you_mean(name, INTEGRATION_TO_CALLBACK)} Known: "
                f"{', '.join(INTEGRATION_TO_CALLBACK)}."
            )
        if name in PACKAGES and name not in get_available_reporting_integrations():
            raise MissingPackageError(
                f"--report_to {name} needs a package that is not installed: pip install {name}, or "
                "remove the option; log_history.jsonl holds the same figures without a tracker."
            )
