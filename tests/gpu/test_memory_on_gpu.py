"""Loading without a peak, 4 bits and offload on a real GPU; a 7B shape in 4 bits from end to end.

The 7B test writes 14 GB of random weights. 4 bits need bitsandbytes.

Run: python -m pytest -s tests/gpu/test_memory_on_gpu.py
"""

import gc
import importlib.util
import time
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from peft import LoraConfig
from safetensors import safe_open
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn.attention import SDPBackend
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, TrainerCallback

from lora_fsdp import FineTuningArguments, LoraTrainer
from lora_fsdp.adapter.adapter_set import AdapterSet
from lora_fsdp.adapter.merging import merge_adapter
from lora_fsdp.adapter.ownership import trainable_parameters
from lora_fsdp.adapter.verification import verify_adapter_folder
from lora_fsdp.arguments import ModelArguments
from lora_fsdp.base.fingerprints import base_parameters
from lora_fsdp.base.layers import base_model
from lora_fsdp.base.loading import load_base
from lora_fsdp.base.streaming import StoredBase, load_on_device, open_base
from lora_fsdp.compute.packed_model import PackedModel
from lora_fsdp.data.packing import Tree, pack_sequence
from lora_fsdp.tasks import Prompt
from lora_fsdp.training.recomputing import enable_checkpointing, recompute_without_random_state
from lora_fsdp.training.step.captured import CapturedStep
from lora_fsdp.training.step.eager import EagerStep
from lora_fsdp.training.step.objectives.supervised import Supervised
from tests.base.test_four_bit import adapted, assert_close, outputs, reference
from tests.gpu.test_recipe_on_gpu import DEEPSEEK_7B
from tests.support.adapters import save_base
from tests.support.ranks import launch_environment, run_ranks
from tests.support.runs import toy_run
from tests.support.tiny import ToyTask, tiny_tokenizer, toy_table

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]
GPU = torch.device("cuda")
needs_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="needs bitsandbytes"
)


@pytest.fixture(autouse=True)
def memory_is_given_back():
    """Other processes, which some tests start, have the GPU's memory too."""
    yield
    gc.collect()
    torch.cuda.empty_cache()


def test_streamed_is_what_transformers_loads(tmp_path):
    save_base(tmp_path)
    arguments = ModelArguments(str(tmp_path), dtype="bfloat16")
    streamed = load_on_device(arguments, device=GPU)
    whole = load_base(arguments, device=GPU)
    for tensors in ("named_parameters", "named_buffers"):
        for name, tensor in getattr(whole, tensors)():
            found = dict(getattr(streamed, tensors)())[name]
            assert found.is_cuda
            assert torch.equal(found.cpu(), tensor), name


@needs_bitsandbytes
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-4), ("bfloat16", 0.05)])
def test_4_bits_against_their_numbers(dtype, tolerance, tmp_path):
    save_base(tmp_path)
    model, stored = adapted(tmp_path, dtype=dtype)
    stored.fill([stored.model], device=GPU, keep_on=GPU)
    expected = outputs(reference(tmp_path, dtype), getattr(torch, dtype))
    found = outputs_on_gpu(model.to(GPU), getattr(torch, dtype))
    assert_close(found, expected, tolerance)


@needs_bitsandbytes
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_4_bits_are_unpacked_as_by_bitsandbytes(dtype):
    """Bit for bit, whatever the scales; not a multiple of the blocks that a program takes."""
    from bitsandbytes.functional import dequantize_4bit

    from lora_fsdp.base.four_bit import FourBitLinear

    def layer_of(rows):
        layer = FourBitLinear(nn.Linear(1088, rows, bias=False, device="meta"), dtype=dtype)
        sizes = torch.logspace(-6, 3, rows, device=GPU)[:, None]
        layer.set_whole(layer.quantize(torch.randn(rows, 1088, device=GPU) * sizes))
        return layer

    torch.manual_seed(0)
    layers = [layer_of(rows) for rows in (1000, 40, 300)]
    expected = [dequantize_4bit(layer.weight, layer.quant_state) for layer in layers]
    found = layers[0].unpack(torch.empty(1000, 1088, dtype=dtype, device=GPU))
    assert torch.equal(found, expected[0])
    for some in (layers[:2], layers):
        rows = sum(layer.out_features for layer in some)
        block = torch.empty(rows, 1088, dtype=dtype, device=GPU)
        assert torch.equal(layers[0].unpack_all(some, block), torch.cat(expected[: len(some)]))
    # As FSDP gives them: anywhere in a larger tensor.
    whole = torch.empty(layers[0].weight.numel() + 1, dtype=dtype, device=GPU)
    whole[1:] = layers[0].weight.detach()[:, 0]
    layers[0].set_whole(whole[1:, None])
    assert torch.equal(layers[0].unpack(torch.empty_like(found)), expected[0])


