"""The fused layer gives the losses and gradients of transformers' and PEFT's own modules.

Run: python -m pytest tests/compute/test_decoder_layer.py
"""

from copy import deepcopy

import pytest
import torch
from peft import LoraConfig
from torch import nn
from torch.nn.attention.flex_attention import BlockMask

from lora_fsdp.adapter.attach import attach_adapter
from lora_fsdp.adapter.ownership import trainable_parameters
from lora_fsdp.compute import attention
from lora_fsdp.compute.attention import dense_mask, sequence_mask
from lora_fsdp.compute.decoder_layer import FusedLayer
from lora_fsdp.compute.fused_functions import project
from lora_fsdp.compute.packed_model import PackedModel
from lora_fsdp.compute.projections import Projections
from lora_fsdp.data.packing import Tree, pack_sequence
from tests.support.tiny import CONFIGS, randomise_adapter, tiny_model

FUSED_KINDS = ["llama", "llama-tied", "qwen3", "mistral"]


def adapted(kind="llama", *, targets="all-linear", dtype=torch.float32, **options):
    torch.manual_seed(3)
    config = LoraConfig(
        r=4, target_modules=targets, task_type="CAUSAL_LM", fan_in_fan_out=kind == "gpt2", **options
    )
    model = attach_adapter(tiny_model(kind, dtype=dtype), config)
    randomise_adapter(model)
    return model


def fuse(model, *, join=False):
    packed = PackedModel(model)
    packed.fuse()
    if join:
        packed.join_weights()
    return packed


def why_not_fused(model):
    fusing = fuse(model).fusing
    assert not fusing.is_fused
    return fusing.reason


def some_sequence(*, share_prefix=True, seed=0):
    generator = torch.Generator().manual_seed(seed)
    head = [5, 6, 7, 8]
    trees = [
        Tree(head + torch.randint(2, 400, (n,), generator=generator).tolist(), [[9, n, 0]])
        for n in (3, 11, 7)
    ]
    return pack_sequence(trees, share_prefix=share_prefix)


def gradients(model, sequence):
    """Of a model, or of a packed model."""
    packed = model if isinstance(model, PackedModel) else PackedModel(model)
    loss = -packed.label_log_probs(sequence).sum()
    loss.backward()
    found = {}
    for name, parameter in trainable_parameters(packed.model).items():
        found[name] = parameter.grad
        parameter.grad = None
    return loss.item(), found


def assert_close(found, expected, *, tolerance=3e-6):
    assert found[0] == pytest.approx(expected[0], rel=tolerance)
    assert found[1].keys() == expected[1].keys()
    for name, reference in expected[1].items():
        assert reference.norm() > 0, name
        assert (found[1][name] - reference).norm() <= tolerance * reference.norm(), name


@pytest.mark.parametrize("join", [False, True], ids=["apart", "joined"])
@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "v_proj"], ["k_proj"], ["down_proj"]])
@pytest.mark.parametrize("kind", FUSED_KINDS)
def test_gradients_are_the_modules_own(kind, targets, join):
    model, sequence = adapted(kind, targets=targets), some_sequence()
    expected = gradients(model, sequence)
    packed = fuse(model, join=join)
    assert packed.fusing.is_fused
    assert_close(gradients(packed, sequence), expected)
    packed.shortened_last_layer = True
    assert_close(gradients(packed, sequence), expected)
    padded = sequence.padded(tokens=len(sequence) + 3, labels=sequence.labels.shape[1])
    assert_close(gradients(packed, padded), expected)


@pytest.mark.parametrize("join", [False, True], ids=["apart", "joined"])
def test_biases(join):
    """In fp64: a key's gradient is the little that is left of terms that nearly cancel, and in fp32
    the modules' own is up to 2.3e-6 away from it, the fused one 3.5e-6. What is left in fp64,
    2e-8, is the norms', which transformers computes in fp32.
    """
    from transformers import AutoModelForCausalLM, Qwen2Config

    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=400, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2,
    )  # fmt: skip
    base = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    for name, parameter in base.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter, std=0.3)
    base.requires_grad_(False)
    model = attach_adapter(base, LoraConfig(r=4, target_modules="all-linear"))
    randomise_adapter(model)
    model = model.double()
    expected = gradients(model, some_sequence())
    assert fuse(model, join=join).fusing.is_fused
    assert_close(gradients(model, some_sequence()), expected, tolerance=1e-7)


