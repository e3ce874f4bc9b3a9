"""The head at label positions, and which architectures can compute a packed sequence at all.

Run: python -m pytest tests/compute/test_packed_model.py
"""

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BloomConfig,
    GPT2Config,
    GPTNeoXConfig,
    GraniteMoeHybridConfig,
    LlamaConfig,
    MambaConfig,
    MiniMaxConfig,
    MistralConfig,
    PreTrainedModel,
    Qwen3NextConfig,
    RecurrentGemmaConfig,
)

from lora_fsdp.compute.architectures import check_architecture, why_apart, windows_of
from lora_fsdp.compute.attention import Window
from lora_fsdp.compute.packed_model import PackedModel
from lora_fsdp.compute.packing_check import check_packing, why_not_packed
from lora_fsdp.compute.recurrent.layers import recurrent_layers
from lora_fsdp.data.packing import Tree, empty_sequence, pack_sequence
from lora_fsdp.errors import UnsupportedModelError
from tests.support.tiny import CONFIGS, adapted_model, tiny_model

FP32 = torch.float32
SIZES = {
    "vocab_size": 60,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}


def read_across_examples(inputs):
    length = inputs["input_ids"].shape[1]
    return inputs | {"attention_mask": torch.full((1, 1, length, length), -torch.inf).triu(1)}


def count_along_the_row(inputs):
    return inputs | {"position_ids": None}


@pytest.mark.parametrize("fault", [read_across_examples, count_along_the_row])
def test_live_check_refuses_a_model_that_cannot_be_packed(fault):
    """Whatever its name and signature say."""
    model = adapted_model()
    check_packing(PackedModel(model), device=torch.device("cpu"))
    forward = model.forward
    model.forward = lambda **inputs: forward(**fault(inputs))
    reason = why_not_packed(PackedModel(model), device=torch.device("cpu"))
    assert reason.startswith("LlamaForCausalLM computes packed examples (short ones)")
    with pytest.raises(UnsupportedModelError, match=r"LlamaForCausalLM computes packed examples"):
        check_packing(PackedModel(model), device=torch.device("cpu"))


def model_from(config):
    attention = "eager" if isinstance(config, BloomConfig | MambaConfig) else "sdpa"
    return AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()


GRANITE = {
    **SIZES,
    "num_hidden_layers": 2,
    "num_key_value_heads": 1,
    "shared_intermediate_size": 32,
    "num_local_experts": 0,
    "mamba_n_heads": 4,
    "mamba_d_head": 16,
    "mamba_d_state": 8,
    "mamba_n_groups": 1,
}
CAUSAL_ALL_THE_SAME = [
    GPTNeoXConfig(**SIZES, eos_token_id=0, bos_token_id=0),
    GraniteMoeHybridConfig(**GRANITE, layer_types=["attention", "attention"]),
]


def two_trees():
    return [Tree([5, 6, 7, 8, 9], [[11, 0]]), Tree([5, 6, 17, 18], [[12, 13, 0]])]


@pytest.mark.parametrize("kind", sorted(CONFIGS))
def test_logits_are_those_of_the_label_positions(kind):
    model = tiny_model(kind).eval()
    [tree, *_] = two_trees()
    with torch.no_grad():
        plain = model(input_ids=torch.tensor([[*tree.prompt_ids, 11]]), use_cache=False).logits[0]
        logits = PackedModel(model).label_logits(pack_sequence([tree], share_prefix=False))
    torch.testing.assert_close(logits, plain[-2:], rtol=1e-5, atol=1e-5)


def test_head_runs_at_label_positions_only():
    model = tiny_model().eval()
    lengths = []
    model.lm_head.register_forward_hook(lambda _, inputs, __: lengths.append(inputs[0].shape[1]))
    sequence = pack_sequence(two_trees(), share_prefix=True)
    PackedModel(model).label_log_probs(sequence)
    assert lengths == [sequence.label_ids.numel()] == [5]


