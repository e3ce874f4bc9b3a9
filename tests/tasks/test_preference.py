"""Which of two texts is better: forms of rows, rewards, loss, and what is no pair.

Run: python -m pytest tests/tasks/test_preference.py
"""

import json

import numpy as np
import pandas as pd
import pytest
import torch
from torch.nn.functional import logsigmoid
from trl import extract_prompt

from lora_fsdp.data.packing import pack_sequence
from lora_fsdp.errors import ArgumentError, ColumnNotFoundError, MalformedRowError
from lora_fsdp.tasks import Example, PreferenceTask, Prompt
from lora_fsdp.tasks.answers import ModelOutputs, Pairs
from lora_fsdp.training.step.objectives.objective import Tree
from lora_fsdp.training.step.objectives.preference import Preference


def rows_of(**columns) -> pd.DataFrame:
    count = len(next(iter(columns.values())))
    index = pd.RangeIndex(1, count + 1)
    return pd.DataFrame({n: pd.Series(cells, index, dtype=object) for n, cells in columns.items()})


def said(role: str, text: str) -> dict[str, str]:
    return {"role": role, "content": text}


ASKED = [said("system", "Be kind."), said("user", "Why?")]
GOOD, BAD = said("assistant", "Because."), said("assistant", "No.")
CONVERSATIONS = {
    "a column of prompts": {"prompt": [ASKED], "chosen": [[GOOD]], "rejected": [[BAD]]},
    "as JSON": {
        "prompt": [json.dumps(ASKED)],
        "chosen": [json.dumps([GOOD])],
        "rejected": [json.dumps([BAD])],
    },
    "the prompt in both": {"chosen": [[*ASKED, GOOD]], "rejected": [[*ASKED, BAD]]},
}


@pytest.mark.parametrize("form", CONVERSATIONS)
def test_conversations(form) -> None:
    table = rows_of(**CONVERSATIONS[form])
    task = PreferenceTask().bind(table)
    [example] = task.examples(table)
    assert example.prompt == Prompt("", "Why?", "", turns=(("system", "Be kind."),))
    assert (example.target, example.choices) == ("Because.", ("Because.", "No."))


def test_texts_are_taken_to_the_letter_or_framed() -> None:
    table = rows_of(prompt=["Q: why?\nA:"], chosen=[" because."], rejected=[" no."])
    [example] = PreferenceTask().bind(table).examples(table)
    assert str(example.prompt) == "Q: why?\nA:"
    assert example.choices == (" because.", " no.")
    assert example.target == " because."
    framed = PreferenceTask(instruction="Be kind:", beta=0.5)
    [example] = framed.bind(table).examples(table)
    assert str(example.prompt) == "Instruction: Be kind:\nInput: Q: why?\nA:\nOutput:"
    again = PreferenceTask(**framed.options())
    assert again.bind(table).examples(table) == [example]
    assert again.answer_kind.beta == 0.5
    assert PreferenceTask(**PreferenceTask().options()).instruction == ""


@pytest.mark.parametrize(
    ("chosen", "rejected"),
    [("The sky is blue.", "The sky is green."), ("It is so", "It isn't"), ("one two", "one ten")],
)
def test_a_prompt_that_both_begin_with_is_trls(chosen, rejected) -> None:
    table = rows_of(chosen=[chosen], rejected=[rejected])
    [example] = PreferenceTask().bind(table).examples(table)
    expected = extract_prompt({"chosen": chosen, "rejected": rejected})
    assert str(example.prompt) == expected["prompt"]
    assert example.choices == (expected["chosen"], expected["rejected"])


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"prompt": ["a", ""], "chosen": ["b", "b"], "rejected": ["c", "c"]},
         r"row 2 \(nothing in column 'prompt'\)"),
        ({"prompt": ["a", "a"], "chosen": ["b", " "], "rejected": ["c", "c"]},
         r"row 2 \(nothing in column 'chosen'\)"),
        ({"prompt": ["a", "a"], "chosen": ["b", "b"], "rejected": ["c", None]},
         r"row 2 \(nothing in column 'rejected'\)"),
        ({"prompt": ["a", "a"], "chosen": ["b", "b"], "rejected": ["c", "b "]},
         "row 2 .*'chosen' and 'rejected' are the same"),
        ({"prompt": ["a", "a"], "chosen": ["b", [GOOD]], "rejected": ["c", "b"]},
         "row 2 .*differ in form"),
        ({"prompt": ["a", "a"], "chosen": ["b", [GOOD, GOOD]], "rejected": ["c", [BAD]]},
         "row 2 .*one message of the assistant after the same conversation"),
        ({"prompt": ["a", "a"], "chosen": ["b", [{"says": "b"}]], "rejected": ["c", [BAD]]},
         "row 2 .*'chosen' holds no list of messages"),
        ({"prompt": ["a", [GOOD]], "chosen": ["b", [GOOD]], "rejected": ["c", [BAD]]},
         "row 2 .*ends with the user's"),
        ({"chosen": ["a b", "left"], "rejected": ["a c", "right"]}, "row 2 .*do not begin alike"),
    ],
)  # fmt: skip
def test_what_is_no_pair_is_named(columns, message) -> None:
    table = rows_of(**columns)
    with pytest.raises(MalformedRowError, match=message):
        PreferenceTask().bind(table)
    assert PreferenceTask().drop_bad_rows(table)[1] == 1


