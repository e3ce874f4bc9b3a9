"""Every watchdog, by causing what it watches for.

Run: python -m pytest tests/training/test_watchdogs.py
"""

import json
import logging
import os
import re
import signal
import time

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from lora_fsdp import FineTuningArguments
from lora_fsdp.data.sampling import TrainingSteps, shares_of_step
from lora_fsdp.errors import ArgumentError, NonFiniteError, RankDriftError
from lora_fsdp.training.saving.atomic_folders import check_whole
from lora_fsdp.training.saving.checkpoints import list_checkpoints
from lora_fsdp.training.watching import log_warnings
from lora_fsdp.training.watching.heartbeat import EXIT_CODE
from lora_fsdp.training.watching.log_warnings import WarnFlatLoss, WarnSlowdown
from tests.support.ranks import RankError, launch_environment, run_ranks, start_ranks
from tests.support.runs import toy_trainer

FSDP = launch_environment("fsdp2_cpu.yaml")
distributed = pytest.mark.distributed
ROWS = 24
BAD_STEP = 3


class AtStep(TrainerCallback):
    """Does something on one rank when a step begins (or ends)."""

    def __init__(self, step, action, *, rank=None, ends=False):
        self.step, self.action, self.rank, self.ends = step, action, rank, ends

    def on_step_begin(self, args, state, control, **kwargs):
        self.at(state.global_step + 1, args, ends=False)

    def on_step_end(self, args, state, control, **kwargs):
        self.at(state.global_step, args, ends=True)

    def at(self, step, args, *, ends):
        if step == self.step and ends == self.ends and self.rank in (None, args.process_index):
            self.action()


