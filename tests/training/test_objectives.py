"""Two more losses, a file's worth each: the gradients of plain computation, however it is packed.

Run: python -m pytest tests/training/test_objectives.py
"""

import pytest
import torch
from peft import LoraConfig
from torch.nn import functional

from lora_fsdp import FineTuningArguments, LoraTrainer
from lora_fsdp.adapter.attach import attach_adapter
from lora_fsdp.adapter.ownership import trainable_parameters
from lora_fsdp.compute.packed_model import PackedModel
from lora_fsdp.data.packing import pack_sequence
from lora_fsdp.errors import ArgumentError
from lora_fsdp.training.step.objectives.objective import (
    Objective,
    Tree,
    sum_over_answers,
    sum_over_examples,
)
from lora_fsdp.training.step.objectives.supervised import Supervised
from tests.support.ranks import launch_environment, run_ranks
from tests.support.tiny import (
    ToyTask,
    adapted_model,
    randomise_adapter,
    tiny_model,
    tiny_tokenizer,
    toy_table,
)

FSDP = launch_environment("fsdp2_cpu.yaml") | {"FSDP_RESHARD_AFTER_FORWARD": "true"}
BETA = 0.3


class Distribution(Objective):
    """Weighted cross-entropy to a distribution over an example's candidates."""

    @staticmethod
    def wanted(example):
        """The right one most, the others by the row."""
        shares = torch.tensor([1.0 + (example.row + n) % 3 for n in range(3)])
        shares[example.label] += 6.0
        return shares / shares.sum()

    def tree(self, example):
        targets = (self.count(example) * self.wanted(example)).tolist()
        return Tree(example.prompt_ids, example.candidate_ids, targets)

    def count(self, example):
        return 1.0 + example.row % 3

    def loss(self, sequence, log_probs, reference):
        scores, examples = sum_over_answers(sequence, log_probs), sequence.answer_examples
        rivals = scores[None].where(examples[:, None] == examples[None], -torch.inf)
        return -(sequence.answer_targets * (scores - rivals.logsumexp(dim=1))).sum()

    def alone(self, example, scores, reference):
        return -self.count(example) * (self.wanted(example) * scores.log_softmax(0)).sum()


class Preference(Objective):
    """Direct preference optimisation (arXiv 2305.18290) of the right answer over the next one."""

    needs_reference = True

    def tree(self, example):
        rejected = example.candidate_ids[(example.label + 1) % 3]
        return Tree(example.prompt_ids, [example.target_ids, rejected], [1.0, -1.0])

    def count(self, example):
        return 1.0

    def loss(self, sequence, log_probs, reference):
        gains = sum_over_answers(sequence, log_probs - reference)
        margins = sum_over_examples(sequence, sequence.answer_targets * gains)
        is_example = sum_over_examples(sequence, sequence.answer_targets.abs()) > 0
        return -functional.logsigmoid(BETA * margins).where(is_example, 0.0).sum()

    def alone(self, example, scores, reference):
        gains = scores - reference
        return -functional.logsigmoid(BETA * (gains[0] - gains[1]))


OBJECTIVES = {"distribution": Distribution, "preference": Preference}


def trainer_of(folder, name, options, *, model=None):
    task = ToyTask().bind(toy_table())
    if model is None:
        model = adapted_model()
        randomise_adapter(model)
    settings = {
        "per_device_train_batch_size": 8, "learning_rate": 1e-2, "logging_steps": 1, "seed": 3,
        "save_strategy": "no", "disable_tqdm": True, "lr_scheduler_type": "constant",
        "num_train_epochs": 6,
    }  # fmt: skip
    return LoraTrainer(
        model=model,
        args=FineTuningArguments(output_dir=str(folder), **{**settings, **options}),
        task=task,
        processing_class=tiny_tokenizer(),
        train_dataset=task.examples(toy_table()),
        max_length=128,
        objective=OBJECTIVES[name](),
    )


def first_step(folder, name, options):
    """Loss and gradients of the first optimizer step; then the losses of a whole training."""
    trainer = trainer_of(folder, name, options)
    step = trainer.get_train_dataloader().dataset[0]
    loss = trainer.training_step(trainer.model, step).item()
    parameters = trainable_parameters(trainer.model)
    gradients = {n: p.grad.clone().numpy() for n, p in parameters.items()}
    trainer.train()
    return {
        "loss": loss,
        "gradients": gradients,
        "rows": step.example_rows,
        "sequences": len(step.sequences),
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        "adapter": trainer.adapter.fingerprint(),
    }


def log_likelihood(model, prompt, answer):
    logits = model(input_ids=torch.tensor([prompt + answer]), use_cache=False).logits[0]
    table = logits[len(prompt) - 1 : -1].log_softmax(-1)
    return table.gather(1, torch.tensor(answer)[:, None]).sum()


