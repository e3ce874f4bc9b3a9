"""Rows with choices of their own: scored as if each choice stood alone, whatever shares the row.

Run: python -m pytest tests/evaluation/test_choices.py
"""

import pandas as pd
import pytest
import torch

from lora_fsdp.compute.packed_model import PackedModel
from lora_fsdp.data.encoding import Encoder
from lora_fsdp.evaluation.metrics import evaluation_metrics, model_outputs
from lora_fsdp.evaluation.scoring import score_examples
from lora_fsdp.tasks import ClassificationTask, MultipleChoiceTask
from tests.support.tiny import adapted_model, randomise_adapter, tiny_tokenizer

TASK = MultipleChoiceTask()
# Two, three and four choices, the first a beginning of the second.
ROWS = [
    {"question": "was it late", "choices": ["bad", "bad crew"], "answer": "bad crew"},
    {"question": "my bag", "choices": ["lost", "late", "good"], "answer": "lost"},
    {"question": "the crew", "choices": ["friendly", "bad", "late", "help"], "answer": "bad"},
    {"question": "the flight", "choices": ["good", "cancelled"], "answer": "good"},
]


@pytest.fixture(scope="module")
def model():
    adapted = adapted_model()
    randomise_adapter(adapted)
    return adapted.eval()


def scored(model, rows, *, max_tokens=2048):
    examples = TASK.examples(pd.DataFrame(rows, index=range(1, len(rows) + 1)))
    encoded = Encoder(tiny_tokenizer(), task=TASK).encode(examples)
    scores = score_examples(
        PackedModel(model), encoded, device=torch.device("cpu"), max_tokens=max_tokens
    )
    return examples, encoded, scores


def alone(model, example):
    found = []
    for answer in example.candidate_ids:
        ids = torch.tensor([example.prompt_ids + answer])
        with torch.no_grad():
            logits = model(input_ids=ids, use_cache=False).logits[0]
        table = logits[len(example.prompt_ids) - 1 : -1].log_softmax(-1)
        found.append(table.gather(1, torch.tensor(answer)[:, None]).sum())
    return torch.stack(found)


@pytest.mark.parametrize("max_tokens", [250, 2048])
def test_likelihoods_equal_one_by_one(model, max_tokens):
    _, encoded, scores = scored(model, ROWS, max_tokens=max_tokens)
    assert scores.log_likelihoods.shape == (4, 4)
    for example, found in zip(encoded, scores.log_likelihoods, strict=True):
        count = len(example.candidate_ids)
        torch.testing.assert_close(found[:count], alone(model, example), rtol=1e-5, atol=1e-5)
        assert found[count:].tolist() == [-torch.inf] * (4 - count)
    sums = scores.probabilities.sum(dim=1)
    torch.testing.assert_close(sums, torch.ones(4))


@pytest.mark.parametrize("max_tokens", [250, 2048])
def test_labels_that_begin_others_are_scored_exactly(model, max_tokens):
    labels = ("bad", "bad crew", "bad crew late", "good")
    task = ClassificationTask(labels=labels, text_column="text", label_column="label")
    table = pd.DataFrame({"text": ["late", "my bag", "the crew", "help"], "label": labels})
    encoded = Encoder(tiny_tokenizer(), task=task).encode(task.bind(table).examples(table))
    scores = score_examples(
        PackedModel(model), encoded, device=torch.device("cpu"), max_tokens=max_tokens
    )
    for example, found in zip(encoded, scores.log_likelihoods, strict=True):
        torch.testing.assert_close(found, alone(model, example), rtol=1e-5, atol=1e-5)
    assert [example.label for example in encoded] == [0, 1, 2, 3]


def test_a_row_s_choices_do_not_touch_another_row_s_scores(model):
    changed = [dict(row) for row in ROWS]
    # The same tokens in number, so that the packed row has the same shape.
    changed[1] = {**changed[1], "choices": ["late", "lost", "good"]}
    _, _, before = scored(model, ROWS)
    _, _, after = scored(model, changed)
    for place in (0, 2, 3):
        assert torch.equal(before.log_likelihoods[place], after.log_likelihoods[place])
    assert not torch.equal(before.log_likelihoods[1], after.log_likelihoods[1])


def test_answers_metrics_and_probabilities(model):
    examples, encoded, scores = scored(model, ROWS)
    kind, outputs = TASK.answer_kind, model_outputs(encoded, scores)
    answers = kind.answers(examples, outputs)
    for row, answer in zip(ROWS, answers, strict=True):
        assert answer in row["choices"]
    right = sum(row["answer"] == answer for row, answer in zip(ROWS, answers, strict=True))
    metrics = evaluation_metrics(TASK, encoded, outputs)
    assert metrics["accuracy"] == right / 4
    choices = kind.run_columns(examples, outputs)["choices"]
    assert [text.count(":") for text in choices] == [2, 3, 4, 2]
