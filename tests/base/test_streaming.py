"""A base read tensor by tensor to where it stays: the same bits as transformers loads, no peak.

Run: python -m pytest tests/base/test_streaming.py
"""

import json
import logging
import os
import subprocess
import sys
from itertools import permutations
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import save_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, GenerationConfig, LlamaConfig

from lora_fsdp.adapter.attach import attach_adapter
from lora_fsdp.adapter.ownership import trainable_parameters
from lora_fsdp.arguments import ModelArguments
from lora_fsdp.arguments.fsdp import FsdpSettings
from lora_fsdp.base.fingerprints import base_parameters, fingerprint_base
from lora_fsdp.base.layers import base_model
from lora_fsdp.base.loading import load_base
from lora_fsdp.base.streaming import StoredBase, load_on_device, needs_weights, open_base
from lora_fsdp.compute.packed_model import PackedModel
from lora_fsdp.distributed.sharding import decoder_layers, place_model
from lora_fsdp.errors import ArgumentError, ModelNotFoundError
from lora_fsdp.placement.layout import Layout
from tests.support.adapters import edit_json, save_base
from tests.support.families import family_config, family_model
from tests.support.ranks import launch_environment, run_ranks
from tests.support.runs import toy_run
from tests.support.tiny import CONFIGS, tiny_model, tiny_tokenizer

CPU = torch.device("cpu")
SETTINGS = FsdpSettings(True, False, False, None, True)
KINDS = sorted(CONFIGS)


def save_pickled(model, folder, *, shards=1):
    model.config.save_pretrained(folder)
    names = list(model.state_dict())
    files = {}
    for shard in range(shards):
        part = f"-0000{shard + 1}-of-0000{shards}" if shards > 1 else ""
        own = {name: model.state_dict()[name] for name in names[shard::shards]}
        torch.save(own, folder / f"pytorch_model{part}.bin")
        files |= dict.fromkeys(own, f"pytorch_model{part}.bin")
    if shards > 1:
        index = {"metadata": {}, "weight_map": files}
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))


FORMS = {
    "single": lambda model, folder: model.save_pretrained(folder),
    "shards": lambda model, folder: model.save_pretrained(folder, max_shard_size="200KB"),
    "pickle": save_pickled,
    "pickles": lambda model, folder: save_pickled(model, folder, shards=2),
}


def arguments(folder, **options):
    return ModelArguments(str(folder), **options)


