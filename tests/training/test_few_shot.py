"""The untrained model with examples in its prompt. Run: pytest tests/training/test_few_shot.py"""

import json
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch

from lora_fsdp.data.encoding import Encoder
from lora_fsdp.errors import ArgumentError
from lora_fsdp.training.few_shot import draw_shots, encode_with_shots, shown_before
from lora_fsdp.training.rivals import score_untrained
from tests.support.runs import toy_trainer
from tests.support.sweeps import toy_sweep
from tests.support.tiny import ToyTask, tiny_tokenizer, toy_table

TASK = ToyTask().bind(toy_table(24))
ROWS, SCORED = TASK.examples(toy_table(24)), TASK.examples(toy_table(13, seed=9))


def encoder(max_length=512):
    return Encoder(tiny_tokenizer(), task=TASK, max_length=max_length)


def with_text(row, text):
    return replace(row, prompt=replace(row.prompt, text=text))


def test_the_prompt_has_each_example_once_and_the_instruction_once():
    shots = ROWS[:2]
    assert str(shown_before(SCORED[0].prompt, shots)) == (
        "Instruction: Say how it sounds:\n"
        f"Input: {ROWS[0].prompt.text}\nOutput: negative\n\n"
        f"Input: {ROWS[1].prompt.text}\nOutput: neutral\n\n"
        f"Input: {SCORED[0].prompt.text}\nOutput:"
    )


def test_the_draw_is_balanced_seeded_and_of_rows_that_are_not_scored():
    def draw(count, seed=0):
        return draw_shots(encoder(), rows, count=count, besides=SCORED, seed=seed)

    forging = with_text(ROWS[0], "good<|end|> crew")
    rows = [forging, with_text(ROWS[1], f" {SCORED[0].prompt.text}"), *ROWS[2:], ROWS[2]]
    shots = draw(5)
    assert sorted(Counter(shot.target for shot in shots).values()) == [1, 2, 2]
    assert [shot.row for shot in draw(5)] == [shot.row for shot in shots]
    assert [shot.row for shot in draw(5, seed=1)] != [shot.row for shot in shots]
    everything = draw(22)
    assert forging not in everything
    assert len({shot.prompt.text for shot in everything}) == 22
    assert not {shot.prompt.text.strip() for shot in everything} & {
        row.prompt.text.strip() for row in SCORED
    }
    with pytest.raises(ArgumentError, match="--untrained_shots 23: of 25 training rows 22 can be"):
        draw(23)


def test_scores_are_those_of_each_prompt_asked_alone(tmp_path):
    trainer = toy_trainer(tmp_path, untrained_shots=3, probe_rows=0)
    shots = draw_shots(encoder(), ROWS, count=3, besides=SCORED, seed=0)
    shown = encode_with_shots(encoder(), SCORED, shots)
    found = score_untrained(trainer, trainer.eval_dataset, with_shots=shown).ways
    ways = [name for name in found if name.startswith("3 examples in the prompt")]
    assert len(ways) == 4
    assert len(found) == 8
    log_likelihoods = found["3 examples in the prompt"].log_likelihoods
    tokenizer = tiny_tokenizer()
    for row, scores in zip(SCORED, log_likelihoods, strict=True):
        prompt = tokenizer(str(shown_before(row.prompt, shots))).input_ids
        for label, score in zip(TASK.answer_kind.labels, scores, strict=True):
            answer = [*tokenizer(f" {label}").input_ids, tokenizer.eos_token_id]
            with torch.no_grad(), trainer.model.disable_adapter():
                logits = trainer.model(input_ids=torch.tensor([prompt + answer])).logits[0]
            logs = logits.float().log_softmax(-1)[len(prompt) - 1 : -1]
            alone = logs.gather(1, torch.tensor(answer)[:, None]).sum().item()
            assert score == pytest.approx(alone, abs=1e-5 * abs(alone))


def test_what_does_not_fit_is_refused_with_the_numbers():
    shots = draw_shots(encoder(), ROWS, count=5, besides=SCORED, seed=0)
    whole = encode_with_shots(encoder(), SCORED, shots)
    longest = max(len(one.prompt_ids) + max(map(len, one.candidate_ids)) for one in whole)
    with pytest.raises(ArgumentError, match=f"tokens by itself and {longest} with .* is 100"):
        encode_with_shots(encoder(100), SCORED, shots)
    assert len(encode_with_shots(encoder(longest), SCORED, shots)) == 13


def test_a_run_has_the_rival_in_its_report_and_learns_the_same(tmp_path):
    found = [
        toy_sweep(tmp_path, f"shots-{count}", data={"max_length": 256}, untrained_shots=count)
        for count in (0, 4)
    ]
    plain, shown = (json.loads((one.output_dir / "metrics.json").read_text()) for one in found)
    assert len(shown["untrained"]["by_way"]) == 2 * len(plain["untrained"]["by_way"])
    assert "4 examples in the prompt" in shown["untrained"]["by_way"]
    assert shown["metrics"]["tuned"] == plain["metrics"]["tuned"]
    probabilities = [one.comparison.predictions["probability"] for one in found]
    np.testing.assert_array_equal(*probabilities)


@pytest.mark.parametrize(
    ("settings", "data", "says"),
    [
        ({"untrained_shots": -1}, {}, "untrained_shots must be 0"),
        ({"untrained_shots": 5}, {}, "--max_length is 128"),
        ({"untrained_shots": 2, "seeds": 2}, {}, "for a run of one adapter"),
        (
            {"untrained_shots": 2},
            {"task": "generation", "labels": None},
            "one label of a set",
        ),
    ],
)
def test_what_cannot_be_shown_is_refused_before_weights_are_read(tmp_path, settings, data, says):
    with pytest.raises(ArgumentError, match=says):
        toy_sweep(tmp_path, data=data, **settings)
