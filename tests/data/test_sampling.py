"""Which examples a rank sees at a step: a function of seed, epoch and step, whatever the ranks.

Run: python -m pytest tests/data/test_sampling.py
"""

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_fsdp.data.encoding import EncodedExample
from lora_fsdp.data.sampling import ScoringSequences, TrainingSteps, epoch_order
from lora_fsdp.tasks import Example, Prompt

HEAD = [2, 3, 4]


def make_examples(count, *, closed=True):
    """Examples whose prompts end with their own number."""
    candidates = ([11, 0], [12, 13, 0], [14, 0]) if closed else ()
    examples = []
    for number in range(count):
        label = number % 3
        target = candidates[label] if closed else [20 + number % 5] * (1 + number % 4) + [0]
        prompt = HEAD + [30 + number] * (1 + number % 5)
        label = label if closed else None
        source = Example(number, Prompt("", "text", ""), " answer")
        examples.append(EncodedExample(number, prompt, target, candidates, label, False, source))
    return examples


def training_steps(examples, *, rank=0, world_size=1, per_step=6, **options):
    settings_ = {"seed": 1, "share_prefix": True, "max_tokens": 40, **options}
    return TrainingSteps(
        examples, examples_per_step=per_step, rank=rank, world_size=world_size, **settings_
    )


def seen(step):
    """The numbers of the examples that really lie in the step's sequences."""
    numbers = []
    for sequence in step.sequences:
        ends = sequence.input_ids[sequence.label_positions[sequence.label_ids != 0]]
        own = sorted({int(token) - 30 for token in sequence.input_ids if token >= 30})
        assert len(ends) > 0 or len(sequence) == 1
        numbers += own
    return numbers


worlds = st.sampled_from([1, 2, 3, 4])


@settings(max_examples=100, deadline=None)
@given(
    count=st.integers(1, 40),
    world_size=worlds,
    batch=st.integers(1, 5),
    max_tokens=st.integers(8, 80),
    share_prefix=st.booleans(),
    epoch=st.integers(0, 3),
)
def test_every_example_exactly_once_an_epoch(
    count, world_size, batch, max_tokens, share_prefix, epoch
):
    examples = make_examples(count)
    datasets = [
        training_steps(
            examples,
            rank=rank,
            world_size=world_size,
            per_step=batch * world_size,
            max_tokens=max_tokens,
            share_prefix=share_prefix,
        )
        for rank in range(world_size)
    ]
    total = Counter()
    for dataset in datasets:
        dataset.set_epoch(epoch)
    assert len({len(dataset) for dataset in datasets}) == 1
    for step in range(len(datasets[0])):
        shares = [dataset[step] for dataset in datasets]
        assert len({len(share.sequences) for share in shares}) == 1
        assert len({share.denominator for share in shares}) == 1
        assert shares[0].denominator == sum(
            one.label_ids.numel() for share in shares for one in share.sequences
        )
        for rank, share in enumerate(shares):
            assert share.sizes_of_ranks == shares[0].sizes_of_ranks
            assert [sizes[rank] for sizes in share.sizes_of_ranks] == [
                r.size for r in share.sequences
            ]
            assert sorted(seen(share)) == sorted(share.example_rows)
            total.update(seen(share))
    assert total == Counter(range(count))


@pytest.mark.parametrize("world_size", [2, 4])
def test_a_step_holds_the_same_examples_on_any_number_of_ranks(world_size):
    examples = make_examples(30)
    alone = training_steps(examples, per_step=8)
    ranks = [
        training_steps(examples, rank=rank, world_size=world_size, per_step=8)
        for rank in range(world_size)
    ]
    for step in range(len(alone)):
        union = [number for rank in ranks for number in seen(rank[step])]
        assert sorted(union) == sorted(seen(alone[step]))
        assert alone[step].denominator == ranks[0][step].denominator


def test_a_rank_without_examples_gets_empty_rows():
    [first, second] = [
        training_steps(make_examples(5), rank=rank, world_size=2, per_step=4) for rank in range(2)
    ]
    assert len(second[1].sequences) == len(first[1].sequences) == 1
    assert second[1].example_rows == []
    assert second[1].sequences[0].label_ids.numel() == 0
    assert second[1].denominator == first[1].denominator > 0


def test_epochs_differ_and_repeat():
    steps = training_steps(make_examples(24), per_step=24, max_tokens=1000)
    orders = {}
    for epoch in (0, 1, 2, 0):
        steps.set_epoch(epoch)
        order = tuple(steps[0].example_rows)
        assert orders.setdefault(epoch, order) == order
    assert len(set(orders.values())) == 3
    assert epoch_order(24, seed=1, epoch=0) != epoch_order(24, seed=2, epoch=0)


def test_a_new_data_set_starts_with_epoch_0():
    steps = training_steps(make_examples(24))
    assert list(steps._order) == epoch_order(24, seed=1, epoch=0)


@pytest.mark.parametrize("step", [-1, 4])
def test_steps_outside_the_epoch(step):
    with pytest.raises(IndexError):
        training_steps(make_examples(24))[step]


@settings(max_examples=60, deadline=None)
@given(
    count=st.integers(1, 40),
    world_size=worlds,
    max_tokens=st.integers(8, 120),
    closed=st.booleans(),
)
def test_scoring_takes_every_example_once_in_rows_that_ignore_the_ranks(
    count, world_size, max_tokens, closed
):
    examples = make_examples(count, closed=closed)
    [alone] = [ScoringSequences(examples, rank=0, world_size=1, max_tokens=max_tokens)]
    ranks = [
        ScoringSequences(examples, rank=rank, world_size=world_size, max_tokens=max_tokens)
        for rank in range(world_size)
    ]
    assert len({len(rank) for rank in ranks}) == 1
    laid = [rank[index] for index in range(len(ranks[0])) for rank in ranks]
    filled = [one for one in laid if one.examples]
    assert [one.examples for one in filled] == [alone[i].examples for i in range(len(alone))]
    assert sorted(number for one in filled for number in one.examples) == list(range(count))
    for one in filled:
        answers = sum(len(alone.answers[number]) for number in one.examples)
        assert one.sequence.label_answers.unique().tolist() == list(range(answers))


def test_scoring_rows_of_closed_sets_hold_all_candidates():
    laid = ScoringSequences(make_examples(2), rank=0, world_size=1, max_tokens=1000)
    assert len(laid) == 1
    assert laid[0].sequence.label_ids.tolist() == [11, 0, 12, 13, 0, 14, 0] * 2


@pytest.mark.parametrize("index", [-1, 1])
def test_rows_outside_the_set(index):
    with pytest.raises(IndexError):
        ScoringSequences(make_examples(2), rank=0, world_size=1, max_tokens=1000)[index]
