"""What every arm of the throughput benchmark trains on: one model, examples, order and clock."""

from __future__ import annotations

import hashlib
import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Qwen3_5TextConfig,
    Qwen3Config,
    Qwen3MoeConfig,
    TrainerCallback,
)

from lora_fsdp import get_task
from lora_fsdp.base.quantized_layers import QuantizedLayer
from lora_fsdp.data.sampling import epoch_order
from lora_fsdp.data.tables import read_table, sample_rows
from lora_fsdp.planning.models import dense_config
from lora_fsdp.tasks import Example, Prompt, Task

SEED = 0
#: Shapes with random weights; `tiny` is the one on which the arms' gradients are compared.
SHAPES: dict[str, PretrainedConfig] = {
    "deepseek-7b": LlamaConfig(
        vocab_size=102400, hidden_size=4096, intermediate_size=11008, num_hidden_layers=30,
        num_attention_heads=32, num_key_value_heads=32, max_position_embeddings=8192,
    ),
    "llama-8b": LlamaConfig(
        vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
        num_attention_heads=32, num_key_value_heads=8, max_position_embeddings=8192,
    ),
    "mistral-7b": MistralConfig(
        vocab_size=49152, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
        num_attention_heads=32, num_key_value_heads=8, max_position_embeddings=8192,
        sliding_window=None,
    ),
    "qwen3-8b": Qwen3Config(
        vocab_size=151936, hidden_size=4096, intermediate_size=12288, num_hidden_layers=36,
        num_attention_heads=32, num_key_value_heads=8, head_dim=128, max_position_embeddings=8192,
    ),
    # Three layers of four mix tokens by a recurrent state (gated delta rule).
    "qwen3.5-4b": Qwen3_5TextConfig(
        vocab_size=248320, hidden_size=2560, intermediate_size=9216, num_hidden_layers=32,
        num_attention_heads=16, num_key_value_heads=4, head_dim=256, linear_num_key_heads=16,
        linear_num_value_heads=32, max_position_embeddings=8192, tie_word_embeddings=True,
    ),
    "gemma3-4b": Gemma3TextConfig(
        vocab_size=262208, hidden_size=2560, intermediate_size=10240, num_hidden_layers=34,
        num_attention_heads=8, num_key_value_heads=4, head_dim=256, sliding_window=1024,
        max_position_embeddings=8192,
    ),
    "llama-1b": LlamaConfig(
        vocab_size=128256, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16,
        num_attention_heads=32, num_key_value_heads=8, max_position_embeddings=8192,
        tie_word_embeddings=True,
    ),
    "smollm2": LlamaConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30,
        num_attention_heads=9, num_key_value_heads=3, max_position_embeddings=8192,
        tie_word_embeddings=True,
    ),
    # Of these two no rank can hold the whole: `Workload.streamed`.
    "llama-70b": dense_config(70e9),
    "qwen3-235b-a22b": Qwen3MoeConfig(
        vocab_size=151936, hidden_size=4096, intermediate_size=12288, moe_intermediate_size=1536,
        num_hidden_layers=94, num_attention_heads=64, num_key_value_heads=4, head_dim=128,
        num_experts=128, num_experts_per_tok=8, max_position_embeddings=8192,
    ),
    "tiny": LlamaConfig(
        vocab_size=49152, hidden_size=64, intermediate_size=160, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=8192,
    ),
    "tiny-moe": Qwen3MoeConfig(
        vocab_size=49152, hidden_size=64, intermediate_size=160, moe_intermediate_size=32,
        num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
        num_experts=4, num_experts_per_tok=2, max_position_embeddings=8192,
    ),
}  # fmt: skip


@dataclass
class Workload:
    """What one arm is to do; travels to its process as JSON.

    Attributes:
        model: a key of `SHAPES`, or a model folder.
        data: folder with the prepared default (tokenizer and tweets).
        dtype: of the base.
        examples: examples of an optimizer step on one process.
        steps: optimizer steps.
        dropout: LoRA's.
        rows: `tweets` (a label each), or `long` (texts of 4,096 tokens, loss on every token).
        targets: LoRA's target modules.
        rank: LoRA's.
        in_4bit: the base's linear layers are stored in 4 bits.
        scored: held-out tweets whose labels this library scores after training.
        long_tokens: of a text of `long` rows, about.
        streamed: every rank draws its shard of the base alone, where it stays; ours only.
        saved: the adapter is saved after training, read back and compared; ours only.
    """

    model: str = "deepseek-7b"
    data: str = ".cache/default"
    dtype: str = "bfloat16"
    examples: int = 8
    steps: int = 40
    dropout: float = 0.0
    rows: str = "tweets"
    targets: list[str] = field(default_factory=lambda: ["q_proj", "v_proj"])
    rank: int = 8
    in_4bit: bool = False
    scored: int = 1000
    long_tokens: int = 4080
    streamed: bool = False
    saved: bool = False

    @property
    def processes(self) -> int:
        """Ranks of this launch."""
        return int(os.environ.get("WORLD_SIZE", "1"))


def load_tokenizer(work: Workload) -> PreTrainedTokenizerBase:
    """SmolLM2's tokenizer, for every shape."""
    folder = Path(work.model)
    name = folder if folder.is_dir() else Path(work.data) / "smollm2-135m-instruct"
    return AutoTokenizer.from_pretrained(name)


