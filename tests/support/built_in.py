"""The built-in tasks on their shipped rows, as the recipes in `examples/recipes` have them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
import yaml
from peft import LoraConfig

from lora_fsdp import DataArguments, FineTuningArguments, LoraTrainer, ModelArguments
from lora_fsdp.base.loading import load_base, load_tokenizer
from lora_fsdp.data.rows import TaskData, load_task_data
from lora_fsdp.evaluation.metrics import evaluation_metrics
from lora_fsdp.evaluation.prediction import Predictor
from tests.support.tiny import tiny_model, tiny_tokenizer

ROOT = Path(__file__).resolve().parents[2]
RECIPES = {
    path.stem: path
    for path in sorted((ROOT / "examples" / "recipes").glob("*.yaml"))
    if "examples/data" in path.read_text(encoding="utf-8")
}
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message.role }}: {{ message.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
_OF_DATA = set(DataArguments.__dataclass_fields__)


def save_chat_model(folder: Path) -> Path:
    """A tiny model whose tokenizer has a chat template."""
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE
    tiny_model().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def data_arguments(recipe: str) -> DataArguments:
    """What a recipe says of task and rows, cut to what a tiny model does in a second."""
    contents = yaml.safe_load(RECIPES[recipe].read_text(encoding="utf-8"))
    given = {key: value for key, value in contents.items() if key in _OF_DATA}
    given |= {"data_file": str(ROOT / given["data_file"]), "head": 15, "eval_size": 5}
    return DataArguments(**given, max_length=700)


def trainer_of(recipe: str, base: Path, output: Path) -> tuple[LoraTrainer, TaskData]:
    """A trainer for a recipe's task, and its rows."""
    arguments = data_arguments(recipe)
    data = load_task_data(arguments, seed=0)
    named = ModelArguments(str(base))
    torch.manual_seed(5)
    trainer = LoraTrainer(
        model=load_base(named, device=torch.device("cpu")),
        args=FineTuningArguments(
            output_dir=str(output),
            max_steps=3,
            learning_rate=3e-3,
            per_device_train_batch_size=4 // int(os.environ.get("WORLD_SIZE", "1")),
            max_new_tokens=12,
            save_strategy="no",
            disable_tqdm=True,
            seed=3,
            max_tokens_per_row=1024,
        ),
        task=data.task,
        processing_class=load_tokenizer(named),
        train_dataset=data.train,
        eval_dataset=data.held_out,
        peft_config=LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"),
        max_length=arguments.max_length,
        chat_template=arguments.chat_template,
    )
    return trainer, data


def train_all(base: Path, output: Path) -> dict[str, Any]:
    """Train, evaluate and save every recipe's task; the metrics and texts of each."""
    return {recipe: train_recipe(recipe, base, output / recipe) for recipe in RECIPES}


def train_recipe(recipe: str, base: Path, output: Path) -> dict[str, Any]:
    """Train, evaluate and save a recipe's task; its metrics and texts."""
    trainer, data = trainer_of(recipe, base, output)
    trainer.train()
    metrics = trainer.evaluate()
    trainer.save_model()
    timing = ("eval_runtime", "epoch")
    return {
        "metrics": {k: v for k, v in metrics.items() if "per_second" not in k and k not in timing},
        "written": trainer.write(data.held_out) if data.task.is_free_text else None,
    }


def predict_all(output: Path) -> dict[str, Any]:
    """What the saved adapters give in one process, by PEFT's own loading."""
    found = {}
    for recipe in RECIPES:
        data = load_task_data(data_arguments(recipe), seed=0)
        predictor = Predictor.from_adapter(output / recipe)
        texts = predictor.write(data.held_out) if data.task.is_free_text else None
        encoded = predictor.encoder.encode(data.held_out)
        outputs = predictor.outputs(encoded)
        found[recipe] = {
            "metrics": evaluation_metrics(predictor.task, encoded, outputs),
            "written": texts,
        }
    return found
