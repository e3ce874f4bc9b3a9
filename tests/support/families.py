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


# ---- models that also see ------------------------------------------------------------------------

_VISION: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
_QWEN_VISION: dict[str, Any] = {
    "depth": 2,
    "hidden_size": 32,
    "out_hidden_size": 64,
    "intermediate_size": 48,
    "num_heads": 2,
}
_WINDOWED: dict[str, Any] = {
    "sliding_window": 512,
    "layer_types": ["sliding_attention", "full_attention"],
}
_IN_SECTIONS: dict[str, Any] = {
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 10000.0,
        "mrope_section": [2, 3, 3],
        "partial_rotary_factor": 1.0,
    }
}
#: By model type: settings of the text model and of the vision model, and the others.
MULTIMODAL: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "gemma3": (_WINDOWED, _VISION, {"mm_tokens_per_image": 4}),
    "gemma4": (
        {
            **_WINDOWED,
            "global_head_dim": 16,
            "num_global_key_value_heads": 2,
            "num_kv_shared_layers": 0,
            "vocab_size_per_layer_input": 400,
            "hidden_size_per_layer_input": 16,
        },
        {**_VISION, "head_dim": 16, "num_key_value_heads": 2, "global_head_dim": 16},
        {},
    ),
    "llama4": (
        {**MIXTURES["llama4_text"], "attention_chunk_size": 512},
        {
            **_VISION,
            "intermediate_size": 128,
            "vision_output_dim": 32,
            "projector_input_dim": 32,
            "projector_output_dim": 32,
        },
        {},
    ),
    "mistral3": (
        {"model_type": "mistral", "sliding_window": None},
        {**_VISION, "model_type": "pixtral", "head_dim": 16},
        {"image_token_index": 10},
    ),
    "qwen2_5_vl": (_IN_SECTIONS, {**_QWEN_VISION, "fullatt_block_indexes": [0]}, {}),
    "qwen3_5": (
        {
            **_IN_SECTIONS,
            "linear_num_value_heads": 4,
            "linear_num_key_heads": 2,
            "linear_key_head_dim": 16,
            "linear_value_head_dim": 16,
            "layer_types": ["linear_attention", "full_attention"],
        },
        {**_QWEN_VISION, "num_position_embeddings": 16},
        {},
    ),
    "qwen3_vl": (
        _IN_SECTIONS,
        {**_QWEN_VISION, "deepstack_visual_indexes": [0], "num_position_embeddings": 16},
        {},
    ),
}


def multimodal_model(model_type: str) -> PreTrainedModel:
    """A tiny model that also sees, of the class in which the family is published."""
    from transformers import AutoModelForImageTextToText

    text, vision, others = MULTIMODAL[model_type]
    config = AutoConfig.for_model(
        model_type,
        text_config={**_SIZES, "head_dim": 16, **text},
        vision_config=vision,
        **others,
    )
    torch.manual_seed(0)
    return AutoModelForImageTextToText.from_config(config).requires_grad_(False).eval()
