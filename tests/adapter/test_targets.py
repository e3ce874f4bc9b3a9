"""Which modules an adapter is on, family by family, and how a run says it.

Run: python -m pytest tests/adapter/test_targets.py
"""

import pytest
import torch
from peft import LoraConfig, PeftModel

from lora_fsdp.adapter.attach import attach_adapter, lora_config
from lora_fsdp.adapter.saved import save_adapter
from lora_fsdp.adapter.targets import targets_in_words
from lora_fsdp.arguments import LoraArguments
from lora_fsdp.errors import TargetModulesError
from tests.support.families import EXPERTS, MIXTURES, family_model
from tests.support.tiny import randomise_adapter, tiny_model


def all_linear(base):
    return attach_adapter(base, lora_config(LoraArguments(4, 8, 0.0, ["all-linear"])))


def logits(model):
    with torch.no_grad():
        return model(input_ids=torch.tensor([[5, 6, 7, 8, 9]]), use_cache=False).logits


class TestRouters:
    @pytest.mark.parametrize("family", MIXTURES)
    def test_all_linear_leaves_them_alone(self, family):
        model = all_linear(family_model(family))
        sides = {
            name: parameter.shape
            for name, parameter in model.named_parameters()
            if parameter.requires_grad
        }
        assert any("lora_A" in name for name in sides)
        # A router has an output for each expert, the shared expert's gate a single one.
        assert not [
            name for name, shape in sides.items() if "lora_B" in name and shape[0] in (1, EXPERTS)
        ]
        assert not [name for name in sides if "router" in name]

    @pytest.mark.parametrize("family", ["llama4_text", "deepseek_v3"])
    def test_all_others_are_adapted_and_load_in_plain_peft(self, family, tmp_path):
        base = family_model(family)
        base.save_pretrained(tmp_path / "base")
        model = all_linear(base)
        named = {*model.targeted_module_names, *model.targeted_parameter_names}
        for part in ("o_proj", "down_proj"):
            assert any(part in name for name in named)
        if family == "deepseek_v3":  # the layer without experts, the shared expert, and the others
            assert {name.rpartition("layers.")[2] for name in named if "down_proj" in name} == {
                "0.mlp.down_proj.weight",
                "1.mlp.shared_experts.down_proj.weight",
                "1.mlp.experts.down_proj",
            }
        randomise_adapter(model)
        save_adapter(model, tmp_path / "adapter")
        again = type(base).from_pretrained(tmp_path / "base")
        before = logits(again)
        loaded = PeftModel.from_pretrained(again, tmp_path / "adapter").eval()
        assert torch.equal(logits(loaded), logits(model.eval()))
        assert not torch.allclose(logits(loaded), before)

    def test_one_that_is_named_is_adapted(self):
        config = LoraConfig(r=4, target_modules=["shared_expert_gate"], task_type="CAUSAL_LM")
        model = attach_adapter(family_model("qwen2_moe"), config)
        assert "shared_expert_gate of 2 layers: 2 modules" in targets_in_words(model)

    @pytest.mark.parametrize("targets", [["router"], r".*\.router"])
    def test_one_that_is_no_linear_map_is_refused(self, targets):
        config = LoraConfig(r=4, target_modules=targets, task_type="CAUSAL_LM")
        with pytest.raises(TargetModulesError, match=r"router, a Llama4Router.* leave it out"):
            attach_adapter(family_model("llama4_text"), config)

    def test_experts_by_the_names_they_once_had(self):
        config = LoraConfig(r=4, target_modules=["w1", "w2", "w3"], task_type="CAUSAL_LM")
        model = attach_adapter(family_model("mixtral"), config)
        assert targets_in_words(model) == (
            "LoRA r 4 on gate_up_proj, down_proj of 2 layers: 4 parameters; r 8 on gate_up_proj"
        )
        config = LoraConfig(r=4, target_modules=["w1", "w2"], task_type="CAUSAL_LM")
        with pytest.raises(TargetModulesError, match="without also targeting w3"):
            attach_adapter(family_model("mixtral"), config)


class TestInWords:
    def test_names_layers_and_number(self):
        model = attach_adapter(tiny_model(), lora_config(LoraArguments()))
        assert targets_in_words(model) == "LoRA r 8 on q_proj, v_proj of 3 layers: 6 modules"

    def test_other_ranks_and_what_is_trained_whole(self):
        extra = {"rank_pattern": {"v_proj": 2}, "modules_to_save": ["lm_head"]}
        arguments = LoraArguments(lora_kwargs={**extra, "layers_to_transform": [1]})
        assert targets_in_words(attach_adapter(tiny_model(), lora_config(arguments))) == (
            "LoRA r 8 on q_proj, v_proj of 1 layer: 2 modules; r 2 on v_proj; "
            "trained whole: lm_head"
        )

    def test_experts(self):
        assert targets_in_words(all_linear(family_model("qwen3_moe"))) == (
            "LoRA r 4 on q_proj, k_proj, v_proj, o_proj of 2 layers: 8 modules; "
            "gate_up_proj, down_proj of 2 layers: 4 parameters"
        )

    def test_rank_of_an_experts_parameter(self):
        extra = {"target_parameters": ["experts.down_proj"], "rank_pattern": {"down_proj": 2}}
        model = attach_adapter(
            family_model("qwen3_moe"), lora_config(LoraArguments(lora_kwargs=extra))
        )
        assert targets_in_words(model) == (
            "LoRA r 8 on q_proj, v_proj of 2 layers: 4 modules; "
            "down_proj of 2 layers: 2 parameters; r 2 on down_proj"
        )


class TestDefaults:
    @pytest.mark.parametrize(
        ("family", "settings", "names"),
        [
            ("llama", {}, {"q_proj", "v_proj"}),
            ("qwen3_moe", {}, {"q_proj", "v_proj"}),
            ("phi", {}, {"q_proj", "v_proj"}),
            ("phi3", {}, {"qkv_proj"}),
            ("gpt2", {"n_head": 4}, {"c_attn"}),
            ("gpt_bigcode", {"n_head": 4}, {"c_attn"}),
            ("gpt_neox", {}, {"query_key_value"}),
            ("bloom", {"n_head": 4}, {"query_key_value"}),
            ("falcon", {}, {"query_key_value"}),
            ("mpt", {"d_model": 64, "n_heads": 4, "n_layers": 2}, {"Wqkv"}),
            ("mamba", {"state_size": 8}, {"in_proj", "x_proj"}),
            ("mamba2", {"num_heads": 8, "head_dim": 16, "state_size": 8, "n_groups": 1},
             {"in_proj"}),
            ("jamba", {"attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 2,
                       "use_mamba_kernels": False}, {"q_proj", "v_proj"}),
            ("deepseek_v3", {}, {"q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj"}),
            ("rwkv", {"attention_hidden_size": 64},
             {"key", "value", "receptance", "output"}),
        ],
        ids=lambda value: value if isinstance(value, str) else "",
    )  # fmt: skip
    def test_of_a_family(self, family, settings, names):
        model = attach_adapter(family_model(family, **settings), lora_config(LoraArguments()))
        found = model.targeted_module_names
        assert {name.rpartition(".")[2] for name in found} == names
        assert str(len(found)) in targets_in_words(model)

    def test_of_a_family_of_which_nothing_is_known(self):
        base = tiny_model()
        for layer in base.model.layers:
            del layer.self_attn
        with pytest.raises(TargetModulesError, match="is not known here") as caught:
            attach_adapter(base, lora_config(LoraArguments()))
        assert "'down_proj', 'gate_proj', 'up_proj'" in str(caught.value)
