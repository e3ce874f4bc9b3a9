"""What `transformers.Trainer` and `trl.SFTTrainer` take is taken, or refused in a sentence.

Run: python -m pytest tests/training/test_given.py
"""

import inspect

import datasets
import pytest
import torch
from peft import LoraConfig, PrefixTuningConfig
from torch.optim.lr_scheduler import LambdaLR
from transformers import (
    EarlyStoppingCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from trl import SFTConfig, SFTTrainer

from lora_fsdp import FineTuningArguments, LoraTrainer, register_task
from lora_fsdp.errors import ArgumentError, DataError, UnknownTaskError
from lora_fsdp.training.hooks import UNUSED_ARGUMENTS
from tests.support.ranks import launch_environment, run_ranks
from tests.support.tiny import ToyTask, tiny_model, tiny_tokenizer, toy_table

TAKEN = {
    "args",
    "callbacks",
    "eval_dataset",
    "model",
    "optimizer_cls_and_kwargs",
    "peft_config",
    "processing_class",
    "train_dataset",
}


def config(**changes):
    return LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", **changes)


def rows(count=16, seed=0):
    return datasets.Dataset.from_pandas(toy_table(count, seed=seed), preserve_index=False)


def trainer(folder, **changes):
    settings = {
        "model": tiny_model(),
        "args": TrainingArguments(
            output_dir=str(folder),
            num_train_epochs=1,
            learning_rate=1e-2,
            logging_steps=1,
            save_strategy="no",
            disable_tqdm=True,
        ),
        "task": ToyTask(),
        "processing_class": tiny_tokenizer(),
        "train_dataset": rows(),
        "peft_config": config(),
        "max_length": 128,
    }
    torch.manual_seed(5)
    return LoraTrainer(**{**settings, **changes})


def parameters():
    """Of the installed trainers' constructors."""
    both = [inspect.signature(kind.__init__).parameters for kind in (Trainer, SFTTrainer)]
    return sorted({name for names in both for name in names} - {"self"})


@pytest.mark.parametrize("name", parameters())
def test_every_argument_is_taken_or_refused_by_name(tmp_path, name):
    if name in TAKEN:
        assert name in inspect.signature(LoraTrainer).parameters
        return
    with pytest.raises(ArgumentError, match=rf"LoraTrainer\(\.\.\., {name}=.*Instead, \w+"):
        trainer(tmp_path, **{name: object()})


@pytest.mark.parametrize("name", UNUSED_ARGUMENTS)
def test_what_is_not_given_is_not_refused(tmp_path, name):
    empty = (None, None) if name == "optimizers" else None
    with pytest.raises(ArgumentError, match="LoraTrainer trains for a task"):
        trainer(tmp_path, **{name: empty}, task="")


def test_other_arguments_are_named(tmp_path):
    with pytest.raises(ArgumentError, match=r"no argument 'train_datasets'.*'train_dataset'"):
        trainer(tmp_path, train_datasets=rows())
    with pytest.raises(ArgumentError, match="all others by their name"):
        LoraTrainer(tiny_model(), FineTuningArguments(output_dir=str(tmp_path)), None, rows())


def losses(trained):
    trained.train()
    return [entry["loss"] for entry in trained.state.log_history if "loss" in entry]


def test_plain_training_arguments_say_what_they_said(tmp_path):
    plain = trainer(tmp_path)
    assert plain.args.learning_rate == 1e-2
    assert isinstance(plain.args, FineTuningArguments)
    given = TrainingArguments(output_dir=str(tmp_path))
    taken = trainer(tmp_path, args=given).args
    unlike = {
        name
        for name, value in given.to_dict().items()
        if value != taken.to_dict()[name] and name not in ("use_cpu", "dataloader_pin_memory")
    }
    assert unlike == set()
    assert taken.learning_rate == 5e-5
    assert taken.step == "auto"


def test_rows_train_like_the_examples_that_the_task_makes_of_them(tmp_path):
    bound = ToyTask().bind(toy_table(16))
    examples = losses(trainer(tmp_path, task=bound, train_dataset=bound.examples(toy_table(16))))
    assert losses(trainer(tmp_path)) == examples
    assert losses(trainer(tmp_path, train_dataset=rows().to_list())) == examples


def test_class_names_of_a_dataset_are_its_labels(tmp_path):
    labels = datasets.ClassLabel(names=["negative", "neutral", "positive"])
    numbered = rows().cast_column("label", labels)
    assert isinstance(numbered[0]["label"], int)
    assert losses(trainer(tmp_path, train_dataset=numbered)) == losses(trainer(tmp_path))


def test_a_chosen_part_of_a_dataset_is_the_rows_of_it(tmp_path):
    chosen = rows().select([3, 1, 4])
    train = trainer(tmp_path, train_dataset=chosen).train_dataset
    assert [one.example.prompt.text for one in train] == chosen["text"][:]
    assert [one.row for one in train] == [1, 2, 3]


def test_a_model_by_its_folder_brings_its_tokenizer(tmp_path, model_folder):
    by_path = trainer(tmp_path, model=str(model_folder), processing_class=None)
    assert by_path.processing_class.get_vocab() == tiny_tokenizer().get_vocab()
    assert losses(by_path) == losses(trainer(tmp_path))


def test_a_loaded_model_brings_its_tokenizer(tmp_path, model_folder):
    model = type(tiny_model()).from_pretrained(model_folder)
    made = trainer(tmp_path, model=model, processing_class=None)
    assert made.processing_class.get_vocab() == tiny_tokenizer().get_vocab()


def test_a_task_by_its_name(tmp_path):
    register_task(type("Named", (ToyTask,), {"name": "named-in-test-given"}))
    assert trainer(tmp_path, task="named-in-test-given").task.name == "named-in-test-given"
    with pytest.raises(UnknownTaskError, match="named-in-test-givven"):
        trainer(tmp_path, task="named-in-test-givven")


@pytest.mark.parametrize("kind", [dict, datasets.DatasetDict])
def test_several_held_out_datasets_have_their_metrics_each(tmp_path, kind):
    parts = kind(easy=rows(8, seed=1), hard=rows(11, seed=2))
    args = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=2,
        learning_rate=1e-2,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="eval_hard_loss",
        disable_tqdm=True,
        per_device_train_batch_size=4,
    )
    made = trainer(tmp_path, args=args, eval_dataset=parts, callbacks=[EarlyStoppingCallback(5)])
    made.train()
    assert made.state.best_metric is not None
    metrics = made.evaluate()
    for name, part in parts.items():
        alone = trainer(tmp_path, eval_dataset=part)
        alone.model.load_state_dict(made.model.state_dict())
        for metric in ("loss", "accuracy", "macro_f1"):
            expected = alone.evaluate()[f"eval_{metric}"]
            assert metrics[f"eval_{name}_{metric}"] == pytest.approx(expected, rel=1e-6)
        matrix = made.confusion_matrices[2, f"eval_{name}"]
        assert matrix.to_numpy().sum() == len(part)
    assert len(made.held_out) == 19
    assert made.evaluate({"other": rows(5)})["eval_other_accuracy"] >= 0
    with pytest.raises(ArgumentError, match="name one of easy, hard"):
        made.outputs()
    resumed = trainer(tmp_path, args=args, eval_dataset=parts)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.confusion_matrices.keys() >= {(1, "eval_easy"), (1, "eval_hard")}


