"""Tiny but real models, tokenizers, tasks and tables, built in memory."""

import pandas as pd
import torch
from peft import LoraConfig, PeftModel
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM as AutoModel
from transformers import (
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
)

from lora_fsdp.adapter.attach import attach_adapter
from lora_fsdp.tasks import ClassificationTask

WORDS = "the flight was late good bad cancelled crew friendly lost my bag again thanks for help"
LABELS = ("negative", "neutral", "positive")


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer trained on a few sentences."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|end|>", "<|pad|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    sentences = [
        f"Instruction: Say how it sounds:\nInput: {WORDS}\nOutput: {label}" for label in LABELS
    ]
    tokenizer.train_from_iterator(sentences, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="<|pad|>"
    )


CONFIGS = {
    "llama": (LlamaConfig, {"num_key_value_heads": 2}),
    "llama-tied": (LlamaConfig, {"num_key_value_heads": 2, "tie_word_embeddings": True}),
    "qwen3": (Qwen3Config, {"num_key_value_heads": 2, "head_dim": 16}),
    "mistral": (MistralConfig, {"num_key_value_heads": 2, "sliding_window": 512}),
    "gpt2": (GPT2Config, {}),
}


def tiny_model(
    kind: str = "llama", *, dtype: torch.dtype = torch.float32, seed: int = 0
) -> PreTrainedModel:
    """A causal LM with three layers and random weights."""
    torch.manual_seed(seed)
    config_class, extra = CONFIGS[kind]
    sizes = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "max_position_embeddings": 1024,
    }
    if kind == "gpt2":
        sizes = {"n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 1024}
        extra = {"attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0}
    config = config_class(
        **{"vocab_size": 400, **sizes, **extra}, eos_token_id=0, pad_token_id=1, bos_token_id=0
    )
    model = AutoModel.from_config(config, attn_implementation="sdpa")
    return model.to(dtype).requires_grad_(False)


def adapted_model(kind: str = "llama", *, dtype: torch.dtype = torch.float32) -> PeftModel:
    """A tiny model with a new adapter on every linear layer."""
    config = LoraConfig(
        r=4,
        target_modules="all-linear",
        fan_in_fan_out=kind == "gpt2",
        task_type="CAUSAL_LM",
    )
    return attach_adapter(tiny_model(kind, dtype=dtype), config)


def randomise_adapter(model: torch.nn.Module, *, seed: int = 1) -> None:
    """Move `lora_B` away from zero, so that every gradient is non-trivial."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float32)
            parameter.data = 0.05 * noise.to(parameter.dtype)


class ToyTask(ClassificationTask):
    """A three-label sentiment task with a short instruction."""

    name = "toy"
    instruction = "Say how it sounds:"
    text_column = "text"
    label_column = "label"
    labels = LABELS


def toy_table(count: int = 24, *, seed: int = 0) -> pd.DataFrame:
    """Rows whose label can be told from one word."""
    generator = torch.Generator().manual_seed(seed)
    words = WORDS.split()
    cues = {"negative": "bad", "neutral": "was", "positive": "good"}
    rows = []
    for number in range(count):
        label = LABELS[number % 3]
        picks = torch.randint(len(words), (4 + number % 9,), generator=generator)
        text = " ".join([*(words[int(i)] for i in picks), cues[label], str(number)])
        rows.append({"text": text, "label": label})
    return pd.DataFrame(rows, index=pd.RangeIndex(1, count + 1, name="row"))
