"""The ways to train that are compared, one a process: `python -m benchmarks.arms '{...}'`.

Processes started side by side with one lock file as their `turn` get ready together, and use the
GPU one after the other. With a file `go`, they get ready and wait until it is there.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import FullyShardedDataParallelPlugin
from filelock import FileLock
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Qwen3MoeConfig,
    Trainer,
    TrainerCallback,
)

from benchmarks.random_base import random_base
from benchmarks.workload import (
    SEED,
    SHAPES,
    StepClock,
    Workload,
    examples_hash,
    in_step_order,
    load_model,
    load_tokenizer,
    longest_length,
    task_and_examples,
)
from lora_fsdp import FineTuningArguments, LoraTrainer
from lora_fsdp.adapter.folder import ADAPTER_FILE
from lora_fsdp.base.streaming import StoredBase
from lora_fsdp.placement.gpus import known_gpu
from lora_fsdp.planning.predicted import predicted


def lora(work: Workload) -> LoraConfig:
    """The article's adapter."""
    return LoraConfig(
        r=work.rank,
        lora_alpha=32,
        lora_dropout=work.dropout,
        target_modules=work.targets,
        task_type="CAUSAL_LM",
    )


class KeepGradient(TrainerCallback):
    """Saves the first step's gradients, for the comparison of the arms."""

    def __init__(self, file: str | None) -> None:
        self.file = file

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write once."""
        if self.file and state.global_step == 0:
            write_gradient(kwargs["model"], self.file)


def write_gradient(model: torch.nn.Module, file: str) -> None:
    """Every adapter gradient by its name in PEFT."""
    gradients = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and parameter.grad is not None:
            bare = name.replace("_fsdp_wrapped_module.", "").removeprefix("module.")
            gradients[bare] = parameter.grad.detach().float().cpu().contiguous()
    save_file(gradients, file)


def some_adapter(model: torch.nn.Module) -> None:
    """Give lora_B values, since at its zeros the gradient of lora_A is zero."""
    generator = torch.Generator().manual_seed(SEED)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if "lora_A" in name or "lora_B" in name:
                values = torch.randn(parameter.shape, generator=generator) * 0.05
                parameter.copy_(values.to(parameter))


def ours(
    work: Workload, gradient: str | None, *, output_dir: str, **options: Any
) -> dict[str, Any]:
    """This library's trainer."""
    task, examples = task_and_examples(work)
    clock = StepClock()
    scores = work.scored and work.rows == "tweets" and not gradient
    held_out = examples[-work.scored :] if scores else []
    trainer = LoraTrainer(
        _streamed(work) if work.streamed else load_model(work),
        FineTuningArguments(
            output_dir=output_dir,
            per_device_train_batch_size=work.examples,
            max_steps=work.steps,
            learning_rate=2e-4,
            logging_steps=max(1, work.steps // 4),
            max_grad_norm=0.0 if gradient else 1.0,  # compared as they are
            save_strategy="no",
            disable_tqdm=True,
            seed=SEED,
            **options,
        ),
        task=task,
        processing_class=load_tokenizer(work),
        train_dataset=examples,
        eval_dataset=held_out,
        peft_config=lora(work),
        max_length=longest_length(work),
        callbacks=[clock, KeepGradient(gradient)],
    )
    if gradient:
        some_adapter(trainer.model)
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    trainer.train()
    seen = in_step_order(trainer.train_dataset, count=trainer.examples_per_step * work.steps)
    lengths = [len(e.prompt_ids) + len(e.target_ids) for e in seen]
    result = clock.result(examples_per_step=trainer.examples_per_step, lengths=lengths)
    steps = trainer.get_train_dataloader().dataset
    packed = [sequence for step in range(3) for sequence in steps[step].sequences]
    if os.environ.get("RANK", "0") == "0":
        print(trainer.placement, flush=True)
    result |= {
        "examples_hash": examples_hash([e.row for e in seen]),
        "computed_tokens_per_step": sum(map(len, packed)) / 3 * work.processes,
        "parameters": multiplied_parameters(work),
        "plan": str(trainer.placement),
        "row_tokens": trainer.placement.sequence_length,
    }
    if torch.cuda.is_available():
        device = torch.cuda.get_device_properties(trainer.args.device)
        gpu = known_gpu(device.name, memory=device.total_memory)
        result["predicted"] = predicted(trainer.placement, trainer.work, gpu)
    if held_out:
        result |= _scoring(trainer, held_out)
    if work.saved:
        trainer.save_model(f"{output_dir}/final")  # which reads it back, and compares
        if trainer.is_world_process_zero():
            file = Path(output_dir) / "final" / ADAPTER_FILE
            result["saved_tensors"] = len(load_file(file))
    return result


def _streamed(work: Workload) -> StoredBase:
    """A base that is still nowhere."""
    place = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"
    return random_base(
        SHAPES[work.model],
        dtype=getattr(torch, work.dtype),
        device=torch.device(place),
        in_4bit=work.in_4bit,
    )


def _scoring(trainer: LoraTrainer, examples: list[Any]) -> dict[str, Any]:
    """Examples scored per second, every label of each."""
    trainer.score(examples)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    began = time.perf_counter()
    trainer.score(examples)
    return {"scored_per_second": round(len(examples) / (time.perf_counter() - began), 1)}


def trl(work: Workload, gradient: str | None, *, output_dir: str, **options: Any) -> dict[str, Any]:
    """TRL's SFTTrainer with `options` of SFTConfig."""
    from trl import SFTConfig, SFTTrainer  # not among what other arms wait for

    accumulation = options.get("gradient_accumulation_steps", 1)
    batch = options.get("per_device_train_batch_size", work.examples)
    count = batch * accumulation * work.processes * work.steps
    task, all_examples = task_and_examples(work)
    examples = in_step_order(all_examples, count=count)
    dataset = task.to_prompt_completion(examples)
    clock = StepClock()
    settings = {
        "per_device_train_batch_size": work.examples,
        "max_steps": work.steps,
        "learning_rate": 2e-4,
        "logging_steps": max(1, work.steps // 4),
        "max_grad_norm": 0.0 if gradient else 1.0,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "max_length": longest_length(work),
        "train_sampling_strategy": "sequential",
        "bf16": work.dtype == "bfloat16" and torch.cuda.is_available(),
        "seed": SEED,
        **options,
    }
    if settings.get("padding_free") and not settings.get("packing"):
        settings["max_length"] = None  # TRL wants it so; no example is longer
    trainer = SFTTrainer(
        load_model(work),
        SFTConfig(output_dir=output_dir, **settings),
        train_dataset=dataset,
        processing_class=load_tokenizer(work),
        peft_config=lora(work),
        callbacks=[clock, KeepGradient(gradient)],
    )
    if gradient:
        some_adapter(trainer.model)
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    trainer.train()
    return _peer_result(trainer, clock, examples, work, settings)


def _peer_result(
    trainer: Trainer,
    clock: StepClock,
    examples: list[Any],
    work: Workload,
    settings: dict[str, Any],
) -> dict[str, Any]:
    """What the clock says of a run over `examples`."""
    per_step = len(examples) // work.steps
    tokenizer = load_tokenizer(work)
    texts = [str(e.prompt) + str(e.target) for e in examples]
    lengths = [len(ids) + 1 for ids in tokenizer(texts)["input_ids"]]
    result = clock.result(examples_per_step=per_step, lengths=lengths)
    packed = bool(settings.get("packing"))
    return result | {
        "examples_hash": "packed" if packed else examples_hash([e.row for e in examples]),
        "computed_tokens_per_step": sum(lengths) / work.steps,
        "parameters": multiplied_parameters(work),
    }


def article(work: Workload, gradient: str | None, *, output_dir: str) -> dict[str, Any]:
    """The tutorial's loop: FSDP1, padded to 512, batches of 2 accumulated, all logits.

    Its labels are every token that is no padding; here they are the answer's, so that every arm has
    the same loss. The work is the same. It writes nothing to `output_dir`.
    """
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    count = work.examples * processes * work.steps
    examples = in_step_order(task_and_examples(work)[1], count=count)
    tokenizer = load_tokenizer(work)
    tokenizer.pad_token, tokenizer.padding_side = tokenizer.eos_token, "right"
    model = get_peft_model(load_model(work), lora(work))
    if gradient:
        some_adapter(model)
    model = model.to(getattr(torch, work.dtype))
    layer = type(model.base_model.model.model.layers[0])
    plugin = None
    if torch.cuda.is_available():
        policy = functools.partial(transformer_auto_wrap_policy, transformer_layer_cls={layer})
        plugin = FullyShardedDataParallelPlugin(auto_wrap_policy=policy, use_orig_params=True)
    accelerator = Accelerator(fsdp_plugin=plugin)
    model = accelerator.prepare(model)
    if plugin and not isinstance(model, FullyShardedDataParallel):
        raise RuntimeError("Accelerate dropped FSDP: it wants a launcher, on one process too.")
    optimizer = accelerator.prepare(torch.optim.AdamW(model.parameters(), lr=2e-4))
    clock, batch = StepClock(), 2
    mine = examples[accelerator.process_index :: accelerator.num_processes]
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    for step in range(work.steps):
        clock.on_step_begin(None, None, None)
        total = 0.0
        for micro in range(work.examples // batch):
            start = step * work.examples + micro * batch
            inputs = _padded_batch(mine[start : start + batch], tokenizer, accelerator.device)
            loss = model(**inputs).loss / (work.examples // batch)
            accelerator.backward(loss)
            total += loss.item()
        if gradient and step == 0:
            write_gradient(model, gradient)
        norm = torch.nn.utils.get_total_norm(
            [p.grad for p in model.parameters() if p.grad is not None]
        )
        clock.on_log(None, None, None, logs={"loss": total, "grad_norm": float(norm)})
        optimizer.step()
        optimizer.zero_grad()
        clock.on_step_end(None, None, None)
    texts = [str(e.prompt) + str(e.target) for e in examples]
    lengths = [len(ids) + 1 for ids in tokenizer(texts)["input_ids"]]
    per_step = work.examples * accelerator.num_processes
    return clock.result(examples_per_step=per_step, lengths=lengths) | {
        "examples_hash": examples_hash([e.row for e in examples]),
        "computed_tokens_per_step": sum(lengths) / work.steps,
        "parameters": multiplied_parameters(work),
    }


def multiplied_parameters(work: Workload) -> int:
    """That tokens are multiplied with: the decoder layers', and the head's where every token has a
    label. The embeddings are looked up.
    """
    config = SHAPES.get(work.model) or AutoConfig.from_pretrained(work.model)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    if isinstance(config, Qwen3MoeConfig):  # a token's experts
        expert = 3 * config.hidden_size * config.moe_intermediate_size
        unused = (config.num_experts - config.num_experts_per_tok) * expert
        idle = config.num_hidden_layers * unused
    else:
        idle = 0
    outside = {model.get_input_embeddings().weight}
    if work.rows == "tweets":
        outside |= {model.get_output_embeddings().weight}
    return sum(p.numel() for p in model.parameters() if p not in outside) - idle


def _padded_batch(examples: list[Any], tokenizer: Any, device: torch.device) -> dict[str, Any]:
    texts = [str(e.prompt) + str(e.target) + tokenizer.eos_token for e in examples]
    batch = tokenizer(
        texts, padding="max_length", truncation=True, max_length=512, return_tensors="pt"
    )
    labels = torch.full_like(batch["input_ids"], -100)
    for index, example in enumerate(examples):
        prompt = len(tokenizer(str(example.prompt))["input_ids"])
        whole = len(tokenizer(texts[index])["input_ids"])
        labels[index, prompt:whole] = batch["input_ids"][index, prompt:whole]
    return {key: value.to(device) for key, value in {**batch, "labels": labels}.items()}


def get_ready(work: Workload) -> None:
    """Do what hardly uses the GPU and is usually done at first use."""
    importlib.import_module("torch._inductor.compile_fx")
    importlib.import_module("lora_fsdp.compute.kernels")
    if work.in_4bit:
        importlib.import_module("bitsandbytes")
    torch.zeros(1, device=f"cuda:{os.environ.get('LOCAL_RANK', 0)}")


ARMS = {"ours": ours, "trl": trl, "article": article}


def main() -> None:
    """One arm, as the driver asked for it."""
    asked = json.loads(sys.argv[1])
    work = Workload(**asked["work"])
    arm = functools.partial(ARMS[asked["kind"]], output_dir=asked["folder"])
    if asked.get("gradient"):
        tiny = dataclasses.replace(
            work, model="tiny", dtype="float32", steps=1, dropout=0.0, rows="tweets"
        )
        arm(tiny, asked["gradient"], **asked["options"])
        torch.manual_seed(SEED)
        return
    turn, go = asked.get("turn"), asked.get("go")
    if (turn or go) and torch.cuda.is_available():
        get_ready(work)
    if go:
        while not Path(go).exists():
            time.sleep(0.1)
        os.environ["ARM_STARTED"] = str(time.time())  # what is imported does not count
    with FileLock(turn) if turn else contextlib.nullcontext():
        result = arm(work, None, **asked["options"])
    if os.environ.get("RANK", "0") == "0":
        Path(asked["output"]).write_text(json.dumps(result))


if __name__ == "__main__":
    main()
