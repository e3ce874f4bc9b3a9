"""What the untrained base gives: read in several ways, and probed.

Run: python -m pytest tests/evaluation/test_untrained.py
"""

import numpy as np
import pytest
import torch

from lora_fsdp.compute.packed_model import PackedModel
from lora_fsdp.data.encoding import Encoder
from lora_fsdp.data.packing import Packing
from lora_fsdp.data.sampling import ScoringSequences
from lora_fsdp.evaluation.metrics import model_outputs
from lora_fsdp.evaluation.outputs import PROBE
from lora_fsdp.evaluation.probing import MeanStates, probe_answers, shared_tokens
from lora_fsdp.evaluation.scoring import Scores, score_examples, score_sequences
from lora_fsdp.evaluation.untrained import (
    AS_TRAINED,
    CALIBRATED,
    WITHOUT_END,
    best_way,
    ways_of_reading,
)
from lora_fsdp.training.rivals import score_untrained
from tests.support.built_in import trainer_of
from tests.support.ranks import launch_environment, run_ranks
from tests.support.runs import toy_trainer
from tests.support.tiny import (
    LABELS,
    ToyTask,
    adapted_model,
    randomise_adapter,
    tiny_tokenizer,
    toy_table,
)

CPU = torch.device("cpu")


def encoded(count=13):
    task = ToyTask()
    return Encoder(tiny_tokenizer(), task=task, max_length=128).encode(
        task.examples(toy_table(count, seed=9))
    )


def test_the_end_token_apart():
    model, examples = adapted_model().eval(), encoded(6)
    scores = score_examples(PackedModel(model), examples, device=CPU)
    for place, example in enumerate(examples):
        for answer, ids in enumerate(example.candidate_ids):
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([example.prompt_ids + ids])).logits[0]
            end = logits[-2].log_softmax(-1)[ids[-1]]
            found = scores.end_log_likelihoods[place, answer]
            torch.testing.assert_close(found, end, rtol=1e-4, atol=1e-5)


def scores_of(log_likelihoods, ends):
    return Scores(torch.tensor(log_likelihoods), torch.tensor(ends))


def test_the_best_way_of_reading():
    """A model that knows the label but for a liking, and for ends that it finds unlikely."""
    examples = encoded(30)
    truth = np.array([example.label for example in examples])
    generator = np.random.default_rng(0)
    knowing = generator.normal(size=(30, 3)).astype(np.float32) - 3
    knowing[np.arange(30), truth] += 4
    ends = np.tile(np.float32([[-0.1, -6.0, -0.2]]), (30, 1))
    liking = np.tile(np.float32([[5.0, 0.0, 0.0]]), (30, 1))
    scores = scores_of(knowing + ends + liking, ends)
    ways = ways_of_reading(ToyTask(), model_outputs(examples, scores), scores)
    both = f"{WITHOUT_END}, {CALIBRATED}"
    assert list(ways) == [AS_TRAINED, WITHOUT_END, CALIBRATED, both]
    np.testing.assert_allclose(ways[WITHOUT_END].log_likelihoods, knowing + liking, atol=1e-5)
    way, by_way = best_way(ToyTask(), examples, ways)
    assert by_way[way] == max(by_way.values()) > 0.9
    assert by_way[AS_TRAINED] < 0.5
    assert CALIBRATED in way
    # A liking for a label, whatever it comes from, is taken out.
    for name in (CALIBRATED, both):
        means = ways[name].log_likelihoods.mean(axis=0)
        np.testing.assert_allclose(means, means.mean(), atol=1e-5)
    # The first of equal ways, which is how the model is asked after training.
    alike = {name: ways[AS_TRAINED] for name in ways}
    assert best_way(ToyTask(), examples, alike)[0] == AS_TRAINED


def states_of(packed, examples, *, max_tokens, skip=None, packing=Packing.PACKED):
    packed.packing = packing
    sequences = ScoringSequences(
        examples, rank=0, world_size=1, max_tokens=max_tokens, packing=packing
    )
    with MeanStates(packed, len(examples), shared_tokens(examples) if skip is None else skip) as it:
        score_sequences(
            packed,
            (sequences[place] for place in range(len(sequences))),
            answers=[3] * len(examples),
            device=CPU,
            states=it,
        )
    return it.features(device=CPU), len(sequences)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("fused", [False, True])