@pytest.mark.parametrize(
    "options",
    [
        {"lora_alpha": 4, "use_rslora": True},
        {"alpha_pattern": {"v_proj": 5}, "rank_pattern": {"q_proj": 7}},
    ],
    ids=["rslora", "patterns"],
)
def test_scaling_and_ranks_of_each_module(options):
    model, sequence = adapted(**options), some_sequence()
    expected = gradients(model, sequence)
    assert fuse(model, join=True).fusing.is_fused
    assert_close(gradients(model, sequence), expected)


def test_an_adapter_that_was_changed_is_seen_at_the_next_forward():
    model, sequence = adapted(), some_sequence()
    assert fuse(model).fusing.is_fused
    gradients(model, sequence)
    randomise_adapter(model, seed=8)
    found = gradients(model, sequence)
    reference = adapted()
    randomise_adapter(reference, seed=8)
    assert_close(found, gradients(reference, sequence))


@pytest.mark.parametrize("change", ["merge_adapter", "merge_and_unload", "unload", "set_adapter"])
def test_what_peft_does_to_an_adapter_afterwards_is_seen(change):
    model, sequence = adapted().eval(), some_sequence()
    packed = fuse(model)
    packed.shortened_last_layer = True
    if change == "set_adapter":
        model.add_adapter("other", LoraConfig(r=2, target_modules=["q_proj"]))
        model.set_adapter("other")
    else:
        getattr(model, change)()
    with torch.no_grad():
        found = packed.label_log_probs(sequence)
        expected = adapted().eval()
        if change in ("unload", "set_adapter"):
            expected = expected.unload()
        assert torch.allclose(PackedModel(expected).label_log_probs(sequence), found, atol=1e-5)


def test_a_deep_copy_has_adapters_of_its_own():
    model, sequence = adapted(), some_sequence()
    fuse(model)
    copy = deepcopy(model)
    randomise_adapter(copy, seed=8)
    reference = adapted()
    randomise_adapter(reference, seed=8)
    with torch.no_grad():
        expected = PackedModel(reference).label_log_probs(sequence)
        assert torch.allclose(PackedModel(copy).label_log_probs(sequence), expected, atol=1e-5)


def test_one_modules_adapter_switched_off():
    model, sequence = adapted(), some_sequence()
    fuse(model)
    reference = adapted()
    for one in (model, reference):
        one.get_base_model().model.layers[1].self_attn.v_proj.enable_adapters(False)
    with torch.no_grad():
        expected = PackedModel(reference).label_log_probs(sequence)
        assert torch.allclose(PackedModel(model).label_log_probs(sequence), expected, atol=1e-5)


def test_adapter_switched_off():
    model, sequence = adapted(), some_sequence()
    with model.disable_adapter(), torch.no_grad():
        expected = PackedModel(model).label_log_probs(sequence)
    fuse(model, join=True)
    with model.disable_adapter(), torch.no_grad():
        assert torch.allclose(PackedModel(model).label_log_probs(sequence), expected, atol=1e-5)


def test_weights_that_were_moved_after_joining_are_used():
    model, sequence = adapted(), some_sequence()
    fuse(model, join=True)
    before = gradients(model, sequence)
    base = model.get_base_model()
    for parameter in base.parameters():
        parameter.data = parameter.data.clone()
    base.model.layers[0].self_attn.q_proj.base_layer.weight.data.mul_(1.5)
    after = gradients(model, sequence)
    reference = adapted()
    reference.get_base_model().model.layers[0].self_attn.q_proj.base_layer.weight.data.mul_(1.5)
    assert_close(after, gradients(reference, sequence))
    assert after[0] != before[0]


def test_joining_takes_no_memory():
    model = adapted()
    fuse(model, join=True)
    attention_block = model.get_base_model().model.layers[0].self_attn
    storages = {
        getattr(attention_block, name).base_layer.weight.untyped_storage().data_ptr()
        for name in ("q_proj", "k_proj", "v_proj")
    }
    assert len(storages) == 1


