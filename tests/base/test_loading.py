"""Checkpoint to tokenizer and base: dtypes, and every way in which a folder can be wrong.

Run: python -m pytest tests/base/test_loading.py
"""

import json
import pathlib
import pickle

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertModel

from lora_fsdp.arguments import ModelArguments
from lora_fsdp.base.loading import load_base, load_tokenizer, resolve_dtype
from lora_fsdp.base.stored_weights import base_skeleton
from lora_fsdp.errors import (
    ArgumentError,
    ModelNotFoundError,
    TokenizerNotFoundError,
    UnsafeFileError,
    UnsupportedModelError,
)
from tests.support.tiny import tiny_model, tiny_tokenizer

CPU = torch.device("cpu")


def arguments(name, **options):
    return ModelArguments(model_name_or_path=str(name), **options)


@pytest.mark.parametrize(
    ("name", "device", "dtype"),
    [
        ("auto", "cpu", torch.float32),
        ("auto", "cuda", torch.bfloat16),
        ("float32", "cuda", torch.float32),
        ("bfloat16", "cpu", torch.bfloat16),
    ],
)
def test_dtype(name, device, dtype):
    assert resolve_dtype(name, device=torch.device(device)) == dtype


@pytest.mark.parametrize("dtype", ["auto", "bfloat16"])
def test_base_is_frozen_in_one_dtype(model_folder, dtype):
    model = load_base(arguments(model_folder, dtype=dtype), device=CPU)
    assert {p.dtype for p in model.parameters()} == {resolve_dtype(dtype, device=CPU)}
    assert not any(p.requires_grad for p in model.parameters())


def test_weights_are_those_of_the_folder(model_folder):
    loaded = load_base(arguments(model_folder), device=CPU).state_dict()
    for name, tensor in tiny_model().state_dict().items():
        assert torch.equal(loaded[name], tensor), name


def test_attention_is_as_asked(model_folder):
    model = load_base(arguments(model_folder, attn_implementation="eager"), device=CPU)
    assert model.config._attn_implementation == "eager"


def test_tokenizer(model_folder):
    tokenizer = load_tokenizer(arguments(model_folder))
    assert tokenizer.eos_token == "<|end|>"
    assert tokenizer.pad_token == "<|pad|>"


def test_missing_padding_token_becomes_the_end_token(tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path)
    loaded = load_tokenizer(arguments(tmp_path))
    assert loaded.pad_token_id == loaded.eos_token_id


def test_no_model_named():
    with pytest.raises(ArgumentError, match="--model_name_or_path"):
        load_base(arguments(""), device=CPU)


@pytest.mark.parametrize("name", ["./not/there", "/not/there/either", "~/not-there", "a/b/c"])
@pytest.mark.parametrize("load", [load_tokenizer, lambda a: load_base(a, device=CPU)])
def test_folder_that_does_not_exist(name, load):
    with pytest.raises(ModelNotFoundError, match="There is no model folder") as caught:
        load(arguments(name))
    assert name.removeprefix("./").removeprefix("~/") in str(caught.value)


def test_hub_name_that_cannot_be_reached():
    with pytest.raises(ModelNotFoundError, match="nobody/no-such-model"):
        load_base(arguments("nobody/no-such-model"), device=CPU)


def test_folder_without_tokenizer(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    with pytest.raises(TokenizerNotFoundError, match=r"holds no tokenizer .*tokenizer\.json"):
        load_tokenizer(arguments(tmp_path))


def test_folder_with_an_unusable_tokenizer(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>"}))
    with pytest.raises(TokenizerNotFoundError, match=tmp_path.name):
        load_tokenizer(arguments(tmp_path))


def test_empty_folder(tmp_path):
    with pytest.raises(ModelNotFoundError, match=tmp_path.name):
        load_base(arguments(tmp_path), device=CPU)


def test_folder_without_weights(tmp_path, model_folder):
    (tmp_path / "config.json").write_text((model_folder / "config.json").read_text())
    with pytest.raises(ModelNotFoundError, match=tmp_path.name):
        load_base(arguments(tmp_path), device=CPU)


def test_damaged_weights(tmp_path, model_folder):
    (tmp_path / "config.json").write_text((model_folder / "config.json").read_text())
    (tmp_path / "model.safetensors").write_bytes(b"not a model")
    with pytest.raises(ModelNotFoundError, match=tmp_path.name):
        load_base(arguments(tmp_path), device=CPU)


@pytest.mark.parametrize("kind", ["model.safetensors", "pytorch_model.bin"])
def test_weights_that_an_index_takes_from_elsewhere(tmp_path, model_folder, kind):
    """What `predict` and `evaluate` load by transformers, which follows such a name."""
    folder = tmp_path / "base"
    folder.mkdir()
    (folder / "config.json").write_text((model_folder / "config.json").read_text())
    weights = load_file(model_folder / "model.safetensors")
    outside = tmp_path / f"outside{pathlib.Path(kind).suffix}"
    if outside.suffix == ".bin":
        torch.save(weights, outside)
    else:
        save_file(weights, outside, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": dict.fromkeys(weights, f"../{outside.name}")}
    (folder / f"{kind}.index.json").write_text(json.dumps(index))
    with pytest.raises(UnsafeFileError, match=r"no plain file name: it is not opened"):
        load_base(arguments(folder), device=CPU)


def test_a_pickle_with_code_in_it(tmp_path, model_folder):
    """torch's own text says how to run it all the same."""
    (tmp_path / "config.json").write_text((model_folder / "config.json").read_text())
    (tmp_path / "pytorch_model.bin").write_bytes(
        pickle.dumps(pathlib.PurePosixPath("x"), protocol=2)
    )
    with pytest.raises(UnsupportedModelError, match="more than tensors") as caught:
        load_base(arguments(tmp_path), device=CPU)
    assert "weights_only" not in str(caught.value)


def test_not_a_causal_language_model(tmp_path):
    config = json.loads(BertConfig().to_json_string()) | {"model_type": "vit"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedModelError, match="cannot be loaded as a causal language model"):
        load_base(arguments(tmp_path), device=CPU)


def test_encoder_without_a_language_model_head(tmp_path):
    """BERT has a causal head in transformers, which this checkpoint's weights do not fill."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = BertConfig(vocab_size=50, intermediate_size=32, **sizes)
    BertModel(config).save_pretrained(tmp_path)
    with pytest.raises((UnsupportedModelError, ModelNotFoundError)):
        load_base(arguments(tmp_path), device=CPU)


def test_sizes_that_divide_by_zero(tmp_path, model_folder):
    config = json.loads((model_folder / "config.json").read_text()) | {"head_dim": 0}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedModelError, match="describes no causal language model"):
        base_skeleton(tmp_path)
