"""Each kind of answer that is right in part: likelihoods, loss and gradients as one by one.

Run: python -m pytest tests/training/test_answer_objectives.py
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch.nn import functional

from lora_fsdp import FineTuningArguments, LoraTrainer
from lora_fsdp.adapter.ownership import trainable_parameters
from lora_fsdp.compute.packed_model import PackedModel
from lora_fsdp.data.encoding import EncodedExample, Encoder
from lora_fsdp.data.packing import Tree, pack_sequence
from lora_fsdp.errors import ArgumentError
from lora_fsdp.tasks import Task, get_task
from lora_fsdp.training.step.objectives.focal import Focal
from lora_fsdp.training.step.objectives.ranked import Ranked
from lora_fsdp.training.step.objectives.supervised import Supervised
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
        settings: of the run.
        weights: whether rows do not count alike.
    """

    task: str
    options: Mapping[str, Any]
    columns: Callable[[pd.DataFrame], pd.DataFrame]
    prompt: Callable[[pd.Series], str]
    branches: Callable[[pd.Series], Sequence[tuple[str, str]]]
    loss: Callable[
        [pd.Series, torch.Tensor, torch.Tensor, torch.Tensor], tuple[torch.Tensor, float]
    ]
    settings: Mapping[str, Any] = field(default_factory=dict)
    weights: bool = False

    def weight(self, row: int) -> float:
        """How much a row counts."""
        return 0.5 + row % 3 if self.weights else 1.0

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
GAMMA, SCALE = 1.5, 0.7


def focal(shares: Callable[[pd.Series], Sequence[float]]) -> Callable[..., Any]:
    """Of the right branches alone: an answer's loss is less, the likelier it is."""

    def loss(cells, scores, reference, lengths):
        right = torch.tensor(shares(cells)) > 0
        likelihoods = scores[right].exp()
        losses = -((1 - likelihoods) ** GAMMA) * likelihoods.log()
        return losses.sum(), float(lengths[right].sum())

    return loss


def ranked(cells, scores, reference, lengths):
    place = SCORES.index(cells.rating)
    below = scores.softmax(0).cumsum(0)[:-1]
    distance = (below - torch.tensor([float(k >= place) for k in range(3)])).square().sum()
    count = float(lengths[place])
    return SCALE * count * distance - scores[place], count


LOSSES = {
    "rating, ranked": replace(
        CASES["rating"], loss=ranked, settings={"ranked_weight": SCALE}, weights=True
    ),
    "rating, focal": replace(
        CASES["rating"],
        loss=focal(lambda cells: [float(score == cells.rating) for score in SCORES]),
        settings={"focal_gamma": GAMMA},
    ),
    "questions, focal": replace(
        CASES["questions"],
        loss=focal(
            lambda cells: [
                float(cells[one["column"]] in (str(option), f"{option}.0"))
                for one in ASKED
                for option in one.get("labels", one.get("scores"))
            ]
        ),
        settings={"focal_gamma": GAMMA},
        weights=True,
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
    case, model = (CASES | LOSSES)[name], adapted_model()
    randomise_adapter(model)
    task = case.bound()
    rows = [replace(one, weight=case.weight(one.row)) for one in task.examples(case.table())]
    settings = {
        "per_device_train_batch_size": 8, "seed": 3, "save_strategy": "no", "disable_tqdm": True,
        "output_dir": str(folder),
    }  # fmt: skip
    return LoraTrainer(
        model=model,
        args=FineTuningArguments(**settings | case.settings | options),
        task=task,
        processing_class=tiny_tokenizer(),
        train_dataset=rows,
        eval_dataset=rows,
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
        weight = case.weight(row)
        total, counted = total + weight * loss, counted + weight * count
    loss = total / counted
    loss.backward()
    return loss.item(), {n: p.grad for n, p in trainable_parameters(model).items()}


@pytest.mark.distributed
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", CASES)
def test_everything_is_as_one_by_one(name, way, tmp_path) -> None:
    compared(CASES[name], name, WAYS[way], tmp_path)


ACCUMULATED = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
WAYS_OF_LOSSES = {
    "one rank": ({}, 1, None),
    "several sequences": ({"max_tokens_per_row": 128, "step": "eager"}, 1, None),
    "apart": ({"share_prefix": "never", "packing": "never"}, 1, None),
    "two ranks, accumulated": (ACCUMULATED, 2, None),
}


@pytest.mark.distributed
@pytest.mark.parametrize("way", WAYS_OF_LOSSES)
@pytest.mark.parametrize("name", LOSSES)
def test_losses_of_choice_are_as_one_by_one(name, way, tmp_path) -> None:
    if way.startswith("two ranks") and name == "rating, focal":
        pytest.skip("the other two are launched")
    compared(LOSSES[name], name, WAYS_OF_LOSSES[way], tmp_path)


def compared(case, name, way, tmp_path) -> None:
    options, world_size, environment = way
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


def test_without_weight_and_power_they_are_cross_entropy() -> None:
    _, rows = encoded_rows("rating")
    found = []
    for objective in (Supervised(), Focal(0.0), Ranked(0.0)):
        model = adapted_model()
        randomise_adapter(model)
        sequence = pack_sequence([objective.tree(one) for one in rows], share_prefix=True)
        sequence = sequence.padded(tokens=len(sequence) + 9, labels=sequence.labels.shape[1] + 5)
        loss = objective.loss(sequence, PackedModel(model).label_log_probs(sequence), None)
        loss.backward()
        gradients = [p.grad.flatten() for p in trainable_parameters(model).values()]
        found.append((loss.item(), torch.cat(gradients), sum(map(objective.count, rows))))
    for loss, gradient, count in found[1:]:
        assert (loss, count) == (pytest.approx(found[0][0], rel=1e-5), found[0][2])
        assert (gradient - found[0][1]).norm() <= 2e-6 * found[0][1].norm()


def test_an_answer_that_is_certain_has_a_finite_gradient() -> None:
    log_probs = torch.zeros(2, requires_grad=True)
    sequence = pack_sequence([Tree([5, 6], [[7, 0]], [1.0])], share_prefix=True)
    Focal(0.5).loss(sequence, log_probs, None).backward()
    assert log_probs.grad.isfinite().all()


@pytest.mark.parametrize(
    ("name", "settings", "says"),
    [
        ("regression", {"focal_gamma": 2.0}, "--focal_gamma 2 cannot be minimised for task 'reg"),
        ("soft_classification", {"focal_gamma": 2.0}, "--focal_gamma 2 cannot"),
        ("preference", {"focal_gamma": 2.0}, "--focal_gamma 2 cannot"),
        ("multilabel", {"ranked_weight": 1.0}, r"leave it out \(--focal_gamma can\)"),
        ("rating", {"ranked_weight": 1.0, "focal_gamma": 1.0}, "keep one of them"),
        ("rating", {"ranked_weight": 1.0, "label_smoothing_factor": 0.1}, "keep one of them"),
        ("rating", {"ranked_weight": -1.0}, r"--ranked_weight must be from 0 \(off\) to 100"),
        ("rating", {"focal_gamma": float("nan")}, "--focal_gamma must be from 0"),
    ],
)
def test_a_loss_that_does_not_fit_is_refused(name, settings, says, tmp_path) -> None:
    with pytest.raises(ArgumentError, match=says):
        trainer_of(tmp_path, name, settings)