@needs_bitsandbytes
def test_4_bits_in_a_captured_step(tmp_path):
    """Fused layers in a CUDA graph: the gradients of bitsandbytes' own layers, run eagerly."""
    save_base(tmp_path)
    texts = torch.arange(5, 29).view(2, 12).tolist()
    some = [pack_sequence([Tree(text[:6], [text[6:]], [1.0]) for text in texts], share_prefix=True)]
    losses, gradients = [], []
    for captured in (False, True):
        model, stored = adapted(tmp_path, dtype="float32")
        packed = PackedModel(model)
        if captured:
            fusing = packed.fuse(filled_copy=stored.filled_copy)
            assert fusing.is_fused, fusing.reason
        stored.fill([stored.model], device=GPU, keep_on=GPU)
        model.to(GPU)
        step = (CapturedStep if captured else EagerStep)(
            packed,
            objective=Supervised(),
            adapter=AdapterSet.of(model),
            device=GPU,
            autocast=nullcontext,
        )
        for _ in range(2):
            losses.append(step(some, denominator=12).item())
            gradients.append(step.adapter.copy_gradients())
        assert not captured or step.failed is None
    for loss, gradient in zip(losses, gradients, strict=True):
        assert loss == pytest.approx(losses[0], rel=1e-5)
        assert (gradient - gradients[0]).norm() <= 1e-4 * gradients[0].norm()


@needs_bitsandbytes
@pytest.mark.parametrize("recomputed", [False, True])
def test_4_bits_unpacked_ahead_beside_the_products(recomputed, tmp_path, monkeypatch):
    """The same bits as unpacked at use, at every replay, whatever overtakes what."""
    # Faster kernels of attention's backward add up in any order.
    monkeypatch.setattr("lora_fsdp.training.step.captured._ATTENTION", [SDPBackend.MATH])
    config = LlamaConfig(
        vocab_size=512, hidden_size=2048, intermediate_size=5632, num_hidden_layers=6,
        num_attention_heads=16, num_key_value_heads=16, max_position_embeddings=1024,
    )  # fmt: skip
    torch.manual_seed(0)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    model, stored = adapted(tmp_path, dtype="bfloat16")
    packed = PackedModel(model)
    fusing = packed.fuse(filled_copy=stored.filled_copy)
    assert fusing.is_fused, fusing.reason
    stored.fill([stored.model], device=GPU, keep_on=GPU)
    model.to(GPU).train()
    if recomputed:
        arguments = FineTuningArguments(output_dir="unused")
        recompute_without_random_state(arguments)
        enable_checkpointing(packed, arguments, None)

    def step_of(kind):
        return kind(
            packed,
            objective=Supervised(),
            adapter=AdapterSet.of(model),
            device=GPU,
            autocast=nullcontext,
        )

    generator = torch.Generator().manual_seed(1)
    rows = []
    for length in (40, 300, 170):
        text = torch.randint(4, 500, (length,), generator=generator).tolist()
        rows.append([pack_sequence([Tree(text[:-8], [text[-8:]], [1.0])], share_prefix=True)])
    at_use = step_of(CapturedStep)
    expected = []
    for row in [*rows, *rows]:
        at_use(row, denominator=8)
        expected.append(at_use.adapter.copy_gradients())
    assert all(map(torch.equal, expected[:3], expected[3:]))
    assert at_use.failed is None
    packed.unpack_ahead(recomputed=recomputed)
    captured = step_of(CapturedStep)
    for _ in range(20):
        for row, gradient in zip(rows, expected[:3], strict=True):
            captured(row, denominator=8)
            assert torch.equal(captured.adapter.copy_gradients(), gradient)
    assert captured.failed is None
    eager = step_of(EagerStep)
    for row, gradient in zip(rows, expected[:3], strict=True):
        eager(row, denominator=8)
        found = eager.adapter.copy_gradients()
        assert (found - gradient).norm() < 0.05 * gradient.norm()  # rows that are not padded


