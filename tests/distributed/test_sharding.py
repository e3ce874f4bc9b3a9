"""Base in FSDP2 shards, adapter whole on every rank, and the checks that prove it.

Run: python -m pytest tests/distributed/test_sharding.py
"""

import os

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, MixtralConfig, Qwen3MoeConfig

from lora_fsdp.adapter.adapter_set import AdapterSet
from lora_fsdp.adapter.ownership import trainable_parameters
from lora_fsdp.arguments.fsdp import FsdpSettings
from lora_fsdp.base.layers import decoder_layers
from lora_fsdp.distributed.sharding import (
    check_placement,
    layers_to_shard,
    place_model,
)
from lora_fsdp.errors import (
    AdapterVerificationError,
    FsdpDroppedError,
    FsdpSettingError,
    UnsupportedModelError,
)
from lora_fsdp.placement.layout import Layout
from tests.support.ranks import RankError, launch_environment, run_ranks
from tests.support.runs import toy_trainer
from tests.support.tiny import CONFIGS, adapted_model, tiny_model

CPU = torch.device("cpu")
FSDP = launch_environment("fsdp2_cpu.yaml")
SETTINGS = FsdpSettings(
    reshard_after_forward=True,
    offload=False,
    activation_checkpointing=False,
    layer_classes=None,
    wrap_layers=True,
)
LAYERS = {
    "llama": "LlamaDecoderLayer",
    "llama-tied": "LlamaDecoderLayer",
    "qwen3": "Qwen3DecoderLayer",
    "mistral": "MistralDecoderLayer",
    "gpt2": "GPT2Block",
}
SIZES = {
    "vocab_size": 60,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}


class TestDecoderLayers:
    @pytest.mark.parametrize("kind", sorted(CONFIGS))
    def test_by_the_model_s_own_list(self, kind):
        layers = decoder_layers(tiny_model(kind))
        assert [type(layer).__name__ for layer in layers] == [LAYERS[kind]] * 3

    @pytest.mark.parametrize("names", [None, [], ["SomethingElse"]])
    def test_by_structure(self, names):
        model = tiny_model()
        model._no_split_modules = names
        assert [type(layer).__name__ for layer in decoder_layers(model)] == [
            "LlamaDecoderLayer"
        ] * 3

    @pytest.mark.parametrize(
        ("config", "name"),
        [
            (MixtralConfig(**SIZES, num_local_experts=4), "MixtralDecoderLayer"),
            (
                Qwen3MoeConfig(**SIZES, head_dim=16, num_experts=4, moe_intermediate_size=64),
                "Qwen3MoeDecoderLayer",
            ),
        ],
        ids=["mixtral", "qwen3-moe"],
    )
    @pytest.mark.parametrize("named", [True, False])
    def test_mixture_of_experts(self, config, name, named):
        """The experts are more than half of the parameters, but inside the layers."""
        model = AutoModelForCausalLM.from_config(config)
        if not named:
            model._no_split_modules = None
        assert [type(layer).__name__ for layer in decoder_layers(model)] == [name] * 2

    def test_by_structure_with_lists_inside_the_layers(self):
        """A layer that keeps its experts in a list of its own, as older models do."""

        class Layer(nn.Module):
            def __init__(self):
                super().__init__()
                self.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))

        model = nn.Module()
        model.layers = nn.ModuleList([Layer()])
        assert decoder_layers(model) == [model.layers[0]]

    def test_no_layers_at_all(self):
        with pytest.raises(UnsupportedModelError, match="fsdp_transformer_layer_cls_to_wrap"):
            decoder_layers(nn.Linear(2, 2))


class TestNamedLayers:
    def test_found(self):
        names = ("LlamaMLP", "LlamaAttention")
        found = layers_to_shard(tiny_model(), names=names)
        assert {type(module).__name__ for module in found} == set(names)
        assert len(found) == 6

    def test_wrong_name(self):
        with pytest.raises(FsdpSettingError, match="fsdp_transformer_layer_cls_to_wrap") as caught:
            layers_to_shard(tiny_model(), names=("LlamaDecodeLayer",))
        message = str(caught.value)
        assert "LlamaDecodeLayer does not occur in LlamaForCausalLM" in message
        assert "its layers are LlamaDecoderLayer" in message

    def test_one_wrong_name_of_two(self):
        names = ("LlamaDecoderLayer", "GPT2Block")
        with pytest.raises(FsdpSettingError, match="GPT2Block"):
            layers_to_shard(tiny_model(), names=names)


def whole(model):
    """The base's parameters, as if every rank held them whole."""
    return [p for p in model.parameters() if not p.requires_grad]


def shard_all(model):
    """Every layer, over two ranks."""
    layers = decoder_layers(model.get_base_model())
    place_model(model, layers=layers, layout=Layout(2, 0), settings=SETTINGS, device=CPU)


