"""Weights whose files hold them otherwise than the model: found, read, merged, and missed.

Run: python -m pytest tests/base/test_conversion.py
"""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from lora_fsdp.adapter.merging import merge_adapter
from lora_fsdp.adapter.saved import save_adapter
from lora_fsdp.arguments import ModelArguments
from lora_fsdp.base.conversion.model_weights import ModelWeights
from lora_fsdp.base.fingerprints import fingerprint_base
from lora_fsdp.base.loading import load_base
from lora_fsdp.base.stored_weights import BaseWeights, base_skeleton
from lora_fsdp.base.streaming import StoredBase, load_on_device, open_base
from lora_fsdp.errors import ModelNotFoundError
from tests.support.adapters import adapted, logits
from tests.support.examined import ExaminedRun
from tests.support.families import MIXTURES, family_model
from tests.support.ranks import launch_environment, run_ranks
from tests.support.runs import toy_run
from tests.support.tiny import tiny_tokenizer

CPU = torch.device("cpu")
#: A family for each way in which experts are published.
PUBLISHED = ["deepseek_v3", "gpt_oss", "granitemoe", "mixtral", "phimoe", "qwen3_moe"]


@pytest.fixture
def saved(tmp_path):
    """Saves a tiny model in its published form."""

    def save(family, dtype=torch.float32):
        model = family_model(family).to(dtype)
        model.save_pretrained(tmp_path / "base", max_shard_size="100KB")
        tiny_tokenizer().save_pretrained(tmp_path / "base")
        return tmp_path / "base"

    return save


def without(folder, part, count=1):
    """Remove tensors from the files; returns their names."""
    removed = []
    for file in sorted(folder.glob("*.safetensors")):
        tensors = load_file(file)
        for name in [name for name in tensors if part in name][: count - len(removed)]:
            del tensors[name]
            removed.append(name)
        save_file(tensors, file, metadata={"format": "pt"})
    index = folder / "model.safetensors.index.json"
    contents = json.loads(index.read_text())
    contents["weight_map"] = {k: v for k, v in contents["weight_map"].items() if k not in removed}
    index.write_text(json.dumps(contents))
    return removed


def assert_equal(found, expected):
    for tensors in ("named_parameters", "named_buffers"):
        pairs = [dict(getattr(model, tensors)()) for model in (found, expected)]
        assert pairs[0].keys() == pairs[1].keys()
        for name, tensor in pairs[1].items():
            assert tensor.dtype == pairs[0][name].dtype, name
            assert torch.equal(tensor, pairs[0][name]), name


@pytest.mark.parametrize("family", MIXTURES)
def test_read_as_transformers_reads_it(family, saved):
    arguments = ModelArguments(str(saved(family)), dtype="float32")
    base = open_base(arguments, device=CPU)
    assert isinstance(base, StoredBase)
    whole = load_base(arguments, device=CPU)
    assert base.fingerprint() == fingerprint_base(whole)
    assert list(base.first_values(8)) == [p.flatten()[:8].tolist() for p in whole.parameters()]
    assert_equal(load_on_device(arguments, device=CPU), whole)


@pytest.mark.parametrize("family", ["deepseek_v3", "ernie4_5_moe"])
def test_what_stays_in_float32(family, saved):
    arguments = ModelArguments(str(saved(family)), dtype="bfloat16")
    assert isinstance(open_base(arguments, device=CPU), StoredBase)
    assert_equal(load_on_device(arguments, device=CPU), load_base(arguments, device=CPU))


def test_of_experts_only_those_that_are_asked_for(saved, monkeypatch):
    folder = saved("qwen3_moe")
    weights = ModelWeights(base_skeleton(folder), BaseWeights(folder))
    read = []
    reader = BaseWeights.reader
    monkeypatch.setattr(BaseWeights, "reader", lambda self, n: read.append(n) or reader(self, n))
    name = "model.layers.1.mlp.experts.gate_up_proj"
    whole = weights.read(name)
    assert not read
    part = weights.reader(name)((slice(2, 4), slice(20, 50), slice(0, 5)))
    assert torch.equal(part, whole[2:4, 20:50, :5])
    assert read == [
        f"model.layers.1.mlp.experts.{expert}.{kind}_proj.weight"
        for expert in (2, 3)
        for kind in ("gate", "up")
    ]


class TestMissing:
    def examined(self, tmp_path, folder):
        (tmp_path / "run").mkdir()
        run = ExaminedRun.good(tmp_path / "run", folder)
        return [one for one in run.examine().findings if one.rule == "model-incomplete"]

    @pytest.mark.parametrize("family", PUBLISHED)
    def test_nothing(self, family, saved, tmp_path):
        assert self.examined(tmp_path, saved(family)) == []

    @pytest.mark.parametrize(
        ("family", "part", "named"),
        [
            ("mixtral", "experts.4.w3", "gate_up_proj"),
            ("qwen3_moe", "experts.6.down_proj", "down_proj"),
            ("deepseek_v3", "shared_experts.up_proj", "shared_experts.up_proj"),
            ("gpt_oss", "router.bias", "router.bias"),
            ("granitemoe", "output_linear", "experts.down_proj"),
        ],
    )
    def test_one_tensor(self, family, part, named, saved, tmp_path):
        folder = saved(family)
        assert len(without(folder, part)) == 1
        [finding] = self.examined(tmp_path, folder)
        assert named in finding.sentence
        with pytest.raises(ModelNotFoundError):
            load_on_device(ModelArguments(str(folder)), device=CPU)


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("mixtral", {"target_modules": "all-linear"}),
        ("qwen3_moe", {"target_modules": "all-linear"}),
        ("deepseek_v3", {"target_modules": "all-linear"}),
        ("gpt_oss", {"target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}),
        ("qwen2_moe", {"target_modules": ["q_proj", "shared_expert_gate"]}),
    ],
)
def test_merged_in_the_published_form(family, settings, saved, tmp_path):
    base = saved(family)
    settings = {"target_modules": ["q_proj"], **settings}
    model = adapted(AutoModelForCausalLM.from_pretrained(base), **settings)
    save_adapter(model, tmp_path / "adapter")
    merge_adapter(tmp_path / "adapter", tmp_path / "merged")
    stored = [BaseWeights(folder).tensors.keys() for folder in (base, tmp_path / "merged")]
    assert set(stored[0]) == set(stored[1])
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    assert (logits(merged) - logits(model)).abs().max() < 1e-5
    with model.disable_adapter():
        assert (logits(merged) - logits(model)).abs().max() > 1e-3


def run_on(folder, base, batch):
    return toy_run(
        folder, base=base, streamed=True, per_device_train_batch_size=batch, num_train_epochs=1
    )


@pytest.mark.slow
@pytest.mark.distributed
def test_two_ranks_train_experts_as_one_process_does(saved, tmp_path):
    base = saved("qwen3_moe")
    [alone] = run_ranks(run_on, tmp_path / "one", base, 8, world_size=1)
    fsdp = launch_environment("fsdp2_cpu.yaml")
    runs = run_ranks(run_on, tmp_path / "two", base, 4, environment=fsdp)
    assert runs[0]["fingerprint"] == runs[1]["fingerprint"]
    assert any("experts" in name for name in alone["adapter"])
    np.testing.assert_allclose(runs[0]["losses"], alone["losses"], rtol=1e-4)
    for name, tensor in alone["adapter"].items():
        np.testing.assert_allclose(runs[0]["adapter"][name], tensor, atol=2e-3, err_msg=name)
