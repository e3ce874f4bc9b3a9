"""What a row, a label and a candidate count in the loss: the gradients of plain computation.

Run: python -m pytest tests/training/test_weighted_losses.py
"""

import os
from dataclasses import dataclass, field
from typing import Any

import pandas as pd
import pytest
import torch

from lora_fsdp import DataArguments, FineTuningArguments, LoraTrainer
from lora_fsdp.adapter.ownership import trainable_parameters
from lora_fsdp.data.rows import load_task_data
from lora_fsdp.errors import (
    ArgumentError,
    ColumnNotFoundError,
    MalformedRowError,
    NoRowsError,
    UnknownLabelError,
)
from lora_fsdp.tasks import GenerationTask
from tests.support.ranks import launch_environment, run_ranks
from tests.support.tiny import (
    LABELS,
    ToyTask,
    adapted_model,
    randomise_adapter,
    tiny_tokenizer,
    toy_table,
)

FSDP = launch_environment("fsdp2_cpu.yaml") | {"FSDP_RESHARD_AFTER_FORWARD": "true"}
SMOOTHING = 0.15


def weighted_table() -> pd.DataFrame:
    """Labels as uneven as in life, and a weight a row."""
    table = toy_table().reset_index(drop=True)
    table = pd.concat([table, table[table.label == "negative"].assign(text="more " + table.text)])
    return table.assign(trust=[0.5 + number % 4 for number in range(len(table))])


@dataclass
class Weighted:
    """Rows with weights of their own and of their labels, and a smoothed target."""

    data: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)

    def rows(self, folder) -> Any:
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / f"rows-{os.getpid()}.csv"  # ranks share the folder
        weighted_table().to_csv(file, index=False)
        arguments = DataArguments(data_file=str(file), eval_size=4, **self.data)
        return load_task_data(arguments, seed=0, task=ToyTask())

    def weight(self, table: pd.DataFrame, row: int, train: list[int]) -> float:
        """By hand, from the cells."""
        weight = 1.0
        if "weight_column" in self.data:
            weight *= float(table.trust.iloc[row - 1])
        label, named = table.label.iloc[row - 1], self.data.get("class_weights", [])
        if named == ["balanced"]:
            counts = table.label.iloc[[one - 1 for one in train]].value_counts()
            weight *= len(train) / (3 * counts[label])
        elif named:
            weight *= dict(negative=0.5, positive=3.0).get(label, 1.0)
        return weight


CASES = {
    "row weights": Weighted({"weight_column": "trust"}),
    "class weights": Weighted({"class_weights": ["negative=0.5", "positive=3"]}),
    "balanced": Weighted({"class_weights": ["balanced"], "weight_column": "trust"}),
    "smoothed": Weighted({}, {"label_smoothing_factor": SMOOTHING}),
    "all": Weighted(
        {"class_weights": ["negative=0.5", "positive=3"], "weight_column": "trust"},
        {"label_smoothing_factor": SMOOTHING},
    ),
}
WAYS = {
    "one rank": ({}, 1, None),
    "several sequences": ({"max_tokens_per_row": 128}, 1, None),
    "accumulated": (
        {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}, 1, None,
    ),
    "two ranks": ({"per_device_train_batch_size": 4}, 2, None),
    "two ranks, gathered": ({"per_device_train_batch_size": 4}, 2, FSDP),
}  # fmt: skip
TRIED = [
    ("all", "one rank"), ("row weights", "one rank"), ("class weights", "one rank"),
    ("balanced", "one rank"), ("smoothed", "one rank"), ("all", "several sequences"),
    ("all", "accumulated"), ("all", "two ranks"), ("all", "two ranks, gathered"),
]  # fmt: skip


def trainer_of(folder, case, options) -> LoraTrainer:
    data = CASES[case].rows(folder)
    model = adapted_model()
    randomise_adapter(model)
    settings = {
        "per_device_train_batch_size": 8, "seed": 3, "save_strategy": "no", "disable_tqdm": True,
        "output_dir": str(folder),
    }  # fmt: skip
    return LoraTrainer(
        model=model,
        args=FineTuningArguments(**settings | CASES[case].training | options),
        task=data.task,
        processing_class=tiny_tokenizer(),
        train_dataset=data.train,
        max_length=128,
    )


def first_step(folder, case, options):
    trainer = trainer_of(folder, case, options)
    step = trainer.get_train_dataloader().dataset[0]
    loss = trainer.training_step(trainer.model, step).item()
    gradients = {n: p.grad.clone().numpy() for n, p in trainable_parameters(trainer.model).items()}
    return {
        "loss": loss,
        "gradients": gradients,
        "rows": step.example_rows,
        "train": sorted(example.row for example in trainer.train_dataset),
        "sequences": len(step.sequences),
    }


def by_hand(case, rows, train):
    """By transformers and PEFT alone: each label's text by itself, autograd over the mean."""
    table, tokenizer, model = weighted_table(), tiny_tokenizer(), adapted_model()
    randomise_adapter(model)
    smoothing = CASES[case].training.get("label_smoothing_factor", 0.0)
    total, counted = torch.zeros(()), 0.0
    for row in rows:
        cells = table.iloc[row - 1]
        prompt = tokenizer(f"Instruction: {ToyTask.instruction}\nInput: {cells.text}\nOutput:")
        weight = CASES[case].weight(table, row, train)
        for label in LABELS:
            share = (1 - smoothing) * (label == cells.label) + smoothing / len(LABELS)
            if not share:
                continue
            answer = [*tokenizer(f" {label}")["input_ids"], tokenizer.eos_token_id]
            ids = torch.tensor([[*prompt["input_ids"], *answer]])
            logits = model(input_ids=ids, use_cache=False).logits[0, -len(answer) - 1 : -1]
            log_probs = logits.log_softmax(-1).gather(1, torch.tensor(answer)[:, None])
            total = total - weight * share * log_probs.sum()
            counted += weight * share * len(answer)
    loss = total / counted
    loss.backward()
    return loss.item(), {n: p.grad for n, p in trainable_parameters(model).items()}


