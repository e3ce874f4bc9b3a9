"""A run that goes on with a saved adapter, and one that stops early.

Run: python -m pytest tests/training/test_continuing.py
"""

import json
import shutil

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from lora_fsdp import (
    DataArguments,
    FineTuningArguments,
    LoraArguments,
    LoraTrainer,
    ModelArguments,
    finetune,
)
from lora_fsdp.adapter.attach import lora_config
from lora_fsdp.adapter.saved import adapter_state
from lora_fsdp.base.streaming import open_base
from lora_fsdp.errors import (
    AdapterVerificationError,
    ArgumentError,
    BaseMismatchError,
    OutputFolderError,
    ResumeMismatchError,
)
from tests.support.ranks import launch_environment, run_ranks
from tests.support.runs import toy_trainer
from tests.support.tiny import ToyTask, tiny_model, tiny_tokenizer, toy_table

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def first(tmp_path_factory, model_folder):
    """The adapter of a first run on `model_folder`."""
    folder = tmp_path_factory.mktemp("first")
    trainer = toy_trainer(folder / "run", base=model_folder, num_train_epochs=2)
    trainer.train()
    trainer.save_model(str(folder / "adapter"))
    return folder / "adapter"


def going_on(folder, base, adapter, *, streamed=True, **settings):
    task = ToyTask().bind(toy_table(16, seed=4))
    defaults = {"max_steps": 3, "learning_rate": 1e-2, "logging_steps": 1, "save_strategy": "no",
                "per_device_train_batch_size": 16, "disable_tqdm": True}  # fmt: skip
    if isinstance(adapter, PeftModel):
        given = {"model": adapter}
    else:
        model = open_base(ModelArguments(str(base)), device=CPU) if streamed else base
        given = {"model": model, "adapter_name_or_path": str(adapter)}
    return LoraTrainer(
        **given,
        args=FineTuningArguments(str(folder), **{**defaults, **settings}),
        task=task,
        processing_class=tiny_tokenizer(),
        train_dataset=task.examples(toy_table(16, seed=4)),
        eval_dataset=task.examples(toy_table(9, seed=5)),
        max_length=128,
    )


def losses(trainer, resume=None):
    trainer.train(resume_from_checkpoint=resume)
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def with_peft(model_folder, adapter):
    base = AutoModelForCausalLM.from_pretrained(model_folder)
    return PeftModel.from_pretrained(base, str(adapter), is_trainable=True)


def loss_by_peft(model, trainer):
    """The mean loss of all label tokens, each example by itself, by the model's own forward."""
    total = count = 0.0
    for one in trainer.train_dataset:
        ids = torch.tensor([one.prompt_ids + one.target_ids])
        labels = ids.clone()
        labels[:, : len(one.prompt_ids)] = -100
        loss = model(input_ids=ids, labels=labels).loss.item()
        total, count = total + loss * len(one.target_ids), count + len(one.target_ids)
    return total / count


def test_it_is_pefts_continued_training(tmp_path, model_folder, first):
    ours = going_on(tmp_path / "ours", model_folder, first)
    assert ours.model.peft_config["default"].r == 4
    by_peft = with_peft(model_folder, first)
    for name, value in adapter_state(ours.model).items():
        torch.testing.assert_close(value, adapter_state(by_peft)[name], rtol=0, atol=0)
    expected = loss_by_peft(by_peft, ours)
    found = losses(ours)
    assert found[0] == pytest.approx(expected, rel=1e-5)
    assert found == losses(going_on(tmp_path / "peft", model_folder, by_peft))
    anew = toy_trainer(tmp_path / "anew", base=model_folder, max_steps=1)
    assert losses(anew)[0] > found[0] + 0.5


def test_the_optimizer_is_new(tmp_path, model_folder, first):
    trainer = going_on(tmp_path, model_folder, first, max_steps=1)
    trainer.train()
    steps = {int(state["step"]) for state in trainer.optimizer.state.values()}
    assert steps == {1}


def losses_on_a_rank(folder, base, adapter):
    trainer = going_on(folder, base, adapter, per_device_train_batch_size=8)
    return losses(trainer), trainer.adapter.fingerprint()


