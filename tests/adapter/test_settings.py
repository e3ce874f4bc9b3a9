"""Every setting of `peft.LoraConfig`: carried out and saved as trained, or refused at the start.

Run: python -m pytest tests/adapter/test_settings.py
"""

from dataclasses import fields

import pytest
import torch
from peft import AdaLoraConfig, IA3Config, LoraConfig, PeftModel, VeraConfig
from peft.tuners.lora.layer import LoraLayer
from transformers import AutoModelForCausalLM

from lora_fsdp import LoraTrainer
from lora_fsdp.adapter.attach import attach_adapter, lora_config
from lora_fsdp.adapter.ownership import trainable_parameters
from lora_fsdp.adapter.saved import save_adapter
from lora_fsdp.adapter.settings import CARRIED_OUT, REFUSED, STARTS
from lora_fsdp.adapter.verification import verify_adapter_folder
from lora_fsdp.arguments import LoraArguments
from lora_fsdp.errors import AdapterVerificationError, ArgumentError, TargetModulesError
from tests.support.adapters import logits, save_base
from tests.support.runs import toy_trainer
from tests.support.tiny import tiny_model

# PEFT warns of what is then carried out, or refused here.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::RuntimeWarning")

KEYS = {field.name for field in fields(LoraConfig)}
CARRIED = [
    {},
    {"r": 2},
    {"lora_alpha": 3},
    {"lora_dropout": 0.1},
    {"target_modules": ["q_proj"]},
    {"target_modules": None},
    {"exclude_modules": ["v_proj"]},
    {"bias": "all"},
    {"bias": "lora_only"},
    {"use_rslora": True},
    {"use_dora": True},
    {"lora_bias": True},
    {"modules_to_save": ["lm_head"]},
    {"layers_to_transform": [1]},
    {"layers_to_transform": [1], "layers_pattern": "layers"},
    {"rank_pattern": {"v_proj": 2}},
    {"alpha_pattern": {"v_proj": 2}},
    {"trainable_token_indices": [1, 2]},
    {"use_bdlora": {"nblocks": 2, "target_modules_bd_a": ["q_proj"], "match_strict": False}},
    {"ensure_weight_tying": True},
    {"task_type": "CAUSAL_LM", "peft_type": "LORA"},
    *({"init_lora_weights": start} for start in STARTS),
]
REFUSED_VALUES = {
    "peft_type": "IA3",
    "task_type": "SEQ_CLS",
    "auto_mapping": {"a": 1},
    "peft_version": "0.1",
    "base_model_name_or_path": "another/model",
    "revision": "v2",
    "inference_mode": True,
    "megatron_config": {"a": 1},
    "megatron_core": "os",
    "loftq_config": {"loftq_bits": 4},
    "eva_config": {},
    "corda_config": {},
    "lora_ga_config": {},
    "velora_config": {},
    "monteclora_config": {},
    "kasa_config": {},
    "arrow_config": {},
    "alora_invocation_tokens": [1],
    "use_qalora": True,
    "qalora_group_size": 8,
    "layer_replication": [[0, 2], [1, 3]],
    "runtime_config": {"ephemeral_gpu_offload": True},
}


def config_of(**extra):
    modules = ["q_proj", "v_proj"]
    return lora_config(LoraArguments(lora_r=4, lora_target_modules=modules, lora_kwargs=extra))


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_base(tmp_path_factory.mktemp("settings") / "base")


def test_every_key_is_decided():
    assert CARRIED_OUT | REFUSED.keys() == KEYS
    assert not CARRIED_OUT & REFUSED.keys()
    assert REFUSED_VALUES.keys() == REFUSED.keys()
    tried = {key for settings in CARRIED for key in settings}
    assert CARRIED_OUT - tried == {"fan_in_fan_out", "target_parameters"}  # tests of their own


@pytest.mark.parametrize("settings", CARRIED, ids=str)
def test_what_is_carried_out_is_saved_as_trained(settings, base, tmp_path):
    torch.manual_seed(0)
    live = attach_adapter(AutoModelForCausalLM.from_pretrained(base), config_of(**settings)).eval()
    generator = torch.Generator().manual_seed(1)
    for parameter in trainable_parameters(live).values():
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    save_adapter(live, tmp_path / "adapter", trained=True)
    plain = AutoModelForCausalLM.from_pretrained(base)
    before = logits(plain)
    torch.manual_seed(99)
    loaded = PeftModel.from_pretrained(plain, tmp_path / "adapter").eval()
    torch.testing.assert_close(logits(loaded), logits(live), atol=1e-5, rtol=0)
    assert (logits(live) - before).abs().max() > 1e-3


@pytest.mark.parametrize("key", sorted(REFUSED))
def test_what_is_not_carried_out_is_refused(key):
    with pytest.raises(ArgumentError, match=rf"{key}.*refused: "):
        config_of(**{key: REFUSED_VALUES[key]})


