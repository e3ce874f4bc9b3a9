"""What the plan says of a recipe is what a run of it decides.

Run: python -m pytest tests/planning/test_plan_and_run.py
"""

import json
from dataclasses import asdict

import pytest
import torch
import yaml

from lora_fsdp.adapter.attach import lora_config
from lora_fsdp.base.loading import load_tokenizer
from lora_fsdp.base.streaming import open_base
from lora_fsdp.cli.main import main
from lora_fsdp.data.rows import load_task_data
from lora_fsdp.placement.gpus import parse_gpus
from lora_fsdp.placement.hardware import Hardware
from lora_fsdp.scripts import parse_arguments
from lora_fsdp.training.placing import decide_for_run, request_of_run
from lora_fsdp.training.trainer import LoraTrainer

GPUS = "1xSmall:3GB:100TFLOPS"


@pytest.fixture
def recipe(tmp_path, model_folder):
    table = tmp_path / "tweets.csv"
    lines = (f"flight {n} was late,{'negative' if n % 2 else 'positive'}" for n in range(90))
    table.write_text("text,sentiment\n" + "\n".join(lines) + "\n")

    def written(**options):
        file = tmp_path / "recipe.yaml"
        settings = {
            "model_name_or_path": str(model_folder), "dtype": "bfloat16", "task": "sentiment",
            "data_file": str(table), "output_dir": str(tmp_path / "run"),
            "per_device_train_batch_size": 4, "lora_target_modules": ["q_proj"],
        }  # fmt: skip
        file.write_text(yaml.safe_dump({**settings, **options}))
        return file

    return written


def planned(capsys, file, *options):
    assert main(["plan", "--config", str(file), "--json", "true", *options]) == 0
    return json.loads(capsys.readouterr().out)


def run_of(file):
    """The trainer that `lora-fsdp train --config` would make, in this process."""
    run = parse_arguments(task="", arguments=["--config", str(file)])
    data = load_task_data(run["data_args"], seed=run["training_args"].seed)
    adapter = lora_config(run["lora_args"])
    device = torch.device("cpu")
    return LoraTrainer(
        model=open_base(run["model_args"], device=device, peft_config=adapter),
        args=run["training_args"],
        task=data.task,
        processing_class=load_tokenizer(run["model_args"]),
        train_dataset=data.train,
        eval_dataset=data.held_out,
        peft_config=adapter,
        max_length=run["data_args"].max_length,
    )


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"max_steps": 5},
        {"num_train_epochs": 1.4, "gradient_accumulation_steps": 3},
        {"share_prefix": "never"},
        {"packing": "never"},
        {"lora_dropout": 0.1},
        {"step": "eager"},
        {"gradient_checkpointing": True},
        {"dtype": "float32"},
        {"max_length": 128, "max_tokens_per_row": 128},
        {"load_in_4bit": True},
    ],
    ids=str,
)
def test_a_recipe_is_planned_as_it_is_run(recipe, capsys, options):
    file = recipe(**options)
    found = planned(capsys, file, "--gpus", GPUS)
    first = found["candidates"][0]
    trainer = run_of(file)
    capsys.readouterr()
    count, gpu = parse_gpus(GPUS)
    request = request_of_run(trainer.model, trainer.args, settings=trainer.fsdp_settings)
    placement = decide_for_run(trainer.model, trainer.work, Hardware.of(gpu, count), request)
    assert found["work"] == asdict(trainer.work)
    assert found["work"]["steps"] == trainer.schedule.steps
    assert first["step"] == placement.step
    assert first["max_tokens_per_row"] == placement.sequence_length
    assert first["row_tokens"] == placement.largest.tokens
    assert first["bytes"]["total"] == placement.memory.total
    assert first["strategy"].endswith("recomputing") == placement.layout.recomputed


def test_each_option_changes_the_plan(recipe, capsys):
    plain = planned(capsys, recipe(), "--gpus", GPUS)
    for options in (
        {"max_steps": 5}, {"share_prefix": "never"}, {"step": "eager"},
        {"gradient_checkpointing": True}, {"dtype": "float32"},
    ):  # fmt: skip
        other = planned(capsys, recipe(**options), "--gpus", GPUS)
        assert (other["work"], other["candidates"]) != (plain["work"], plain["candidates"])


def test_texts_are_as_long_as_a_run_would_leave_them(capsys):
    numbers = ["plan", "--model_name_or_path", "1B", "--examples", "100", "--gpus", "1xH100"]
    assert main([*numbers, "--tokens_per_example", "2000", "--json", "true"]) == 0
    assert json.loads(capsys.readouterr().out)["work"]["longest_example"] == 512


@pytest.mark.parametrize(
    ("model", "gpus"),
    [
        ("7B", "2xRTX4090"),
        pytest.param("70B", "2xRTX4090", marks=pytest.mark.slow),
        ("7B", "1xSmall:4GB:9TFLOPS"),
    ],
)
@pytest.mark.slow
def test_what_is_printed_chooses_what_is_shown(tmp_path, capsys, model, gpus):
    """Each strategy's options and YAML, given back to the plan, are the same strategy."""
    asked = [
        "plan", "--model_name_or_path", model, "--examples", "4500", "--tokens_per_example", "59",
        "--gpus", gpus, "--json", "true",
    ]  # fmt: skip
    assert main(asked) == 0
    found = json.loads(capsys.readouterr().out)
    assert len(found["candidates"]) > 3
    for one in found["candidates"]:
        file = tmp_path / "plan.yaml"
        file.write_text(yaml.safe_dump(one["accelerate"]))
        options = [str(file) if word == "plan.yaml" else word for word in one["options"]]
        assert main([*asked, *options]) == 0
        again = json.loads(capsys.readouterr().out)["candidates"][0]
        same = ("strategy", "weights", "step", "max_tokens_per_row", "bytes", "seconds")
        assert {name: again[name] for name in same} == {name: one[name] for name in same}