@pytest.mark.distributed
def test_two_ranks_go_on_as_one(tmp_path, model_folder, first):
    environment = launch_environment("fsdp2_cpu.yaml")
    both = run_ranks(losses_on_a_rank, tmp_path / "b", model_folder, first, environment=environment)
    assert both[0] == both[1]
    assert both[0][0] == pytest.approx(losses(going_on(tmp_path / "a", model_folder, first)), 1e-4)


def test_another_base_is_refused_before_it_is_read(tmp_path, first):
    other = tmp_path / "other"
    tiny_model(seed=7).save_pretrained(other)
    with pytest.raises(BaseMismatchError, match=r"was trained on .*: .*weights differ"):
        going_on(tmp_path / "run", other, first)


def test_an_adapter_of_peft_alone_is_taken_with_a_warning(tmp_path, model_folder, first, caplog):
    plain = tmp_path / "plain"
    plain.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(first / name, plain)
    found = losses(going_on(tmp_path / "run", model_folder, plain))
    assert "has no proof.json" in caplog.text
    assert found == losses(going_on(tmp_path / "same", model_folder, first))


def test_an_adapter_that_does_not_fit_is_refused(tmp_path, first):
    narrow = tmp_path / "narrow"
    config = tiny_model().config
    config.num_hidden_layers = 2
    AutoModelForCausalLM.from_config(config).save_pretrained(narrow)
    plain = tmp_path / "plain"
    shutil.copytree(first, plain)
    (plain / "proof.json").unlink()
    with pytest.raises(AdapterVerificationError, match="does not fit this base"):
        going_on(tmp_path / "run", narrow, plain)


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ({"lora_r": 16}, "--lora_r 16 contradicts .* whose r is 4: leave it out"),
        ({"lora_alpha": 64}, "--lora_alpha 64 contradicts .* whose lora_alpha is 8"),
        ({"lora_dropout": 0.1}, r"--lora_dropout 0\.1 contradicts .* is 0\.0"),
        ({"lora_target_modules": ["k_proj"]}, "--lora_target_modules .*contradicts .*down_proj"),
        ({"lora_kwargs": {"use_dora": True}}, "--lora_kwargs use_dora True contradicts .* False"),
    ],
)
def test_options_that_contradict_the_adapter_are_refused(first, given, match):
    with pytest.raises(ArgumentError, match=match):
        lora_config(LoraArguments(adapter_name_or_path=str(first), **given))


def test_options_that_agree_with_it_are_not(first):
    kwargs = {"use_dora": False}
    config = lora_config(LoraArguments(4, 8, adapter_name_or_path=str(first), lora_kwargs=kwargs))
    assert (config.r, config.lora_alpha, config.inference_mode) == (4, 8, False)


def test_what_is_no_adapter_is_refused(tmp_path, model_folder, first):
    for name, kind in (
        (tmp_path / "none", ArgumentError),
        (model_folder, AdapterVerificationError),
    ):
        with pytest.raises(kind):
            lora_config(LoraArguments(adapter_name_or_path=str(name)))
    with pytest.raises(ArgumentError, match="or a model that already has an adapter"):
        LoraTrainer(with_peft(model_folder, first), adapter_name_or_path=first, task=ToyTask(),
                    processing_class=tiny_tokenizer())  # fmt: skip


def test_it_resumes_exactly_and_only_from_the_same_adapter(tmp_path, model_folder, first):
    saves = {"save_strategy": "steps", "save_steps": 1}
    whole = going_on(tmp_path / "run", model_folder, first, **saves)
    expected = losses(whole)
    shutil.rmtree(tmp_path / "run" / "checkpoint-3")
    resumed = going_on(tmp_path / "run", model_folder, first, **saves)
    assert losses(resumed, resume=True) == expected
    assert resumed.adapter.fingerprint() == whole.adapter.fingerprint()
    anew = toy_trainer(tmp_path / "other", base=model_folder, max_steps=1)
    anew.save_model(str(tmp_path / "second"))
    with pytest.raises(ResumeMismatchError, match="the adapter that it began with"):
        losses(going_on(tmp_path / "run", model_folder, tmp_path / "second", **saves), resume=True)


