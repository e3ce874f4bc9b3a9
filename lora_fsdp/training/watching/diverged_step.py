"""What is kept of a step that was not finite, and the error that stops the run."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from lora_fsdp.adapter.saved import save_adapter
from lora_fsdp.data.encoding import EncodedExample
from lora_fsdp.errors import LoraFsdpError, NonFiniteError
from lora_fsdp.ranks import on_first_rank
from lora_fsdp.training.saving.atomic_folders import atomic_folder
from lora_fsdp.training.watching.finiteness import BadStep

BATCH_FILE = "batch.json"
_ROWS_NAMED = 20


def diverged(
    bad: BadStep,
    *,
    shares: Sequence[Sequence[EncodedExample]],
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    run_folder: Path,
    adapter_held: bool,
) -> NonFiniteError:
    """Save the step's batch and adapter in `diverged-step-N/`, and give the error: a collective
    call.

    Args:
        bad: the step.
        shares: each rank's examples of it.
        model: with the adapter as it is now.
        tokenizer, run_folder: of the run.
        adapter_held: whether the adapter is still as it was before the step.
    """
    folder = run_folder / f"diverged-step-{bad.step}"

    def save() -> None:
        with atomic_folder(folder, {"step": bad.step}) as partial:
            batch = _batch(bad, shares, tokenizer, adapter_held=adapter_held)
            (partial / BATCH_FILE).write_text(json.dumps(batch, indent=1), encoding="utf-8")
            save_adapter(model, partial / "adapter")

    try:
        on_first_rank(save)
        kept = f"The batch and the adapter {'before' if adapter_held else 'after'} it: {folder}"
    except LoraFsdpError as error:  # the step is what the message is about
        kept = f"Its batch could not be saved ({error})"
    return NonFiniteError(
        f"Step {bad.step}: {_what(bad)} not finite (NaN or infinity), on {_rows(bad, shares)}. "
        f"{kept}. No checkpoint was written since. Look at these rows, or lower --learning_rate, "
        "then continue with --resume_from_checkpoint true."
    )


def _batch(
    bad: BadStep,
    shares: Sequence[Sequence[EncodedExample]],
    tokenizer: PreTrainedTokenizerBase,
    *,
    adapter_held: bool,
) -> dict[str, object]:
    return {
        "step": bad.step,
        "adapter_is_the_one_before_the_step": adapter_held,
        "ranks": [
            {
                "rank": rank,
                "loss_is_finite": rank not in bad.losses,
                "gradient_is_finite": rank not in bad.gradients,
                "examples": [
                    {
                        "row": int(example.row),
                        "prompt": tokenizer.decode(example.prompt_ids),
                        "target": tokenizer.decode(example.target_ids),
                        "prompt_ids": list(example.prompt_ids),
                        "target_ids": list(example.target_ids),
                    }
                    for example in share
                ],
            }
            for rank, share in enumerate(shares)
        ],
    }


def _what(bad: BadStep) -> str:
    if not bad.ranks:
        return "every rank's gradient is finite, but their sum is"
    named = "rank " if len(bad.ranks) == 1 else "ranks "
    which = "loss" if bad.losses else "gradient"
    return f"the {which} of {named}{', '.join(map(str, bad.ranks))} is"


def _rows(bad: BadStep, shares: Sequence[Sequence[EncodedExample]]) -> str:
    ranks = bad.ranks or range(len(shares))
    rows = [str(example.row) for rank in ranks for example in shares[rank]]
    more = f" and {len(rows) - _ROWS_NAMED} more" if len(rows) > _ROWS_NAMED else ""
    return f"rows {', '.join(rows[:_ROWS_NAMED])}{more}"
