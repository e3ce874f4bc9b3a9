"""The same training without this library's trainer, so that one sees what it hides.

    python examples/loop.py --config examples/recipes/sentiment-default.yaml

One process, one padded batch a step, the loss over the answers' tokens, plain AdamW. The losses it
prints are those of `examples/sentiment.py` on one process with the same options. What it lacks is
the rest: several GPUs, sharding, packing, checkpoints, metrics while training.
"""

import torch
from peft import get_peft_model
from torch.nn.functional import cross_entropy
from transformers import get_scheduler, set_seed

from lora_fsdp.adapter.attach import lora_config
from lora_fsdp.base.loading import load_base, load_tokenizer
from lora_fsdp.data.encoding import EncodedExample, Encoder
from lora_fsdp.data.rows import load_task_data
from lora_fsdp.data.sampling import epoch_order
from lora_fsdp.scripts import RunArguments, parse_arguments

IGNORED = -100


def pad(examples: list[EncodedExample], pad_token_id: int) -> dict[str, torch.Tensor]:
    """A right-padded batch; only the answer and its end token are learnt, by position."""
    sequences = [example.prompt_ids + example.target_ids for example in examples]
    longest = max(map(len, sequences))
    input_ids, labels, mask = [], [], []
    for example, ids in zip(examples, sequences, strict=True):
        padding = longest - len(ids)
        input_ids.append(ids + [pad_token_id] * padding)
        mask.append([1] * len(ids) + [0] * padding)
        unlearnt = [IGNORED] * len(example.prompt_ids)
        labels.append(unlearnt + example.target_ids + [IGNORED] * padding)
    columns = {"input_ids": input_ids, "attention_mask": mask, "labels": labels}
    return {name: torch.tensor(column) for name, column in columns.items()}


def train(run: RunArguments) -> list[float]:
    """Train as the recipe says; returns the loss of every step."""
    args = run["training_args"]
    data = load_task_data(run["data_args"], seed=args.seed)
    tokenizer = load_tokenizer(run["model_args"])
    encoder = Encoder(tokenizer, task=data.task, max_length=run["data_args"].max_length)
    examples = encoder.encode(data.train)

    set_seed(args.seed)
    model = load_base(run["model_args"], device=args.device)
    model = get_peft_model(model, lora_config(run["lora_args"])).to(args.device)
    model.train()

    batch_size = args.per_device_train_batch_size * args.gradient_accumulation_steps
    steps = -(-len(examples) // batch_size) * int(args.num_train_epochs)
    adapter = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(adapter, lr=args.learning_rate, weight_decay=args.weight_decay)
    schedule = get_scheduler(args.lr_scheduler_type, optimizer, int(args.warmup_steps), steps)

    losses = []
    for epoch in range(int(args.num_train_epochs)):
        order = epoch_order(len(examples), seed=args.seed, epoch=epoch)
        for start in range(0, len(order), batch_size):
            chosen = [examples[index] for index in order[start : start + batch_size]]
            batch = {k: v.to(args.device) for k, v in pad(chosen, tokenizer.pad_token_id).items()}
            labels = batch.pop("labels")[:, 1:]
            logits = model(**batch, use_cache=False).logits[:, :-1].float()
            loss = cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(adapter, args.max_grad_norm)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            losses.append(loss.item())
            print(f"step {len(losses)}/{steps}  loss {losses[-1]:.4f}", flush=True)
    return losses


if __name__ == "__main__":
    train(parse_arguments(task="sentiment"))