def test_states_are_those_of_each_prompt_alone(kind, fused):
    """However rows are packed, also alone in a sequence, where all of a prompt is its prefix."""
    model, examples = adapted_model(kind).eval(), encoded()
    packed = PackedModel(model)
    if fused:
        packed.fuse()
        packed.shortened_last_layer = True
    skip = shared_tokens(examples)
    assert skip > 5
    expected = []
    for example in examples:
        with torch.no_grad():
            ids = torch.tensor([example.prompt_ids])
            hidden = model(input_ids=ids, output_hidden_states=True).hidden_states[-1][0]
        expected.append(hidden[skip:].mean(dim=0).numpy())
    counts = set()
    for max_tokens in (16, 128, 4096):
        found, count = states_of(packed, examples, max_tokens=max_tokens)
        counts.add(count)
        np.testing.assert_allclose(found, np.stack(expected), rtol=2e-4, atol=2e-5)
    assert max(counts) == len(examples)
    assert min(counts) == 1
    assert packed.shortened_last_layer == fused
    for packing in (Packing.BATCHED, Packing.SINGLE):
        found, _ = states_of(packed, examples, max_tokens=512, packing=packing)
        np.testing.assert_allclose(found, np.stack(expected), rtol=2e-4, atol=2e-5)


def test_a_probe_learns_what_is_in_the_states():
    generator = np.random.default_rng(0)
    labels = [LABELS[number % 3] for number in range(200)]
    features = generator.normal(size=(200, 40))
    features[:, 7] = 0.0  # a place that says nothing of any row
    for number, label in enumerate(labels):
        features[number, LABELS.index(label)] += 3
    answers = probe_answers(features[:150], labels[:150], features[150:])
    right = [answer == label for answer, label in zip(answers, labels[150:], strict=True)]
    assert sum(right) / len(right) > 0.85
    assert probe_answers(features[:3], ["a"] * 3, features[:2]) == ["a", "a"]


def probe_on_ranks(folder):
    trainer = toy_trainer(folder, rows=36, probe_rows=30)
    randomise_adapter(trainer.model)
    found = score_untrained(trainer, trainer.eval_dataset)
    outputs = trainer.outputs()
    with trainer.model.disable_adapter():
        alone = trainer.outputs()
    assert np.array_equal(found.ways[AS_TRAINED].log_likelihoods, alone.log_likelihoods)
    assert not np.array_equal(outputs.log_likelihoods, alone.log_likelihoods)
    sequences = trainer.get_eval_dataloader(trainer.eval_dataset)
    skip = shared_tokens(trainer.eval_dataset)
    return found.answers, found.facts, trainer.scorer.features(sequences, skip=skip)


@pytest.mark.distributed
def test_sharded_ranks_gather_the_states_of_one_process(tmp_path):
    environment = launch_environment("fsdp2_cpu.yaml")
    [(answers, facts, features)] = run_ranks(probe_on_ranks, tmp_path / "alone", world_size=1)
    assert facts == {"probe_rows": 30}
    assert len(answers[PROBE]) == 13
    assert set(answers[PROBE]) <= set(LABELS)
    for on_rank in run_ranks(probe_on_ranks, tmp_path / "two", environment=environment):
        assert on_rank[0] == answers
        np.testing.assert_allclose(on_rank[2], features, rtol=1e-5, atol=1e-6)


def test_no_probe_where_no_regression_fits(model_folder, tmp_path):
    trainer, data = trainer_of("multiple-choice", model_folder, tmp_path)
    found = score_untrained(trainer, trainer.eval_dataset)
    assert found.answers == {}
    # Choices of a row's own are no labels, which a batch could calibrate.
    assert list(found.ways) == [AS_TRAINED, WITHOUT_END]
    assert len(data.held_out) == len(found.ways[WITHOUT_END].log_likelihoods)


def test_without_a_probe(tmp_path):
    trainer = toy_trainer(tmp_path, probe_rows=0)
    assert score_untrained(trainer, trainer.eval_dataset).answers == {}