def lora(kind="llama", **options):
    settings = {"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    return LoraConfig(**settings, fan_in_fan_out=kind == "gpt2", **options)


def assert_equal(found, expected):
    """Parameters and buffers, bit for bit; which of them are one tensor; the settings."""
    for tensors in ("named_parameters", "named_buffers"):
        pairs = [dict(getattr(model, tensors)()) for model in (found, expected)]
        assert pairs[0].keys() == pairs[1].keys()
        for name, tensor in pairs[1].items():
            assert tensor.dtype == pairs[0][name].dtype, name
            assert torch.equal(tensor, pairs[0][name]), name
    assert found.config.to_dict() == expected.config.to_dict()
    assert found.name_or_path == expected.name_or_path
    assert found.generation_config.to_dict() == expected.generation_config.to_dict()
    assert found.training is expected.training


class TestWhole:
    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    @pytest.mark.parametrize("kind", KINDS)
    def test_as_transformers_loads_it(self, kind, dtype, tmp_path):
        tiny_model(kind).save_pretrained(tmp_path, max_shard_size="50KB")
        GenerationConfig(temperature=0.3, do_sample=True).save_pretrained(tmp_path)
        base = open_base(arguments(tmp_path, dtype=dtype), device=CPU)
        assert isinstance(base, StoredBase)
        assert all(parameter.is_meta for parameter in base.model.parameters())
        found = load_on_device(arguments(tmp_path, dtype=dtype), device=CPU)
        assert_equal(found, load_base(arguments(tmp_path, dtype=dtype), device=CPU))

    @pytest.mark.parametrize("kind", ["llama-tied", "gpt2"])
    @pytest.mark.parametrize("drop", [True, False], ids=["no prefix", "prefix"])
    def test_names_without_the_model_s_prefix(self, kind, drop, tmp_path):
        from safetensors.torch import load_file, save_file

        model = tiny_model(kind)
        model.save_pretrained(tmp_path)
        prefix = f"{model.base_model_prefix}."
        file = tmp_path / "model.safetensors"
        tensors = {
            name.removeprefix(prefix) if drop else prefix + name.removeprefix(prefix): value
            for name, value in load_file(file).items()
        }
        save_file(tensors, file, metadata={"format": "pt"})
        assert isinstance(open_base(arguments(tmp_path), device=CPU), StoredBase)
        found = load_on_device(arguments(tmp_path), device=CPU)
        assert_equal(found, load_base(arguments(tmp_path), device=CPU))

    def test_fingerprints(self, tmp_path):
        tiny_model(dtype=torch.bfloat16).save_pretrained(tmp_path)
        stored = open_base(arguments(tmp_path, dtype="float32"), device=CPU)
        whole = load_base(arguments(tmp_path, dtype="float32"), device=CPU)
        assert stored.fingerprint() == fingerprint_base(whole)
        expected = [p.flatten()[:8].float().tolist() for p in whole.parameters()]
        assert list(stored.first_values(8)) == expected

    def test_the_same_adapter(self, tmp_path):
        """PEFT would leave an adapter on the meta device without values."""
        tiny_model().save_pretrained(tmp_path)
        models = []
        for load in (open_base, load_base):
            base = load(arguments(tmp_path), device=CPU)
            stored = base if isinstance(base, StoredBase) else None
            torch.manual_seed(7)
            models.append(attach_adapter(stored.model if stored else base, lora(), stored=stored))
        assert all(p.is_meta for _, p in base_parameters(base_model(models[0])))
        found, expected = map(trainable_parameters, models)
        assert found.keys() == expected.keys()
        for name, parameter in expected.items():
            assert torch.equal(found[name], parameter), name


class TestLoadedWhole:
    """Where the files do not hold what the model does, transformers loads, and the log says so."""

    def whole(self, folder, caplog, **options):
        with caplog.at_level(logging.WARNING, "lora_fsdp.base.streaming"):
            unread = open_base(arguments(folder), device=CPU, **options)
            assert not isinstance(unread, StoredBase)
            base = unread.load()
        assert not any(parameter.is_meta for parameter in base.parameters())
        [line] = [r.getMessage() for r in caplog.records if "whole base in host" in r.getMessage()]
        return base, line

    def test_pickles(self, tmp_path, caplog):
        model = tiny_model()
        model.config.save_pretrained(tmp_path)
        torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
        found, line = self.whole(tmp_path, caplog)
        assert "no complete safetensors" in line
        for name, tensor in model.state_dict().items():
            assert torch.equal(found.state_dict()[name], tensor)

    def test_a_shared_tensor_that_is_stored_twice(self, tmp_path, caplog):
        """They might differ, and then transformers does not share them."""
        from safetensors.torch import load_file, save_file

        tiny_model("llama-tied").save_pretrained(tmp_path)
        file = tmp_path / "model.safetensors"
        tensors = load_file(file)
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + 1
        save_file(tensors, file, metadata={"format": "pt"})
        found, line = self.whole(tmp_path, caplog)
        assert "lm_head.weight" in line
        assert torch.equal(found.lm_head.weight, tensors["lm_head.weight"])

    @pytest.mark.parametrize(
        "options",
        [{"init_lora_weights": "pissa"}, {"use_dora": True}, {"modules_to_save": ["lm_head"]}],
        ids=lambda options: next(iter(options)),
    )
    def test_an_adapter_that_needs_the_weights(self, options, tmp_path, caplog):
        tiny_model().save_pretrained(tmp_path)
        config = lora(**options)
        base, line = self.whole(tmp_path, caplog, peft_config=config)
        assert next(iter(options)) in line
        attach_adapter(base, config)
        stored = open_base(arguments(tmp_path), device=CPU)
        with pytest.raises(ArgumentError, match="no weights yet"):
            attach_adapter(stored.model, config, stored=stored)

    def test_plain_adapters_do_not(self):
        for init in (True, False, "gaussian"):
            assert needs_weights(lora(init_lora_weights=init)) is None

    @pytest.mark.parametrize("explicit", [None, "model.safetensors", "other.safetensors"])
    @pytest.mark.parametrize("pair", list(permutations(FORMS, 2)), ids="+".join)
    def test_files_that_disagree(self, pair, explicit, tmp_path):
        """Whatever else lies in the folder, it is the model that transformers (and PEFT) load."""
        first, second = (tiny_model(seed=seed) for seed in (0, 1))
        FORMS[pair[0]](first, tmp_path)
        FORMS[pair[1]](second, tmp_path / "second")
        for file in (tmp_path / "second").glob("*model*"):
            if not (tmp_path / file.name).exists():
                file.rename(tmp_path / file.name)
        if explicit == "model.safetensors" and "single" not in pair:
            pytest.skip("it names a file that is not there")
        if explicit == "other.safetensors":
            third = {name: t.clone() for name, t in tiny_model(seed=2).state_dict().items()}
            save_file(third, tmp_path / explicit, metadata={"format": "pt"})
        if explicit is not None:
            edit_json(tmp_path / "config.json", transformers_weights=explicit)
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path)
        ours = load_on_device(arguments(tmp_path), device=CPU)
        for name, parameter in theirs.named_parameters():
            assert torch.equal(parameter, ours.get_parameter(name)), name

    def test_missing_weights_are_named_as_before(self, tmp_path):
        from safetensors.torch import load_file, save_file

        tiny_model().save_pretrained(tmp_path)
        file = tmp_path / "model.safetensors"
        tensors = load_file(file)
        del tensors["model.norm.weight"]
        save_file(tensors, file, metadata={"format": "pt"})
        with pytest.raises(ModelNotFoundError, match=r"lacks 1 of the weights.*model\.norm"):
            open_base(arguments(tmp_path), device=CPU).load()


