"""Kernels, captured steps and block masks on a real GPU against the plain computation.

Run: python -m pytest tests/gpu/test_fast_step_on_gpu.py
"""

from contextlib import nullcontext

import pytest
import torch
from peft import LoraConfig
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback

from lora_fsdp.adapter.adapter_set import AdapterSet
from lora_fsdp.adapter.attach import attach_adapter
from lora_fsdp.arguments import FineTuningArguments
from lora_fsdp.base.layers import base_model, decoder_layers
from lora_fsdp.compute import fused_functions
from lora_fsdp.compute.attention import BLOCKS_FROM_TOKENS
from lora_fsdp.compute.decoder_layer import FusedLayer
from lora_fsdp.compute.packed_model import PackedModel
from lora_fsdp.data.packing import Tree, pack_sequence
from lora_fsdp.placement.memory import LargestSequence
from lora_fsdp.training.recomputing import enable_checkpointing, recompute_without_random_state
from lora_fsdp.training.step.captured import CapturedStep
from lora_fsdp.training.step.eager import EagerStep
from lora_fsdp.training.step.objectives.supervised import Supervised
from tests.compute.test_decoder_layer import adapted
from tests.support.ranks import launch_environment, run_ranks
from tests.support.runs import toy_trainer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]
GPU = torch.device("cuda")


def rows(count, *, longest=40, seed=0):
    generator = torch.Generator().manual_seed(seed)
    head = [5, 6, 7, 8]

    def one():
        trees = []
        for n in torch.randint(3, longest, (5,), generator=generator).tolist():
            text = torch.randint(2, 400, (n,), generator=generator).tolist()
            trees.append(Tree(head + text, [[9, n % 300, 0]], [1.0]))
        return pack_sequence(trees, share_prefix=True)

    return [one() for _ in range(count)]


def step_of(kind, packed, **options):
    adapter = AdapterSet.of(packed.model)
    options = {"objective": Supervised(), "device": GPU, "autocast": nullcontext} | options
    return kind(packed, adapter=adapter, **options)


def plain(kind="llama"):
    return PackedModel(adapted(kind).to(GPU))


def gradients(step, some_rows):
    loss = step(some_rows, denominator=30)
    found = step.adapter.copy_gradients()
    assert found.norm() > 0, "nothing is learnt: the comparison says nothing"
    return loss.item(), found