def test_rows_are_evaluated_and_predicted_too(tmp_path):
    made = trainer(tmp_path, eval_dataset=rows(8, seed=1))
    expected = made.evaluate()["eval_loss"]
    assert made.evaluate(rows(8, seed=1))["eval_loss"] == expected
    assert made.predict(rows(8, seed=1)).metrics["test_loss"] == expected
    assert made.predict(rows(8, seed=1).to_list()).metrics["test_loss"] == expected
    assert set(made.confusion_matrices) == {0, (0, "test")}


def test_an_optimizer_by_its_class(tmp_path):
    given = (torch.optim.SGD, {"lr": 0.5, "momentum": 0.9})
    made = trainer(tmp_path, optimizer_cls_and_kwargs=given)
    made.train()
    inner = made.optimizer.optimizer
    assert type(inner) is torch.optim.SGD
    assert inner.defaults["momentum"] == 0.9
    assert "SGD" in made.checkpointer.facts["must_stay"]["optimizer_cls_and_kwargs"]


def test_callbacks_may_be_classes(tmp_path):
    calls = []

    class Counts(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            calls.append(state.global_step)

    trainer(tmp_path, callbacks=[Counts]).train()
    assert calls == [1, 2]


class Streamed(torch.utils.data.Dataset):
    def __getitem__(self, index):
        return {"text": "a", "label": "positive"}

    def __len__(self):
        return 3


REFUSED = {
    "no model": ({"model": None}, "model is None: give a causal language model"),
    "a plain module": ({"model": torch.nn.Linear(2, 2)}, "model is a Linear: give"),
    "other arguments": (
        {"args": {"learning_rate": 1}},
        "args must be .*Arguments, not a dict",
    ),
    "a Trainer's optimizer": (
        {"optimizers": (None, LambdaLR(torch.optim.SGD([torch.zeros(1)]), lambda step: 1.0))},
        "optimizers=.*optimizer_cls_and_kwargs=",
    ),
    "no peft_config": ({"peft_config": None}, "Give a peft_config"),
    "another PEFT": (
        {"peft_config": PrefixTuningConfig(num_virtual_tokens=2)},
        "The adapter is of type PREFIX_TUNING",
    ),
    "a dict as peft_config": ({"peft_config": {"r": 8}}, "must be a peft.LoraConfig, not a dict"),
    "a stream": ({"train_dataset": rows().to_iterable_dataset()}, "train_dataset is a IterableD"),
    "splits": ({"train_dataset": datasets.DatasetDict(train=rows())}, "train_dataset is a Dataset"),
    "a torch dataset": ({"eval_dataset": Streamed()}, "eval_dataset is a Streamed: give a datas"),
    "a path": ({"train_dataset": "tweets.csv"}, "train_dataset is a str: give a datasets.Dataset"),
    "a table": ({"train_dataset": toy_table(4)}, "train_dataset is a DataFrame: .*Task.examples"),
    "texts": ({"train_dataset": ["a", "b"]}, "train_dataset is a list with a str"),
    "named by number": ({"eval_dataset": {1: rows()}}, "keys of eval_dataset .*texts"),
    "one of several": ({"eval_dataset": {"a": ["b"]}}, "eval_dataset a is a list with a str"),
    "no tokenizer": ({"processing_class": None}, "no name to load a tokenizer by"),
    "a processor": ({"processing_class": object()}, "must be a tokenizer, not a object"),
    "one callback": ({"callbacks": TrainerCallback()}, "callbacks must be a list"),
    "no callback": ({"callbacks": [print]}, "A callback is a transformers.TrainerCallback"),
    "a task's class": ({"task": ToyTask}, r"task is the class ToyTask: give an object, ToyTask\("),
    "no task": ({"task": ""}, "LoraTrainer trains for a task.*task="),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_taken_is_refused_in_a_sentence(tmp_path, case):
    changes, match = REFUSED[case]
    with pytest.raises(ArgumentError, match=match) as error:
        trainer(tmp_path, **changes)
    assert "\n" not in str(error.value)


def test_a_path_without_an_adapter_is_refused_before_it_is_read(tmp_path):
    with pytest.raises(ArgumentError, match="is to get an adapter: give peft_config="):
        trainer(tmp_path, model="not/there", peft_config=None)


def test_settings_of_another_trainer_are_named(tmp_path):
    with pytest.raises(ArgumentError, match=r"SFTConfig has settings of another trainer \(\w+"):
        trainer(tmp_path, args=SFTConfig(output_dir=str(tmp_path), bf16=False))


@pytest.mark.parametrize(
    ("data", "match"),
    [
        (rows().rename_column("text", "tweet"), "'text'"),
        (rows().select([]), "train_dataset holds no rows"),
        ([{"text": "a", "label": "positive"}, 5], "train_dataset, row 2 is a int"),
    ],
    ids=["another column", "none", "a number"],
)
def test_rows_that_do_not_fit_the_task_are_errors_of_the_data(tmp_path, data, match):
    with pytest.raises(DataError, match=match):
        trainer(tmp_path, train_dataset=data)


def plainly_on_a_rank(folder, use_cpu):
    args = TrainingArguments(
        output_dir=str(folder), use_cpu=use_cpu, max_steps=1, logging_steps=1, save_strategy="no"
    )
    return losses(trainer(folder, args=args))


@pytest.mark.distributed
def test_plain_arguments_on_two_ranks(tmp_path):
    """Joined, whether they say `use_cpu` or only the launcher does."""
    environment = launch_environment("fsdp2_cpu.yaml")
    first, second = run_ranks(plainly_on_a_rank, tmp_path, True, environment=environment)
    assert first == second
    assert run_ranks(plainly_on_a_rank, tmp_path, False, environment=environment) == [first, first]
