"""The same task in `trl.SFTTrainer` and in a plain loop gives the same losses.

Run: python -m pytest tests/training/test_peers.py
"""

import runpy
from pathlib import Path

import pytest
from peft import LoraConfig, get_peft_model
from trl import SFTConfig, SFTTrainer

from lora_fsdp import DataArguments, FineTuningArguments, LoraArguments, ModelArguments, finetune
from tests.support.ranks import run_ranks
from tests.support.runs import toy_run
from tests.support.tiny import ToyTask, tiny_model, tiny_tokenizer, toy_table

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
ROWS = 8


def sft_losses(output_dir):
    """One step of TRL over the first batch of `toy_run`, and a second, after the update."""
    import torch

    task = ToyTask()
    dataset = task.to_prompt_completion(task.bind(toy_table(ROWS)).examples(toy_table(ROWS)))
    torch.manual_seed(5)
    base = tiny_model()
    torch.manual_seed(3)
    config = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    trainer = SFTTrainer(
        model=get_peft_model(base, config),
        args=SFTConfig(
            output_dir=str(output_dir),
            per_device_train_batch_size=ROWS,
            max_steps=2,
            learning_rate=1e-2,
            lr_scheduler_type="constant",
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            disable_tqdm=True,
        ),
        train_dataset=dataset,
        processing_class=tiny_tokenizer(),
    )
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.filterwarnings("ignore")
def test_trl_trains_the_same_task_with_the_same_loss(tmp_path):
    [theirs] = run_ranks(sft_losses, tmp_path / "trl", world_size=1)
    [ours] = run_ranks(short_run, tmp_path / "ours", world_size=1)
    # Before the first update lora_B is zero, so the loss does not depend on the adapter's seed.
    assert ours["losses"][0] == pytest.approx(theirs[0], rel=1e-5)
    assert theirs[1] < theirs[0]


def short_run(output_dir):
    return toy_run(output_dir, rows=ROWS, max_steps=2)


def test_conversational_prompt_completion():
    task = ToyTask().bind(toy_table(3))
    row = task.to_prompt_completion(task.examples(toy_table(3)), conversational=True)[0]
    assert row["prompt"][0]["role"] == "user"
    assert row["prompt"][0]["content"].endswith("Output:")
    assert row["completion"] == [{"role": "assistant", "content": "negative"}]


def arguments(folder, output_dir):
    return {
        "model_args": ModelArguments(model_name_or_path=str(folder)),
        "lora_args": LoraArguments(),
        "data_args": DataArguments(
            task="classification",
            data_file=str(folder / "rows.csv"),
            instruction="Say how it sounds:",
            text_column="text",
            label_column="label",
            eval_size=0.2,
            max_length=128,
        ),
        "training_args": FineTuningArguments(
            output_dir=str(output_dir),
            per_device_train_batch_size=4,
            gradient_accumulation_steps=2,
            num_train_epochs=2,
            learning_rate=1e-2,
            lr_scheduler_type="linear",
            warmup_steps=2,
            logging_steps=1,
            disable_tqdm=True,
        ),
    }


def library_losses(folder, output_dir):
    from transformers import Trainer

    histories = []
    original = Trainer._finalize_training

    def keep_history(trainer, *args):
        histories.append(list(trainer.state.log_history))
        return original(trainer, *args)

    Trainer._finalize_training = keep_history
    finetune(**arguments(folder, output_dir))
    return [entry["loss"] for entry in histories[0] if "loss" in entry]


def loop_losses(folder, output_dir):
    train = runpy.run_path(str(EXAMPLES / "loop.py"))["train"]
    return train(arguments(folder, output_dir))


def test_plain_loop_has_the_same_losses(tmp_path):
    folder = tmp_path / "model"
    tiny_model().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    toy_table(30).to_csv(folder / "rows.csv", index=False)
    [ours] = run_ranks(library_losses, folder, tmp_path / "ours", world_size=1)
    [plain] = run_ranks(loop_losses, folder, tmp_path / "plain", world_size=1)
    assert len(ours) == 6
    assert plain == pytest.approx(ours, rel=1e-5)
