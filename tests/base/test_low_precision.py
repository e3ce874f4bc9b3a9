"""Bases that were published in FP8 or MXFP4: what transformers makes of them, read part by part.

Run: python -m pytest tests/base/test_low_precision.py
"""

import logging

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from lora_fsdp.adapter.attach import attach_adapter
from lora_fsdp.adapter.merging import merge_adapter
from lora_fsdp.adapter.saved import save_adapter
from lora_fsdp.arguments import ModelArguments
from lora_fsdp.arguments.fsdp import FsdpSettings
from lora_fsdp.base.conversion.low_precision import LowPrecisionWeights, Published, published_in
from lora_fsdp.base.fingerprints import base_parameters
from lora_fsdp.base.layers import base_model
from lora_fsdp.base.streaming import StoredBase, load_on_device, open_base
from lora_fsdp.distributed.sharding import decoder_layers, place_model
from lora_fsdp.errors import ModelNotFoundError
from lora_fsdp.placement.layout import Layout
from tests.support.adapters import adapted, edit_json
from tests.support.families import EXPERTS, family_model
from tests.support.ranks import launch_environment, run_ranks
from tests.support.tiny import tiny_tokenizer

CPU = torch.device("cpu")
BLOCK = 16


def publish_in_fp8(folder, family="deepseek_v3"):
    """As DeepSeek-V3 is published: 8-bit floats with a scale for each block, a matrix an expert.

    Returns:
        the numbers of every packed tensor, as transformers' own code unpacks them.
    """
    family_model(family).to(torch.bfloat16).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    tensors, expected = load_file(folder / "model.safetensors"), {}
    for name in list(tensors):
        if ".layers." not in name or tensors[name].dim() != 2 or ".gate.weight" in name:
            continue
        values = tensors[name].float()
        rows, columns = (-(-side // BLOCK) for side in values.shape)
        padded = torch.zeros(rows * BLOCK, columns * BLOCK)
        padded[: values.shape[0], : values.shape[1]] = values
        blocks = padded.view(rows, BLOCK, columns, BLOCK)
        scales = blocks.abs().amax(dim=(1, 3)).clamp(min=1e-9) / 448
        packed = (blocks / scales[:, None, :, None]).to(torch.float8_e4m3fn)
        whole = packed.reshape(padded.shape)
        tensors[name] = whole[: values.shape[0], : values.shape[1]].contiguous()
        tensors[f"{name}_scale_inv"] = scales
        unpacked = Fp8Dequantize(None)._dequantize_one(whole, scales, torch.float32)
        expected[name] = unpacked[: values.shape[0], : values.shape[1]]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    edit_json(
        folder / "config.json",
        quantization_config={"quant_method": "fp8", "weight_block_size": [BLOCK, BLOCK]},
    )
    return expected


def publish_in_mxfp4(folder):
    """As gpt-oss is published: each stack of experts in blocks of 32 with an exponent."""
    family_model("gpt_oss").to(torch.bfloat16).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    tensors, expected = load_file(folder / "model.safetensors"), {}
    generator = torch.Generator().manual_seed(0)
    for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
        experts, columns, rows = tensors.pop(name).shape
        shape = (experts, rows, columns // 32)
        blocks = torch.randint(256, (*shape, 16), dtype=torch.uint8, generator=generator)
        scales = torch.randint(118, 124, shape, dtype=torch.uint8, generator=generator)
        tensors[f"{name}_blocks"], tensors[f"{name}_scales"] = blocks, scales
        expected[name] = convert_moe_packed_tensors(blocks, scales, dtype=torch.bfloat16)
        assert expected[name].shape == (experts, columns, rows)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    edit_json(folder / "config.json", quantization_config={"quant_method": "mxfp4"})
    return expected


PUBLISH = {"fp8": publish_in_fp8, "mxfp4": publish_in_mxfp4}
PUBLISHED = {"fp8": Published("FP8 in blocks", (BLOCK, BLOCK)), "mxfp4": Published("MXFP4")}


@pytest.mark.parametrize("kind", PUBLISH)
def test_the_numbers_are_those_of_transformers(kind, tmp_path):
    expected = PUBLISH[kind](tmp_path)
    weights = LowPrecisionWeights(tmp_path, PUBLISHED[kind])
    assert set(weights.unpacked) == expected.keys()
    assert not [name for name in weights.tensors if "scale" in name or "blocks" in name]
    for name, values in expected.items():
        assert weights.tensors[name].shape == values.shape
        assert torch.equal(weights.read(name), values), name
        # Parts that begin and end within blocks.
        read = weights.reader(name)
        for part in [(slice(1, 2),), (slice(0, 3), slice(5, 41)), (slice(2, 3), slice(17, 18))]:
            assert torch.equal(read(part), values[part]), (name, part)


@pytest.mark.parametrize("kind", PUBLISH)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_model_of_them(kind, dtype, tmp_path, caplog):
    """The same model as of files that hold the numbers; and a line that says what it costs."""
    expected = PUBLISH[kind](tmp_path)
    with caplog.at_level(logging.WARNING):
        found = load_on_device(ModelArguments(str(tmp_path), dtype=dtype), device=CPU)
    assert sum("unpacked while they are read" in one for one in caplog.messages) == 1
    assert "quantization_config" not in found.config.to_dict()
    plain = AutoModelForCausalLM.from_config(found.config, dtype=getattr(torch, dtype))
    stored = load_file(tmp_path / "model.safetensors")
    numbers = {name: value for name, value in stored.items() if name in plain.state_dict()}
    numbers |= {name: value for name, value in expected.items() if ".experts." not in name}
    for layer in range(2):
        prefix = f"model.layers.{layer}.mlp.experts"
        if f"{prefix}.0.up_proj.weight" in expected:
            one = [
                {p: expected[f"{prefix}.{i}.{p}_proj.weight"] for p in ("gate", "up", "down")}
                for i in range(EXPERTS)
            ]
            joined = [torch.cat([expert["gate"], expert["up"]]) for expert in one]
            numbers[f"{prefix}.gate_up_proj"] = torch.stack(joined)
            numbers[f"{prefix}.down_proj"] = torch.stack([expert["down"] for expert in one])
    numbers |= {name: value for name, value in expected.items() if kind == "mxfp4"}
    missing = plain.load_state_dict(numbers, strict=False).missing_keys
    assert all("inv_freq" in name for name in missing), missing
    ids = torch.arange(5, 17)[None]
    with torch.no_grad():
        assert torch.equal(found(ids).logits, plain.eval()(ids).logits)


@pytest.mark.parametrize("kind", PUBLISH)
def test_merging_onto_them(kind, tmp_path):
    """Into the numbers: there is no other original that could be merged onto."""
    base, output = tmp_path / "base", tmp_path / "merged"
    PUBLISH[kind](base)
    model = load_on_device(ModelArguments(str(base), dtype="bfloat16"), device=CPU)
    lora = {"target_modules": ["o_proj"], "target_parameters": ["experts.down_proj"]}
    adapted_model = adapted(model, **lora)
    save_adapter(adapted_model, tmp_path / "adapter")
    merge_adapter(tmp_path / "adapter", output, base=base)
    merged = AutoModelForCausalLM.from_pretrained(output)
    assert merged.dtype == torch.bfloat16
    assert not hasattr(merged.config, "quantization_config")
    ids = torch.arange(5, 17)[None]
    with torch.no_grad():
        found, expected = merged(ids).logits, adapted_model(ids).logits
        with adapted_model.disable_adapter():
            plain = adapted_model(ids).logits
    assert (found - expected).norm() < 0.1 * (expected - plain).norm()


@pytest.mark.distributed
@pytest.mark.parametrize("kind", PUBLISH)
def test_each_rank_reads_its_shard(kind, tmp_path):
    PUBLISH[kind](tmp_path)
    whole = load_on_device(ModelArguments(str(tmp_path), dtype="float32"), device=CPU)
    expected = {name: p.double().sum().item() for name, p in base_parameters(whole)}
    environment = launch_environment("fsdp2_cpu.yaml")
    for found in run_ranks(sums_of_shards, tmp_path, environment=environment):
        assert found == pytest.approx(expected, abs=1e-6)


def sums_of_shards(folder):
    import torch.distributed as dist

    dist.init_process_group("gloo")
    stored = open_base(ModelArguments(str(folder), dtype="float32"), device=CPU)
    assert isinstance(stored, StoredBase)
    lora = LoraConfig(r=4, target_modules=["o_proj"], task_type="CAUSAL_LM")
    model = attach_adapter(stored.model, lora, stored=stored)
    layers = decoder_layers(base_model(model))
    settings = FsdpSettings(True, False, False, None, True)
    place_model(
        model, layers=layers, layout=Layout(2, 0), settings=settings, device=CPU, stored=stored
    )
    return {
        name: p.full_tensor().double().sum().item()
        for name, p in base_parameters(base_model(model))
    }


def test_scales_that_do_not_fit(tmp_path):
    publish_in_fp8(tmp_path)
    with pytest.raises(ModelNotFoundError, match="weight_block_size"):
        LowPrecisionWeights(tmp_path, Published("FP8 in blocks", (7, 7)))
    publish_in_mxfp4(tmp_path / "other")
    file = tmp_path / "other" / "model.safetensors"
    tensors = load_file(file)
    name = next(name for name in tensors if name.endswith("_scales"))
    save_file({**tensors, name: tensors[name][:, 1:].contiguous()}, file)
    with pytest.raises(ModelNotFoundError, match="MXFP4's layout"):
        LowPrecisionWeights(tmp_path / "other", PUBLISHED["mxfp4"])


@pytest.mark.parametrize(
    "settings",
    [
        None,
        {"quant_method": "gptq"},
        {"quant_method": "fp8"},
        {"quant_method": "fp8", "weight_block_size": [0, 128]},
        {"quant_method": "fp8", "weight_block_size": "128"},
    ],
)
def test_other_layouts_are_not_taken_for_these(settings):
    assert published_in(settings) is None