def test_activations_are_recomputed_where_nothing_else_fits(tmp_path):
    """One example of 3,000 tokens on a GPU that is full but for half of its activations."""
    config = LlamaConfig(
        vocab_size=512, hidden_size=1024, intermediate_size=4096, num_hidden_layers=24,
        num_attention_heads=16, num_key_value_heads=16, max_position_embeddings=4096,
    )  # fmt: skip
    task = ToyTask().bind(toy_table(80))
    prompt = Prompt("", " good" * 2900, "")
    long = [replace(example, prompt=prompt) for example in task.examples(toy_table(4))]
    losses, plans = [], []
    for left in (0, 1):
        gc.collect()
        torch.cuda.empty_cache()
        if left:
            memory = plans[0].memory
            left = memory.allocated - memory.activations // 2
        free = torch.cuda.mem_get_info()[0]
        ballast = torch.empty(free - left if left else 0, dtype=torch.uint8, device=GPU)
        torch.manual_seed(0)
        trainer = LoraTrainer(
            model=LlamaForCausalLM(config).to(torch.bfloat16).requires_grad_(False),
            args=FineTuningArguments(
                output_dir=str(tmp_path / str(left)), per_device_train_batch_size=2, max_steps=3,
                learning_rate=1e-3, logging_steps=1, save_strategy="no", disable_tqdm=True,
            ),
            task=task,
            processing_class=tiny_tokenizer(),
            train_dataset=long,
            peft_config=LoraConfig(r=8, target_modules=["q_proj"], task_type="CAUSAL_LM"),
            max_length=4096,
        )  # fmt: skip
        trainer.train()
        losses.append([e["loss"] for e in trainer.state.log_history if "loss" in e])
        plans.append(trainer.placement)
        assert trainer.step.failed is None
        print(f"\n{ballast.numel() / 1e9:.1f} GB of the GPU taken:\n{trainer.placement}")
        del trainer, ballast
    assert not plans[0].recomputing
    assert "free" in plans[1].recomputing
    assert plans[1].step == "graph"
    assert losses[1] == pytest.approx(losses[0], rel=2e-2)


def outputs_on_gpu(model, dtype):
    texts = torch.arange(5, 29).view(2, 12).tolist()
    row = pack_sequence(
        [Tree(text[:6], [text[6:]], [1.0]) for text in texts], share_prefix=True
    ).to(GPU)
    log_probs = PackedModel(model.train()).label_log_probs(row)
    (-log_probs.sum()).backward()
    gradients = {n: p.grad.cpu() for n, p in trainable_parameters(model).items()}
    return log_probs.detach().cpu(), gradients


@pytest.mark.parametrize("in_4bit", [False, pytest.param(True, marks=needs_bitsandbytes)])
@pytest.mark.parametrize("activations", ["false", "true"])
def test_offload(in_4bit, activations, tmp_path):
    """Shards in pinned host memory, and layers' inputs too: the losses of a run without."""
    save_base(tmp_path / "base")
    options = {"base": tmp_path / "base", "streamed": True, "load_in_4bit": in_4bit}
    options |= {"allow_fsdp_on_one_process": True, "num_train_epochs": 1}
    environment = launch_environment("fsdp2_offload.yaml") | {
        "FSDP_ACTIVATION_CHECKPOINTING": "true",
        "FSDP_ACTIVATION_CHECKPOINTING_OFFLOAD": activations,
    }
    [expected] = run_ranks(run_from, tmp_path / "plain", options, world_size=1)
    [found] = run_ranks(
        run_from, tmp_path / "offload", options, world_size=1, launched=True,
        environment=environment,
    )  # fmt: skip
    assert found["placed"] == {"cpu"}
    assert expected["placed"] == {"cuda"}
    assert found["losses"] == pytest.approx(expected["losses"], rel=1e-2)


