"""Likelihoods of answers: equal to one-by-one computation, on any ranks.

Run: python -m pytest tests/evaluation/test_scoring.py
"""

import numpy as np
import pytest
import torch
from peft import LoraConfig

from lora_fsdp.adapter.attach import attach_adapter
from lora_fsdp.compute.packed_model import PackedModel
from lora_fsdp.data.encoding import Encoder
from lora_fsdp.data.sampling import ScoringSequences
from lora_fsdp.errors import LoraFsdpError
from lora_fsdp.evaluation.metrics import evaluation_metrics, model_outputs
from lora_fsdp.evaluation.scoring import Scores, score_examples, score_sequences
from lora_fsdp.tasks import Example, Prompt, Task
from lora_fsdp.tasks.answers import ModelOutputs
from tests.support.ranks import launch_environment, run_ranks
from tests.support.runs import toy_trainer
from tests.support.tiny import (
    ToyTask,
    randomise_adapter,
    tiny_model,
    tiny_tokenizer,
    toy_table,
)

CPU = torch.device("cpu")
FP32 = torch.float32


class FreeTask(Task):
    """Free text: the answer is a sentence."""

    name = "free"


def encoded(count=13, *, task=None):
    task = task or ToyTask()
    table = toy_table(count, seed=9)
    return Encoder(tiny_tokenizer(), task=task, max_length=128).encode(task.examples(table))


def adapted(kind="llama"):
    config = LoraConfig(
        r=4, target_modules="all-linear", fan_in_fan_out=kind == "gpt2", task_type="CAUSAL_LM"
    )
    model = attach_adapter(tiny_model(kind), config)
    randomise_adapter(model)
    return model.eval()


def one_by_one(model, example):
    """Log-probability of each answer, each computed as a text of its own."""
    found = []
    for answer in example.candidate_ids or (example.target_ids,):
        ids = torch.tensor([example.prompt_ids + answer])
        with torch.no_grad():
            logits = model(input_ids=ids, use_cache=False).logits[0]
        table = logits[len(example.prompt_ids) - 1 : -1].log_softmax(-1)
        found.append(table.gather(1, torch.tensor(answer)[:, None]).sum())
    return torch.stack(found)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen3"])
@pytest.mark.parametrize("max_tokens", [128, 2048])
def test_likelihoods_equal_one_by_one(kind, max_tokens):
    model, examples = adapted(kind), encoded()
    scores = score_examples(PackedModel(model), examples, device=CPU, max_tokens=max_tokens)
    expected = torch.stack([one_by_one(model, example) for example in examples])
    torch.testing.assert_close(scores.log_likelihoods, expected, rtol=1e-5, atol=1e-5)
    assert scores.log_likelihoods.shape == (13, 3)


def test_free_text_has_one_answer():
    model = adapted()
    task = FreeTask()
    examples = Encoder(tiny_tokenizer(), task=task).encode(
        [
            Example(1, Prompt("Say:", " hi", ":"), " good crew"),
            Example(2, Prompt("", "a", ""), " b"),
        ]
    )
    scores = score_examples(PackedModel(model), examples, device=CPU)
    expected = torch.stack([one_by_one(model, example) for example in examples])
    torch.testing.assert_close(scores.log_likelihoods, expected, rtol=1e-5, atol=1e-5)
    metrics = evaluation_metrics(task, examples, model_outputs(examples, scores))
    tokens = sum(len(example.target_ids) for example in examples)
    assert metrics["loss"] == pytest.approx(-float(expected.sum()) / tokens, rel=1e-5)


def test_free_text_without_targets():
    """There is nothing to score, and nothing to stumble over."""
    examples = Encoder(tiny_tokenizer(), task=FreeTask()).encode(
        [Example(1, Prompt("Say:", " hi", ":"), None), Example(2, Prompt("", "a", ""), " b")]
    )
    scores = score_examples(PackedModel(adapted()), examples, device=CPU)
    assert scores.log_likelihoods.shape == (2, 1)
    outputs = model_outputs(examples, scores)
    assert evaluation_metrics(FreeTask(), examples, outputs)["loss"] > 0


