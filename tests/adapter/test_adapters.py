"""The adapter: where it is attached, its dtype, what is written and what is read back.

Run: python -m pytest tests/adapter/test_adapters.py
"""

import socket

import pytest
import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file, save_file

from lora_fsdp.adapter.attach import attach_adapter, lora_config
from lora_fsdp.adapter.folder import ADAPTER_FILE
from lora_fsdp.adapter.ownership import trainable_parameters
from lora_fsdp.adapter.saved import adapter_state, load_adapter, save_adapter, verify_adapter
from lora_fsdp.arguments import LoraArguments
from lora_fsdp.errors import AdapterVerificationError, ArgumentError, TargetModulesError
from tests.support.tiny import randomise_adapter, tiny_model

PROMPT = torch.tensor([[5, 6, 7, 8, 9]])


def adapted(kind="llama", *, dtype=torch.float32, **options):
    """A tiny model whose adapter is not zero."""
    settings = {"r": 4, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
    model = attach_adapter(tiny_model(kind, dtype=dtype), LoraConfig(**{**settings, **options}))
    randomise_adapter(model)
    return model.eval()


def logits(model):
    with torch.no_grad():
        return model(input_ids=PROMPT, use_cache=False).logits


class TestTargets:
    @pytest.mark.parametrize(
        ("targets", "named"),
        [
            (["q_proj", "nothing_like_it"], "nothing_like_it"),
            (["nothing", "at_all"], "nothing"),
            (r".*\.queries", "queries"),
            (["proj"], "proj"),  # an end of a name is not a name
        ],
        ids=["one of two", "all", "regular expression", "part of a name"],
    )
    def test_match_nothing(self, targets, named):
        config = LoraConfig(target_modules=targets, task_type="CAUSAL_LM")
        with pytest.raises(TargetModulesError, match="match nothing in LlamaForCausalLM") as caught:
            attach_adapter(tiny_model(), config)
        message = str(caught.value)
        assert named in message
        assert "q_proj" in message
        assert "--lora_target_modules all-linear" in message

    def test_only_what_is_missing_is_blamed(self):
        config = LoraConfig(target_modules=["q_proj", "wrong"], task_type="CAUSAL_LM")
        with pytest.raises(TargetModulesError, match=r"modules \['wrong'\] match nothing"):
            attach_adapter(tiny_model(), config)

    def test_names_of_another_family(self):
        config = lora_config(LoraArguments(lora_target_modules=["q_proj", "v_proj"]))
        with pytest.raises(TargetModulesError, match="GPT2LMHeadModel") as caught:
            attach_adapter(tiny_model("gpt2"), config)
        assert "c_attn" in str(caught.value)  # its linear layers are of another class

    def test_module_that_cannot_be_adapted(self):
        config = LoraConfig(target_modules=["self_attn"], task_type="CAUSAL_LM")
        with pytest.raises(TargetModulesError, match="cannot adapt LlamaForCausalLM"):
            attach_adapter(tiny_model(), config)

    @pytest.mark.parametrize("targets", [["layers.0.self_attn.q_proj"], r".*\.0\..*q_proj"])
    def test_path_or_regular_expression(self, targets):
        model = attach_adapter(
            tiny_model(), LoraConfig(target_modules=targets, task_type="CAUSAL_LM")
        )
        assert len(trainable_parameters(model)) == 2

    def test_all_linear_leaves_the_head_alone(self):
        config = lora_config(LoraArguments(lora_target_modules=["all-linear"]))
        names = list(trainable_parameters(attach_adapter(tiny_model(), config)))
        assert len(names) == 3 * 7 * 2
        assert not any("lm_head" in name for name in names)


class TestConfig:
    def test_defaults_are_the_article_s(self):
        config = lora_config(LoraArguments())
        attach_adapter(tiny_model(), config)
        assert (config.r, config.lora_alpha, config.target_modules) == (8, 32, {"q_proj", "v_proj"})
        assert str(config.task_type) in ("CAUSAL_LM", "TaskType.CAUSAL_LM")

    def test_any_field_of_peft_is_reachable(self):
        text = '{"use_rslora": true, "layers_to_transform": [1], "bias": "none"}'
        config = lora_config(LoraArguments(lora_r=3, lora_dropout=0.5, lora_kwargs=text))
        assert config.use_rslora is True
        assert config.layers_to_transform == [1]
        assert (config.r, config.lora_dropout) == (3, 0.5)

    def test_unknown_field_is_named(self):
        arguments = LoraArguments(lora_kwargs={"use_magic": True})
        with pytest.raises(ArgumentError, match=r"peft\.LoraConfig refuses lora_kwargs.*use_magic"):
            lora_config(arguments)

    @pytest.mark.parametrize("text", ["{use_dora: true}", "[1, 2]", "3"])
    def test_not_a_json_object(self, text):
        with pytest.raises(ArgumentError, match="--lora_kwargs"):
            LoraArguments(lora_kwargs=text)

    @pytest.mark.parametrize("rank", [0, -1])
    def test_impossible_rank(self, rank):
        config = lora_config(LoraArguments(lora_r=rank))
        with pytest.raises((TargetModulesError, ArgumentError), match=r"positive|`r`|rank"):
            attach_adapter(tiny_model(), config)


class TestDtype:
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
    def test_adapter_is_float32_whatever_the_base(self, dtype):
        model = adapted(dtype=dtype)
        adapter = trainable_parameters(model)
        assert {p.dtype for p in adapter.values()} == {torch.float32}
        rest = {p.dtype for n, p in model.named_parameters() if n not in adapter}
        assert rest == {dtype}
        assert logits(model).isfinite().all()

    def test_base_stays_frozen(self):
        assert all("lora_" in name for name in trainable_parameters(adapted()))


class TestDisk:
    def test_round_trip(self, tmp_path):
        model = adapted()
        save_adapter(model, tmp_path)
        other = adapted()
        randomise_adapter(other, seed=99)
        assert not torch.equal(logits(other), logits(model))
        load_adapter(other, tmp_path)
        assert torch.equal(logits(other), logits(model))
        assert {p.dtype for p in trainable_parameters(other).values()} == {torch.float32}
        verify_adapter(other, tmp_path)

    def test_loading_keeps_the_parameters_that_the_optimizer_holds(self, tmp_path):
        model = adapted()
        save_adapter(model, tmp_path)
        before = trainable_parameters(model)
        load_adapter(model, tmp_path)
        after = trainable_parameters(model)
        assert all(after[name] is parameter for name, parameter in before.items())
        assert all(parameter.requires_grad for parameter in after.values())

    def test_peft_alone_reads_it(self, tmp_path):
        model = adapted()
        save_adapter(model, tmp_path)
        plain = PeftModel.from_pretrained(tiny_model(), str(tmp_path)).eval()
        assert torch.equal(logits(plain), logits(model))

    def test_files(self, tmp_path):
        save_adapter(adapted(), tmp_path)
        names = {path.name for path in tmp_path.iterdir()}
        assert {ADAPTER_FILE, "adapter_config.json"} <= names
        assert not any(name.endswith((".bin", ".pt", ".pickle")) for name in names)
        saved = load_file(tmp_path / ADAPTER_FILE)
        assert all("lora_" in name for name in saved)
        assert {tensor.dtype for tensor in saved.values()} == {torch.float32}

    def test_changed_value_is_noticed(self, tmp_path):
        model = adapted()
        save_adapter(model, tmp_path)
        saved = load_file(tmp_path / ADAPTER_FILE)
        name = sorted(saved)[-1]
        saved[name].view(-1)[0] += 1e-6
        save_file(saved, tmp_path / ADAPTER_FILE)
        with pytest.raises(AdapterVerificationError, match=f"{name} is not what is in memory"):
            verify_adapter(model, tmp_path)

    def test_missing_tensor_is_noticed(self, tmp_path):
        model = adapted()
        save_adapter(model, tmp_path)
        saved = load_file(tmp_path / ADAPTER_FILE)
        name = sorted(saved)[0]
        del saved[name]
        save_file(saved, tmp_path / ADAPTER_FILE)
        with pytest.raises(AdapterVerificationError, match="differ") as caught:
            verify_adapter(model, tmp_path)
        assert name in str(caught.value)

    @pytest.mark.parametrize("keep", [0, 100, -10])
    def test_truncated_file_is_noticed(self, tmp_path, keep):
        model = adapted()
        save_adapter(model, tmp_path)
        file = tmp_path / ADAPTER_FILE
        file.write_bytes(file.read_bytes()[:keep])
        with pytest.raises(AdapterVerificationError):
            verify_adapter(model, tmp_path)
        with pytest.raises(AdapterVerificationError):
            load_adapter(model, tmp_path)

    def test_load_another_rank(self, tmp_path):
        save_adapter(adapted(r=8), tmp_path)
        with pytest.raises(AdapterVerificationError, match=r"other modules or ranks.*same lora_r"):
            load_adapter(adapted(r=4), tmp_path)

    def test_load_other_modules(self, tmp_path):
        save_adapter(adapted(target_modules=["q_proj"]), tmp_path)
        with pytest.raises(AdapterVerificationError, match="lora_target_modules"):
            load_adapter(adapted(), tmp_path)

    def test_load_from_a_folder_without_adapter(self, tmp_path):
        with pytest.raises(AdapterVerificationError, match=f"{ADAPTER_FILE} is missing"):
            load_adapter(adapted(), tmp_path)


def test_saving_asks_no_network(tmp_path, monkeypatch):
    """With `save_embedding_layers="auto"` PEFT asks the Hub about the base's vocabulary."""
    model = adapted("llama")
    model.get_base_model().config._name_or_path = "somebody/some-model"
    model.peft_config["default"].base_model_name_or_path = "somebody/some-model"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    asked = []

    def refuse(*arguments, **keywords):
        asked.append(arguments)
        raise OSError("no network in this test")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    save_adapter(model, tmp_path)
    assert asked == []


def test_adapted_embeddings_are_saved_without_the_base(tmp_path):
    """A LoRA on the embeddings is where PEFT would add the whole embedding matrix."""
    model = adapted(target_modules=["q_proj", "embed_tokens"])
    save_adapter(model, tmp_path)
    saved = load_file(tmp_path / ADAPTER_FILE)
    assert all("lora_" in name for name in saved)
    assert saved.keys() == adapter_state(model).keys()