def one_by_one(name, rows, folder):
    """By transformers and PEFT alone: each answer by itself, autograd over the mean."""
    examples = {e.row: e for e in trainer_of(folder, name, {}).train_dataset}
    model, objective = adapted_model(), OBJECTIVES[name]()
    randomise_adapter(model)
    losses = []
    for example in (examples[row] for row in rows):
        tree = objective.tree(example)
        scores, reference = [], []
        for answer in tree.answers:
            scores.append(log_likelihood(model, tree.prompt_ids, answer))
            with model.disable_adapter(), torch.no_grad():
                reference.append(log_likelihood(model, tree.prompt_ids, answer))
        losses.append(objective.alone(example, torch.stack(scores), torch.stack(reference)))
    loss = sum(losses) / sum(objective.count(examples[row]) for row in rows)
    loss.backward()
    return loss.item(), {n: p.grad for n, p in trainable_parameters(model).items()}


WAYS = {
    "shared": ({"share_prefix": "always"}, 1, None),
    "apart": ({"share_prefix": "never"}, 1, None),
    "several sequences": ({"max_tokens_per_row": 128}, 1, None),
    "eager": ({"step": "eager"}, 1, None),
    "accumulated": (
        {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}, 1, None,
    ),
    "two ranks": ({"per_device_train_batch_size": 4}, 2, None),
    "two ranks apart": ({"per_device_train_batch_size": 4, "share_prefix": "never"}, 2, None),
    "two ranks, several sequences": ({"max_tokens_per_row": 128}, 2, FSDP),
    "two ranks, gathered": ({"per_device_train_batch_size": 4}, 2, FSDP),
}  # fmt: skip


@pytest.mark.distributed
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", OBJECTIVES)
def test_gradients_are_those_of_plain_computation(name, way, tmp_path):
    options, world_size, environment = WAYS[way]
    ranks = run_ranks(
        first_step, tmp_path / "run", name, options, world_size=world_size, environment=environment
    )
    rows = sorted(row for rank in ranks for row in rank["rows"])
    assert len(rows) == (16 if way == "two ranks, several sequences" else 8)
    loss, gradients = one_by_one(name, rows, tmp_path / "alone")
    assert sum(rank["loss"] for rank in ranks) / world_size == pytest.approx(loss, rel=1e-5)
    for rank in ranks:
        found = {n: torch.from_numpy(gradient) for n, gradient in rank["gradients"].items()}
        distance = torch.stack([(found[n] - gradients[n]).norm() for n in gradients]).norm()
        assert distance <= 2e-6 * torch.stack([g.norm() for g in gradients.values()]).norm()
        assert rank["adapter"] == ranks[0]["adapter"]
        an_epoch = len(rank["losses"]) // 6
        assert sum(rank["losses"][-an_epoch:]) < sum(rank["losses"][:an_epoch])
    assert (max(rank["sequences"] for rank in ranks) > 1) == ("max_tokens_per_row" in options)


@pytest.mark.parametrize("name", [*OBJECTIVES, "supervised"])
def test_padding_counts_nothing(name, tmp_path):
    """As a CUDA graph pads."""
    objective = {**OBJECTIVES, "supervised": Supervised}[name]()
    model = adapted_model()
    randomise_adapter(model)
    packed = PackedModel(model)
    examples = trainer_of(tmp_path, "distribution", {}).train_dataset[:5]
    plain = pack_sequence([objective.tree(example) for example in examples], share_prefix=True)
    padded = plain.padded(tokens=len(plain) + 30, labels=plain.labels.shape[1] + 17)
    losses, gradients = [], []
    for sequence in (plain, padded):
        model.zero_grad()
        reference = packed.reference_log_probs(sequence)
        loss = objective.loss(sequence, packed.label_log_probs(sequence), reference)
        loss.backward()
        losses.append(loss.item())
        parameters = trainable_parameters(model).values()
        gradients.append(torch.cat([p.grad.flatten() for p in parameters]))
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert (gradients[1] - gradients[0]).norm() <= 2e-6 * gradients[0].norm()


def test_the_reference_is_the_frozen_base():
    model = adapted_model()
    randomise_adapter(model)
    model.train()
    sequence = pack_sequence([Tree([5, 6, 7], [[8, 9, 0], [10, 0]])], share_prefix=True)
    packed = PackedModel(model)
    found = packed.reference_log_probs(sequence)
    assert torch.equal(found, PackedModel(tiny_model()).label_log_probs(sequence))
    assert not torch.equal(found, packed.label_log_probs(sequence))
    assert model.training
    assert len(trainable_parameters(model)) == 42


def test_an_adapter_that_changed_the_base_has_no_reference(tmp_path):
    config = LoraConfig(
        r=4, target_modules="all-linear", init_lora_weights="pissa", task_type="CAUSAL_LM"
    )
    model = tiny_model()
    model.config.name_or_path = model.name_or_path = "a/base"
    with pytest.raises(ArgumentError, match=r"Preference compares with the base.*'pissa'"):
        trainer_of(tmp_path, "preference", {}, model=attach_adapter(model, config))
