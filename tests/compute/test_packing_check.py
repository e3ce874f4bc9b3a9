"""The live check looks at the run's own examples, as long as the run's sequences will be.

Run: python -m pytest tests/compute/test_packing_check.py
"""

import pytest
import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM, GPTNeoConfig

from lora_fsdp import FineTuningArguments, LoraTrainer
from lora_fsdp.adapter.attach import attach_adapter
from lora_fsdp.compute.packed_model import PackedModel
from lora_fsdp.compute.packing_check import check_packing, sample_of
from lora_fsdp.data.packing import Tree
from lora_fsdp.errors import UnsupportedModelError
from tests.support.tiny import ToyTask, adapted_model, tiny_tokenizer, toy_table

CPU = torch.device("cpu")
WINDOW = 64


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
    sample = sample_of(given, tokens=60)
    assert len(sample[-1]) == max(map(len, given)) == 19
    assert 45 < sum(map(len, sample)) <= 60
    assert sample_of([], tokens=60) == []


@pytest.mark.parametrize(("tokens", "fits"), [(WINDOW, True), (4 * WINDOW, False)])
def test_windows_that_count_along_the_sequence(tokens, fits):
    """Two texts of 12 tokens see nothing of it; in one window packing is exact."""
    adapter = LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")
    packed = PackedModel(attach_adapter(with_windows(), adapter))
    check_packing(packed, device=CPU)
    sample = sample_of(trees(30, 20), tokens=tokens)
    if fits:
        check_packing(packed, device=CPU, sample=sample)
        return
    with pytest.raises(UnsupportedModelError, match=r"this run's in \d+ tokens.*--max_tokens_per"):
        check_packing(packed, device=CPU, sample=sample)


def test_what_is_chosen_by_the_length_of_the_sequence():
    """As a temperature by the position along the sequence is, or factors of long sequences."""
    model = adapted_model()
    forward = model.forward

    def longer_is_colder(**inputs):
        output = forward(**inputs)
        output.logits = output.logits * (1 + 0.1 * (inputs["input_ids"].shape[1] > 100))
        return output

    check_packing(PackedModel(model), device=CPU, sample=sample_of(trees(30, 20), tokens=400))
    model.forward = longer_is_colder
    check_packing(PackedModel(model), device=CPU, sample=sample_of(trees(30, 20), tokens=90))
    with pytest.raises(UnsupportedModelError, match="differently from single ones"):
        check_packing(PackedModel(model), device=CPU, sample=sample_of(trees(30, 20), tokens=400))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_damaged_base_is_called_so(value):
    """And not a model that computes packed examples differently."""
    model = adapted_model()
    [weight] = [w for name, w in model.named_parameters() if "layers.0.mlp.down_proj.base" in name]
    weight.data[0, 0] = value
    message = r"not finite: its weight model.layers.0.*down_proj.* is not finite"
    with pytest.raises(UnsupportedModelError, match=message):
        check_packing(PackedModel(model), device=CPU)


@pytest.mark.parametrize("most", [None, WINDOW])
def test_a_run_is_refused_before_its_first_step(tmp_path, most):
    task = ToyTask().bind(toy_table(40))
    settings = {"per_device_train_batch_size": 16, "max_tokens_per_row": most}

    def trainer():
        return LoraTrainer(
            model=with_windows(),
            args=FineTuningArguments(output_dir=str(tmp_path), use_cpu=True, **settings),
            task=task,
            processing_class=tiny_tokenizer(),
            train_dataset=task.examples(toy_table(40)),
            peft_config=LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM"),
            max_length=WINDOW,
        )

    if most is not None:
        assert trainer().placement.sequence_length == WINDOW
        return
    with pytest.raises(UnsupportedModelError, match="GPTNeoForCausalLM computes packed examples"):
        trainer()