def assert_equal_weights(found, expected):
    for name, parameter in expected.named_parameters():
        assert torch.equal(dict(found.named_parameters())[name], parameter), name


class TestFusedLayers:
    """The comparison with the originals, before there are weights."""

    def fused(self, folder, damage=None):
        stored = open_base(arguments(folder), device=CPU)
        model = attach_adapter(stored.model, lora(), stored=stored)
        base = base_model(model)
        layers = decoder_layers(base)
        if damage:
            damage(layers)
        result = PackedModel(model).fuse(layers, filled_copy=stored.filled_copy)
        assert all(p.is_meta for _, p in base_parameters(base))
        return result

    @pytest.mark.parametrize("kind", ["llama", "qwen3"])
    def test_equal(self, kind, tmp_path):
        tiny_model(kind).save_pretrained(tmp_path)
        assert len(self.fused(tmp_path).layers) == 3

    def test_a_later_layer_that_computes_something_else(self, tmp_path):
        tiny_model().save_pretrained(tmp_path)

        def damage(layers):
            layers[1].input_layernorm.forward = lambda hidden: hidden

        assert "1 computes something else" in self.fused(tmp_path, damage).reason


@pytest.mark.distributed
class TestShards:
    @pytest.mark.parametrize("kind", KINDS)
    def test_as_sharded_from_a_whole_model(self, kind, tmp_path):
        tiny_model(kind).save_pretrained(tmp_path, max_shard_size="50KB")
        run_ranks(compare_shards, str(tmp_path), kind, 1, environment=FSDP)

    def test_three_ranks_share_unevenly(self, tmp_path):
        tiny_model().save_pretrained(tmp_path)
        run_ranks(compare_shards, str(tmp_path), "llama", 0, world_size=3, environment=FSDP)

    def test_whole_runs(self, tmp_path):
        """One resident layer, two sharded ones."""
        save_base(tmp_path / "base")
        whole, streamed = (
            run_ranks(run_from, tmp_path / str(read), tmp_path / "base", read, environment=FSDP)
            for read in (False, True)
        )
        assert whole[0]["groups"]["LlamaDecoderLayer"] == 2
        for key in ("losses", "fingerprint", "groups", "metrics"):
            assert streamed[0][key] == whole[0][key], key


FSDP = launch_environment("fsdp2_cpu.yaml")


def run_from(output_dir, base, streamed):
    return toy_run(
        output_dir, base=base, streamed=streamed, resident_layers="1", num_train_epochs=1
    )


def compare_shards(folder, kind, resident):
    import torch.distributed as dist

    dist.init_process_group("gloo")
    world_size = dist.get_world_size()
    init_device_mesh("cpu", (world_size,))
    placed = []
    for load in (open_base, load_base):
        base = load(arguments(folder, dtype="bfloat16"), device=CPU)
        stored = base if isinstance(base, StoredBase) else None
        model = attach_adapter(stored.model if stored else base, lora(kind), stored=stored)
        layers = decoder_layers(base_model(model))
        place_model(
            model, layers=layers, layout=Layout(world_size, resident), settings=SETTINGS,
            device=CPU, stored=stored,
        )  # fmt: skip
        placed.append(base_model(model))
    found, expected = (dict(base_parameters(base)) for base in placed)
    assert found.keys() == expected.keys()
    sharded = 0
    for name, parameter in expected.items():
        assert isinstance(parameter, DTensor) == isinstance(found[name], DTensor), name
        if isinstance(parameter, DTensor):
            sharded += 1
            assert found[name].placements == parameter.placements
            assert torch.equal(found[name].to_local(), parameter.to_local()), name
            assert torch.equal(found[name].full_tensor(), parameter.full_tensor()), name
        else:
            assert torch.equal(found[name], parameter), name
    assert sharded
    ids = torch.arange(12)[None]
    logits = [base(ids, use_cache=False).logits for base in placed]
    assert torch.equal(*logits)