def batch_of(world_size):
    return {"per_device_train_batch_size": 8 // world_size}


# ---- loss or gradient that is not finite ---------------------------------------------------------


def break_loss(trainer):
    """A real NaN: the base's last norm overflows from here on, as a bad kernel's output would."""
    model = trainer.model.get_base_model()
    model.lm_head.register_forward_hook(lambda module, inputs, output: output * torch.nan)


def break_gradient(trainer):
    """A finite loss whose gradient is not."""
    model = trainer.model.get_base_model()
    model.model.layers[1].register_full_backward_hook(
        lambda module, inputs, outputs: (torch.full_like(inputs[0], torch.inf), *inputs[1:])
    )


def overflow_in_the_sum(trainer):
    """Every rank's gradient is finite, their sum is not."""
    summed = trainer.adapter.sum_gradients

    def sum_gradients():
        trainer.adapter.gradients[7] = 3e38
        summed()

    trainer.adapter.sum_gradients = sum_gradients


def break_loss_only(trainer):
    """A loss that overflowed, though its gradient did not."""
    run = trainer.step.run
    trainer.step.run = lambda row, **others: run(row, **others) * torch.inf


BREAKS = {
    "loss": break_loss,
    "loss only": break_loss_only,
    "gradient": break_gradient,
    "sum": overflow_in_the_sum,
}


def diverging_run(folder, kind, world_size, rank, options):
    trainer = toy_trainer(folder, **batch_of(world_size) | options)
    trainer.add_callback(AtStep(BAD_STEP, lambda: BREAKS[kind](trainer), rank=rank))
    trainer.train()


@distributed
class TestNotFinite:
    @pytest.mark.parametrize("kind", ["loss", "loss only", "gradient"])
    def test_names_step_rank_and_rows_before_the_next_checkpoint(self, tmp_path, kind):
        options = {"save_strategy": "steps", "save_steps": 2, "logging_steps": 100}
        with pytest.raises(RankError) as caught:
            run_ranks(diverging_run, tmp_path, kind, 2, 1, options)
        assert caught.value.kind == NonFiniteError.__name__
        assert (
            f"Step {BAD_STEP}: the {kind.split()[0]} of rank 1 is not finite" in caught.value.text
        )
        folder = tmp_path / f"diverged-step-{BAD_STEP}"
        check_whole(folder)
        batch = json.loads((folder / "batch.json").read_text())
        rows = [[e["row"] for e in rank["examples"]] for rank in batch["ranks"]]
        assert f"on rows {', '.join(map(str, rows[1]))}." in caught.value.text
        assert rows == expected_rows(BAD_STEP)
        finite = [(rank["loss_is_finite"], rank["gradient_is_finite"]) for rank in batch["ranks"]]
        assert finite[0] == (True, True)
        assert finite[1] == ("loss" not in kind, kind == "loss only")
        assert "Output:" in batch["ranks"][0]["examples"][0]["prompt"]
        # Found at step 4, before its checkpoint: the one before is whole, and the adapter that was
        # kept is the one before the bad step, to the bit.
        assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-2"]
        check_whole(tmp_path / "checkpoint-2")
        before = load_file(tmp_path / "checkpoint-2" / "adapter_model.safetensors")
        kept = load_file(folder / "adapter" / "adapter_model.safetensors")
        assert batch["adapter_is_the_one_before_the_step"]
        for name, tensor in before.items():
            np.testing.assert_array_equal(kept[name], tensor)

    @pytest.mark.parametrize("last", ["log", "end"])
    def test_is_found_at_the_log_and_at_the_end(self, tmp_path, last):
        options = {"logging_steps": 4 if last == "log" else 100}
        with pytest.raises(RankError, match=f"Step {BAD_STEP}: the loss of rank 0 is not finite"):
            run_ranks(diverging_run, tmp_path, "loss", 1, 0, options, world_size=1)

    def test_a_sum_that_overflows_names_every_rank(self, tmp_path):
        with pytest.raises(RankError, match="every rank's gradient is finite, but their sum is"):
            run_ranks(diverging_run, tmp_path, "sum", 2, None, {"max_grad_norm": 0.0})

    def test_other_optimizers_get_no_gradient_and_it_is_said(self, tmp_path):
        options = {"optim": "sgd", "logging_steps": 5}
        with pytest.raises(RankError, match="The batch and the adapter after it"):
            run_ranks(diverging_run, tmp_path, "loss", 1, 0, options, world_size=1)
        kept = load_file(
            tmp_path / f"diverged-step-{BAD_STEP}" / "adapter" / "adapter_model.safetensors"
        )
        assert all(np.isfinite(tensor).all() for tensor in kept.values())

    def test_is_named_also_where_its_batch_cannot_be_written(self, tmp_path):
        with pytest.raises(
            RankError, match=r"Step 3: the loss .* batch could not be saved"
        ) as caught:
            run_ranks(diverging_in_the_way, tmp_path)
        assert caught.value.kind == NonFiniteError.__name__

    def test_in_the_first_step_it_is_not_taken_for_a_stuck_adapter(self, tmp_path):
        with pytest.raises(RankError, match="Step 1: the loss of rank 0 is not finite"):
            run_ranks(diverging_at_once, tmp_path, world_size=1)


def diverging_in_the_way(folder):
    trainer = toy_trainer(folder, logging_steps=4, **batch_of(2))

    def break_and_block():
        break_loss(trainer)
        # A file where the folder is to be written (what a run leaves is tidied when one starts).
        (folder / f"diverged-step-{BAD_STEP}.partial").touch()

    trainer.add_callback(AtStep(BAD_STEP, break_and_block, rank=0))
    trainer.train()


def diverging_at_once(folder):
    trainer = toy_trainer(folder, logging_steps=100)
    break_loss(trainer)
    trainer.train()


def expected_rows(step):
    """From the data set itself, which the message's rows must be those of."""
    trainer = toy_trainer("unused", stall_seconds=0)
    rows = []
    for rank in range(2):
        steps = TrainingSteps(
            trainer.train_dataset, examples_per_step=8, rank=rank, world_size=2,
            seed=trainer.order_seed, share_prefix=False, max_tokens=256,
        )  # fmt: skip
        steps.set_epoch((step - 1) // len(steps))
        rows.append(steps[(step - 1) % len(steps)].example_rows)
    return rows


@pytest.mark.parametrize("step", [0, 2, 3, 7])
def test_shares_are_those_of_the_steps(step):
    trainer = toy_trainer("unused", rows=21, stall_seconds=0)
    for rank in range(3):
        steps = TrainingSteps(
            trainer.train_dataset, examples_per_step=9, rank=rank, world_size=3, seed=4,
            share_prefix=False, max_tokens=256,
        )  # fmt: skip
        steps.set_epoch(step // len(steps))
        shares = shares_of_step(
            trainer.train_dataset, step, examples_per_step=9, world_size=3, seed=4
        )
        found = [example.row for example in shares[rank]]
        assert found == steps[step % len(steps)].example_rows


# ---- ranks that drift apart ----------------------------------------------------------------------


def drifting_run(folder, step, options):
    trainer = toy_trainer(folder, num_train_epochs=4, **batch_of(2) | options)

    def nudge():
        value = list(trainer.adapter.parameters.values())[5].data
        value.view(torch.int32)[0, 0] += 1  # the last bit of one number

    trainer.add_callback(AtStep(step, nudge, rank=1, ends=True))
    trainer.train()


@distributed
class TestDrift:
    def test_of_one_bit_names_ranks_and_step(self, tmp_path):
        options = {"drift_check_steps": 3}
        with pytest.raises(RankError) as caught:
            run_ranks(drifting_run, tmp_path, 6, options, environment=FSDP)
        assert caught.value.kind == RankDriftError.__name__
        assert "After step 6 " in caught.value.text
        assert "was equal after step 3: rank 1 differs from rank 0" in caught.value.text
        assert "lora_" in caught.value.text

    def test_is_looked_for_at_logs_only(self, tmp_path):
        options = {"drift_check_steps": 1, "logging_steps": 5}
        with pytest.raises(RankError, match="After step 5 the adapter is not the same"):
            run_ranks(drifting_run, tmp_path, 5, options)

    def test_can_be_switched_off(self, tmp_path):
        run_ranks(drifting_run, tmp_path, 6, {"drift_check_steps": 0})


# ---- ranks that stall ----------------------------------------------------------------------------


def stall_for_ever():
    time.sleep(3600)


def freeze():
    os.kill(os.getpid(), signal.SIGSTOP)


def stalling_run(folder, rank, action, world_size):
    mine = os.environ.get("RANK", "0")
    os.environ["TORCHELASTIC_ERROR_FILE"] = str(folder / f"error-{mine}.json")
    os.dup2(os.open(folder / f"stderr-{mine}.txt", os.O_WRONLY | os.O_CREAT), 2)
    trainer = toy_trainer(
        folder,
        num_train_epochs=100,
        stall_seconds=2.0,
        callbacks=[AtStep(BAD_STEP, action, rank=rank)],
        **batch_of(world_size),
    )
    trainer.train()


def exit_codes(processes, *, of):
    codes = []
    try:
        for rank in of:
            processes[rank].join(timeout=120)
            codes.append(processes[rank].exitcode)
    finally:
        for process in processes:
            process.kill()
            process.join()
    return codes


@distributed
class TestStall:
    @pytest.mark.parametrize("world_size", [1, 2])
    def test_ends_every_rank_with_stacks(self, tmp_path, world_size):
        processes, _ = start_ranks(
            stalling_run, tmp_path, world_size - 1, stall_for_ever, world_size,
            world_size=world_size,
        )  # fmt: skip
        codes = exit_codes(processes, of=range(world_size))
        assert codes == [EXIT_CODE] * world_size
        stalled = (tmp_path / "stalled" / f"rank-{world_size - 1}.txt").read_text()
        assert "in stall_for_ever" in stalled
        assert f"step {BAD_STEP - 1}, done" in stalled  # it stalls before step 3 begins
        told = (tmp_path / "stderr-0.txt").read_text()
        assert "StalledRankError: No progress in 2 s" in told
        assert "in stall_for_ever" in (tmp_path / f"stderr-{world_size - 1}.txt").read_text()
        for_launcher = json.loads((tmp_path / "error-0.json").read_text())["message"]["message"]
        assert for_launcher in told
        if world_size == 2:
            waiting = (tmp_path / "stalled" / "rank-0.txt").read_text()
            assert "in sum_gradients" in waiting
            assert f"rank 0: step {BAD_STEP}, summing gradients over ranks" in told
            assert f"rank 1: step {BAD_STEP - 1}, done" in told

    @pytest.mark.parametrize("frozen", [0, 1])
    def test_a_frozen_process_is_named_by_the_others(self, tmp_path, frozen):
        """Also where it is the one that holds the store."""
        processes, _ = start_ranks(stalling_run, tmp_path, frozen, freeze, 2, world_size=2)
        assert exit_codes(processes, of=[1 - frozen]) == [EXIT_CODE]
        told = (tmp_path / f"stderr-{1 - frozen}.txt").read_text()
        assert f"rank {1 - frozen}: step {BAD_STEP}, summing gradients over ranks" in told
        assert f"rank {frozen}: " in told
        if frozen == 1:
            assert "its process has not answered for" in told

    @pytest.mark.slow
    def test_what_may_take_long_is_left_alone(self, tmp_path):
        assert run_ranks(slow_run, tmp_path) == [6, 6]
        assert not (tmp_path / "stalled").exists()


class SlowEvaluation(TrainerCallback):
    slept = 0

    def on_evaluate(self, args, state, control, **kwargs):
        self.slept += 1
        time.sleep(2.5 if self.slept == 1 else 0)


def slow_run(folder):
    """The first step, an evaluation and a checkpoint all take longer than the time-out."""
    trainer = toy_trainer(
        folder,
        stall_seconds=1.0,
        eval_strategy="epoch",
        save_strategy="epoch",
        callbacks=[SlowEvaluation(), AtStep(1, lambda: time.sleep(2.5), rank=1)],
        **batch_of(2),
    )
    tokenizer = trainer.processing_class
    write = tokenizer.save_pretrained

    def slowly(*arguments, **others):
        time.sleep(2.5 if trainer.state.global_step == 3 else 0)
        return write(*arguments, **others)

    tokenizer.save_pretrained = slowly
    trainer.train()
    return trainer.state.global_step


# ---- warnings ------------------------------------------------------------------------------------


def warnings_of(caplog):
    return [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]


def feed(callback, logs):
    """Give the callback a run's log, entry by entry, as the Trainer does."""
    args, state, control = TrainingArguments(logging_steps=1), TrainerState(), TrainerControl()
    callback.on_train_begin(args, state, control)
    for step, entry in enumerate(logs, start=1):
        state.global_step = step
        state.log_history.append({"step": step, **entry})
        callback.on_log(args, state, control, logs=entry)


def losses(values, rate=1e-4):
    return [{"loss": float(value), "learning_rate": rate} for value in values]


class TestFlatLoss:
    def test_of_a_run_is_warned_of_once(self, tmp_path, caplog):
        options = {"num_train_epochs": 6, "flat_loss_steps": 12, "stall_seconds": 0}
        toy_trainer(tmp_path, learning_rate=1e-9, **options).train()
        flat = [m for m in warnings_of(caplog) if "The loss has not moved in steps" in m]
        assert len(flat) == 1
        assert "steps 1 to 12" in flat[0]

    NOISE = np.random.default_rng(0).normal(0, 0.1, 400)

    @pytest.mark.parametrize(
        ("values", "flat"),
        [
            (np.full(400, 1.1), True),
            (1.1 + NOISE, True),
            (1.1 + NOISE + np.linspace(0, 1, 400), True),  # it rises
            (1.1 + NOISE - np.linspace(0, 0.5, 400), False),
            (3 * np.exp(-np.arange(400) / 10) + 0.5 + NOISE / 10, False),  # it has fallen
            (np.concatenate([[6, 5.7, 5.4, 5.2, 5.1], np.full(395, 5.0)]), False),
        ],
        ids=["constant", "noise", "rising", "slowly falling", "converged", "fell at once"],
    )
    def test_is_told_from_noise_and_from_a_loss_that_fell(self, values, flat, caplog):
        feed(WarnFlatLoss(100), losses(values))
        assert len(warnings_of(caplog)) == flat

    def test_without_a_learning_rate_is_none(self, caplog):
        feed(WarnFlatLoss(100), losses(np.full(400, 1.1), rate=0.0))
        assert not warnings_of(caplog)

    def test_is_not_looked_for_at_0(self, caplog):
        feed(WarnFlatLoss(0), losses(np.full(400, 1.1)))
        assert not warnings_of(caplog)


def speeds(*values):
    return [{"examples_per_second": float(value)} for value in values]


class TestSlowdown:
    def test_of_a_run_is_warned_of_with_step_and_figures(self, tmp_path, caplog, monkeypatch):
        monkeypatch.setattr(log_warnings, "SLOW_SECONDS", 2.0)
        callbacks = [AtStep(step, lambda: time.sleep(1.0)) for step in (8, 9, 10, 11)]
        toy_trainer(tmp_path, num_train_epochs=4, callbacks=callbacks, stall_seconds=0).train()
        slow = [m for m in warnings_of(caplog) if "examples/s, under half" in m]
        assert len(slow) == 1
        # Slow steps of a busy machine may come just before.
        assert re.match(r"Step (8|9|10|11): training runs at .* for \d+ s: another", slow[0])

    @pytest.mark.parametrize(
        ("after", "warned"),
        [((40, 40, 40, 40), 1), ((40, 40), 0), ((60, 60, 60, 60), 0), ((40, 90, 40, 40), 0)],
    )
    def test_is_a_while_at_under_half(self, after, warned, caplog, monkeypatch):
        monkeypatch.setattr(log_warnings, "SLOW_SECONDS", 0.0)
        feed(WarnSlowdown(), speeds(*[100] * 10, *after))
        assert len(warnings_of(caplog)) == warned

    def test_of_a_moment_is_none_however_many_logs_it_has(self, caplog):
        feed(WarnSlowdown(), speeds(*[100] * 10, *[40] * 10))
        assert not warnings_of(caplog)


@pytest.mark.parametrize("name", ["stall_seconds", "drift_check_steps", "flat_loss_steps"])
def test_negative_limits_are_refused(name):
    with pytest.raises(ArgumentError, match=f"--{name} must be 0"):
        FineTuningArguments(**{name: -1})
