"""The recorded runs: toy trainings, each by another way through the library.

Only names that outlive a move of code are imported: the package's own, its dependencies' and the
tests' support. The one exception is marked where it is made.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from peft import LoraConfig
from safetensors.torch import load_file
from transformers import TrainerCallback

from lora_fsdp import FineTuningArguments, LoraTrainer, ModelArguments, Task, get_task
from tests.support.adapters import save_base
from tests.support.ranks import launch_environment, run_ranks
from tests.support.tiny import ToyTask, tiny_model, tiny_tokenizer, toy_table

EXAMPLES_PER_STEP = 8
FSDP = launch_environment("fsdp2_cpu.yaml")
FULL_SHARD = FSDP | {"FSDP_RESHARD_AFTER_FORWARD": "true"}
# Of an evaluation, what is measured of the clock and not of the model.
OF_THE_CLOCK = ("runtime", "per_second", "preparation_time")


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What a run trains.

    Attributes:
        kind: architecture, see `tiny_model`.
        dtype: of the base.
        dropout: of the adapter.
        task: makes the task.
        train: training rows.
        held_out: held-out rows.
        max_length: longest example in tokens.
        stored: the base is read from its files, by each rank its shard, instead of given loaded.
        in_4bit: the base is kept in 4 bits; implies `stored`.
        arguments: of `FineTuningArguments`, where they differ from `build_trainer`'s.
    """

    kind: str = "llama"
    dtype: str = "float32"
    dropout: float = 0.0
    task: Callable[[], Task] = ToyTask
    train: pd.DataFrame = field(default_factory=lambda: toy_table(24))
    held_out: pd.DataFrame = field(default_factory=lambda: toy_table(13, seed=9))
    max_length: int = 128
    stored: bool = False
    in_4bit: bool = False
    arguments: Mapping[str, Any] = field(default_factory=dict)


class StopAfter(TrainerCallback):
    """Ends the training after an optimizer step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step >= self.step


# ---- on a rank ----------------------------------------------------------------------------------


def load_stored(folder: Path, setup: Setup) -> Any:
    """The base in `folder`, to be read where it stays."""
    # The one internal module: the package offers no name of its own for this.
    from lora_fsdp.base.streaming import open_base

    named = ModelArguments(str(folder), dtype=setup.dtype, load_in_4bit=setup.in_4bit)
    return open_base(named, device=torch.device("cpu"))


def build_trainer(folder: Path, setup: Setup, callbacks: list[TrainerCallback]) -> LoraTrainer:
    """A trainer of `setup` that writes to `folder`; its base, where stored, lies beside that."""
    settings: dict[str, Any] = {
        "per_device_train_batch_size": EXAMPLES_PER_STEP // int(os.environ.get("WORLD_SIZE", "1")),
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "num_train_epochs": 2,
        "logging_steps": 1,
        "eval_strategy": "steps",
        "eval_steps": 3,
        "save_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": 3,
    }
    task = setup.task().bind(setup.train)
    if setup.stored or setup.in_4bit:
        model = load_stored(folder.parent / "base", setup)
    else:
        model = tiny_model(setup.kind, dtype=getattr(torch, setup.dtype))
    torch.manual_seed(5)
    return LoraTrainer(
        model=model,
        args=FineTuningArguments(output_dir=str(folder), **{**settings, **setup.arguments}),
        task=task,
        processing_class=tiny_tokenizer(),
        train_dataset=task.examples(setup.train),
        eval_dataset=task.examples(setup.held_out),
        peft_config=LoraConfig(
            r=4,
            target_modules="all-linear",
            lora_dropout=setup.dropout,
            fan_in_fan_out=setup.kind == "gpt2",
            task_type="CAUSAL_LM",
        ),
        max_length=setup.max_length,
        callbacks=callbacks,
    )


def train(
    folder: Path, setup: Setup, stop_after: int | None = None, checkpoint: str | None = None
) -> dict[str, Any]:
    """Train and save; what the log holds, and what the trained model says of held-out rows."""
    silence()
    callbacks = [] if stop_after is None else [StopAfter(stop_after)]
    trainer = build_trainer(folder, setup, callbacks)
    trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_model(str(folder / "final"))
    examples = trainer.task.examples(setup.held_out)
    found: dict[str, Any] = {"steps": [], "evaluations": []}
    for entry in trainer.state.log_history:
        if "loss" in entry:
            names = ("step", "epoch", "loss", "grad_norm", "learning_rate")
            found["steps"].append({name: entry[name] for name in names})
        if "eval_loss" in entry:
            found["evaluations"].append(
                {
                    name: value
                    for name, value in entry.items()
                    if not any(word in name for word in OF_THE_CLOCK)
                }
            )
    # A float32 is exact as a float64, and a float64 as JSON.
    found["log_likelihoods"] = trainer.score(examples).log_likelihoods.tolist()
    if trainer.task.is_free_text:
        found["written"] = trainer.write(examples)
    trained = {name: p for name, p in trainer.model.named_parameters() if p.requires_grad}
    found["trained"] = digest(trained)
    return found


def silence() -> None:
    """No line a step from this process, among which those of a comparison would be lost."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.close(nowhere)