class TestDropout:
    """Masks are drawn at random; what is tested is what they must do on average and in backward."""

    def test_gradient_is_that_of_the_drawn_masks(self):
        model, sequence = (
            adapted(lora_dropout=0.5, targets=["q_proj", "down_proj"]),
            some_sequence(),
        )
        fuse(model)
        model.train()
        layer = model.get_base_model().model.layers[1].mlp.down_proj.lora_B["default"].weight

        def loss():
            torch.manual_seed(0)
            return -PackedModel(model).label_log_probs(sequence).sum()

        loss().backward()
        slope = layer.grad[0, 0].item()
        with torch.no_grad():
            step = 1e-2
            layer[0, 0] += step
            above = loss()
            layer[0, 0] -= 2 * step
            below = loss()
        assert slope == pytest.approx(((above - below) / (2 * step)).item(), rel=2e-2)

    def test_expectation(self):
        model = adapted(lora_dropout=0.3)
        projections = Projections([model.get_base_model().model.layers[0].mlp.up_proj])
        inputs = torch.randn(5, 64)
        with torch.no_grad():
            for copy, original in projections.copies():
                copy.copy_(original)
            model.eval()
            exact = project(projections, inputs)
            model.train()
            draws = torch.stack([project(projections, inputs) for _ in range(3000)])
        assert not torch.equal(draws[0], draws[1])
        deviation = draws.std(0) / 3000**0.5
        assert ((draws.mean(0) - exact).abs() < 5 * deviation).all()

    def test_zero_in_evaluation(self):
        model, sequence = adapted(lora_dropout=0.5).eval(), some_sequence()
        with torch.no_grad():
            expected = PackedModel(model).label_log_probs(sequence)
            fuse(model)
            found = PackedModel(model).label_log_probs(sequence)
        assert torch.allclose(found, expected, atol=1e-5)


def twice_as_sharp(block):
    """An attention block whose own code does something that its settings do not say."""
    original = block.forward

    def forward(hidden_states, **others):
        context, weights = original(hidden_states, **others)
        return 2 * context, weights

    return forward


class TestFallback:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_another_activation(self, dtype):
        model = adapted(dtype=dtype)
        model.get_base_model().model.layers[2].mlp.act_fn = nn.GELU()
        assert "another activation than SiLU" in why_not_fused(model)

    def test_norms_that_are_trained(self):
        model = adapted("qwen3", modules_to_save=["q_norm"])
        assert "q_norm is no frozen RMS norm" in why_not_fused(model)

    def test_gemma(self):
        from transformers import AutoModelForCausalLM, GemmaConfig

        config = GemmaConfig(
            vocab_size=400, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, head_dim=16,
        )  # fmt: skip
        base = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
        model = attach_adapter(base.requires_grad_(False), LoraConfig(target_modules=["q_proj"]))
        assert "another norm than Llama's" in why_not_fused(model)

    def test_another_architecture_is_left_alone(self):
        model = adapted("gpt2")
        before = gradients(model, some_sequence())
        assert "GPT2Block" in why_not_fused(model)
        assert_close(gradients(model, some_sequence()), before, tolerance=0)

    def test_a_layer_that_computes_something_else(self):
        model = adapted()
        for layer in model.get_base_model().model.layers:
            layer.self_attn.forward = twice_as_sharp(layer.self_attn)
        assert "computes something else" in why_not_fused(model)
        assert not isinstance(model.get_base_model().model.layers[0].forward, FusedLayer)

    def test_dora(self):
        assert "no frozen linear layer with plain LoRA" in why_not_fused(adapted(use_dora=True))

    def test_generation_and_plain_masks_run_the_models_own_code(self, monkeypatch):
        model = adapted().eval()
        packed = fuse(model)

        def unwanted(self, *inputs):
            raise AssertionError("the fused layer ran")

        monkeypatch.setattr(FusedLayer, "compute", unwanted)
        ids = torch.tensor([[3, 4, 5]])
        model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=2)
        model(input_ids=ids)
        with pytest.raises(AssertionError, match="the fused layer ran"):
            packed.label_log_probs(some_sequence())


