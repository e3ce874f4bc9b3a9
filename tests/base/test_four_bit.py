"""A base in 4 bits against the same numbers in float32, on one rank and on two.

Needs bitsandbytes, which computes NF4 on CPUs as well.

Run: python -m pytest tests/base/test_four_bit.py
"""

import importlib.util

import pandas as pd
import pytest
import torch
from peft import LoraConfig
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from lora_fsdp import finetune
from lora_fsdp.adapter.attach import attach_adapter
from lora_fsdp.adapter.merging import merge_adapter
from lora_fsdp.adapter.ownership import trainable_parameters
from lora_fsdp.adapter.proof import read_proof
from lora_fsdp.adapter.verification import verify_adapter_folder
from lora_fsdp.arguments import (
    DataArguments,
    FineTuningArguments,
    LoraArguments,
    ModelArguments,
)
from lora_fsdp.arguments.fsdp import FsdpSettings
from lora_fsdp.base.layers import base_model
from lora_fsdp.base.loading import load_base
from lora_fsdp.base.streaming import StoredBase, load_on_device, open_base
from lora_fsdp.compute.packed_model import PackedModel
from lora_fsdp.data.packing import Tree, pack_sequence
from lora_fsdp.distributed.sharding import check_placement, decoder_layers, place_model, shard_base
from lora_fsdp.errors import (
    ArgumentError,
    FsdpSettingError,
    MissingPackageError,
    RankMismatchError,
    ResumeMismatchError,
    UnsupportedModelError,
)
from lora_fsdp.evaluation.prediction import Predictor
from lora_fsdp.placement.layout import Layout
from tests.support.adapters import save_base
from tests.support.ranks import RankError, launch_environment, run_ranks
from tests.support.runs import toy_run
from tests.support.tiny import adapted_model, randomise_adapter, tiny_model, toy_table

CPU = torch.device("cpu")
SETTINGS = FsdpSettings(True, False, False, None, True)
FSDP = launch_environment("fsdp2_cpu.yaml", FSDP_RESHARD_AFTER_FORWARD="true")
needs_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="needs bitsandbytes"
)


def arguments(folder, **options):
    return ModelArguments(str(folder), load_in_4bit=True, **options)


@pytest.fixture
def base(tmp_path):
    return save_base(tmp_path / "base")


def adapted(folder, **options):
    """The base in 4 bits, not read yet, with an adapter that is not zero."""
    stored = open_base(arguments(folder, **options), device=CPU)
    assert isinstance(stored, StoredBase)
    config = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    torch.manual_seed(2)
    model = attach_adapter(stored.model, config, stored=stored)
    randomise_adapter(model)
    return model, stored