def test_dropout_is_off_and_the_mode_restored():
    config = LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.5, task_type="CAUSAL_LM")
    model = attach_adapter(tiny_model(), config)
    randomise_adapter(model)
    model.train()
    first, second = (
        score_examples(PackedModel(model), encoded(), device=CPU).log_likelihoods for _ in range(2)
    )
    assert torch.equal(first, second)
    assert model.training


def test_best_and_probabilities():
    scores = Scores(torch.tensor([[-1.0, -3.0], [-2.0, -0.5]]))
    assert scores.best == [0, 1]
    torch.testing.assert_close(scores.probabilities.sum(dim=1), torch.ones(2))
    task = ToyTask(labels=("no", "yes"))
    outputs = ModelOutputs(scores.log_likelihoods.numpy(), np.ones((2, 2)))
    assert task.answer_kind.answers([], outputs) == ["no", "yes"]
    np.testing.assert_allclose(outputs.probabilities, scores.probabilities.numpy(), rtol=1e-6)


def test_metrics_use_the_examples_with_a_target():
    task = ToyTask()
    examples = encoded(6)
    without = [
        *examples,
        *Encoder(tiny_tokenizer(), task=task).encode([Example(7, Prompt("a", "b", "c"), None)]),
    ]
    scores = score_examples(PackedModel(adapted()), without, device=CPU)
    cut = Scores(scores.log_likelihoods[:6])
    assert evaluation_metrics(task, without, model_outputs(without, scores)) == (
        evaluation_metrics(task, examples, model_outputs(examples, cut))
    )


def test_target_outside_the_candidates_is_not_taken_for_the_first_label():
    """`build_target` and `target_of` disagree by a blank: an easy mistake in one's own task."""

    class Blankless(ToyTask):
        name = "blankless"

        def build_target(self, row):
            return str(row["label"])

    task = Blankless()
    with pytest.raises(LoraFsdpError, match=r"target|label"):
        evaluate_all(task, encoded(6, task=task))


def evaluate_all(task, examples):
    scores = score_examples(PackedModel(adapted()), examples, device=CPU)
    return evaluation_metrics(task, examples, model_outputs(examples, scores))


def score_on_ranks(folder, max_tokens):
    trainer = toy_trainer(folder, max_tokens_per_row=max_tokens)
    randomise_adapter(trainer.model)
    scores = trainer.score(trainer.eval_dataset)
    return scores.log_likelihoods.numpy(), trainer.evaluate()


@pytest.mark.distributed
@pytest.mark.parametrize("max_tokens", [128, 2048])
def test_two_ranks_give_the_bits_of_one(max_tokens, tmp_path):
    """13 examples in rows of a few: the ranks get unequal numbers of rows, or one gets none."""
    environment = launch_environment("fsdp2_cpu.yaml")
    [alone] = run_ranks(score_on_ranks, tmp_path, max_tokens, world_size=1)
    ranks = run_ranks(score_on_ranks, tmp_path, max_tokens, environment=environment)
    for likelihoods, metrics in ranks:
        assert (likelihoods == alone[0]).all()
        assert metrics["eval_accuracy"] == alone[1]["eval_accuracy"]
        assert metrics["eval_loss"] == alone[1]["eval_loss"]


def test_rows_may_come_in_any_order():
    model, examples = adapted(), encoded()
    rows = ScoringSequences(examples, rank=0, world_size=1, max_tokens=128)
    assert len(rows) > 1
    backwards = score_sequences(
        PackedModel(model),
        (rows[index] for index in reversed(range(len(rows)))),
        answers=[3] * len(examples),
        device=CPU,
    )
    forwards = score_examples(PackedModel(model), examples, device=CPU, max_tokens=128)
    assert torch.equal(backwards.log_likelihoods, forwards.log_likelihoods)
