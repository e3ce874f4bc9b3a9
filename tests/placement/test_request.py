"""What a run asks for, and what its model brings along.

Run: python -m pytest tests/placement/test_request.py
"""

import pytest
from peft import LoraConfig
from transformers import FalconConfig, GPT2Config, GPTNeoXConfig, LlamaConfig, OPTConfig

from lora_fsdp import FineTuningArguments, LoraTrainer
from lora_fsdp.base.dropout import dropout_settings
from tests.support.tiny import ToyTask, tiny_model, tiny_tokenizer, toy_table


@pytest.mark.parametrize(
    ("config", "found"),
    [
        (LlamaConfig(), {}),
        (LlamaConfig(attention_dropout=0.1), {"attention_dropout": 0.1}),
        (GPT2Config(), {"attn_pdrop": 0.1, "embd_pdrop": 0.1, "resid_pdrop": 0.1}),
        (GPT2Config(attn_pdrop=0, embd_pdrop=0, resid_pdrop=0), {}),
        (OPTConfig(), {"dropout": 0.1}),
        (OPTConfig(dropout=0, layerdrop=0.2), {"layerdrop": 0.2}),
        (GPTNeoXConfig(hidden_dropout=0.3), {"hidden_dropout": 0.3}),
        (FalconConfig(hidden_dropout=0.2), {"hidden_dropout": 0.2}),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_a_model_drops(config, found):
    assert dropout_settings(config) == found


@pytest.mark.parametrize(
    ("rate", "lora", "asked", "shared"),
    [
        (0.0, 0.0, "auto", True),
        (0.1, 0.0, "auto", False),
        (0.0, 0.1, "auto", False),
        (0.1, 0.0, "always", True),
        (0.0, 0.0, "never", False),
    ],
)
def test_a_prefix_is_shared_where_nothing_is_dropped(tmp_path, rate, lora, asked, shared):
    """LoRA's dropout and the model's own alike: examples would share the prefix's masks."""
    model = tiny_model("gpt2")
    model.config.resid_pdrop = rate
    task = ToyTask().bind(toy_table(20))
    trainer = LoraTrainer(
        model=model.requires_grad_(False),
        args=FineTuningArguments(output_dir=str(tmp_path), use_cpu=True, share_prefix=asked),
        task=task,
        processing_class=tiny_tokenizer(),
        train_dataset=task.examples(toy_table(20)),
        peft_config=LoraConfig(
            r=4, target_modules=["c_attn"], lora_dropout=lora, fan_in_fan_out=True,
            task_type="CAUSAL_LM",
        ),
        max_length=128,
    )  # fmt: skip
    assert trainer.placement.shares_prefix == shared
