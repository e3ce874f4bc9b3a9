"""Merging: the new model is base + adapter, written tensor by tensor, whole or not at all.

Run: python -m pytest tests/adapter/test_merging.py
"""

import json
import os
import resource
import subprocess
import sys

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from lora_fsdp.adapter import merged_files
from lora_fsdp.adapter.folder import ADAPTER_FILE
from lora_fsdp.adapter.merging import merge_adapter
from lora_fsdp.errors import (
    ArgumentError,
    BaseMismatchError,
    MergeError,
    ModelNotFoundError,
    OutputFolderError,
    UnsafeFileError,
    UnsupportedAdapterError,
)
from tests.support.adapters import adapted, edit_json, logits, save_base, save_plain_adapter
from tests.support.tiny import CONFIGS, tiny_model

KINDS = sorted(CONFIGS)
OPTIONS = {
    "plain": lambda query, up: {},
    "rslora": lambda query, up: {"use_rslora": True, "r": 8},
    "patterns": lambda query, up: {"rank_pattern": {query: 2}, "alpha_pattern": {up: 64}},
    "one layer": lambda query, up: {"layers_to_transform": [1], "target_modules": [query]},
}
NAMES = {"gpt2": ("c_attn", "c_fc")}


def is_close(first, second, *, tolerance):
    return bool((first - second).abs().max() < tolerance)