@pytest.mark.parametrize(
    ("start", "why"),
    [
        ("eva", "pass over data"),
        ("corda", "pass over data"),
        ("lora_ga", "pass over data"),
        ("loftq", "--load_in_4bit"),
        ("mica", "freezes"),
        ("pissa_niter_4", "at random"),
        ("GAUSSIAN", "not known"),
        (None, "not known"),
        (1, "not known"),
        ([], "not known"),
    ],
)
def test_starts_that_are_refused(start, why):
    with pytest.raises(ArgumentError, match=rf"init_lora_weights .* is refused: .*{why}"):
        config_of(init_lora_weights=start)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"bias": "some"}, "bias must be"),
        ({"use_dora": "yes"}, "use_dora must be true or false"),
        ({"r": 4.0}, "r must be a whole number"),
        ({"modules_to_save": "lm_head"}, "list of names"),
        ({"layers_to_transform": "1"}, "layer numbers"),
        ({"trainable_token_indices": [-1]}, "token ids"),
        ({"exclude_modules": "["}, "no regular expression"),
        ({"init_lora_weights": "orthogonal", "r": 3}, "even ranks"),
    ],
    ids=str,
)
def test_nonsense(settings, words):
    with pytest.raises(ArgumentError, match=words):
        config_of(**settings)


@pytest.mark.parametrize(
    "settings",
    [
        {"rank_pattern": {"nothing": 3}},
        {"alpha_pattern": {"nothing": 3}},
        {"modules_to_save": ["nothing"]},
        {"exclude_modules": ["nothing"]},
        {"target_parameters": ["nothing.weight"]},
        {"layers_to_transform": [1, 99]},
        {"fan_in_fan_out": True},
    ],
    ids=str,
)
def test_parts_that_the_model_has_not_got(settings):
    with pytest.raises(ArgumentError, match=next(iter(settings))):
        attach_adapter(tiny_model(), config_of(**settings))


@pytest.mark.parametrize(
    "settings",
    [
        {"exclude_modules": "(a+)+x"},
        {"rank_pattern": {"(q|v)_(proj+)+": 2}},
        {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    ],
    ids=str,
)
def test_what_could_not_be_saved_is_refused_at_the_start(settings):
    with pytest.raises(ArgumentError, match="could not be loaded again when it is saved"):
        attach_adapter(tiny_model("llama-tied"), config_of(**settings))


def test_olora_on_transposed_weights(tmp_path):
    config = LoraConfig(target_modules=["c_attn"], init_lora_weights="olora")
    with pytest.raises(ArgumentError, match="transposed: use pissa"):
        attach_adapter(tiny_model("gpt2"), config)


@pytest.mark.parametrize("kind", [IA3Config, VeraConfig, AdaLoraConfig])
def test_other_methods_of_peft(kind, tmp_path):
    extra = {"total_step": 10} if kind is AdaLoraConfig else {}
    config = kind(target_modules=["q_proj"], task_type="CAUSAL_LM", **extra)
    trainer = toy_trainer(tmp_path / "other", rows=8)
    with pytest.raises(ArgumentError, match="only LORA is trained here"):
        LoraTrainer(
            model=tiny_model(),
            args=trainer.args,
            task=trainer.task,
            processing_class=trainer.processing_class,
            peft_config=config,
        )
    with pytest.raises(ArgumentError, match="only LORA is trained here"):
        attach_adapter(tiny_model(), config)


def test_a_check_at_the_start_draws_no_numbers():
    for start in (True, "orthogonal"):
        drawn = []
        for wrapped in (attach_adapter, lambda base, config: base.add_adapter(config)):
            torch.manual_seed(0)
            base = tiny_model()
            torch.manual_seed(1)
            wrapped(base, config_of(init_lora_weights=start))
            drawn.append(torch.rand(1))
        assert torch.equal(*drawn)


class TestStartsThatChangeTheBase:
    def trained(self, base, tmp_path, start):
        trainer = toy_trainer(
            tmp_path / "run", rows=8, num_train_epochs=1, base=base, init_lora_weights=start
        )
        trainer.train()
        return trainer

    @pytest.mark.parametrize("start", ["pissa", "olora"])
    def test_is_proved_by_loading_it_again(self, start, base, tmp_path):
        self.trained(base, tmp_path, start).save_model(str(tmp_path / "adapter"))
        found = {c.name: c.outcome for c in verify_adapter_folder(tmp_path / "adapter").checks}
        assert found["answers"] == "passed"

    def test_a_part_that_differs_each_time_stops_the_run(self, base, tmp_path, monkeypatch):
        plain = LoraLayer.pissa_init

        def random(layer, adapter_name, init_lora_weights):
            plain(layer, adapter_name, init_lora_weights)
            weight = layer.get_base_layer().weight
            weight.data = weight + 0.3 * torch.randn_like(weight)

        monkeypatch.setattr(LoraLayer, "pissa_init", random)
        trainer = self.trained(base, tmp_path, "pissa")
        with pytest.raises(AdapterVerificationError, match="loaded again, it is not what was"):
            trainer.save_model(str(tmp_path / "adapter"))
        assert not (tmp_path / "adapter" / "adapter_config.json").exists()

    def test_a_base_without_a_place_is_refused(self):
        with pytest.raises(ArgumentError, match="pissa needs a base that lies in a folder"):
            attach_adapter(tiny_model(), config_of(init_lora_weights="pissa"))


def test_what_peft_cannot_wrap(base):
    with pytest.raises(TargetModulesError, match=r"PEFT cannot adapt.*nn\.Parameter"):
        attach_adapter(tiny_model(), config_of(target_parameters=["q_proj.weight"]))