MEMORY = """
import json, sys
from tests.base.test_streaming import shard_in_limit
from tests.support.ranks import RankError, launch_environment, run_ranks
if __name__ == "__main__":
    environment = launch_environment("fsdp2_cpu.yaml")
    found = {}
    for load in ("open_base", "load_base"):
        try:
            found[load] = run_ranks(shard_in_limit, *sys.argv[1:], load, environment=environment)
        except RankError as error:
            found[load] = error.text
    print(json.dumps(found))
"""


def shard_in_limit(folder, allowed, load):
    """Shard a base, allowed so many bytes more than before; the growth of the peak."""
    import resource

    import torch.distributed as dist

    dist.init_process_group("gloo")
    load_and_shard(folder + "/small", load)  # what is allocated once
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    before = memory("VmHWM")
    limit = memory("VmData") + int(allowed)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    load_and_shard(folder + "/big", load)
    return memory("VmHWM") - before


def memory(name):
    return int(Path("/proc/self/status").read_text().split(f"{name}:")[1].split()[0]) * 1024


def load_and_shard(folder, load):
    """As a training run does it."""
    base = {"open_base": open_base, "load_base": load_base}[load](arguments(folder), device=CPU)
    stored = base if isinstance(base, StoredBase) else None
    model = attach_adapter(stored.model if stored else base, lora(), stored=stored)
    layers = decoder_layers(base_model(model))
    filled_copy = stored.filled_copy if stored else None
    fusing = PackedModel(model).fuse(layers, filled_copy=filled_copy)
    assert fusing.is_fused or "mlp has no" in fusing.reason  # but experts
    place_model(
        model, layers=layers, layout=Layout(2, 0), settings=SETTINGS, device=CPU, stored=stored
    )
    assert all(isinstance(p, DTensor) for _, p in base_parameters(base_model(model)))


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc, and sets RLIMIT_DATA")
def test_a_base_larger_than_the_memory_allowed(tmp_path):
    """240 MB of base in files of a layer (17 MB), on two ranks that may have 165 MB more each: the
    shard of 119 MB, a layer in its file, and its copies for the comparison. Loaded whole, it does
    not fit.
    """
    save_base(tmp_path / "small")
    config = LlamaConfig(
        vocab_size=512, hidden_size=512, intermediate_size=2048, num_hidden_layers=14,
        num_attention_heads=4,
    )  # fmt: skip
    held_to_shard_and_two_layers(tmp_path, config)


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc, and sets RLIMIT_DATA")
def test_a_mixture_of_experts_larger_than_the_memory_allowed(tmp_path):
    """As above, of 240 MB in files where every expert has tensors of its own: on each rank the
    shard of 120 MB and two layers of 15 MB.
    """
    family_model("qwen3_moe").save_pretrained(tmp_path / "small")
    tiny_tokenizer().save_pretrained(tmp_path / "small")
    config = family_config(
        "qwen3_moe", vocab_size=512, hidden_size=512, moe_intermediate_size=256, num_experts=8,
        num_hidden_layers=16,
    )  # fmt: skip
    held_to_shard_and_two_layers(tmp_path, config)


def held_to_shard_and_two_layers(tmp_path, config):
    big = AutoModelForCausalLM.from_config(config)
    big.save_pretrained(tmp_path / "big", max_shard_size="17MB")
    size = sum(p.nbytes for p in big.parameters())
    layer = sum(p.nbytes for p in big.model.layers[0].parameters())
    allowed = size // 2 + 2 * layer + 12_000_000
    assert allowed < 0.7 * size
    run = subprocess.run(
        [sys.executable, "-c", MEMORY, str(tmp_path), str(allowed)],
        capture_output=True,
        text=True,
        cwd=Path(__file__).resolve().parents[2],
        # glibc keeps what was freed below a threshold that it moves at will.
        env=os.environ
        | {"MALLOC_MMAP_THRESHOLD_": "131072", "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert run.returncode == 0, run.stderr[-2000:]
    found = json.loads(run.stdout.strip().splitlines()[-1])
    assert isinstance(found["open_base"], list), found
    assert max(found["open_base"]) < allowed, f"{found} for a shard of {size // 2}"
    assert "memory" in str(found["load_base"])
