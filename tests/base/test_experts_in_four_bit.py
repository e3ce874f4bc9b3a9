"""Experts in 4 bits against the same numbers in full, on one rank and on two.

Needs bitsandbytes, which computes NF4 on CPUs as well.

Run: python -m pytest tests/base/test_experts_in_four_bit.py
"""

import gc
import importlib.util
import weakref

import pytest
import torch
from peft import LoraConfig, PeftModel
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM

from lora_fsdp.adapter.attach import attach_adapter
from lora_fsdp.adapter.folder import attach_saved, read_adapter_folder
from lora_fsdp.adapter.merging import merge_adapter
from lora_fsdp.adapter.ownership import trainable_parameters
from lora_fsdp.adapter.saved import save_adapter
from lora_fsdp.adapter.verification import verify_adapter_folder
from lora_fsdp.arguments import ModelArguments
from lora_fsdp.arguments.fsdp import FsdpSettings
from lora_fsdp.base.experts.packed import PackedExperts, stacked_parameters
from lora_fsdp.base.layers import base_model
from lora_fsdp.base.loading import load_base
from lora_fsdp.base.quantized_layers import unpacked
from lora_fsdp.base.streaming import StoredBase, load_on_device, open_base
from lora_fsdp.distributed.sharding import check_placement, decoder_layers, place_model
from lora_fsdp.placement.layout import Layout
from lora_fsdp.sizing.counting import build_on_meta, shape_of
from tests.base.test_four_bit import assert_close, outputs
from tests.support.families import EXPERTS, family_model
from tests.support.ranks import launch_environment, run_ranks
from tests.support.runs import toy_run
from tests.support.tiny import randomise_adapter, tiny_tokenizer

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="needs bitsandbytes"
)
CPU = torch.device("cpu")
SETTINGS = FsdpSettings(True, False, False, None, True)
FSDP = launch_environment("fsdp2_cpu.yaml", FSDP_RESHARD_AFTER_FORWARD="true")
ON_ATTENTION = {"target_modules": ["q_proj", "o_proj"]}
ON_EXPERTS = {
    "target_modules": ["o_proj"],
    "target_parameters": ["experts.gate_up_proj", "experts.down_proj"],
}
LATENT = {"target_modules": ["kv_b_proj", "o_proj"]}


def save(folder, family):
    family_model(family).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def arguments(folder, **options):
    return ModelArguments(str(folder), load_in_4bit=True, **options)


def with_adapter(base, lora, stored=None):
    torch.manual_seed(2)
    model = attach_adapter(base, LoraConfig(r=4, task_type="CAUSAL_LM", **lora), stored=stored)
    randomise_adapter(model)
    return model


def adapted(folder, lora, **options):
    stored = open_base(arguments(folder, **options), device=CPU)
    assert isinstance(stored, StoredBase)
    return with_adapter(stored.model, lora, stored), stored


