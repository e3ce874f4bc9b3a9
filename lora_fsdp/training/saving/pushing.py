"""A finished run's folder on the Hub."""

from __future__ import annotations

import logging
from pathlib import Path

from huggingface_hub.errors import HfHubHTTPError
from transformers import TrainingArguments
from transformers.utils.hub import hf_api

logger = logging.getLogger(__name__)

# Checkpoints stay here; the Trainer pickles its arguments beside them while it pushes those.
# Texts of the data and paths of this machine stay here, too.
_NOT_PUSHED = [
    *("_*", ".*", "checkpoint-*", "*.bin", "*.pt"),
    *("*.csv", "data_health.json", "run_record.json", "report.*", "report_figures/*"),
    "lm_eval.yaml",  # asks about the rows in predictions.csv
]


def try_to_push(folder: Path, repository: str, arguments: TrainingArguments) -> str | None:
    """Upload adapter, tokenizer, card and scores as one commit.

    Args:
        folder: of the adapter, with its card.
        repository: owner/name; it exists.
        arguments: with token and revision.

    Returns:
        the commit's address; `None` if it could not be made, which is said and ends nothing: the
        run is saved by now.
    """
    try:
        commit = hf_api().upload_folder(
            repo_id=repository,
            folder_path=folder,
            commit_message="Model save",
            token=arguments.hub_token,
            revision=arguments.hub_revision,
            ignore_patterns=_NOT_PUSHED,
        )
    except (HfHubHTTPError, OSError, RuntimeError, ValueError) as error:
        # The client wraps what a server or the network said.
        cause = error.__cause__ or error
        reason = (str(cause).strip().splitlines() or [type(cause).__name__])[0]
        logger.error(
            "The run is saved in %s and was not pushed to %s (%s). Try again: hf upload %s %s",
            folder, repository, reason, repository, folder,
        )  # fmt: skip
        return None
    return str(commit.commit_url)
