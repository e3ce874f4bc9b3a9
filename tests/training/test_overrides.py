"""What the trainer overrides, and that it says why.

Run: python -m pytest tests/training/test_overrides.py
"""

from transformers import Trainer

from lora_fsdp import LoraTrainer

OVERRIDES = {
    "_clip_grad_norm",
    "_finalize_training",
    "_get_grad_norm",
    "_load_best_model",
    "_load_from_checkpoint",
    "_load_optimizer_and_scheduler",
    "_load_rng_state",
    "_load_scaler",
    "_move_model_to_device",
    "_save_checkpoint",
    "create_accelerator_and_postprocess",
    "create_optimizer",
    "evaluate",
    "evaluation_loop",
    "floating_point_ops",
    "get_batch_samples",
    "get_eval_dataloader",
    "get_test_dataloader",
    "get_train_dataloader",
    "hyperparameter_search",
    "log",
    "num_examples",
    "predict",
    "save_model",
    "set_initial_training_values",
    "train",
    "training_step",
}


def overridden():
    """Methods of the Trainer, public or not, that stand in `LoraTrainer` again."""
    return {name for name in vars(LoraTrainer) if callable(vars(Trainer).get(name))} - {
        "__init__",
        "__doc__",
    }


def test_there_is_one_class_over_the_trainers():
    assert LoraTrainer.__bases__ == (Trainer,)


def test_every_override_says_its_reason():
    for name in overridden():
        assert len((vars(LoraTrainer)[name].__doc__ or "").split()) > 3, name


def test_the_trainer_has_what_is_overridden():
    """One that it lost would be one that nobody calls."""
    assert overridden() == OVERRIDES
