"""Which adapter counts as trained: one that a step with a learning rate has moved.

An adapter that was moved and is zero is an error: tests/adapter/test_verification.py.

Run: python -m pytest tests/training/test_adapter_moves.py
"""

import logging

from lora_fsdp.adapter.folder import read_adapter_folder, zero_lora_b
from lora_fsdp.adapter.proof import read_proof
from tests.support.runs import toy_trainer

# The first step of a warm-up has the learning rate 0.
WARM_UP = {"lr_scheduler_type": "linear", "warmup_steps": 1, "max_steps": 3, "rows": 8}
SAVED = {"save_strategy": "steps", "save_steps": 1}


def trained_and_moved(folder):
    """What the proof says, and whether every `lora_B` has values."""
    return read_proof(folder).trained, not zero_lora_b(read_adapter_folder(folder).tensors)


def test_the_best_adapter_may_be_that_of_a_step_without_a_learning_rate(tmp_path, caplog):
    caplog.set_level(logging.WARNING, logger="lora_fsdp")
    # The worst loss is taken for the best: it is the untrained adapter's.
    best = {
        "load_best_model_at_end": True, "metric_for_best_model": "loss", "greater_is_better": True,
        "eval_strategy": "steps", "eval_steps": 1,
    }  # fmt: skip
    trainer = toy_trainer(tmp_path, **WARM_UP, **SAVED, **best)
    trainer.train()
    assert str(trainer.state.best_model_checkpoint).endswith("checkpoint-1")
    assert "was saved before the first step with a learning rate above 0" in caplog.text
    trainer.save_model(str(tmp_path / "final"))
    assert trained_and_moved(tmp_path / "final") == (False, False)
    assert trained_and_moved(tmp_path / "checkpoint-3") == (True, True)


def test_a_finished_run_that_is_resumed_saves_a_trained_adapter(tmp_path):
    toy_trainer(tmp_path, **WARM_UP, **SAVED).train()
    resumed = toy_trainer(tmp_path, **WARM_UP, **SAVED)
    resumed.train(resume_from_checkpoint=True)
    resumed.save_model(str(tmp_path / "final"))
    assert trained_and_moved(tmp_path / "final") == (True, True)
