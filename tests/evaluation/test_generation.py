"""Free generation: greedy as one by one, in step under FSDP2, and only what follows the prompt.

Run: python -m pytest tests/evaluation/test_generation.py
"""

import pytest
import torch

from lora_fsdp.evaluation.generation import generate_texts
from tests.support.ranks import launch_environment, run_ranks
from tests.support.runs import toy_trainer
from tests.support.tiny import tiny_tokenizer

CPU = torch.device("cpu")
LENGTHS = (3, 17, 9, 30)
PENALTIES = {
    "do_sample": True,
    "temperature": 0.6,
    "top_p": 0.5,
    "repetition_penalty": 5.0,
    "no_repeat_ngram_size": 1,
}


def trained(folder):
    trainer = toy_trainer(folder, num_train_epochs=3)
    trainer.train()
    return trainer


def write(trainer, prompts, *, max_new_tokens=12, temperature=0.0):
    return generate_texts(
        trainer.model,
        tiny_tokenizer(),
        prompts,
        device=CPU,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        end_token_id=trainer.encoder.end_token_id,
    )


def prompts_of(trainer):
    """Trained prompts, which end soon, between meaningless ones, which run to the limit."""
    learnt = [example.prompt_ids for example in trainer.eval_dataset[:4]]
    strange = [[5 + (number * 37) % 300 for number in range(length)] for length in LENGTHS]
    return [prompt for pair in zip(learnt, strange, strict=True) for prompt in pair]


@pytest.fixture(scope="module")
def trainer(tmp_path_factory):
    return trained(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def untrained(tmp_path_factory):
    return toy_trainer(tmp_path_factory.mktemp("untrained"))


def test_a_batch_writes_what_each_prompt_would_alone(trainer):
    prompts = prompts_of(trainer)
    together = write(trainer, prompts)
    assert together == [write(trainer, [prompt])[0] for prompt in prompts]
    lengths = {len(tiny_tokenizer()(text)["input_ids"]) for text in together}
    assert len(lengths) > 1  # they do not all stop together


def test_only_the_continuation_comes_back(trainer):
    tokenizer = tiny_tokenizer()
    prompt = tokenizer("Input: Output: good\nOutput: bad\nOutput:")["input_ids"]
    [text] = write(trainer, [prompt])
    assert "Input" not in text
    assert "<|end|>" not in text


@pytest.mark.parametrize("limit", [1, 5])
def test_limit(untrained, limit):
    """A model that knows nothing never ends an answer by itself."""
    forwards = []
    base = untrained.model.get_base_model()
    hook = base.register_forward_hook(lambda *_: forwards.append(1))
    write(untrained, prompts_of(untrained), max_new_tokens=limit)
    hook.remove()
    assert len(forwards) == limit


def test_sampling_differs_and_repeats_with_the_seed(trainer):
    prompts = [[5, 42, 79, 116]] * 3
    texts = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        texts.append(write(trainer, prompts, temperature=1.5))
    assert texts[0] == texts[1] != texts[2]
    assert len(set(texts[0])) > 1


def test_no_prompts(trainer):
    assert write(trainer, []) == []


def test_mode_is_restored(trainer):
    trainer.model.train()
    write(trainer, [[5, 6]])
    assert trainer.model.training


def test_the_model_s_own_generation_settings_do_not_make_greedy_something_else(untrained):
    """Chat models ship a generation_config.json with sampling and penalties switched on."""
    prompts = prompts_of(untrained)
    expected = write(untrained, prompts)
    assert all(expected)
    own = untrained.model.get_base_model().generation_config
    before = {name: getattr(own, name) for name in PENALTIES}
    try:
        own.update(**PENALTIES)
        assert write(untrained, prompts) == expected
    finally:
        own.update(**before)


def write_on_ranks(folder, temperature):
    trainer = trained(folder)
    torch.manual_seed(trainer.args.process_index)
    return write(trainer, prompts_of(trainer), temperature=temperature)


@pytest.mark.distributed
def test_ranks_whose_prompts_end_at_different_steps_do_not_hang(trainer, tmp_path):
    environment = launch_environment("fsdp2_cpu.yaml")
    ranks = run_ranks(write_on_ranks, tmp_path, 0.0, environment=environment)
    assert ranks[0] == ranks[1] == write(trainer, prompts_of(trainer))


def write_of_unequal_length(folder):
    """Rank 0's prompt ends with an answer, rank 1's runs to the limit."""
    trainer = trained(folder)
    learnt, strange = trainer.eval_dataset[0].prompt_ids, [5, 42, 79]
    is_first = trainer.args.process_index == 0
    if not is_first:
        # An untrained adapter: nothing it writes ends by itself.
        for parameter in trainer.adapter.parameters.values():
            parameter.data.zero_()
    forwards = []
    base = trainer.model.get_base_model()
    base.lm_head.register_forward_hook(lambda _, __, output: forwards.append(output.shape))
    texts = write(trainer, [learnt if is_first else strange])
    after = trainer.score(trainer.eval_dataset[:2])
    return texts, len(forwards), after.log_likelihoods.isfinite().all().item()


@pytest.mark.distributed
def test_a_rank_that_has_finished_keeps_step_with_the_others(tmp_path):
    environment = launch_environment("fsdp2_cpu.yaml")
    first, second = run_ranks(write_of_unequal_length, tmp_path, environment=environment)
    assert first == second
    assert first[0] != [""]
    assert first[1] >= 12
    assert first[2]


@pytest.mark.distributed
def test_ranks_that_sample_apart_agree_on_rank_0_s_texts(tmp_path):
    """Each rank's random numbers, and so its lengths, are its own."""
    environment = launch_environment("fsdp2_cpu.yaml")
    ranks = run_ranks(write_on_ranks, tmp_path, 1.5, environment=environment)
    assert ranks[0] == ranks[1]
