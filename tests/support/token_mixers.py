"""Tiny models of families that mix tokens in other ways than by plain attention."""

from __future__ import annotations

import copy
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from lora_fsdp.adapter.attach import attach_adapter
from tests.support.tiny import randomise_adapter

_SIZES = {
    "vocab_size": 400,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
_DELTA = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
}
_MAMBA = {
    "mamba_d_state": 8,
    "mamba_n_heads": 8,
    "mamba_d_head": 16,
    "mamba_n_groups": 1,
    "mamba_chunk_size": 16,
}

#: By family: the config's arguments, and the target modules of the adapter.
FAMILIES: dict[str, tuple[dict[str, Any], list[str] | str]] = {
    "mamba": (
        {"vocab_size": 400, "hidden_size": 64, "num_hidden_layers": 2, "state_size": 8},
        ["in_proj", "x_proj"],
    ),
    "mamba2": (
        {
            "vocab_size": 400,
            "hidden_size": 64,
            "num_hidden_layers": 2,
            "state_size": 8,
            "num_heads": 8,
            "head_dim": 16,
            "n_groups": 1,
            "chunk_size": 16,
        },
        ["in_proj"],
    ),
    "qwen3_next": (
        {
            **_SIZES,
            **_EXPERTS,
            **_DELTA,
            "head_dim": 16,
            "shared_expert_intermediate_size": 32,
            "layer_types": ["linear_attention", "full_attention"],
        },
        ["q_proj", "v_proj", "in_proj_qkvz", "out_proj"],
    ),
    "qwen3_5_text": (
        {
            **_SIZES,
            **_DELTA,
            "head_dim": 16,
            "layer_types": ["linear_attention", "full_attention"],
        },
        ["q_proj", "v_proj", "in_proj_qkv", "out_proj"],
    ),
    "jamba": (
        {
            **_SIZES,
            "num_experts": 2,
            "num_experts_per_tok": 1,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "expert_layer_period": 2,
            "expert_layer_offset": 1,
            "mamba_d_state": 8,
            "mamba_dt_rank": 8,
            "use_mamba_kernels": False,
        },
        ["q_proj", "v_proj", "in_proj", "x_proj"],
    ),
    "bamba": ({**_SIZES, **_MAMBA, "attn_layer_indices": [1]}, ["q_proj", "v_proj", "in_proj"]),
    "falcon_h1": (
        {**_SIZES, **_MAMBA, "mamba_d_ssm": 128, "head_dim": 16},
        ["q_proj", "v_proj", "in_proj"],
    ),
    "granitemoehybrid": (
        {
            **_SIZES,
            **_MAMBA,
            "shared_intermediate_size": 96,
            "num_local_experts": 0,
            "layer_types": ["mamba", "attention"],
        },
        ["q_proj", "v_proj", "in_proj"],
    ),
    "lfm2": (
        {**_SIZES, "layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False},
        ["q_proj", "v_proj", "in_proj", "w1"],
    ),
    "zamba2": (
        {
            **_SIZES,
            "num_key_value_heads": 4,
            "mamba_d_state": 8,
            "n_mamba_heads": 8,
            "mamba_ngroups": 1,
            "mamba_expand": 2,
            "num_mem_blocks": 1,
            "chunk_size": 16,
            "layers_block_type": ["mamba", "hybrid"],
        },
        ["q_proj", "v_proj", "in_proj"],
    ),
    "nemotron_h": (
        {
            **_SIZES,
            "ssm_state_size": 8,
            "chunk_size": 16,
            "mamba_num_heads": 8,
            "mamba_head_dim": 16,
            "n_groups": 1,
            "head_dim": 16,
            "layers_block_type": ["mamba", "attention"],
        },
        ["q_proj", "v_proj", "in_proj"],
    ),
    "recurrent_gemma": (
        {
            **_SIZES,
            "num_key_value_heads": 1,
            "lru_width": 64,
            "block_types": ["recurrent", "attention"],
            "attention_window_size": 512,
        },
        ["q_proj", "v_proj", "linear_x"],
    ),
    "rwkv": (
        {
            "vocab_size": 400,
            "hidden_size": 64,
            "attention_hidden_size": 64,
            "num_hidden_layers": 2,
            "context_length": 512,
        },
        ["key", "value", "receptance"],
    ),
    "bloom": (
        {"vocab_size": 400, "hidden_size": 64, "n_layer": 2, "n_head": 4},
        ["query_key_value"],
    ),
    "mpt": (
        {"vocab_size": 400, "d_model": 64, "n_layers": 2, "n_heads": 4, "max_seq_len": 512},
        ["Wqkv"],
    ),
    "falcon": (
        {
            "vocab_size": 400,
            "hidden_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "alibi": True,
            "new_decoder_architecture": False,
        },
        ["query_key_value"],
    ),
    "gpt_neo": (
        {
            "vocab_size": 400,
            "hidden_size": 64,
            "num_layers": 2,
            "num_heads": 4,
            "attention_types": [[["global", "local"], 1]],
            "window_size": 8,
            "max_position_embeddings": 512,
            "resid_dropout": 0.0,
            "embed_dropout": 0.0,
            "attention_dropout": 0.0,
        },
        ["q_proj", "v_proj"],
    ),
    "deepseek_v32": (
        {
            **_SIZES,
            "num_key_value_heads": 4,
            "moe_intermediate_size": 32,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "n_group": 1,
            "topk_group": 1,
            "first_k_dense_replace": 1,
            "q_lora_rank": 32,
            "kv_lora_rank": 32,
            "qk_rope_head_dim": 16,
            "qk_nope_head_dim": 16,
            "v_head_dim": 16,
            "index_head_dim": 32,
            "index_n_heads": 16,
            "index_topk": 8,
        },
        ["q_b_proj", "o_proj"],
    ),
}

#: Of these, whose recurrent states follow a packed sequence's tree.
FOLLOWING_TREES = (
    "qwen3_next",
    "qwen3_5_text",
    "jamba",
    "bamba",
    "falcon_h1",
    "granitemoehybrid",
    "lfm2",
    "zamba2",
    "nemotron_h",
)

_MIXED = {
    **_SIZES,
    "head_dim": 16,
    "sliding_window": 8,
    "layer_types": ["sliding_attention", "full_attention"],
}
#: The same of families whose attention has windows, here of 8 tokens.
WINDOWED: dict[str, tuple[dict[str, Any], list[str] | str]] = {
    "gemma2": (_MIXED, ["q_proj", "v_proj"]),
    "gemma3_text": (_MIXED, ["q_proj", "v_proj"]),
    "gemma4_text": (
        {
            **_MIXED,
            "global_head_dim": 16,
            "num_kv_shared_layers": 0,
            "vocab_size_per_layer_input": 400,
            "hidden_size_per_layer_input": 16,
        },
        ["q_proj", "v_proj"],
    ),
    "gpt_oss": (
        {**_MIXED, "num_local_experts": 4, "num_experts_per_tok": 2},
        ["q_proj", "v_proj"],
    ),
    "mistral": ({**_SIZES, "sliding_window": 8}, ["q_proj", "v_proj"]),
    "starcoder2": ({**_SIZES, "sliding_window": 8}, ["q_proj", "v_proj"]),
    "qwen2": (
        {**_MIXED, "use_sliding_window": True, "max_window_layers": 1},
        ["q_proj", "v_proj"],
    ),
    "qwen3": (
        {**_MIXED, "use_sliding_window": True, "max_window_layers": 1},
        ["q_proj", "v_proj"],
    ),
    "cohere2": (_MIXED, ["q_proj", "v_proj"]),
    "olmo3": (_MIXED, ["q_proj", "v_proj"]),
    "exaone4": (_MIXED, ["q_proj", "v_proj"]),
    "ministral": (_MIXED, ["q_proj", "v_proj"]),
    "phi3": ({**_SIZES, "sliding_window": 8}, ["qkv_proj"]),
    "mixtral": (
        {**_SIZES, "sliding_window": 8, "num_local_experts": 4, "num_experts_per_tok": 2},
        ["q_proj", "v_proj"],
    ),
    "llama4_text": (
        {
            **_SIZES,
            "head_dim": 16,
            "intermediate_size_mlp": 96,
            "num_local_experts": 2,
            "num_experts_per_tok": 1,
            "attention_chunk_size": 8,
            "layer_types": ["chunked_attention", "full_attention"],
            "no_rope_layers": [1, 0],
        },
        ["q_proj", "v_proj"],
    ),
}


def family_config(family: str) -> Any:
    """The config of a tiny model."""
    arguments = copy.deepcopy(
        (FAMILIES | WINDOWED)[family][0]
    )  # transformers completes some lists in place
    ends = {"eos_token_id": 0, "pad_token_id": 1, "bos_token_id": 0}
    return AutoConfig.for_model(family, **{**ends, **arguments})


def family_model(family: str) -> PreTrainedModel:
    """A tiny model with random weights, large enough that its outputs depend on every layer."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(family_config(family), dtype=torch.float32)
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1 and "embed" not in name:
            # Mamba's scan, which multiplies step after step, rounds more then.
            parameter.data *= 2 if family == "mamba" else 4
    return model.requires_grad_(False)


def adapted_family(family: str) -> PeftModel:
    """A tiny model with an adapter that has moved."""
    adapter = LoraConfig(
        r=4, target_modules=(FAMILIES | WINDOWED)[family][1], task_type="CAUSAL_LM"
    )
    model = attach_adapter(family_model(family), adapter)
    randomise_adapter(model)
    return model