def run_from(output_dir, options):
    placed = set()

    class Look(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **others):
            for _, parameter in base_parameters(base_model(model)):
                local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
                placed.add(local.device.type)

    run = toy_run(output_dir, callbacks=[Look()], **options)
    return {"losses": run["losses"], "placed": placed}


@pytest.fixture(scope="module")
def seven_billion(tmp_path_factory):
    """DeepSeek-7B's shape with random bf16 weights, in files of 2 GB."""
    folder = tmp_path_factory.mktemp("7b")
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with GPU:
        model = AutoModelForCausalLM.from_config(LlamaConfig(**DEEPSEEK_7B))
    torch.set_default_dtype(torch.float32)
    model.save_pretrained(folder, max_shard_size="2GB")
    tiny_tokenizer().save_pretrained(folder)
    del model
    torch.cuda.empty_cache()
    return folder


def trainer_of(folder, output_dir, *, in_4bit, steps):
    task = ToyTask().bind(toy_table(80))
    base = open_base(ModelArguments(str(folder), load_in_4bit=in_4bit), device=GPU)
    assert isinstance(base, StoredBase)
    return LoraTrainer(
        model=base,
        args=FineTuningArguments(
            output_dir=str(output_dir), per_device_train_batch_size=8, max_steps=steps,
            learning_rate=1e-3, lr_scheduler_type="constant", logging_steps=1,
            save_strategy="steps", save_steps=10, disable_tqdm=True,
        ),
        task=task,
        processing_class=tiny_tokenizer(),
        train_dataset=task.examples(toy_table(80)),
        eval_dataset=task.examples(toy_table(13, seed=9)),
        peft_config=LoraConfig(
            r=8, lora_alpha=32, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"
        ),
        max_length=128,
    )  # fmt: skip


@pytest.mark.slow
@needs_bitsandbytes
def test_7b_in_4_bits(seven_billion, tmp_path):
    """Trains in at most 6.5 GB at 8 examples a step; saves, resumes, verifies and merges."""
    torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    trainer = trainer_of(seven_billion, tmp_path / "run", in_4bit=True, steps=20)
    seconds = time.perf_counter() - start
    loaded = torch.cuda.max_memory_allocated() / 1e9
    trainer.train()
    peak = torch.cuda.max_memory_allocated() / 1e9
    rate = 160 / trainer.state.log_history[-1]["train_runtime"]
    print(
        f"\n4-bit 7B: loaded in {seconds:.0f} s, {loaded:.2f} GB; peak {peak:.2f} GB, "
        f"{rate:.1f} examples/s"
    )
    assert peak <= 6.5
    trainer.save_model(str(tmp_path / "final"))
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert sum(losses[-5:]) < sum(losses[:5])
    del trainer
    torch.cuda.empty_cache()
    resumed = trainer_of(seven_billion, tmp_path / "again", in_4bit=True, steps=20)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-10"))
    again = [entry["loss"] for entry in resumed.state.log_history if "loss" in entry]
    assert again[-5:] == pytest.approx(losses[-5:], rel=1e-2)
    del resumed
    torch.cuda.empty_cache()
    found = verify_adapter_folder(tmp_path / "final")
    assert found.passed, str(found)
    merged = merge_adapter(tmp_path / "final", tmp_path / "merged", dtype="bfloat16")
    assert "quantised base" in str(merged)
    name = "model.layers.0.self_attn.q_proj.weight"
    values = [weight_of(folder, name) for folder in (seven_billion, tmp_path / "merged")]
    assert not torch.equal(*values)


def weight_of(folder, name):
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            if name in opened.keys():  # noqa: SIM118 (not a mapping)
                return opened.get_tensor(name)
    raise AssertionError(f"{folder} holds no {name}")