@pytest.mark.distributed
@pytest.mark.parametrize(("case", "way"), TRIED)
def test_the_weighted_mean_is_the_global_one(case, way, tmp_path) -> None:
    options, world_size, environment = WAYS[way]
    ranks = run_ranks(
        first_step, tmp_path / "run", case, options, world_size=world_size, environment=environment
    )
    rows = [row for rank in ranks for row in rank["rows"]]
    assert len(rows) == 8
    loss, gradients = by_hand(case, rows, ranks[0]["train"])
    assert sum(rank["loss"] for rank in ranks) / world_size == pytest.approx(loss, rel=1e-5)
    for rank in ranks:
        found = {n: torch.from_numpy(gradient) for n, gradient in rank["gradients"].items()}
        distance = torch.stack([(found[n] - gradients[n]).norm() for n in gradients]).norm()
        assert distance <= 2e-6 * torch.stack([g.norm() for g in gradients.values()]).norm()
    assert (ranks[0]["sequences"] > 1) == ("max_tokens_per_row" in options)


def read(tmp_path, table: pd.DataFrame, task=None, **options):
    table.to_csv(tmp_path / "rows.csv", index=False)
    arguments = DataArguments(data_file=str(tmp_path / "rows.csv"), eval_size=4, **options)
    return load_task_data(arguments, seed=0, task=task or ToyTask())


@pytest.mark.parametrize(
    ("cell", "named"),
    [
        ("-1", "row 2 (column 'trust' holds '-1', no weight)"),
        ("nan", "row 2 (column 'trust' holds 'nan', no weight)"),
        ("inf", "row 2 (column 'trust' holds 'inf', no weight)"),
        ("often", "row 2 (column 'trust' holds 'often', no weight)"),
        ("", "row 2 (nothing in column 'trust')"),
    ],
)
def test_a_cell_that_is_no_weight_is_named(cell, named, tmp_path) -> None:
    table = toy_table().assign(trust="1")
    table.loc[2, "trust"] = cell
    with pytest.raises(MalformedRowError) as error:
        read(tmp_path, table, weight_column="trust")
    assert named in str(error.value)
    kept = read(tmp_path, table, weight_column="trust", on_bad_rows="drop")
    assert kept.dropped == 1
    assert 2 not in [example.row for example in (*kept.train, *kept.held_out)]


def test_rows_that_weigh_nothing_are_left_out(tmp_path) -> None:
    table = toy_table().assign(trust=[number % 2 for number in range(24)])
    data = read(tmp_path, table, weight_column="trust")
    assert all(example.row % 2 == 0 and example.weight == 1 for example in data.train)
    assert len(data.held_out) == 4
    assert data.dropped == 20 - len(data.train)
    with pytest.raises(NoRowsError, match="of all 20 training rows are 0: see --weight_col"):
        read(tmp_path, table.assign(trust=0), weight_column="trust")
    with pytest.raises(NoRowsError, match="are 0: see --class_weights"):
        read(tmp_path, table, class_weights=["negative=0", "neutral=0", "positive=0"])


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        (["negativ=2"], UnknownLabelError, "'negativ'.*Did you mean 'negative'"),
        (["negative=-2"], ArgumentError, "'negative=-2'"),
        (["negative=nan"], ArgumentError, "'negative=nan'"),
        (["negative"], ArgumentError, "give balanced, or label=weight"),
        (["balanced", "negative=2"], ArgumentError, "'balanced'"),
        (["negative=2", "negative=3"], ArgumentError, "twice"),
        ("negative", ArgumentError, "'negative'"),
    ],
)
def test_class_weights_that_are_none(given, error, message, tmp_path) -> None:
    with pytest.raises(error, match=message):
        read(tmp_path, toy_table(), class_weights=given)


def test_what_has_no_labels_has_no_class_weights_and_nothing_to_smooth(tmp_path) -> None:
    task = GenerationTask(label_column="label")
    with pytest.raises(ArgumentError, match=r"--class_weights weighs labels.*--weight_column"):
        read(tmp_path, toy_table(), task, class_weights=["balanced"])
    with pytest.raises(ColumnNotFoundError, match=r"no column 'weight' with weights.*--weight_c"):
        read(tmp_path, toy_table(), weight_column="weight")
    data = read(tmp_path, toy_table(), task)
    arguments = FineTuningArguments(output_dir=str(tmp_path), label_smoothing_factor=0.1)
    with pytest.raises(ArgumentError, match=r"--label_smoothing_factor 0\.1.*free text"):
        LoraTrainer(
            model=adapted_model(),
            args=arguments,
            task=data.task,
            processing_class=tiny_tokenizer(),
            train_dataset=data.train,
        )
    with pytest.raises(ArgumentError, match="from 0 to less than 1"):
        FineTuningArguments(output_dir=str(tmp_path), label_smoothing_factor=1.0)