def fused(kind="llama", **options):
    packed = PackedModel(adapted(kind, **options).to(GPU))
    fusing = packed.fuse()
    assert fusing.is_fused, fusing.reason
    packed.join_weights()
    return packed


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 1e-2)], ids=["fp32", "bf16"]
)
class TestKernels:
    def compare(self, function, *inputs, dtype, tolerance):
        results = {}
        for device in ("cpu", "cuda"):
            moved = [i.to(device, dtype).detach().requires_grad_(i.dim() > 1) for i in inputs]
            outputs = function(*moved)
            outputs = outputs if isinstance(outputs, tuple) else (outputs,)
            sum((o.double() ** 3).sum() for o in outputs).backward()
            values = [*outputs, *(i.grad for i in moved if i.grad is not None)]
            results[device] = [v.detach().cpu().double() for v in values]
        for expected, found in zip(results["cpu"], results["cuda"], strict=True):
            assert (found - expected).norm() <= tolerance * expected.norm()

    @pytest.mark.parametrize("width", [64, 576, 4096])
    def test_rms_norm(self, width, dtype, tolerance):
        self.compare(
            lambda hidden, weight: fused_functions.rms_norm(hidden, weight, 1e-6),
            torch.randn(33, width), torch.randn(width), dtype=dtype, tolerance=tolerance,
        )  # fmt: skip

    @pytest.mark.parametrize("width", [96, 1536, 11008])
    def test_silu_multiply(self, width, dtype, tolerance):
        self.compare(
            fused_functions.silu_multiply, torch.randn(17, 2 * width),
            dtype=dtype, tolerance=tolerance,
        )  # fmt: skip

    @pytest.mark.parametrize(
        ("heads", "width"), [((9, 3, 3), 64), ((4, 4, 4), 128), ((3, 1, 1), 96)]
    )
    def test_split_and_rotate(self, heads, width, dtype, tolerance):
        angles = torch.randn(21, width // 2).repeat(1, 2)

        def function(projected):
            cos, sin = (
                t.to(projected.device, projected.dtype) for t in (angles.cos(), angles.sin())
            )
            return fused_functions.split_and_rotate(projected, cos, sin, heads=heads)

        self.compare(
            function, torch.randn(21, sum(heads) * width), dtype=dtype, tolerance=tolerance
        )


@pytest.mark.parametrize("recomputed", [False, True])
@pytest.mark.parametrize("kind", ["llama", "qwen3", "mistral"])
def test_captured_step_gives_the_plain_gradients(kind, recomputed, monkeypatch):
    some = rows(6)
    expected = gradients(step_of(EagerStep, plain(kind)), some)
    packed = fused(kind)
    packed.model.train()
    if recomputed:
        arguments = FineTuningArguments(output_dir="unused")
        recompute_without_random_state(arguments)
        enable_checkpointing(packed, arguments, None)
    counts = {"model": 0, "layers": 0}
    decoder = packed.base.base_model
    decoder.register_forward_pre_hook(lambda *_: counts.update(model=counts["model"] + 1))
    compute = FusedLayer.compute

    def counted(self, *tensors):
        counts["layers"] += 1
        return compute(self, *tensors)

    monkeypatch.setattr(FusedLayer, "compute", counted)
    captured = step_of(CapturedStep, packed)
    for _ in range(3):
        loss, found = gradients(captured, some)
        assert captured.failed is None
        assert loss == pytest.approx(expected[0], rel=1e-5)
        assert (found - expected[1]).norm() <= 1e-5 * expected[1].norm()
    assert 1 < len(captured._graphs) < len(some) + 1
    assert counts["layers"] == counts["model"] * len(decoder.layers) * (1 + recomputed)


@pytest.mark.parametrize("compiled", [False, True])
def test_other_architectures_are_captured_too(compiled):
    some = rows(3)
    expected = gradients(step_of(EagerStep, plain("gpt2")), some)
    packed = plain("gpt2")
    if compiled:
        packed.compile()
    captured = step_of(CapturedStep, packed)
    loss, found = gradients(captured, some)
    assert captured.failed is None
    assert loss == pytest.approx(expected[0], rel=1e-5)
    assert (found - expected[1]).norm() <= 1e-5 * expected[1].norm()


def test_later_graphs_find_room_in_the_memory_of_the_largest():
    """Rows that grow longer take no more memory, once the largest was captured."""
    config = LlamaConfig(
        vocab_size=512, hidden_size=1024, intermediate_size=4096, num_hidden_layers=8,
        num_attention_heads=16, num_key_value_heads=16, max_position_embeddings=2048,
    )  # fmt: skip
    model = attach_adapter(LlamaForCausalLM(config), LoraConfig(target_modules=["q_proj"])).to(GPU)
    packed = PackedModel(model)
    assert packed.fuse().is_fused
    captured = step_of(CapturedStep, packed, largest=LargestSequence(tokens=1500, labels=8))
    reserved = []
    for length in (100, 300, 600, 900, 1200, 1490):
        ids = torch.arange(length).remainder(500).tolist()
        captured([pack_sequence([Tree(ids, [[7] * 8], [1.0])], share_prefix=True)], denominator=8)
        torch.cuda.empty_cache()
        reserved.append(torch.cuda.memory_reserved())
    assert captured.failed is None
    assert len(captured._graphs) == 6
    taken = reserved[0] - torch.cuda.memory_allocated()
    assert taken > 0
    assert reserved[-1] - reserved[0] < 0.05 * taken


def test_graphs_are_captured_again_after_they_were_released(tmp_path):
    """As a second `train` does."""
    trainer = toy_trainer(tmp_path, step="graph", max_steps=4)
    for _ in range(2):
        trainer.train()
        assert trainer.step.failed is None
        assert trainer.step.captured
        assert not trainer.step._graphs


def test_nothing_is_captured_for_rows_that_are_too_long():
    """Where the largest row is computed eagerly, short ones are captured as they come."""
    some = rows(1)
    captured = step_of(CapturedStep, fused(), largest=LargestSequence(tokens=5000, labels=8))
    gradients(captured, some)
    assert [size.tokens for size in captured._graphs] == [-(-len(some[0]) // 32) * 32]


def test_long_rows_by_blocks():
    some = [row for row in rows(9, longest=990, seed=3) if len(row) > BLOCKS_FROM_TOKENS]
    one = pack_sequence([Tree(list(range(2, 390)) * 6, [[7] * 40], [1.0])], share_prefix=True)
    assert len(some) > 1
    assert len(one) > BLOCKS_FROM_TOKENS
    some.append(one)
    expected = gradients(step_of(EagerStep, plain()), some)
    loss, found = gradients(step_of(CapturedStep, fused()), some)
    assert loss == pytest.approx(expected[0], rel=1e-4)
    assert (found - expected[1]).norm() <= 1e-3 * expected[1].norm()


def test_dropout_draws_anew_at_every_replay_and_capturing_draws_nothing():
    packed = fused(lora_dropout=0.3)
    packed.model.train()
    captured, some = step_of(CapturedStep, packed), rows(1)
    torch.manual_seed(0)
    first, second = gradients(captured, some)[1], gradients(captured, some)[1]
    assert not torch.equal(first, second)
    torch.manual_seed(0)
    assert torch.equal(gradients(captured, some)[1], first)
    assert torch.equal(gradients(captured, some)[1], second)


def test_falls_back_once_where_a_step_cannot_be_captured(caplog):
    packed = fused()

    def wait(module, inputs, output):
        output[0].sum().item()

    packed.base.model.layers[1].register_forward_hook(wait)
    captured, some = step_of(CapturedStep, packed), rows(3)
    expected = gradients(step_of(EagerStep, packed), some)
    found = gradients(captured, some)
    found = gradients(captured, some)
    assert captured.failed
    assert len([r for r in caplog.records if "cannot be captured" in r.message]) == 1
    assert found[0] == pytest.approx(expected[0], rel=1e-5)
    assert (found[1] - expected[1]).norm() <= 1e-5 * expected[1].norm()


@pytest.mark.parametrize(
    ("reshard", "recompute"), [("true", False), ("false", False), ("true", True)]
)
def test_steps_that_gather_are_captured_too(tmp_path, reshard, recompute):
    """FSDP2 on one rank, which copies where several gather; the losses of steps launched one by
    one.
    """
    environment = launch_environment("fsdp2.yaml") | {"FSDP_RESHARD_AFTER_FORWARD": reshard}
    environment["FSDP_ACTIVATION_CHECKPOINTING"] = str(recompute).lower()
    options = {"resident_layers": "none", "allow_fsdp_on_one_process": True, "num_train_epochs": 4}
    runs = {}
    for step in ("fused", "auto"):
        [runs[step]] = run_ranks(
            sharded_run, tmp_path / step, {**options, "step": step}, world_size=1, launched=True,
            environment=environment,
        )  # fmt: skip
    assert runs["auto"]["graphs"] > 1
    assert runs["fused"]["graphs"] == 0
    assert runs["auto"]["losses"] == pytest.approx(runs["fused"]["losses"], rel=1e-5)
    assert runs["auto"]["metrics"] == pytest.approx(runs["fused"]["metrics"], rel=1e-4)


def sharded_run(output_dir, options):
    trainer = toy_trainer(output_dir, per_device_train_batch_size=4, **options)
    trainer.train()
    metrics = trainer.evaluate()
    assert any(isinstance(p, DTensor) for p in trainer.model.parameters())
    return {
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        "metrics": {k: v for k, v in metrics.items() if "per_second" not in k and "time" not in k},
        "graphs": len(getattr(trainer.step, "captured", ())),
    }


@pytest.mark.skipif(not hasattr(FSDPModule, "reset_iter_state"), reason="needs torch 2.13")
def test_a_capture_with_gathers_that_is_broken_off_leaves_the_eager_step(tmp_path):
    """In the middle of forward, where FSDP2 has gathered a part of the layers."""
    environment = launch_environment("fsdp2.yaml")
    runs = {}
    for step in ("graph", "fused"):
        [runs[step]] = run_ranks(
            broken_off_run, tmp_path / step, step, world_size=1, launched=True,
            environment=environment,
        )  # fmt: skip
    broken, fused = runs["graph"], runs["fused"]
    assert broken["failed"]
    assert broken["losses"] == pytest.approx(fused["losses"], rel=1e-5)


def broken_off_run(output_dir, step):
    options = {"resident_layers": "none", "allow_fsdp_on_one_process": True, "step": step}
    trainer = toy_trainer(output_dir, per_device_train_batch_size=4, **options)

    def wait(module, inputs, output):
        if torch.cuda.is_current_stream_capturing():
            output[0].sum().item()

    decoder_layers(base_model(trainer.model))[-1].register_forward_hook(wait)
    trainer.train()
    return {
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        "failed": getattr(trainer.step, "failed", None),
    }


class NoWaiting(TrainerCallback):
    """Any wait for the device within steps 6 to 12 is an error."""

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 5:
            torch.cuda.set_sync_debug_mode("error")

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 12:
            torch.cuda.set_sync_debug_mode("default")


@pytest.fixture
def waiting_is_allowed_again():
    yield
    torch.cuda.set_sync_debug_mode("default")


# Torch says of the mode itself that it is a prototype; as an error that would end the first run.
@pytest.mark.filterwarnings("ignore:Synchronization debug mode:UserWarning")
@pytest.mark.usefixtures("waiting_is_allowed_again")
@pytest.mark.parametrize("step", ["graph", "fused", "eager"])
def test_no_step_waits_for_the_device(tmp_path, step):
    trainer = toy_trainer(
        tmp_path, step=step, logging_steps=100, num_train_epochs=8, callbacks=[NoWaiting()]
    )
    # Every size is captured within the first steps.
    trainer.train()
    assert trainer.state.global_step == 24
