"""Generated text: in batches that the ranks share, the same on any number of them.

Run: python -m pytest tests/evaluation/test_writing.py
"""

import pytest
import torch

from lora_fsdp.evaluation import generation as writing
from lora_fsdp.evaluation.generation import generate_texts
from tests.support.ranks import launch_environment, run_ranks
from tests.support.runs import toy_trainer
from tests.support.tiny import tiny_tokenizer


def test_batches_hold_every_prompt_once_and_are_bounded():
    lengths = [5, 900, 40, 7] * 30
    batches = writing.plan_batches(lengths, max_new_tokens=100)
    assert sorted(place for batch in batches for place in batch) == list(range(120))
    for batch in batches:
        assert len(batch) <= 32
        assert len(batch) * (max(lengths[place] for place in batch) + 100) <= 16_384


def test_a_prompt_longer_than_a_batch_has_its_own():
    assert writing.plan_batches([20_000, 3], max_new_tokens=5) == [[1], [0]]


def write_in_small_batches(folder, limit):
    """13 prompts in batches of 3, so that two ranks get unequal numbers of batches."""
    writing._MOST_PROMPTS = 3
    trainer = toy_trainer(folder, num_train_epochs=1, max_new_tokens=limit)
    texts = trainer.write(trainer.eval_dataset)
    one_by_one = [
        generate_texts(
            trainer.model,
            tiny_tokenizer(),
            [example.prompt_ids],
            device=torch.device("cpu"),
            max_new_tokens=limit,
            temperature=0.0,
            end_token_id=trainer.encoder.end_token_id,
        )[0]
        for example in trainer.eval_dataset
    ]
    return texts, one_by_one


@pytest.mark.distributed
def test_ranks_share_the_batches_and_agree(tmp_path):
    environment = launch_environment("fsdp2_cpu.yaml")
    [(alone, one_by_one)] = run_ranks(write_in_small_batches, tmp_path, 6, world_size=1)
    ranks = run_ranks(write_in_small_batches, tmp_path, 6, environment=environment)
    assert alone == one_by_one
    assert len(set(alone)) > 1
    for texts, _ in ranks:
        assert texts == alone
