"""`README.md` in an adapter's folder: what it is, what it was measured by, how to ask it."""

from __future__ import annotations

import hashlib
import logging
import re
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from lora_fsdp.adapter.folder import CONFIG_FILE
from lora_fsdp.base.folders import read_json_object
from lora_fsdp.evaluation.outputs import write_text
from lora_fsdp.reporting.card_contents import card_contents, card_header, data_name
from lora_fsdp.reporting.rendering import template_of
from lora_fsdp.reporting.run_files import RECORD_FILE, RunFiles, read_run

logger = logging.getLogger(__name__)

CARD_FILE = "README.md"
# The last line of a card: without it, or after a change, the file is the user's own.
_SIGNATURE = re.compile(r"<!-- lora-fsdp wrote this card; sha256 ([0-9a-f]{64}) -->\n\Z")


def write_model_card(
    folder: str | Path, *, run_folder: str | Path | None = None, measured: bool = True
) -> Path | None:
    """Write the card of the adapter in `folder`.

    A `README.md` that this library did not write, or that was changed since, is left as it is.

    Args:
        folder: the adapter's.
        run_folder: of the run, where `folder` is one of its checkpoints.
        measured: whether the metrics in the run's folder are this adapter's.

    Returns:
        the card's path; `None` where the user's own file was kept.

    Raises:
        RunNotFoundError: the folder holds nothing of a run.
        DamagedRunError: a file of the run is damaged; the message names it.
        AdapterVerificationError: it holds no adapter, or a damaged one.
    """
    path = Path(folder)
    card = path / CARD_FILE
    if not _may_write(card):
        logger.info("%s is not a card of this library, or was changed: it is kept.", card)
        return None
    run = read_run(path if run_folder is None else run_folder)
    number = path.name.rpartition("-")[2]
    step = int(number) if run_folder is not None and number.isdigit() else None
    adapter = read_json_object(path, CONFIG_FILE)
    text = run.part(
        RECORD_FILE, lambda run: _card_text(run, adapter=adapter, step=step, measured=measured)
    )
    write_text(card, f"{text}<!-- lora-fsdp wrote this card; sha256 {_digest(text)} -->\n")
    return card


def _card_text(run: RunFiles, *, adapter: dict[str, Any], step: int | None, measured: bool) -> str:
    contents = card_contents(run, adapter=adapter, step=step, with_scores=measured)
    snippet = "labels" if contents["answers"] or contents["choices"] else "text"
    if contents["reading"]:
        snippet = "kind"
    contents["snippet"] = template_of(f"snippet_{snippet}.py.jinja").render(**contents)
    body = template_of("model_card.md.jinja").render(**contents)
    return f"---\n{card_header(contents, data_name=data_name(run))}\n---\n\n{body}\n"


def remove_model_card(folder: str | Path) -> None:
    """Remove the card in `folder`, if this library wrote it and nobody changed it."""
    card = Path(folder) / CARD_FILE
    if card.exists() and _may_write(card):
        card.unlink()


class WriteCards(TrainerCallback):
    """Rank 0 writes a card into every checkpoint of the run in `run_folder`."""

    def __init__(self, run_folder: str | Path) -> None:
        self.run_folder = Path(run_folder)

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """The checkpoint stands: describe it."""
        checkpoint = self.run_folder / f"checkpoint-{state.global_step}"
        if state.is_world_process_zero and checkpoint.is_dir():
            try_to_write_card(checkpoint, run_folder=self.run_folder, measured=False)


def try_to_write_card(
    folder: Path, *, run_folder: Path | None = None, measured: bool = True
) -> None:
    """As `write_model_card`; what goes wrong is said and ends nothing: the adapter is saved."""
    try:
        write_model_card(folder, run_folder=run_folder, measured=measured)
    except Exception as error:  # whatever it is, it must not turn a saved run into a failed one
        logger.error(
            "The model card of %s could not be written (%s: %s).",
            folder,
            type(error).__name__,
            error,
        )


def _may_write(card: Path) -> bool:
    """Whether there is no file, or one that is as this library wrote it."""
    if card.is_symlink() or (card.exists() and not card.is_file()):
        return False
    try:
        text = card.read_bytes().decode("utf-8")
    except FileNotFoundError:
        return True
    except (OSError, ValueError):
        return False
    signature = _SIGNATURE.search(text)
    return signature is not None and signature[1] == _digest(text[: signature.start()])


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8")).hexdigest()