def load_model(work: Workload) -> PreTrainedModel:
    """The base on its device, with random weights unless it is a folder."""
    dtype = getattr(torch, work.dtype)
    if Path(work.model).is_dir():
        return AutoModelForCausalLM.from_pretrained(work.model, dtype=dtype)
    device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(SEED)
    torch.set_default_dtype(dtype)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(
            SHAPES[work.model], attn_implementation="sdpa", dtype=dtype
        )
    torch.set_default_dtype(torch.float32)
    if work.in_4bit:
        _pack(model, dtype=dtype)
    return model


def _pack(model: PreTrainedModel, *, dtype: torch.dtype) -> None:
    """Exchange the linear layers for packed ones, as is done with weights read from files."""
    from lora_fsdp.base.four_bit import replace_linear_layers

    plain = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    replace_linear_layers(model, dtype=dtype)
    for name, module in model.named_modules():
        if isinstance(module, QuantizedLayer):
            module.set_whole(module.quantize(plain.pop(name).weight.detach()))


class LongTexts(Task):
    """Texts of about 4,096 tokens, learnt from the first token to the last."""

    name = "long"
    primary_metric = "exact_match"


def task_and_examples(work: Workload) -> tuple[Task, list[Example]]:
    """The task and its examples, in the table's order."""
    table = sample_rows(
        read_table(Path(work.data) / "airline_tweets.csv"), max_rows=4500, head=None, seed=SEED
    )
    task = get_task("sentiment").bind(table)
    tweets = task.examples(table)
    if work.rows == "tweets":
        return task, tweets
    tokenizer = load_tokenizer(work)
    ids = tokenizer("\n".join(example.prompt.text for example in tweets))["input_ids"]
    size = work.long_tokens
    texts = [tokenizer.decode(ids[start : start + size]) for start in range(0, len(ids), size)]
    return LongTexts(), [
        Example(prompt=Prompt("Text:", "", ""), target=" " + text, row=row)
        for row, text in enumerate(texts[:-1])
    ]


def longest_length(work: Workload) -> int:
    """Of an example, in tokens."""
    return 4352 if work.rows == "long" else 512


def in_step_order(examples: list[Any], *, count: int) -> list[Any]:
    """The first `count` examples as this library's trainer takes them, over the epochs."""
    ordered: list[Any] = []
    epoch = 0
    while len(ordered) < count:
        order = epoch_order(len(examples), seed=SEED, epoch=epoch)
        ordered += [examples[index] for index in order]
        epoch += 1
    return ordered[:count]


def examples_hash(rows: list[int]) -> str:
    """Of the row numbers in the order they are trained on."""
    return hashlib.sha256(str(rows).encode()).hexdigest()[:12]


class StepClock(TrainerCallback):
    """Times optimizer steps by CUDA events, without making anything wait.

    The first three steps and those that evaluate or capture count in `first_step` and not in the
    median.
    """

    def __init__(self) -> None:
        self.events: list[Any] = []
        self.host: list[float] = []
        self.logs: list[dict[str, float]] = []
        self.first_step = 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Note the host's clock."""
        if not self.events:
            self._mark()
        self._began = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Mark the step's end on the device."""
        self.host.append(time.perf_counter() - self._began)
        self._mark()
        if not self.first_step:
            _synchronize()
            self.first_step = time.time() - float(os.environ.get("ARM_STARTED", "nan"))

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Keep losses and gradient norms."""
        if logs and "loss" in logs:
            self.logs.append(
                {key: float(logs[key]) for key in ("loss", "grad_norm") if key in logs}
            )

    def seconds(self) -> list[float]:
        """Of every step."""
        _synchronize()
        if torch.cuda.is_available():
            pairs = zip(self.events, self.events[1:], strict=False)
            return [before.elapsed_time(after) / 1e3 for before, after in pairs]
        return [b - a for a, b in zip(self.events, self.events[1:], strict=False)]

    def result(self, *, examples_per_step: int, lengths: list[int]) -> dict[str, Any]:
        """Speed over the steps after the tenth."""
        seconds = self.seconds()
        counted = seconds[10:] or seconds[-1:]
        step = median(counted)
        return {
            "examples_per_second": round(examples_per_step / step, 1),
            "examples_per_second_mean": round(examples_per_step * len(counted) / sum(counted), 1),
            "tokens_per_second": round(examples_per_step * sum(lengths) / len(lengths) / step),
            "step_ms": round(step * 1e3, 2),
            "host_ms": round(median(self.host[10:] or self.host) * 1e3, 2),
            "training_s": round(sum(seconds), 2),
            "first_step_s": round(self.first_step, 1),
            "first_loss": self.logs[0]["loss"],
            "last_loss": self.logs[-1]["loss"],
            "grad_norms": [round(log.get("grad_norm", float("nan")), 4) for log in self.logs],
            "peak_gb": round(torch.cuda.max_memory_allocated() / 1e9, 2)
            if torch.cuda.is_available()
            else None,
        }

    def _mark(self) -> None:
        if torch.cuda.is_available():
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self.events.append(event)
        else:
            self.events.append(time.perf_counter())


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
