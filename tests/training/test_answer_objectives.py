"""Each kind of answer that is right in part: likelihoods, loss and gradients as one by one.

Run: python -m pytest tests/training/test_answer_objectives.py
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch.nn import functional

from lora_fsdp import FineTuningArguments, LoraTrainer
from lora_fsdp.adapter.ownership import trainable_parameters
from lora_fsdp.data.encoding import EncodedExample, Encoder
from lora_fsdp.tasks import Task, get_task
from tests.support.ranks import launch_environment, run_ranks
from tests.support.tiny import adapted_model, randomise_adapter, tiny_tokenizer, toy_table

FSDP = launch_environment("fsdp2_cpu.yaml") | {"FSDP_RESHARD_AFTER_FORWARD": "true"}


@dataclass(frozen=True)
class Case:
    """A task, and what its objective is by hand.

    Attributes:
        task: its name.
        options: its options.
        columns: what is added to the toy table.
        prompt: a row's prompt.
        branches: what continues it: texts that are given, and texts that are scored after them.
        loss: of a row: its loss and what it counts, by the scores of the branches, those of the
            base, and their numbers of tokens.
    """

    task: str
    options: Mapping[str, Any]
    columns: Callable[[pd.DataFrame], pd.DataFrame]
    prompt: Callable[[pd.Series], str]
    branches: Callable[[pd.Series], Sequence[tuple[str, str]]]
    loss: Callable[
        [pd.Series, torch.Tensor, torch.Tensor, torch.Tensor], tuple[torch.Tensor, float]
    ]

    def table(self) -> pd.DataFrame:
        """24 rows."""
        return self.columns(toy_table().drop(columns="label"))

    def bound(self) -> Task:
        """The task, bound to it."""
        return get_task(self.task, self.options).bind(self.table())


def in_instruction(cells: pd.Series) -> str:
    return f"Instruction: Say it:\nInput: {cells.text}\nOutput:"


def in_part_right(shares: Callable[[pd.Series], Sequence[float]]) -> Callable[..., Any]:
    """Cross-entropy to what the row says of each branch."""

    def loss(cells, scores, reference, lengths):
        wanted = torch.tensor(shares(cells))
        return -(wanted * scores).sum(), float((wanted * lengths).sum())

    return loss


TOPICS = ("crew", "luggage", "price")


def topics_of(number: int) -> str:
    there = [topic for place, topic in enumerate(TOPICS) if number >> place & 1]
    return ";".join(there) or "none"


VOTES = ("calm", "angry", "amused")


def votes_of(number: int) -> list[int]:
    return [number % 3, 1 + number % 2, number % 5]


BETA, ANSWERS = 0.3, (" good crew", " late again", " lost my bag", " thanks for help")


def preferred(cells, scores, reference, lengths):
    gains = scores - reference
    return -functional.logsigmoid(BETA * (gains[0] - gains[1])), 1.0


SCORES = ("1", "2.5", "3", "10")
ASKED = [
    {"column": "late", "ask": "Was it late?", "labels": ["yes", "no"]},
    {"column": "mood", "labels": ["calm", "angry", "amused"]},
    {"column": "stars", "ask": "How many stars?", "scores": [1, 2, 5]},
]


def with_answers(table: pd.DataFrame) -> pd.DataFrame:
    """Some rows do not answer some questions."""
    numbers = range(len(table))
    return table.assign(
        late=[("yes", "no")[n % 2] for n in numbers],
        mood=[("calm", "angry", "amused", "")[n % 4] for n in numbers],
        stars=[("1", "2", "", "5", "2.0")[n % 5] for n in numbers],
    )


CASES = {
    "questions": Case(
        "questions",
        {"instruction": "Say it:", "questions": ASKED},
        with_answers,
        lambda cells: f"Instruction: Say it:\nInput: {cells.text}\n",
        lambda cells: [
            (one.get("ask", "mood?"), f" {option}")
            for one in ASKED
            for option in one.get("labels", one.get("scores"))
        ],
        in_part_right(
            lambda cells: [
                float(cells[one["column"]] in (str(option), f"{option}.0"))
                for one in ASKED
                for option in one.get("labels", one.get("scores"))
            ]
        ),
    ),
    "regression": Case(
        "regression",
        {"instruction": "Say it:", "centres": [0, 1, 2.5, 10]},
        lambda table: table.assign(value=[-1 + number / 2 for number in range(24)]),
        in_instruction,
        lambda cells: [("", f" {centre}") for centre in ("0", "1", "2.5", "10")],
        in_part_right(
            lambda cells: np.array(
                [np.interp(cells.value, [0, 1, 2.5, 10], one) for one in np.eye(4)]
            ).astype(np.float32)
        ),
    ),
    "preference": Case(
        "preference",
        {"beta": BETA, "text_column": "text"},
        lambda table: table.assign(
            chosen=[ANSWERS[number % 4] for number in range(24)],
            rejected=[ANSWERS[(number + 1 + number % 3) % 4] for number in range(24)],
        ),
        lambda cells: cells.text,
        lambda cells: [("", cells.chosen), ("", cells.rejected)],
        preferred,
    ),
    "soft_classification": Case(
        "soft_classification",
        {"instruction": "Say it:", "votes": True, "share_columns": list(VOTES)},
        lambda table: table.assign(
            **{name: [votes_of(n)[k] for n in range(24)] for k, name in enumerate(VOTES)}
        ),
        in_instruction,
        lambda cells: [("", f" {name}") for name in VOTES],
        in_part_right(lambda cells: [cells[name] / sum(cells[list(VOTES)]) for name in VOTES]),
    ),
    "multilabel": Case(
        "multilabel",
        {"instruction": "Say it:", "labels": list(TOPICS)},
        lambda table: table.assign(labels=[topics_of(number % 8) for number in range(24)]),
        lambda cells: f"Instruction: Say it:\nInput: {cells.text}\n",
        lambda cells: [(f"{topic}:", answer) for topic in TOPICS for answer in (" yes", " no")],
        in_part_right(
            lambda cells: [
                float((topic in cells.labels) == (answer == "yes"))
                for topic in TOPICS
                for answer in ("yes", "no")
            ]
        ),
    ),
    "rating": Case(
        "rating",
        {"instruction": "Say it:", "labels": ["10", "2.50", "1", "3"]},
        lambda table: table.assign(rating=[SCORES[number % 4] for number in range(24)]),
        in_instruction,
        lambda cells: [("", f" {score}") for score in SCORES],
        in_part_right(lambda cells: [float(score == cells.rating) for score in SCORES]),
    ),
}
WAYS = {
    "one rank": ({}, 1, None),
    "several sequences": ({"max_tokens_per_row": 128}, 1, None),
    "two ranks": ({"per_device_train_batch_size": 4}, 2, None),
    "two ranks, gathered": ({"per_device_train_batch_size": 4}, 2, FSDP),
}


def encoded_rows(name: str) -> tuple[Task, list[EncodedExample]]:
    """The task, and its rows as tokens."""
    task = CASES[name].bound()
    encoder = Encoder(tiny_tokenizer(), task=task, max_length=128)
    return task, encoder.encode(task.examples(CASES[name].table()))


def trainer_of(folder, name, options) -> LoraTrainer:
    case, model = CASES[name], adapted_model()
    randomise_adapter(model)
    task = case.bound()
    settings = {
        "per_device_train_batch_size": 8, "seed": 3, "save_strategy": "no", "disable_tqdm": True,
        "output_dir": str(folder),
    }  # fmt: skip
    return LoraTrainer(
        model=model,
        args=FineTuningArguments(**settings | options),
        task=task,
        processing_class=tiny_tokenizer(),
        train_dataset=task.examples(case.table()),
        eval_dataset=task.examples(case.table()),
        max_length=128,
    )


def found_by_training(folder, name, options) -> dict[str, Any]:
    """Scores of all rows; loss and gradients of the first step."""
    trainer = trainer_of(folder, name, options)
    outputs = trainer.outputs()
    step = trainer.get_train_dataloader().dataset[0]
    loss = trainer.training_step(trainer.model, step).item()
    parameters = trainable_parameters(trainer.model)
    return {
        "scores": outputs.log_likelihoods,
        "tokens": outputs.tokens,
        "reference": outputs.reference,
        "loss": loss,
        "gradients": {n: p.grad.clone().numpy() for n, p in parameters.items()},
        "rows": step.example_rows,
        "sequences": len(step.sequences),
        "eval_loss": trainer.evaluate()["eval_loss"],
    }


def branch_scores(model, case, cells) -> tuple[torch.Tensor, torch.Tensor]:
    """Of each branch by itself: its log-likelihood, and how many tokens that is of."""
    tokenizer = tiny_tokenizer()
    scores, lengths = [], []
    for given, text in case.branches(cells):
        before = tokenizer(f"{case.prompt(cells)}{given}")["input_ids"]
        answer = [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
        logits = model(input_ids=torch.tensor([before + answer]), use_cache=False).logits[0]
        table = logits[len(before) - 1 : -1].log_softmax(-1)
        scores.append(table.gather(1, torch.tensor(answer)[:, None]).sum())
        lengths.append(len(answer))
    return torch.stack(scores), torch.tensor(lengths)


def by_hand(case, rows):
    """By transformers and PEFT alone, with autograd over the mean of the rows."""
    model, table = adapted_model(), case.table()
    randomise_adapter(model)
    total, counted = torch.zeros(()), 0.0
    for row in rows:
        cells = table.loc[row]
        scores, lengths = branch_scores(model, case, cells)
        with model.disable_adapter(), torch.no_grad():
            reference, _ = branch_scores(model, case, cells)
        loss, count = case.loss(cells, scores, reference, lengths)
        total, counted = total + loss, counted + count
    loss = total / counted
    loss.backward()
    return loss.item(), {n: p.grad for n, p in trainable_parameters(model).items()}


@pytest.mark.distributed
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", CASES)
def test_everything_is_as_one_by_one(name, way, tmp_path) -> None:
    case, (options, world_size, environment) = CASES[name], WAYS[way]
    if world_size == 1:
        ranks = [found_by_training(tmp_path, name, options)]
    else:
        ranks = run_ranks(
            found_by_training, tmp_path, name, options, world_size=2, environment=environment
        )
    loss, gradients = by_hand(case, [row for rank in ranks for row in rank["rows"]])
    assert sum(rank["loss"] for rank in ranks) / world_size == pytest.approx(loss, rel=1e-5)
    for rank in ranks:
        found = {n: torch.from_numpy(gradient) for n, gradient in rank["gradients"].items()}
        distance = torch.stack([(found[n] - gradients[n]).norm() for n in gradients]).norm()
        assert distance <= 2e-6 * torch.stack([g.norm() for g in gradients.values()]).norm()
        np.testing.assert_array_equal(rank["scores"], ranks[0]["scores"])
    assert (ranks[0]["sequences"] > 1) == ("max_tokens_per_row" in options)


@pytest.mark.parametrize("name", CASES)
def test_scores_are_as_one_by_one(name, tmp_path) -> None:
    case, found = CASES[name], found_by_training(tmp_path, name, {})
    table, model = case.table(), adapted_model()
    randomise_adapter(model)
    losses = []
    for place, row in enumerate(table.index):
        with torch.no_grad():
            scores, lengths = branch_scores(model, case, table.loc[row])
            with model.disable_adapter():
                reference, _ = branch_scores(model, case, table.loc[row])
        np.testing.assert_allclose(found["scores"][place], scores.numpy(), atol=2e-5)
        assert found["tokens"][place].tolist() == lengths.tolist()
        if found["reference"] is not None:
            np.testing.assert_allclose(found["reference"][place], reference.numpy(), atol=2e-5)
        losses.append(case.loss(table.loc[row], scores, reference, lengths))
    mean = sum(loss for loss, _ in losses).item() / sum(count for _, count in losses)
    assert found["eval_loss"] == pytest.approx(mean, rel=1e-5)