@pytest.mark.parametrize(
    ("kind", "options"),
    [(kind, "plain") for kind in KINDS]
    + [(kind, name) for kind in ("llama", "gpt2") for name in OPTIONS if name != "plain"],
)
def test_merged_is_base_and_adapter(tmp_path, kind, options):
    options = OPTIONS[options](*NAMES.get(kind, ("q_proj", "up_proj")))
    base = save_base(tmp_path / "base", kind)
    model = save_plain_adapter(tmp_path / "adapter", base, kind, **options)
    result = merge_adapter(tmp_path / "adapter", tmp_path / "merged")
    merged, loaded = AutoModelForCausalLM.from_pretrained(
        tmp_path / "merged", output_loading_info=True
    )
    assert not loaded["missing_keys"]
    assert not loaded["unexpected_keys"]
    with model.disable_adapter():
        untouched = logits(model)
    assert not is_close(untouched, logits(model), tolerance=1e-3), "the adapter must matter"
    assert is_close(logits(merged), logits(model), tolerance=1e-5)
    assert result.merged == sum("lora_A" in name for name, _ in model.named_parameters())


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [("bfloat16", 0.05), ("float16", 0.005), ("float32", 1e-5)]
)
def test_dtypes(tmp_path, dtype, tolerance):
    base = save_base(tmp_path / "base")
    model = save_plain_adapter(tmp_path / "adapter", base)
    merge_adapter(tmp_path / "adapter", tmp_path / "merged", dtype=dtype)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert merged.dtype == getattr(torch, dtype)
    stored = load_file(tmp_path / "merged" / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {getattr(torch, dtype)}
    assert is_close(logits(merged.float()), logits(model), tolerance=tolerance)


def test_added_up_in_float32(tmp_path):
    """In bfloat16 a small change to a large weight would be lost twice."""
    base = save_base(tmp_path / "base", dtype=torch.bfloat16)
    model = save_plain_adapter(tmp_path / "adapter", base)
    merge_adapter(tmp_path / "adapter", tmp_path / "merged", dtype="float32")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert is_close(logits(merged), logits(model.float()), tolerance=1e-5)


def test_as_the_base_has_it(tmp_path):
    base = save_base(tmp_path / "base", dtype=torch.bfloat16)
    save_plain_adapter(tmp_path / "adapter", base)
    result = merge_adapter(tmp_path / "adapter", tmp_path / "merged")
    stored = load_file(tmp_path / "merged" / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}
    assert result.bytes == sum(tensor.nbytes for tensor in stored.values())


def test_shards_and_files(tmp_path):
    base = save_base(tmp_path / "base", max_shard_size="100KB")
    assert len(list(base.glob("*.safetensors"))) > 3
    model = save_plain_adapter(tmp_path / "adapter", base)
    result = merge_adapter(tmp_path / "adapter", tmp_path / "merged", max_shard_size="150KB")
    files = sorted((tmp_path / "merged").glob("*.safetensors"))
    assert len(files) == len(result.files) > 2
    assert all(file.stat().st_size < 160_000 for file in files)
    index = json.loads((tmp_path / "merged" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {file.name for file in files}
    names = {path.name for path in (tmp_path / "merged").iterdir()}
    assert {"config.json", "generation_config.json", "tokenizer.json"} <= names
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert is_close(logits(merged), logits(model), tolerance=1e-5)
    assert AutoTokenizer.from_pretrained(tmp_path / "merged").eos_token == "<|end|>"
    assert "weights merged" in str(result)


def test_lm_head(tmp_path):
    base = save_base(tmp_path / "base")
    model = save_plain_adapter(
        tmp_path / "adapter", base, target_modules=["lm_head", "q_proj"], r=2
    )
    merge_adapter(tmp_path / "adapter", tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert is_close(logits(merged), logits(model), tolerance=1e-5)


MEMORY = """
import sys
from lora_fsdp.adapter.merging import merge_adapter
folder = sys.argv[1]
merge_adapter(folder + "/adapter", folder + "/warm", base=folder + "/base")
def peak():
    return int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0]) * 1024
open("/proc/self/clear_refs", "w").write("5")  # forget the peak so far
before = peak()
merge_adapter(folder + "/big-adapter", folder + "/merged", base=folder + "/big")
print(peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.slow
def test_the_model_is_never_whole_in_memory(tmp_path):
    """A base of 240 MB in files of 9 MB: the peak grows by one file and a few of the largest
    tensors (4 MB), not by the base.
    """
    save_base(tmp_path / "base")
    save_plain_adapter(tmp_path / "adapter", tmp_path / "base")
    size = big_base(tmp_path / "big", tmp_path / "big-adapter")
    assert size > 200e6
    run = subprocess.run(
        [sys.executable, "-c", MEMORY, str(tmp_path)],
        capture_output=True,
        text=True,
        check=True,
        # glibc keeps what was freed below a threshold that it moves at will: with it fixed, what
        # counts is what was in use.
        env=os.environ | {"MALLOC_MMAP_THRESHOLD_": "131072"},
    )
    grown = int(run.stdout.strip().splitlines()[-1])
    assert grown < size / 4, f"{grown / 1e6:.0f} MB for a model of {size / 1e6:.0f} MB"


def big_base(folder, adapter):
    from transformers import LlamaConfig

    config = LlamaConfig(
        vocab_size=512,
        hidden_size=512,
        intermediate_size=2048,
        num_hidden_layers=14,
        num_attention_heads=4,
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(folder, max_shard_size="9MB")
    adapted(model, target_modules=["q_proj", "down_proj"]).save_pretrained(
        adapter, save_embedding_layers=False
    )
    edit_json(adapter / "adapter_config.json", base_model_name_or_path=str(folder))
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


class TestRefusals:
    def test_dora(self, tmp_path):
        base = save_base(tmp_path / "base")
        save_plain_adapter(tmp_path / "adapter", base, use_dora=True)
        with pytest.raises(UnsupportedAdapterError, match=r"not plain LoRA \(use_dora"):
            merge_adapter(tmp_path / "adapter", tmp_path / "merged")
        assert not (tmp_path / "merged").exists()

    @pytest.mark.parametrize(
        ("options", "named"),
        [
            ({"bias": "all"}, "biases"),
            ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
            ({"init_lora_weights": "olora"}, "olora"),
            ({"target_modules": ["embed_tokens", "q_proj"]}, "embed_tokens"),
            ({"trainable_token_indices": [1, 2]}, "trainable_token_indices"),
        ],
        ids=lambda value: value if isinstance(value, str) else "",
    )
    def test_other_kinds(self, tmp_path, options, named):
        base = save_base(tmp_path / "base")
        model = AutoModelForCausalLM.from_pretrained(base)
        config = {"r": 4, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM", **options}
        get_peft_model(model, LoraConfig(**config)).save_pretrained(
            tmp_path / "adapter", save_embedding_layers=False
        )
        with pytest.raises(UnsupportedAdapterError, match=named):
            merge_adapter(tmp_path / "adapter", tmp_path / "merged")

    def test_tied_head(self, tmp_path):
        base = save_base(tmp_path / "base", "llama-tied")
        model = AutoModelForCausalLM.from_pretrained(base)
        config = LoraConfig(r=2, target_modules=["lm_head"], task_type="CAUSAL_LM")
        with pytest.warns(UserWarning, match="tie_word_embeddings"):
            peft_model = get_peft_model(model, config)
        peft_model.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
        with pytest.raises(UnsupportedAdapterError, match="lm_head"):
            merge_adapter(tmp_path / "adapter", tmp_path / "merged")

    def test_shapes_of_another_base(self, tmp_path):
        save_plain_adapter(tmp_path / "adapter", save_base(tmp_path / "base"))
        other = save_base(tmp_path / "other", "gpt2")
        with pytest.raises(BaseMismatchError, match=r"adapter.*other"):
            merge_adapter(tmp_path / "adapter", tmp_path / "merged", base=other)
        assert not (tmp_path / "merged").exists()

    def test_overflow_in_float16(self, tmp_path):
        base = save_base(tmp_path / "base")
        save_plain_adapter(tmp_path / "adapter", base)
        weights = load_file(base / "model.safetensors")
        weights["model.layers.0.self_attn.q_proj.weight"][0, 0] = 70_000.0
        save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(MergeError, match=r"q_proj.*float16.*70000"):
            merge_adapter(tmp_path / "adapter", tmp_path / "merged", dtype="float16")
        assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]
        merge_adapter(tmp_path / "adapter", tmp_path / "merged", dtype="bfloat16")

    def test_output_that_holds_something(self, tmp_path):
        save_plain_adapter(tmp_path / "adapter", save_base(tmp_path / "base"))
        (tmp_path / "merged").mkdir()
        (tmp_path / "merged" / "note.txt").write_text("mine")
        with pytest.raises(OutputFolderError, match="already holds"):
            merge_adapter(tmp_path / "adapter", tmp_path / "merged")
        assert (tmp_path / "merged" / "note.txt").read_text() == "mine"

    def test_quantized_base(self, tmp_path):
        base = save_base(tmp_path / "base")
        save_plain_adapter(tmp_path / "adapter", base)
        edit_json(base / "config.json", quantization_config={"quant_method": "bitsandbytes"})
        with pytest.raises(MergeError, match="quantised"):
            merge_adapter(tmp_path / "adapter", tmp_path / "merged")

    @pytest.mark.parametrize("size", ["5 apples", "", "GB"])
    def test_shard_size(self, tmp_path, size):
        save_plain_adapter(tmp_path / "adapter", save_base(tmp_path / "base"))
        with pytest.raises(ArgumentError, match="max_shard_size"):
            merge_adapter(tmp_path / "adapter", tmp_path / "merged", max_shard_size=size)

    def test_base_that_moved(self, tmp_path):
        base = save_base(tmp_path / "base")
        save_plain_adapter(tmp_path / "adapter", base)
        base.rename(tmp_path / "elsewhere")
        with pytest.raises(ModelNotFoundError, match=r"base is not|is not at .*base="):
            merge_adapter(tmp_path / "adapter", tmp_path / "merged")
        merge_adapter(tmp_path / "adapter", tmp_path / "merged", base=tmp_path / "elsewhere")

    def test_pickled_base(self, tmp_path):
        base = save_base(tmp_path / "base")
        save_plain_adapter(tmp_path / "adapter", base)
        (base / "model.safetensors").rename(base / "pytorch_model.bin")
        with pytest.raises(ModelNotFoundError, match="pickle"):
            merge_adapter(tmp_path / "adapter", tmp_path / "merged")


class TestIndex:
    @pytest.mark.parametrize(
        "file", ["../secret.safetensors", "/etc/secret.safetensors", "a/b.safetensors", "x.bin", ""]
    )
    def test_files_elsewhere(self, tmp_path, file):
        base = save_base(tmp_path / "base", max_shard_size="100KB")
        save_plain_adapter(tmp_path / "adapter", base)
        save_file({"x": torch.ones(1)}, tmp_path / "secret.safetensors")
        index = base / "model.safetensors.index.json"
        contents = json.loads(index.read_text())
        name = next(iter(contents["weight_map"]))
        edit_json(index, weight_map={**contents["weight_map"], name: file})
        with pytest.raises(UnsafeFileError, match="not opened"):
            merge_adapter(tmp_path / "adapter", tmp_path / "merged")

    def test_missing_shard(self, tmp_path):
        base = save_base(tmp_path / "base", max_shard_size="100KB")
        save_plain_adapter(tmp_path / "adapter", base)
        sorted(base.glob("*.safetensors"))[1].unlink()
        with pytest.raises(ModelNotFoundError, match="incomplete"):
            merge_adapter(tmp_path / "adapter", tmp_path / "merged")


def test_full_disk_leaves_nothing(tmp_path, monkeypatch):
    save_plain_adapter(tmp_path / "adapter", save_base(tmp_path / "base"))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    import signal

    previous = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(MergeError, match="could not be written"):
            merge_adapter(tmp_path / "adapter", tmp_path / "merged")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, previous)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]


def test_interrupted_leaves_nothing(tmp_path, monkeypatch):
    save_plain_adapter(tmp_path / "adapter", save_base(tmp_path / "base"))

    def interrupt(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(merged_files.shutil, "copyfile", interrupt)
    with pytest.raises(KeyboardInterrupt):
        merge_adapter(tmp_path / "adapter", tmp_path / "merged")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]


def test_adapter_is_left_alone(tmp_path):
    base = save_base(tmp_path / "base")
    model = save_plain_adapter(tmp_path / "adapter", base)
    before = (tmp_path / "adapter" / ADAPTER_FILE).read_bytes()
    merge_adapter(tmp_path / "adapter", tmp_path / "merged")
    assert (tmp_path / "adapter" / ADAPTER_FILE).read_bytes() == before
    again = PeftModel.from_pretrained(tiny_model(), str(tmp_path / "adapter"))
    assert is_close(logits(again.eval()), logits(model), tolerance=1e-6)