def reference(folder, dtype="float32"):
    """The numbers that the 4 bits stand for, in ordinary linear layers, with the same adapter."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    model = load_base(ModelArguments(str(folder), dtype=dtype), device=CPU)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name != "lm_head":
            options = {"compress_statistics": True, "quant_type": "nf4"}
            packed, scales = quantize_4bit(module.weight.data, blocksize=64, **options)
            rounded = dequantize_4bit(packed, scales)
            assert 0.01 < (rounded - module.weight).norm() / module.weight.norm() < 0.2
            module.weight.data = rounded
    config = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    torch.manual_seed(2)
    model = attach_adapter(model, config)
    randomise_adapter(model)
    return model


def outputs(model, dtype=torch.float32):
    """Log-probabilities of a packed sequence's labels, and the adapter's gradients."""
    texts = torch.arange(5, 29).view(2, 12).tolist()
    sequence = pack_sequence([Tree(text[:6], [text[6:]]) for text in texts], share_prefix=True)
    log_probs = PackedModel(model.train()).label_log_probs(sequence)
    (-log_probs.sum()).backward()
    return log_probs.detach(), {n: p.grad for n, p in trainable_parameters(model).items()}


def assert_close(found, expected, tolerance):
    assert torch.allclose(found[0], expected[0], atol=tolerance, rtol=tolerance)
    assert found[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        assert gradient.norm() > 0
        assert (found[1][name] - gradient).norm() < tolerance * gradient.norm(), name


@needs_bitsandbytes
class TestOneRank:
    @pytest.mark.parametrize(
        ("kind", "dtype", "tolerance"),
        [("llama", "float32", 1e-5), ("qwen3", "float32", 1e-5), ("llama", "bfloat16", 0.05)],
    )
    def test_outputs_and_gradients(self, kind, dtype, tolerance, tmp_path):
        save_base(tmp_path, kind)
        model, stored = adapted(tmp_path, dtype=dtype)
        stored.fill([stored.model], device=CPU, keep_on=CPU)
        computed = getattr(torch, dtype)
        expected = outputs(reference(tmp_path, dtype), computed)
        assert_close(outputs(model, computed), expected, tolerance)

    @pytest.mark.parametrize(
        ("kind", "dtype", "tolerance"),
        [("llama", "float32", 1e-5), ("qwen3", "float32", 1e-5), ("llama", "bfloat16", 0.05)],
    )
    def test_fused_layers(self, kind, dtype, tolerance, tmp_path):
        """Fused before the weights are read, and afterwards, the same as the numbers in full."""
        save_base(tmp_path, kind)
        expected = outputs(reference(tmp_path, dtype), getattr(torch, dtype))
        for read_first in (False, True):
            model, stored = adapted(tmp_path, dtype=dtype)
            copies = None if read_first else stored.filled_copy
            if read_first:
                stored.fill([stored.model], device=CPU, keep_on=CPU)
            decoder = base_model(model).base_model
            packed = PackedModel(model)
            fusing = packed.fuse(filled_copy=copies)
            assert fusing.is_fused, fusing.reason
            stored.fill([stored.model], device=CPU, keep_on=CPU)
            packed.join_weights()  # nothing to join: weights in 4 bits stay as they are
            assert_close(outputs(model, getattr(torch, dtype)), expected, tolerance)
            weight = decoder.layers[0].mlp.up_proj.base_layer.weight
            assert weight.numel() * 2 * weight.element_size() == 64 * 128

    def test_what_is_kept_in_4_bits(self, base):
        model = load_on_device(arguments(base, dtype="bfloat16"), device=CPU)
        plain = load_base(ModelArguments(str(base), dtype="bfloat16"), device=CPU)
        layer = model.model.layers[0].self_attn.q_proj
        assert layer.weight.nbytes * 4 == plain.model.layers[0].self_attn.q_proj.weight.nbytes
        assert layer.weight.dtype == torch.bfloat16  # so that FSDP2 shards it
        assert layer.quant_state.nested
        assert type(model.lm_head) is nn.Linear
        assert torch.equal(model.lm_head.weight, plain.lm_head.weight)
        assert torch.equal(model.model.embed_tokens.weight, plain.model.embed_tokens.weight)
        packed = [m for m in model.modules() if type(m).__name__ == "FourBitLinear"]
        assert len(packed) == 7 * 3
        assert not any(parameter.requires_grad for parameter in model.parameters())

    def test_evaluation_changes_no_weight(self, base):
        """bitsandbytes' own layer lays its weight out anew in a CPU's evaluation mode."""
        model = load_on_device(arguments(base), device=CPU)
        before = [parameter.clone() for parameter in model.parameters()]
        ids = torch.arange(12)[None]
        with torch.no_grad():
            first = model.eval()(ids).logits
        for parameter, old in zip(model.parameters(), before, strict=True):
            assert torch.equal(parameter.view(torch.int32), old.view(torch.int32))
        assert torch.equal(model(ids).logits, first)


@needs_bitsandbytes
@pytest.mark.distributed
@pytest.mark.parametrize("resident", [0, 2])
def test_two_ranks(base, resident):
    """Sharded packed weights, whole scales: what one rank computes."""
    model, stored = adapted(base)
    stored.fill([stored.model], device=CPU, keep_on=CPU)
    expected = outputs(model)
    for found in run_ranks(sharded_outputs, base, resident, environment=FSDP):
        log_probs, gradients = found
        found = torch.tensor(log_probs), {n: torch.tensor(g) for n, g in gradients.items()}
        assert_close(found, expected, 1e-5)


def sharded_outputs(folder, resident):
    import torch.distributed as dist

    dist.init_process_group("gloo")
    model, stored = adapted(folder)
    layers = decoder_layers(base_model(model))
    whole = place_model(
        model, layers=layers, layout=Layout(2, resident), settings=SETTINGS, device=CPU,
        stored=stored,
    )  # fmt: skip
    check_placement(model, resident=whole)
    packed = [layer.self_attn.q_proj.base_layer.weight for layer in layers]
    assert [isinstance(weight, DTensor) for weight in packed] == [i >= resident for i in range(3)]
    assert packed[2].to_local().numel() * 2 == packed[2].numel() == 64 * 64 / 8
    log_probs, gradients = outputs(model)
    # A second step on the same shards: nothing was exchanged in the first.
    for parameter in trainable_parameters(model).values():
        parameter.grad = None
    again, _ = outputs(model)
    assert torch.equal(log_probs, again)
    return log_probs.tolist(), {name: g.tolist() for name, g in gradients.items()}


@needs_bitsandbytes
@pytest.mark.distributed
class TestRun:
    """Train, save, resume, evaluate, verify, predict, merge."""

    def test_to_the_end(self, base, tmp_path):
        options = {"base": base, "streamed": True, "load_in_4bit": True}
        settings = {"save_strategy": "steps", "save_steps": 2, "save_total_limit": 3}
        runs = run_ranks(run_from, tmp_path / "run", options | settings, environment=FSDP)
        assert runs[0]["fingerprint"] == runs[1]["fingerprint"]
        assert runs[0]["losses"][-1] < runs[0]["losses"][0]
        # Resumed from the middle, on other processes: it ends where it would have.
        checkpoint = tmp_path / "run" / "checkpoint-2"
        single = options | {"per_device_train_batch_size": 16}
        [resumed] = run_ranks(run_from, tmp_path / "resumed", single, str(checkpoint), world_size=1)
        assert resumed["losses"][-1] == pytest.approx(runs[0]["losses"][-1], rel=1e-4)
        assert resumed["metrics"]["eval_loss"] == pytest.approx(
            runs[0]["metrics"]["eval_loss"], rel=1e-3
        )
        # In another dtype it is another base.
        with pytest.raises(RankError) as caught:
            run_ranks(
                run_from,
                tmp_path / "other",
                single | {"load_in_4bit": False},
                str(checkpoint),
                world_size=1,
            )
        assert caught.value.kind in (ResumeMismatchError.__name__, RankMismatchError.__name__)
        assert "base model" in caught.value.text
        self.check_adapter(tmp_path / "run" / "final", base, tmp_path)

    def check_adapter(self, adapter, base, tmp_path):
        proof = read_proof(adapter)
        assert proof.base_in_4bit
        found = verify_adapter_folder(adapter)
        assert found.passed, str(found)
        answers = next(check for check in found.checks if check.name == "answers")
        assert answers.outcome == "passed"
        # The tight tolerance: they were computed with the same 4 bits.
        assert float(answers.detail.split()[2]) < 1e-4
        merged = merge_adapter(adapter, tmp_path / "merged")
        assert "trained on a quantised base" in str(merged)
        plain = load_base(ModelArguments(str(tmp_path / "merged")), device=CPU)
        original = load_base(ModelArguments(str(base)), device=CPU)
        change = (
            plain.model.layers[0].mlp.down_proj.weight
            - original.model.layers[0].mlp.down_proj.weight
        )
        assert change.norm() > 0


def run_from(output_dir, options, resume=None):
    return toy_run(output_dir, resume, **options)


@needs_bitsandbytes
def test_a_whole_fine_tuning_and_its_predictions(base, tmp_path):
    """`finetune`, then the adapter at work on a base that is read in 4 bits as well."""
    toy_table(40).to_csv(tmp_path / "rows.csv", index=False)
    options = {"text_column": "text", "label_column": "label", "instruction": "How is it:"}
    done = finetune(
        model_args=arguments(base),
        lora_args=LoraArguments(lora_target_modules=["all-linear"]),
        data_args=DataArguments(
            task="classification",
            data_file=str(tmp_path / "rows.csv"),
            max_length=128,
            eval_size=8,
            **options,
        ),
        training_args=FineTuningArguments(
            output_dir=str(tmp_path / "run"), max_steps=2, learning_rate=1e-2, disable_tqdm=True
        ),
    )
    predictor = Predictor.from_adapter(done.output_dir)
    layer = base_model(predictor.model).model.layers[0].mlp.up_proj.base_layer
    assert type(layer).__name__ == "FourBitLinear"
    saved = pd.read_csv(done.output_dir / "predictions.csv")
    rows = pd.DataFrame({"text": saved["text"], "label": saved["target"]})
    scores = predictor.score(predictor.task.examples(rows))
    torch.testing.assert_close(
        scores.probabilities.amax(dim=1),
        torch.tensor(saved["probability"].to_numpy(), dtype=torch.float32),
        atol=1e-4,
        rtol=1e-4,
    )


class TestRefusals:
    def test_without_bitsandbytes(self, base, monkeypatch):
        found = importlib.util.find_spec
        monkeypatch.setattr(
            importlib.util, "find_spec", lambda n: None if n == "bitsandbytes" else found(n)
        )
        with pytest.raises(MissingPackageError, match=r"lora-fsdp\[4bit\]"):
            open_base(arguments(base), device=CPU)

    @needs_bitsandbytes
    def test_layers_of_another_kind(self, tmp_path):
        tiny_model("gpt2").save_pretrained(tmp_path)
        with pytest.raises(UnsupportedModelError, match="no linear layers"):
            open_base(arguments(tmp_path), device=CPU)

    @needs_bitsandbytes
    def test_files_that_cannot_be_read_tensor_by_tensor(self, tmp_path):
        model = tiny_model()
        model.config.save_pretrained(tmp_path)
        torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
        with pytest.raises(UnsupportedModelError, match=r"no complete safetensors.*--load_in_4bit"):
            open_base(arguments(tmp_path), device=CPU)

    def test_by_the_function_that_loads_whole(self, base):
        with pytest.raises(ArgumentError, match="load_on_device"):
            load_base(arguments(base), device=CPU)

    @pytest.mark.distributed
    def test_integers_under_fsdp2(self):
        """What a checkpoint quantised with bnb_4bit_quant_storage uint8 holds."""
        with pytest.raises(RankError) as caught:
            run_ranks(shard_integers, environment=FSDP)
        assert caught.value.kind == FsdpSettingError.__name__
        assert "torch.uint8" in caught.value.text
        assert "bnb_4bit_quant_storage" in caught.value.text


def shard_integers():
    import torch.distributed as dist

    dist.init_process_group("gloo")
    model = adapted_model()
    base = base_model(model)
    packed = torch.zeros(2048, 1, dtype=torch.uint8)
    layer = base.model.layers[1].mlp.up_proj.base_layer
    layer.weight = nn.Parameter(packed, requires_grad=False)
    shard_base(
        base,
        settings=SETTINGS,
        mesh=init_device_mesh("cpu", (2,)),
        ignored=frozenset(trainable_parameters(model).values()),
        groups=decoder_layers(base),
    )