class TestCheckPlacement:
    def test_unsharded_model_without_fsdp_is_right(self):
        model = adapted_model()
        check_placement(model, resident=whole(model))

    def test_base_that_was_not_sharded(self):
        with pytest.raises(FsdpDroppedError, match=r"The base's .*embed_tokens.* is not sharded"):
            check_placement(adapted_model(), resident=())

    def test_adapter_in_bf16(self):
        model = adapted_model(dtype=torch.bfloat16)
        for parameter in trainable_parameters(model).values():
            parameter.data = parameter.data.bfloat16()
        with pytest.raises(FsdpDroppedError, match=r"lora_A.* float32 .* torch\.bfloat16"):
            check_placement(model, resident=whole(model))

    def test_base_of_several_dtypes(self):
        model = adapted_model(dtype=torch.bfloat16)
        check_placement(model, resident=whole(model))
        norm = model.get_base_model().model.norm.weight
        norm.data = norm.data.float()
        with pytest.raises(FsdpDroppedError, match=r"several dtypes: .*bfloat16.*float32"):
            check_placement(model, resident=whole(model))

    def test_model_without_a_trained_parameter(self):
        model = adapted_model()
        model.requires_grad_(False)
        with pytest.raises((FsdpDroppedError, AdapterVerificationError)):
            check_placement(model, resident=whole(model))


# ---- on real ranks ------------------------------------------------------------------------------


def layout(folder):
    trainer = toy_trainer(folder)
    base = trainer.model.get_base_model()
    adapter = trainable_parameters(trainer.model)
    return {
        "adapter": {type(p.data).__name__ for p in adapter.values()},
        "base": {
            name: (tuple(p.shape), tuple(p.to_local().shape), str(p.placements))
            for name, p in base.named_parameters()
            if isinstance(p, DTensor)
        },
        "plain": [
            n for n, p in base.named_parameters() if not isinstance(p, DTensor) and "lora_" not in n
        ],
    }


def seeds_apart(folder):
    """The adapter of every rank is its own before it is placed."""
    rank = int(os.environ["RANK"])
    torch.distributed.init_process_group("gloo")
    model = adapted_model()
    generator = torch.Generator().manual_seed(rank)
    for parameter in trainable_parameters(model).values():
        parameter.data = torch.randn(parameter.shape, generator=generator)
    shard_all(model)
    adapters = AdapterSet.of(model)
    before = adapters.fingerprint()
    adapters.broadcast()
    adapters.check_equal()
    return before, adapters.fingerprint()


def drifted(folder):
    trainer = toy_trainer(folder)
    if trainer.args.process_index == 1:
        next(iter(trainer.adapter.parameters.values())).data.view(-1)[0] += 1
    trainer.save_model(str(folder))


def sums(folder):
    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    first, second = nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(2, 2))
    adapters = AdapterSet({"default": {"first": first, "second": second}})
    adapters.zero_gradients()
    first.grad += float(rank + 1)
    if rank == 1:
        second.grad += 1.0
    adapters.sum_gradients()
    return first.grad.tolist(), second.grad.tolist()


def adapter_swept_into_the_shards(folder):
    """What accelerate's own `prepare` would do: adapter and base in the same groups."""
    torch.distributed.init_process_group("gloo")
    model = adapted_model()
    mesh = init_device_mesh("cpu", (2,))
    fully_shard(model.get_base_model(), mesh=mesh)
    check_placement(model, resident=())


def base_sharded_unasked(folder):
    torch.distributed.init_process_group("gloo")
    model = adapted_model()
    shard_all(model)
    check_placement(model, resident=whole(model))


@pytest.mark.distributed
class TestRanks:
    def test_layout(self, tmp_path):
        for rank in run_ranks(layout, tmp_path, environment=FSDP):
            assert rank["adapter"] == {"Tensor"}
            assert rank["plain"] == []
            assert len(rank["base"]) == 3 * 9 + 3
            for whole, local, placements in rank["base"].values():
                assert local == (whole[0] // 2, *whole[1:])
                assert placements == "(Shard(dim=0),)"

    def test_adapters_of_different_seeds_become_equal(self, tmp_path):
        ranks = run_ranks(seeds_apart, tmp_path)
        assert ranks[0][0] != ranks[1][0]
        assert ranks[0][0] == ranks[0][1] == ranks[1][1]

    def test_drifted_adapter_is_not_saved(self, tmp_path):
        with pytest.raises(RankError) as caught:
            run_ranks(drifted, tmp_path, environment=FSDP)
        assert caught.value.kind == "RankMismatchError"
        assert "the adapter's weights" in caught.value.text
        assert not (tmp_path / "adapter_model.safetensors").exists()

    def test_gradients_are_summed_and_a_missing_one_is_zero(self, tmp_path):
        for first, second in run_ranks(sums, tmp_path):
            assert first == [3.0, 3.0, 3.0]
            assert second == [[1.0, 1.0], [1.0, 1.0]]

    def test_adapter_inside_the_groups_is_caught(self, tmp_path):
        with pytest.raises(RankError) as caught:
            run_ranks(adapter_swept_into_the_shards, tmp_path)
        assert caught.value.kind == "FsdpDroppedError"
        assert "DTensor" in caught.value.text

    def test_sharding_that_nobody_asked_for_is_caught(self, tmp_path):
        with pytest.raises(RankError) as caught:
            run_ranks(base_sharded_unasked, tmp_path)
        assert "is sharded, not whole" in caught.value.text