def test_columns_and_options_that_are_none() -> None:
    with pytest.raises(ColumnNotFoundError, match="needs 'rejected'"):
        PreferenceTask().bind(rows_of(prompt=["a"], chosen=["b"]))
    for beta in (0, -1, "0.1", float("nan"), True):
        with pytest.raises(ArgumentError, match="beta must be a number above 0"):
            PreferenceTask(beta=beta)


def outputs(scores, reference) -> ModelOutputs:
    tokens = np.array([[2, 8]] * len(scores))
    return ModelOutputs(np.array(scores, dtype=np.float32), tokens, (), np.array(reference))


def test_the_answer_has_the_larger_reward_whichever_stands_first() -> None:
    kind = Pairs(0.5)
    examples = [
        Example(1, Prompt("", "a", ""), " x", (" x", " y")),
        Example(2, Prompt("", "a", ""), " y", (" x", " y")),
    ]
    found = outputs([[-4.0, -9.0], [-4.0, -9.0]], [[-5.0, -8.0], [-3.0, -9.0]])
    assert kind.answers(examples, found) == ["x", "y"]
    metrics = kind.metrics_of_outputs(examples, found)
    assert metrics["reward_margin"] == pytest.approx((1.0 + 0.5) / 2)
    expected = -(np.log(1 / (1 + np.exp(-1.0))) + np.log(1 / (1 + np.exp(-0.5)))) / 2
    assert metrics["loss"] == pytest.approx(expected)
    assert kind.probabilities(found) == pytest.approx(
        [1 / (1 + np.exp(-1.0)), 1 / (1 + np.exp(-0.5))]
    )
    assert np.mean(kind.row_scores("reward_margin", examples, found)) == pytest.approx(0.75)


def test_the_base_itself_prefers_what_is_likelier_by_token() -> None:
    kind, example = Pairs(0.5), Example(1, Prompt("", "a", ""), " x", (" x", " y"))
    found = outputs([[-4.0, -9.0]], [[-4.0, -9.0]])
    assert kind.answers([example], found) == ["y"]
    assert kind.metrics_of_outputs([example], found)["loss"] == pytest.approx(np.log(2))
    nothing = ModelOutputs(np.zeros((0, 0)), np.zeros((0, 0)))
    assert list(kind.predicted_columns([], nothing)) == [
        "preferred", "probability", "reward_chosen", "reward_rejected",
    ]  # fmt: skip


def test_classic_baselines_compare_the_two_texts() -> None:
    rows = rows_of(
        prompt=["why"] * 12,
        chosen=["because of the rain", "thank you", "because of snow"] * 4,
        rejected=["no idea at all, sorry about it", "no", "no idea"] * 4,
    )
    task = PreferenceTask().bind(rows)
    examples, kind = task.examples(rows), task.answer_kind
    classic = kind.classic(examples, examples)
    accuracy = {
        name: task.measure(examples, kind.answers(examples, given))["accuracy"]
        for name, given in classic.items()
    }
    assert accuracy == pytest.approx({"longer text": 2 / 3, "TF-IDF + logistic": 1.0})


def test_pairs_have_weights_and_may_be_the_wrong_way_round() -> None:
    objective = Preference(0.2, beta=0.3)
    trees = [
        Tree([1, 2], [[3, 0], [4, 5, 0]], [2.0, -2.0]),
        Tree([1, 6], [[4, 0], [3, 0]], [0.5, -0.5]),
    ]
    sequence = pack_sequence(trees, share_prefix=True)
    log_probs, reference = -torch.rand(9), -torch.rand(9)
    gains = (log_probs - reference).split([2, 3, 2, 2])
    margins = [0.3 * (gains[0].sum() - gains[1].sum()), 0.3 * (gains[2].sum() - gains[3].sum())]
    by_hand = sum(
        -weight * (0.8 * logsigmoid(margin) + 0.2 * logsigmoid(-margin))
        for weight, margin in zip((2.0, 0.5), margins, strict=True)
    )
    assert objective.loss(sequence, log_probs, reference).item() == pytest.approx(by_hand.item())
    padded = sequence.padded(tokens=len(sequence) + 3, labels=13)
    more = torch.cat([log_probs, torch.full((4,), -9.0)]), torch.cat([reference, torch.zeros(4)])
    assert objective.loss(padded, *more).item() == pytest.approx(by_hand.item())
