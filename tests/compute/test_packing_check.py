"""The live check looks at the run's own examples, as long as the run's sequences will be.

Run: python -m pytest tests/compute/test_packing_check.py
"""

import pytest
import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM, GPTNeoConfig, LlamaConfig

from lora_fsdp import FineTuningArguments, LoraTrainer
from lora_fsdp.adapter.attach import attach_adapter
from lora_fsdp.compute.packed_model import PackedModel
from lora_fsdp.compute.packing_check import check_packing, sample_of
from lora_fsdp.data.packing import Packing, Tree
from lora_fsdp.errors import ArgumentError, UnsupportedModelError
from tests.support.tiny import ToyTask, adapted_model, tiny_model, tiny_tokenizer, toy_table

CPU = torch.device("cpu")
WINDOW = 64


def sample_trees(given: list[Tree], *, tokens: int) -> list[Tree]:
    """`sample_of` where the examples are their trees."""
    return sample_of(given, lambda tree: tree, tokens=tokens)


def with_windows():
    """Its local attention counts along the sequence, whatever the mask says."""
    torch.manual_seed(0)
    config = GPTNeoConfig(
        vocab_size=400, hidden_size=64, intermediate_size=128, num_layers=2, num_heads=4,
        attention_types=[[["global", "local"], 1]], window_size=WINDOW, resid_dropout=0.0,
        embed_dropout=0.0, attention_dropout=0.0, max_position_embeddings=1024,
        initializer_range=0.2,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    return model.requires_grad_(False).eval()


def trees(count, tokens):
    generator = torch.Generator().manual_seed(1)
    drawn = torch.randint(400, (count, tokens), generator=generator).tolist()
    return [Tree([7, 8, 9, *ids[3:-2]], [ids[-2:]]) for ids in drawn]


def test_a_sample_fills_the_sequence_and_ends_with_the_longest():
    given = [*trees(4, 10), *trees(1, 20), *trees(5, 10)]
    sample = sample_trees(given, tokens=60)
    assert len(sample[-1]) == max(map(len, given)) == 19
    assert 45 < sum(map(len, sample)) <= 60
    assert sample_trees([], tokens=60) == []


@pytest.mark.parametrize(("tokens", "fits"), [(WINDOW, True), (4 * WINDOW, False)])
def test_windows_that_count_along_the_sequence(tokens, fits):
    """Two texts of 12 tokens see nothing of it; in one window packing is exact."""
    adapter = LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")
    packed = PackedModel(attach_adapter(with_windows(), adapter))
    check_packing(packed, device=CPU)
    sample = sample_trees(trees(30, 20), tokens=tokens)
    if fits:
        check_packing(packed, device=CPU, sample=sample)
        return
    with pytest.raises(UnsupportedModelError, match=r"this run's in \d+ tokens.*--packing auto"):
        check_packing(packed, device=CPU, sample=sample)


def test_what_is_chosen_by_the_length_of_the_sequence():
    """As a temperature by the position along the sequence is, or factors of long sequences."""
    model = adapted_model()
    forward = model.forward

    def longer_is_colder(**inputs):
        output = forward(**inputs)
        output.logits = output.logits * (1 + 0.1 * (inputs["input_ids"].shape[1] > 100))
        return output

    check_packing(
        PackedModel(model),
        device=CPU,
        sample=sample_trees(trees(30, 20), tokens=400),
    )
    model.forward = longer_is_colder
    check_packing(
        PackedModel(model),
        device=CPU,
        sample=sample_trees(trees(30, 20), tokens=90),
    )
    with pytest.raises(UnsupportedModelError, match="differently from single ones"):
        check_packing(
            PackedModel(model),
            device=CPU,
            sample=sample_trees(trees(30, 20), tokens=400),
        )


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_damaged_base_is_called_so(value):
    """And not a model that computes packed examples differently."""
    model = adapted_model()
    [weight] = [w for name, w in model.named_parameters() if "layers.0.mlp.down_proj.base" in name]
    weight.data[0, 0] = value
    message = r"not finite: its weight model.layers.0.*down_proj.* is not finite"
    with pytest.raises(UnsupportedModelError, match=message):
        check_packing(PackedModel(model), device=CPU)


def trainer_of(folder, model, **settings):
    task = ToyTask().bind(toy_table(40))
    return LoraTrainer(
        model=model,
        args=FineTuningArguments(
            output_dir=str(folder), use_cpu=True, per_device_train_batch_size=16, **settings
        ),
        task=task,
        processing_class=tiny_tokenizer(),
        train_dataset=task.examples(toy_table(40)),
        peft_config=LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM"),
        max_length=WINDOW,
    )


def test_windows_of_a_model_s_own_making_are_known(tmp_path):
    placement = trainer_of(tmp_path, with_windows()).placement
    assert placement.packing.packing is Packing.BATCHED
    assert "GPTNeoForCausalLM attends over windows" in str(placement)
    with pytest.raises(ArgumentError, match=r"--packing always: GPTNeo.*Use --packing auto"):
        trainer_of(tmp_path, with_windows(), packing="always")


def with_factors_by_length():
    """Its rotary factors are those of the longest example of a forward."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=400, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=1024,
        initializer_range=0.2,
        rope_parameters={
            "rope_type": "longrope", "rope_theta": 10_000.0, "short_factor": [1.0] * 8,
            "long_factor": [4.0] * 8, "original_max_position_embeddings": 28,
        },
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config).requires_grad_(False)


def test_what_the_live_check_finds_is_gone_by(tmp_path):
    """Nothing in the settings says it: the run's examples do, packed and filled up alike."""
    trainer = trainer_of(tmp_path, with_factors_by_length(), max_steps=2)
    assert trainer.placement.packing.packing is trainer.packed.packing is Packing.SINGLE
    assert not trainer.placement.shares_prefix
    assert "one example a sequence, one by one (LlamaForCausalLM computes packed" in str(
        trainer.placement
    )
    assert trainer.work.step_tokens > 16 * 20
    trainer.train()
    with pytest.raises(UnsupportedModelError, match="LlamaForCausalLM computes packed examples"):
        trainer_of(tmp_path, with_factors_by_length(), packing="always")


@pytest.mark.parametrize("asked", ["share_prefix", "step"])
def test_what_needs_packed_sequences_is_refused_without(tmp_path, asked):
    value = {"share_prefix": "always", "step": "fused"}[asked]
    with pytest.raises(ArgumentError, match=rf"--{asked} {value}.*Use --{asked} auto"):
        trainer_of(tmp_path, tiny_model(), packing="never", **{asked: value})
