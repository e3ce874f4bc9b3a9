"""A complete toy training run in one call, for the tests that compare runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig

from lora_fsdp import FineTuningArguments, LoraTrainer, ModelArguments
from lora_fsdp.adapter.saved import adapter_state
from lora_fsdp.base.loading import load_base
from lora_fsdp.base.streaming import open_base
from lora_fsdp.distributed.status import fsdp_status
from tests.support.tiny import CONFIGS, ToyTask, tiny_model, tiny_tokenizer, toy_table
from tests.support.token_mixers import FAMILIES, WINDOWED, family_model


def toy_trainer(
    output_dir: str | Path,
    *,
    kind: str = "llama",
    dropout: float = 0.0,
    rows: int = 24,
    dtype: torch.dtype = torch.float32,
    callbacks: list[Any] | None = None,
    base: str | Path | None = None,
    streamed: bool = False,
    load_in_4bit: bool = False,
    init_lora_weights: Any = True,
    lora_r: int = 4,
    lora: dict[str, Any] | None = None,
    **arguments: Any,
) -> LoraTrainer:
    """A trainer for the toy task; `arguments` are those of `FineTuningArguments`.

    `base` is a folder to load the model from; `streamed` reads it where it stays. `lora` are more
    settings of the adapter.
    """
    settings: dict[str, Any] = {
        "per_device_train_batch_size": 8,
        "learning_rate": 1e-2,
        "num_train_epochs": 2,
        "logging_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": True,
        "lr_scheduler_type": "constant",
        "seed": 3,
    }
    task = ToyTask()
    table = task.bind(toy_table(rows))
    examples = table.examples(toy_table(rows))
    held_out = table.examples(toy_table(13, seed=9))
    # Of `tiny_model`, a name means what it always meant.
    families = {k: v for k, v in (FAMILIES | WINDOWED).items() if k not in CONFIGS}
    if base is None:
        make = family_model if kind in families else tiny_model
        model: Any = make(kind).to(dtype)
    else:
        load = open_base if streamed else load_base
        model_args = ModelArguments(str(base), load_in_4bit=load_in_4bit)
        model = load(model_args, device=torch.device("cpu"))
    torch.manual_seed(5)
    return LoraTrainer(
        model=model,
        args=FineTuningArguments(output_dir=str(output_dir), **{**settings, **arguments}),
        task=table,
        processing_class=tiny_tokenizer(),
        train_dataset=examples,
        eval_dataset=held_out,
        peft_config=LoraConfig(
            **{
                "r": lora_r,
                "target_modules": families[kind][1] if kind in families else "all-linear",
                "lora_dropout": dropout,
                "init_lora_weights": init_lora_weights,
                "task_type": "CAUSAL_LM",
                **(lora or {}),
            }
        ),
        max_length=128,
        callbacks=callbacks,
    )


def toy_run(output_dir: str | Path, resume: str | bool | None = None, **options: Any) -> dict:
    """Train, evaluate and save; everything a test may want to compare."""
    trainer = toy_trainer(output_dir, **options)
    trainer.train(resume_from_checkpoint=resume)
    metrics = trainer.evaluate()
    trainer.save_model(f"{output_dir}/final")
    history = trainer.state.log_history
    return {
        "losses": [entry["loss"] for entry in history if "loss" in entry],
        "gradient_norms": [entry["grad_norm"] for entry in history if "grad_norm" in entry],
        "metrics": {
            k: v for k, v in metrics.items() if "runtime" not in k and "per_second" not in k
        },
        "adapter": {k: v.detach().cpu().numpy() for k, v in adapter_state(trainer.model).items()},
        "fingerprint": trainer.adapter.fingerprint(),
        "groups": fsdp_status(trainer.model).groups,
        "files": sorted(str(p.relative_to(output_dir)) for p in Path(output_dir).rglob("*")),
        "history": history,
        "steps": trainer.state.global_step,
        "confusion": {s: m.to_numpy().sum() for s, m in trainer.confusion_matrices.items()},
        "best": trainer.state.best_model_checkpoint,
        "step": str(trainer.placement.step),
        "packing": str(trainer.placement.packing.packing),
    }