def test_model_without_logits_to_keep():
    """Older and custom models compute all logits; the labels' are picked afterwards."""

    class Wrapper(nn.Module):
        dtype = FP32

        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, input_ids, attention_mask, position_ids, use_cache):
            return self.model(
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=position_ids,
                use_cache=use_cache,
            )

    model = tiny_model().eval()
    sequence = pack_sequence(two_trees(), share_prefix=True)
    with torch.no_grad():
        expected = PackedModel(model).label_log_probs(sequence)
        found = PackedModel(Wrapper(model)).label_log_probs(sequence)
    torch.testing.assert_close(found, expected)


def test_logits_are_float32_over_a_bf16_base():
    model = tiny_model(dtype=torch.bfloat16).eval()
    logits = PackedModel(model).label_logits(pack_sequence(two_trees(), share_prefix=True))
    assert logits.dtype == FP32


@pytest.mark.parametrize("kind", sorted(CONFIGS))
def test_a_sequence_without_labels(kind):
    assert PackedModel(tiny_model(kind).eval()).label_log_probs(empty_sequence()).shape == (0,)


class TestCacheTrap:
    """Without an explicit mask, examples attend to each other, and nothing says so."""

    def sequences(self):
        first, second = [5, 6, 7, 8, 9, 11, 0], [15, 16, 17, 18, 12, 0]
        other = [25, 26, 27, 28, 29, 21, 0]
        return first + second, other + second, len(second)

    def naive(self, ids, second, **keywords):
        """What packing by position ids alone computes, with the cache left on by default."""
        positions = [*range(len(ids) - second), *range(second)]
        with torch.no_grad():
            return (
                tiny_model()
                .eval()(
                    input_ids=torch.tensor([ids]),
                    position_ids=torch.tensor([positions]),
                    **keywords,
                )
                .logits[0, -second:]
            )

    @pytest.mark.parametrize(
        "keywords",
        [{}, {"use_cache": True}, {"attention_mask": torch.ones(1, 13, dtype=torch.int64)}],
        ids=["use_cache unset", "use_cache on", "mask of ones"],
    )
    def test_naive_packing_contaminates(self, keywords):
        ids, changed, second = self.sequences()
        before = self.naive(ids, second, **keywords)
        after = self.naive(changed, second, **keywords)
        assert (before - after).abs().max() > 1e-3

    def test_ours_does_not(self):
        model = tiny_model().eval()
        answers = [[12, 0]]
        second = Tree([3, 4, 15, 16, 17, 18], answers)
        before, after = (
            PackedModel(model).label_log_probs(
                pack_sequence([Tree(first, [[11, 0]]), second], share_prefix=True)
            )
            for first in ([3, 4, 5, 6, 7, 8, 9], [3, 4, 25, 26, 27, 28, 29])
        )
        assert torch.equal(before[2:], after[2:])
        assert not torch.equal(before[:2], after[:2])
        with torch.no_grad():
            alone = PackedModel(model).label_log_probs(pack_sequence([second], share_prefix=False))
        torch.testing.assert_close(before[2:], alone, rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("use_cache", [True, False])
    def test_the_model_s_own_setting_changes_nothing(self, use_cache):
        model = tiny_model().eval()
        sequence = pack_sequence(two_trees(), share_prefix=True)
        expected = PackedModel(model).label_log_probs(sequence)
        model.config.use_cache = use_cache
        assert torch.equal(PackedModel(model).label_log_probs(sequence), expected)


def apart(model):
    """Why it is not packed; it is not refused."""
    check_architecture(model, longest=64)
    return why_apart(model)


class TestArchitectures:
    @pytest.mark.parametrize("kind", sorted(CONFIGS))
    def test_accepted(self, kind):
        check_architecture(tiny_model(kind), longest=512)
        assert apart(tiny_model(kind)) is None

    def test_no_position_ids(self):
        bloom = model_from(BloomConfig(vocab_size=60, hidden_size=32, n_layer=1, n_head=2))
        assert apart(bloom) == "BloomForCausalLM takes no `position_ids`"

    def test_recurrent(self):
        sizes = {"vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 1, "state_size": 4}
        assert apart(model_from(MambaConfig(**sizes)))

    def test_hybrid_by_layer_types(self):
        config = Qwen3NextConfig(
            **SIZES,
            head_dim=16,
            num_key_value_heads=1,
            num_experts=2,
            num_experts_per_tok=1,
            moe_intermediate_size=16,
            shared_expert_intermediate_size=16,
            layer_types=["linear_attention", "full_attention"],
        )
        assert apart(model_from(config)) is None  # its states follow the tree

    def test_hybrid_whose_states_follow_no_tree(self):
        config = MiniMaxConfig(
            **SIZES,
            head_dim=16,
            num_key_value_heads=1,
            num_local_experts=2,
            layer_types=["linear_attention", "full_attention"],
        )
        assert apart(model_from(config)).endswith("mixes tokens by linear_attention")

    def test_hybrid_by_block_types(self):
        config = RecurrentGemmaConfig(
            **SIZES, num_key_value_heads=1, block_types=("recurrent", "attention"), lru_width=32
        )
        assert apart(model_from(config)).startswith("RecurrentGemmaForCausalLM")

    @pytest.mark.parametrize(("longest", "windowed"), [(63, False), (64, False), (65, True)])
    def test_window_against_the_longest_example(self, longest, windowed):
        model = model_from(MistralConfig(**SIZES, num_key_value_heads=1, sliding_window=64))
        assert apart(model) is None
        windows = windows_of(model, longest=longest)
        assert windows == ({"sliding_attention": Window(64)} if windowed else {})

    def test_an_example_as_long_as_the_window_is_exact(self):
        """The boundary case without a window in the mask."""
        config = MistralConfig(**SIZES, num_key_value_heads=1, sliding_window=8)
        model = model_from(config)
        ids = torch.tensor([[5, 6, 7, 8, 9, 10, 11, 12]])
        with torch.no_grad():
            windowed = model(input_ids=ids, use_cache=False).logits[0, -1].log_softmax(-1)[3]
            sequence = pack_sequence(
                [Tree([2], [[4]]), Tree(ids[0].tolist(), [[3]])], share_prefix=True
            )
            packed = PackedModel(model).label_log_probs(sequence)[-1]
        torch.testing.assert_close(packed, windowed)

    def test_no_window(self):
        config = MistralConfig(**SIZES, num_key_value_heads=1, sliding_window=None)
        assert windows_of(model_from(config), longest=100_000) == {}

    def test_longer_than_the_learnt_positions(self):
        config = GPT2Config(vocab_size=60, n_embd=32, n_layer=1, n_head=2, n_positions=64)
        with pytest.raises(UnsupportedModelError, match=r"64.*--max_length"):
            check_architecture(model_from(config), longest=65)

    def test_encoder(self):
        config = BertConfig(**SIZES)
        model = model_from(config)
        with pytest.raises(UnsupportedModelError, match="BertLMHeadModel"):
            check_architecture(model, longest=64)

    @pytest.mark.parametrize("config", CAUSAL_ALL_THE_SAME, ids=lambda one: one.model_type)
    def test_causal_whatever_the_settings_say(self, config):
        """Accepted, and packed examples have the log-probabilities that they have alone."""
        model = model_from(config)
        check_architecture(model, longest=64)
        assert apart(model) is None
        trees = two_trees()
        packed = PackedModel(model).label_log_probs(pack_sequence(trees, share_prefix=True))
        alone = []
        for tree in trees:
            ids = torch.tensor([[*tree.prompt_ids, *tree.answers[0]]])
            with torch.no_grad():
                logits = model(input_ids=ids, use_cache=False).logits[0].log_softmax(-1)
            for place in range(len(tree.prompt_ids), ids.shape[1]):
                alone.append(logits[place - 1, ids[0, place]])
        torch.testing.assert_close(packed.detach(), torch.stack(alone), rtol=1e-5, atol=1e-5)

    def test_one_recurrent_layer_is_enough(self):
        config = GraniteMoeHybridConfig(**GRANITE, layer_types=["attention", "mamba"])
        model = model_from(config)
        assert apart(model) is None
        assert len(recurrent_layers(model)) == 1

    def test_refusal_is_about_the_class(self):
        assert issubclass(type(tiny_model()), PreTrainedModel)
        sizes = {**SIZES, "num_hidden_layers": 1}
        check_architecture(model_from(LlamaConfig(**sizes)), longest=1)