def run(output, base, *, adapter=None, **training):
    data = {"text_column": "text", "label_column": "label", "instruction": "Say how it sounds:"}
    table = output.parent / "t.csv"
    toy_table(40).to_csv(table, index=False)
    return finetune(
        model_args=ModelArguments(str(base)),
        lora_args=LoraArguments(adapter_name_or_path=adapter and str(adapter)),
        data_args=DataArguments("classification", data_file=str(table), max_length=128, **data),
        training_args=FineTuningArguments(str(output), disable_tqdm=True, **training),
    )


def test_the_whole_run_goes_on(tmp_path, model_folder, first):
    run(tmp_path / "run", model_folder, adapter=first, max_steps=2)
    saved = json.loads((tmp_path / "run" / "adapter_config.json").read_text())
    assert (saved["r"], saved["lora_alpha"]) == (4, 8)
    again = {"max_steps": 1, "overwrite_output_dir": True}
    with pytest.raises(OutputFolderError, match="the new run reads it"):
        run(tmp_path / "run", model_folder, adapter=tmp_path / "run" / "checkpoint-2", **again)


# ---- early stopping ------------------------------------------------------------------------------


def early(folder, **settings):
    return FineTuningArguments(str(folder), **settings)


@pytest.mark.parametrize(
    ("given", "strategies", "steps"),
    [
        ({}, ("epoch", "epoch"), None),
        ({"eval_strategy": "epoch"}, ("epoch", "epoch"), None),
        ({"eval_strategy": "steps", "eval_steps": 7}, ("steps", "steps"), 7),
        ({"eval_strategy": "steps", "logging_steps": 5}, ("steps", "steps"), 5),
        ({"eval_strategy": "steps", "eval_steps": 7, "save_steps": 14}, ("steps", "steps"), 14),
        ({"save_strategy": "best"}, ("epoch", "best"), None),
    ],
    ids=str,
)
def test_what_early_stopping_needs_is_derived(tmp_path, given, strategies, steps):
    args = early(tmp_path, early_stopping_patience=2, **given)
    assert (args.eval_strategy, args.save_strategy) == strategies
    assert args.load_best_model_at_end
    assert args.metric_for_best_model == "loss"
    assert args.greater_is_better is False
    assert steps is None or args.save_steps == steps


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ({"early_stopping_patience": 0}, "must be 1 or more, not 0"),
        ({"early_stopping_patience": 1, "early_stopping_threshold": -1.0}, "0 or more"),
        ({"early_stopping_threshold": 0.1}, "does nothing without --early_stopping_patience"),
        ({"early_stopping_patience": 1, "save_strategy": "no"}, "would save none: remove one"),
        ({"early_stopping_patience": 1, "eval_steps": 5}, "needs --eval_strategy steps"),
    ],
)
def test_what_cannot_stop_early_is_refused(tmp_path, given, match):
    with pytest.raises(ArgumentError, match=match):
        early(tmp_path, **given)


def stopping(folder, **settings):
    trainer = toy_trainer(folder, num_train_epochs=30, early_stopping_patience=2,
                          save_strategy="steps", learning_rate=0.3, **settings)  # fmt: skip
    trainer.train()
    scores = {e["step"]: e["eval_loss"] for e in trainer.state.log_history if "eval_loss" in e}
    return trainer, scores


def test_it_stops_after_patience_and_keeps_the_best(tmp_path):
    trainer, scores = stopping(tmp_path)
    best = min(scores, key=scores.get)
    assert trainer.state.global_step == best + 2 * 3 < 30 * 3
    assert trainer.evaluate()["eval_loss"] == pytest.approx(scores[best], rel=1e-5)


def test_a_threshold_asks_for_more(tmp_path):
    trainer, scores = stopping(tmp_path, early_stopping_threshold=100.0)
    assert list(scores) == [3, 6, 9]
    assert trainer.state.global_step == 9


def stopped_on_a_rank(folder):
    trainer, scores = stopping(folder, per_device_train_batch_size=4)
    return trainer.state.global_step, scores, trainer.adapter.fingerprint()


@pytest.mark.distributed
def test_two_ranks_stop_together(tmp_path):
    environment = launch_environment("fsdp2_cpu.yaml")
    first, second = run_ranks(stopped_on_a_rank, tmp_path, environment=environment)
    assert first == second
    assert first[0] < 90