class TestBlocks:
    @pytest.fixture(autouse=True)
    def _short_rows_have_blocks(self, monkeypatch):
        monkeypatch.setattr(attention, "BLOCKS_FROM_TOKENS", 1)

    @pytest.mark.parametrize("share_prefix", [True, False])
    def test_block_mask_is_the_dense_mask(self, share_prefix):
        trees = [Tree([1, 2, 3, 4 + n], [[5, 6, 0], [7, 8, 0]][: 1 + n % 2]) for n in range(3)]
        sequence = pack_sequence(trees, share_prefix=share_prefix).padded(tokens=32, labels=16)
        mask = sequence_mask(sequence, dtype=torch.float32, by_blocks=True)
        assert isinstance(mask, BlockMask)
        index = torch.arange(len(sequence))
        allowed = mask.mask_mod(0, 0, index[:, None], index[None, :])
        assert torch.equal(allowed, dense_mask(sequence, dtype=torch.float32)[0, 0] == 0)

    @pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
    @pytest.mark.parametrize("kind", ["llama", "qwen3"])
    def test_gradients(self, kind):
        model, sequence = adapted(kind), some_sequence()
        expected = gradients(model, sequence)
        packed = fuse(model.eval())
        with torch.no_grad():
            found = packed.label_log_probs(sequence).sum()
        assert -found.item() == pytest.approx(expected[0], rel=1e-5)

    def test_one_sequence_is_causal(self):
        sequence = pack_sequence([Tree([3, 4, 5, 6], [[7, 8, 9, 0]])], share_prefix=True)
        assert sequence.is_one_sequence
        assert (
            sequence_mask(sequence, dtype=torch.float32, by_blocks=True).mask_mod
            is attention.causal
        )
        model = adapted()
        expected = gradients(model, sequence)
        assert_close(gradients(fuse(model), sequence), expected)

    def test_several_sequences_are_not(self):
        assert not some_sequence().is_one_sequence
        assert not pack_sequence([Tree([3], [[4, 0], [5, 0]])], share_prefix=True).is_one_sequence

    def test_one_sequence_with_padding(self):
        sequence = pack_sequence([Tree([3, 4, 5, 6], [[7, 8, 9, 0]])], share_prefix=True)
        padded = sequence.padded(tokens=16, labels=6)
        assert (
            sequence_mask(padded, dtype=torch.float32, by_blocks=True).mask_mod is attention.causal
        )
        model = adapted()
        expected = PackedModel(model).label_log_probs(sequence)
        found = fuse(model).label_log_probs(padded)
        assert torch.allclose(found[:4], expected, atol=1e-5)


class TestPadding:
    @pytest.mark.parametrize("fused", [False, True])
    def test_padding_changes_nothing(self, fused):
        model, sequence = adapted(), some_sequence()
        if fused:
            fuse(model)
        expected = PackedModel(model).label_log_probs(sequence)
        padded = sequence.padded(tokens=len(sequence) + 13, labels=sequence.labels.shape[1] + 5)
        found = PackedModel(model).label_log_probs(padded)
        assert torch.allclose(found[: len(expected)], expected, atol=1e-5)
        assert found.isfinite().all()

    def test_to_less_is_refused(self):
        with pytest.raises(ValueError, match="cannot be padded"):
            some_sequence().padded(tokens=3, labels=99)


class TestChunkedHead:
    @pytest.mark.parametrize("kind", CONFIGS)
    def test_log_probs_and_gradients(self, kind, monkeypatch):
        monkeypatch.setattr("lora_fsdp.compute.chunked_head.CHUNK", 4)
        model, sequence = (
            adapted(kind, targets=["c_attn"] if kind == "gpt2" else ["q_proj"]),
            some_sequence(),
        )
        packed = PackedModel(model)
        packed.chunked_head = True
        expected = PackedModel(model).label_log_probs(sequence)
        expected_gradients = gradients(model, sequence)
        found = packed.label_log_probs(sequence, chunk_above=0)
        assert torch.allclose(found, expected, atol=1e-5)
        loss = -found.sum()
        loss.backward()
        mine = {n: p.grad for n, p in trainable_parameters(model).items()}
        assert_close((loss.item(), mine), expected_gradients)

    def test_weighted_tokens(self):
        model, sequence = adapted(), some_sequence()
        weights = torch.linspace(0, 2, sequence.labels.shape[1])
        (PackedModel(model).label_log_probs(sequence) * weights).sum().backward()
        expected = {n: p.grad.clone() for n, p in trainable_parameters(model).items()}
        model.zero_grad()
        packed = PackedModel(model)
        packed.chunked_head = True
        (packed.label_log_probs(sequence, chunk_above=0) * weights).sum().backward()
        mine = {n: p.grad for n, p in trainable_parameters(model).items()}
        assert_close((0.0, mine), (0.0, expected))