def rounded(values):
    """The numbers that 4 bits stand for, as bitsandbytes makes them of a whole tensor."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    options = {"compress_statistics": True, "quant_type": "nf4", "blocksize": 64}
    # Flat: of rows that end within a block, bitsandbytes on a CPU makes other numbers.
    found = dequantize_4bit(*quantize_4bit(values.flatten(), **options)).view(values.shape)
    assert 0.01 < (found - values).norm() / values.norm() < 0.2
    return found


def rounded_base(folder):
    model = load_base(ModelArguments(str(folder), dtype="float32"), device=CPU)
    for name, module in model.named_modules():
        if type(module) is nn.Linear and name != "lm_head":
            module.weight.data = rounded(module.weight.data)
        for parameter in stacked_parameters(module).values():
            parameter.data = rounded(parameter.data)
    return model


@pytest.mark.parametrize("experts", ["eager", "grouped_mm"])
@pytest.mark.parametrize(
    ("family", "lora"),
    [
        ("qwen3_moe", ON_ATTENTION),
        ("qwen3_moe", ON_EXPERTS),
        ("mixtral", ON_EXPERTS),
        ("gpt_oss", ON_EXPERTS),
        ("deepseek_v3", LATENT | {"target_parameters": ["experts.down_proj"]}),
    ],
)
def test_outputs_and_gradients(family, lora, experts, tmp_path):
    save(tmp_path, family)
    model, stored = adapted(tmp_path, lora)
    stored.fill([stored.model], device=CPU, keep_on=CPU)
    reference = with_adapter(rounded_base(tmp_path), lora)
    for one in (model, reference):
        base_model(one).set_experts_implementation(experts)
    assert_close(outputs(model), outputs(reference), 1e-5)
    # A second time on the same weights: nothing was exchanged or added twice.
    for one in (model, reference):
        for parameter in trainable_parameters(one).values():
            parameter.grad = None
    assert_close(outputs(model), outputs(reference), 1e-5)


@pytest.mark.parametrize("family", ["granitemoe", "jetmoe", "llama4_text", "qwen3_next"])
def test_other_kinds_of_experts(family, tmp_path):
    """Modules that compute with their stacks in ways of their own."""
    save(tmp_path, family)
    lora = {"target_modules": "all-linear"}
    model, stored = adapted(tmp_path, lora)
    stored.fill([stored.model], device=CPU, keep_on=CPU)
    assert any(isinstance(module, PackedExperts) for module in model.modules())
    ids = torch.arange(5, 17)[None]
    reference = with_adapter(rounded_base(tmp_path), lora)
    results = []
    for one in (model, reference):
        logits = one(input_ids=ids, use_cache=False).logits
        logits.logsumexp(-1).sum().backward()
        results.append((logits.detach(), {n: p.grad for n, p in trainable_parameters(one).items()}))
    torch.testing.assert_close(results[0][0], results[1][0], atol=1e-5, rtol=1e-5)
    assert results[0][1].keys() == results[1][1].keys()
    for name, gradient in results[1][1].items():
        torch.testing.assert_close(results[0][1][name], gradient, atol=1e-5, rtol=1e-4)


def test_recomputed_activations(tmp_path):
    save(tmp_path, "qwen3_moe")
    results = []
    for recomputed in (False, True):
        model, stored = adapted(tmp_path, ON_EXPERTS)
        stored.fill([stored.model], device=CPU, keep_on=CPU)
        if recomputed:
            base_model(model).activation_checkpointing_enable({"use_reentrant": False})
        results.append(outputs(model))
    assert_close(results[1], results[0], 1e-6)


@pytest.mark.parametrize("lora", [ON_ATTENTION, ON_EXPERTS])
def test_no_layer_s_numbers_stay_for_backward(lora, tmp_path, monkeypatch):
    save(tmp_path, "qwen3_moe")
    model, stored = adapted(tmp_path, lora)
    stored.fill([stored.model], device=CPU, keep_on=CPU)
    made = []
    numbers = PackedExperts.numbers

    def noted(self, name, only=None):
        found = numbers(self, name, only)
        made.append(weakref.ref(found))
        return found

    monkeypatch.setattr(PackedExperts, "numbers", noted)
    kept = set()
    for size in (8, 16):
        gc.collect()
        loss = model(input_ids=torch.arange(size)[None], use_cache=False).logits.logsumexp(-1).sum()
        assert len(made) >= 4
        assert not [one for one in made if one() is not None]
        big = [
            tensor
            for tensor in gc.get_objects()
            if isinstance(tensor, torch.Tensor)
            and tensor.shape in ((EXPERTS, 64, 64), (EXPERTS, 64, 32))
            and tensor.untyped_storage().nbytes() >= tensor.numel() * tensor.element_size()
        ]
        kept.add(len(big))
        loss.backward()
    assert kept == {0}


def test_what_is_kept_in_4_bits(tmp_path):
    save(tmp_path, "qwen3_moe")
    model = load_on_device(arguments(tmp_path, dtype="bfloat16"), device=CPU)
    experts = model.model.layers[0].mlp.experts
    assert isinstance(experts, PackedExperts)
    packed = dict(experts.named_parameters())["gate_up_proj"]
    assert packed.dtype == torch.bfloat16  # so that FSDP2 shards it
    assert packed.nbytes * 4 == EXPERTS * 64 * 64 * 2
    assert experts.gate_up_proj.shape == (EXPERTS, 64, 64)
    router = model.model.layers[0].mlp.gate.weight
    plain = load_base(ModelArguments(str(tmp_path), dtype="bfloat16"), device=CPU)
    assert torch.equal(router, plain.model.layers[0].mlp.gate.weight)
    copied = unpacked(model.model.layers[0])
    assert type(copied.mlp.experts) is type(plain.model.layers[0].mlp.experts)
    assert torch.equal(copied.mlp.experts.down_proj, experts.down_proj)


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3"])
def test_the_plan_counts_the_bytes_that_are_there(family, tmp_path):
    """Experts too, and layers that are not all alike (the first of DeepSeek-V3 has none)."""
    save(tmp_path, family)
    model = load_on_device(arguments(tmp_path, dtype="bfloat16"), device=CPU)
    states = [m.quant_state for m in model.modules() if type(m).__name__ == "FourBitLinear"]
    for module in model.modules():
        if isinstance(module, PackedExperts):
            states += [packing._scales for packing in module.packings.values()]
    real = sum(p.nbytes for p in model.parameters())
    real += sum(state.absmax.nbytes + state.state2.absmax.nbytes for state in states)
    lora = LoraConfig(r=4, target_modules=["o_proj"], task_type="CAUSAL_LM")
    shape = shape_of(build_on_meta(model.config), lora)
    # Of these small matrices 256 scales are not full.
    assert shape.base_bytes(quantized=True) == pytest.approx(real, rel=5e-3)
    config = model.config
    expert = 3 * config.hidden_size * config.moe_intermediate_size
    assert shape.idle_parameters == (EXPERTS - config.num_experts_per_tok) * expert
    assert shape.largest_linear == EXPERTS * expert


def test_only_the_experts_that_a_token_uses(tmp_path):
    """Where text is generated, few of many experts are asked for."""
    save(tmp_path, "qwen3_moe")
    model = load_on_device(arguments(tmp_path), device=CPU).eval()
    experts = model.model.layers[0].mlp.experts
    packing, seen = experts.packings["gate_up_proj"], []
    unpack = packing.unpack

    def noted(packed, only=None):
        seen.append(None if only is None else list(only))
        return unpack(packed, only)

    packing.unpack = noted
    with torch.no_grad():
        whole = model(torch.arange(5, 17)[None]).logits
        assert seen == [None]
        one = model(torch.arange(5, 6)[None]).logits
    assert len(seen[1]) == 2  # num_experts_per_tok
    torch.testing.assert_close(one[0, 0], whole[0, 0], atol=1e-5, rtol=1e-5)


@pytest.mark.distributed
@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_two_ranks(family, tmp_path):
    """Sharded packed stacks, whole scales: what one rank computes."""
    save(tmp_path, family)
    model, stored = adapted(tmp_path, ON_EXPERTS)
    stored.fill([stored.model], device=CPU, keep_on=CPU)
    expected = outputs(model)
    for log_probs, gradients in run_ranks(sharded_outputs, tmp_path, environment=FSDP):
        found = torch.tensor(log_probs), {n: torch.tensor(g) for n, g in gradients.items()}
        assert_close(found, expected, 1e-5)


def sharded_outputs(folder):
    import torch.distributed as dist

    dist.init_process_group("gloo")
    model, stored = adapted(folder, ON_EXPERTS)
    layers = decoder_layers(base_model(model))
    whole = place_model(
        model, layers=layers, layout=Layout(2, 1), settings=SETTINGS, device=CPU, stored=stored
    )
    check_placement(model, resident=whole)
    packed = [p for n, p in layers[1].named_parameters() if n.endswith("experts.gate_up_proj")] or [
        p for n, p in layers[1].named_parameters() if n.endswith(".gate_up_proj")
    ]
    assert isinstance(packed[0], DTensor)
    assert packed[0].to_local().numel() * 2 == packed[0].numel()
    log_probs, gradients = outputs(model)
    for parameter in trainable_parameters(model).values():
        parameter.grad = None
    again, _ = outputs(model)
    assert torch.equal(log_probs, again)
    return log_probs.tolist(), {name: g.tolist() for name, g in gradients.items()}


@pytest.mark.distributed
def test_a_run_to_the_end(tmp_path):
    """Trained on two ranks; verified, merged, used; and loaded by PEFT on the base as it was."""
    base = save(tmp_path / "base", "qwen3_moe")
    lora = {"target_parameters": ON_EXPERTS["target_parameters"]}
    options = {"base": base, "streamed": True, "load_in_4bit": True, "lora": lora}
    runs = run_ranks(run_from, tmp_path / "run", options, environment=FSDP)
    assert runs[0]["fingerprint"] == runs[1]["fingerprint"]
    assert runs[0]["losses"][-1] < runs[0]["losses"][0]
    adapter = tmp_path / "run" / "final"
    found = verify_adapter_folder(adapter)
    assert found.passed, str(found)
    answers = next(check for check in found.checks if check.name == "answers")
    assert float(answers.detail.split()[2]) < 1e-4
    merge_adapter(adapter, tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter)
    ids = torch.arange(5, 17)[None]
    with torch.no_grad():
        torch.testing.assert_close(merged(ids).logits, plain(ids).logits, atol=1e-5, rtol=1e-4)
    loaded = attach_saved(read_adapter_folder(adapter), load_on_device(arguments(base), device=CPU))
    with torch.no_grad():
        found = loaded(ids).logits.log_softmax(-1)
        full = plain(ids).logits.log_softmax(-1)
    assert 0 < (found - full).abs().max() < 1


def run_from(output_dir, options):
    return toy_run(output_dir, None, **options)


def test_the_saved_adapter_is_the_one_peft_would_save(tmp_path):
    """The same names: which of two stacks PEFT wraps first depends on how it finds them."""
    save(tmp_path / "base", "mixtral")
    model, stored = adapted(tmp_path / "base", ON_EXPERTS)
    stored.fill([stored.model], device=CPU, keep_on=CPU)
    save_adapter(model, tmp_path / "adapter")
    plain = PeftModel.from_pretrained(rounded_base(tmp_path / "base"), tmp_path / "adapter")
    ids = torch.arange(5, 17)[None]
    with torch.no_grad():
        torch.testing.assert_close(
            plain.eval()(ids).logits, model.eval()(ids).logits, atol=1e-5, rtol=1e-5
        )
