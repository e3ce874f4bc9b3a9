"""Tiny models of many families, each small enough to be built in a test."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

#: Experts of each layer: a number that no other side of a tiny weight has.
EXPERTS = 7

_SIZES: dict[str, Any] = {
    "vocab_size": 400,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "eos_token_id": 0,
    "pad_token_id": 1,
    "bos_token_id": 0,
}
_EXPERTS: dict[str, Any] = {
    "head_dim": 16,
    "moe_intermediate_size": 32,
    "num_experts_per_tok": 2,
}
_LATENT: dict[str, Any] = {
    "n_routed_experts": EXPERTS,
    "n_group": 1,
    "topk_group": 1,
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 16,
    "head_dim": 8,
    "first_k_dense_replace": 1,
    "num_key_value_heads": 4,
}

#: Mixtures of experts by model type, with the settings that they need beside the sizes.
MIXTURES: dict[str, dict[str, Any]] = {
    "afmoe": {"num_experts": EXPERTS, "num_dense_layers": 1, "layer_types": None},
    "deepseek_v2": {**_LATENT, "moe_layer_freq": 1},
    "deepseek_v3": _LATENT,
    "ernie4_5_moe": {"moe_num_experts": EXPERTS, "moe_k": 2, "moe_layer_start_index": 1},
    "flex_olmo": {"num_experts": EXPERTS},
    "glm4_moe": {"n_routed_experts": EXPERTS, "n_group": 1, "topk_group": 1},
    "gpt_oss": {"num_local_experts": EXPERTS, "initial_context_length": 512},
    "granitemoe": {"num_local_experts": EXPERTS},
    "jetmoe": {"num_local_experts": EXPERTS, "kv_channels": 16},
    "llama4_text": {
        "num_local_experts": EXPERTS,
        "intermediate_size_mlp": 96,
        "interleave_moe_layer_step": 1,
    },
    "mixtral": {"num_local_experts": EXPERTS},
    "olmoe": {"num_experts": EXPERTS},
    "phimoe": {"num_local_experts": EXPERTS},
    "qwen2_moe": {
        "num_experts": EXPERTS,
        "decoder_sparse_step": 1,
        "shared_expert_intermediate_size": 48,
    },
    "qwen3_moe": {"num_experts": EXPERTS, "decoder_sparse_step": 1},
    "qwen3_next": {
        "num_experts": EXPERTS,
        "shared_expert_intermediate_size": 48,
        "linear_num_value_heads": 4,
        "linear_num_key_heads": 2,
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 16,
        "layer_types": ["linear_attention", "full_attention"],
    },
}


def family_config(model_type: str, **settings: Any) -> PretrainedConfig:
    """A tiny config of a family; `settings` go before those of this file."""
    own = {**_EXPERTS, **MIXTURES[model_type]} if model_type in MIXTURES else {}
    return AutoConfig.for_model(model_type, **{**_SIZES, **own, **settings})


def family_model(model_type: str, *, seed: int = 0, **settings: Any) -> PreTrainedModel:
    """A tiny causal LM of a family, with random weights."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(family_config(model_type, **settings))
    return model.requires_grad_(False).eval()