def digest(tensors: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 of names, types, shapes and every bit."""
    hashed = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        values = tensor.detach().cpu().contiguous()
        hashed.update(f"{name} {values.dtype} {tuple(values.shape)}\n".encode())
        hashed.update(values.view(torch.uint8).numpy().tobytes())
    return hashed.hexdigest()


# ---- in the process that asks -------------------------------------------------------------------


def run(
    folder: Path,
    setup: Setup,
    *,
    ranks: int = 1,
    environment: Mapping[str, str] | None = None,
    **others: Any,
) -> dict[str, Any]:
    """`train` on new processes, each with nothing left of an earlier run."""
    folder.mkdir(parents=True)
    if setup.stored or setup.in_4bit:
        save_base(folder.parent / "base", setup.kind, dtype=getattr(torch, setup.dtype))
    results = run_ranks(
        partial(train, **others),
        folder,
        setup,
        world_size=ranks,
        environment=environment,
    )
    found = results[0]
    # Compared among the ranks only: it has the names within the model, which no file shows.
    trained = [result.pop("trained") for result in results]
    found["ranks_agree"] = all(
        result == found and own == trained[0] for result, own in zip(results, trained, strict=True)
    )
    found["adapter"] = digest(load_file(folder / "final" / "adapter_model.safetensors"))
    return found


def complete(folder: Path, setup: Setup, **launch: Any) -> dict[str, Any]:
    """From the first step to the last."""
    return run(folder / "run", setup, **launch)


def resumed(folder: Path, setup: Setup, **launch: Any) -> dict[str, Any]:
    """Interrupted within the second epoch, then to the end on one process."""
    saving = {"save_strategy": "steps", "save_steps": 2, **setup.arguments}
    setup = replace(setup, arguments=saving)
    run(folder / "cut", setup, stop_after=4, **launch)
    return run(folder / "run", setup, checkpoint=str(folder / "cut" / "checkpoint-4"))


# ---- tasks --------------------------------------------------------------------------------------


def free_text() -> Task:
    """Answers that are written, and compared as text."""
    columns = {"text_column": "text", "label_column": "answer"}
    return get_task("generation", {"instruction": "Answer kindly:", **columns})


def answers_table(count: int, *, seed: int = 0) -> pd.DataFrame:
    """Rows of `free_text`, whose answers differ in length."""
    table = toy_table(count, seed=seed)
    answers = {"negative": "sorry for the bad flight", "neutral": "thanks", "positive": "good crew"}
    return table.assign(answer=table["label"].map(answers))


def multiple_choice() -> Task:
    """Rows with choices of their own."""
    return get_task("multiple_choice", {"instruction": "Choose:", "label_column": "answer"})


def choices_table(count: int, *, seed: int = 0) -> pd.DataFrame:
    """Rows of `multiple_choice`, with two to four choices each."""
    table = toy_table(count, seed=seed)
    words = ["bag", "crew", "flight", "help"]
    choices = [words[: 2 + number % 3] for number in range(count)]
    answers = [own[number % len(own)] for number, own in enumerate(choices)]
    return pd.DataFrame(
        {"question": table["text"], "choices": choices, "answer": answers}, index=table.index
    )


# ---- all runs -----------------------------------------------------------------------------------


def toy(launch: Mapping[str, Any] | None = None, /, **settings: Any) -> Callable[..., Any]:
    """A complete run: of `Setup`'s fields those that `settings` names; the rest are arguments."""
    return partial(complete, setup=make_setup(**settings), **(launch or {}))


def make_setup(**settings: Any) -> Setup:
    """See `toy`."""
    own = {name: settings.pop(name) for name in Setup.__dataclass_fields__ if name in settings}
    return Setup(**own, arguments=settings)


TWO = {"ranks": 2}
TWO_FSDP = {"ranks": 2, "environment": FSDP}
TWO_FULL_SHARD = {"ranks": 2, "environment": FULL_SHARD}
SHORT_ROWS = {"max_tokens_per_row": 128}
SCHEDULE = {"lr_scheduler_type": "cosine", "warmup_steps": 2, "weight_decay": 0.1}

#: By name; each takes an empty folder and returns what `train` does, with the adapter's digest.
RUNS: dict[str, Callable[[Path], dict[str, Any]]] = {
    "one-process": toy(),
    "two-ranks": toy(TWO),
    "two-ranks-fsdp": toy(TWO_FSDP),
    "two-ranks-unequal-rows": toy(TWO_FSDP, train=toy_table(23), **SHORT_ROWS),
    "resident-layer": toy(TWO_FULL_SHARD, resident_layers="1"),
    "prefix-not-shared": toy(share_prefix="never", **SHORT_ROWS),
    "prefix-shared": toy(share_prefix="always", **SHORT_ROWS),
    "dropout": toy(dropout=0.1),
    "dropout-prefix-shared": toy(dropout=0.1, share_prefix="always"),
    "dropout-two-ranks": toy(TWO_FSDP, dropout=0.1),
    "dropout-eager": toy(dropout=0.1, step="eager"),
    "fused": toy(step="fused"),
    "eager": toy(step="eager"),
    "gradient-checkpointing": toy(gradient_checkpointing=True, dropout=0.1),
    "gradient-checkpointing-fsdp": toy(TWO_FULL_SHARD, gradient_checkpointing=True),
    "accumulation": toy(per_device_train_batch_size=2, gradient_accumulation_steps=4),
    "clipping-and-schedule": toy(max_grad_norm=0.5, **SCHEDULE),
    # The worst one, in truth: the earlier of the two, so that its loading shows in the adapter.
    "best-checkpoint": toy(
        save_strategy="steps",
        save_steps=3,
        load_best_model_at_end=True,
        metric_for_best_model="loss",
        greater_is_better=True,
    ),
    "shortened": toy(max_length=24),
    "resumed": partial(resumed, setup=make_setup(dropout=0.1, **SCHEDULE)),
    "resumed-two-ranks-to-one": partial(resumed, setup=make_setup(**SCHEDULE), **TWO_FSDP),
    "stored-base-fsdp": toy(TWO_FULL_SHARD, stored=True),
    "four-bits": toy(in_4bit=True),
    "four-bits-fsdp": toy(TWO_FULL_SHARD, in_4bit=True),
    "bfloat16": toy(dtype="bfloat16"),
    "free-text": toy(
        task=free_text,
        train=answers_table(24),
        held_out=answers_table(5, seed=9),
        max_new_tokens=12,
    ),
    "multiple-choice": toy(
        task=multiple_choice, train=choices_table(24), held_out=choices_table(7, seed=9)
    ),
    "tied-embeddings": toy(kind="llama-tied"),
    "tied-embeddings-fsdp": toy(TWO_FSDP, kind="llama-tied"),
    "qwen3": toy(kind="qwen3"),
    "mistral": toy(kind="mistral"),
    "gpt2": toy(kind="gpt2"),
}
