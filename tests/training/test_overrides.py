"""What the trainer overrides, and that it says why.

Run: python -m pytest tests/training/test_overrides.py
"""

import re

from transformers import Trainer

from lora_fsdp import LoraTrainer


def overridden():
    """Methods of the Trainer, public or not, that stand in `LoraTrainer` again."""
    return {name for name in vars(LoraTrainer) if callable(vars(Trainer).get(name))} - {
        "__init__",
        "__doc__",
    }


def listed():
    """The methods that the docstring's list names before its colons, with a reason after them."""
    items = re.findall(r"^    \* (.*?):\s+\S", LoraTrainer.__doc__, re.MULTILINE | re.DOTALL)
    return [name for names in items for name in re.findall(r"`(\w+)`", names)]


def test_there_is_one_class_over_the_trainers():
    assert LoraTrainer.__bases__ == (Trainer,)


def test_every_override_has_its_reason_in_the_docstring():
    """Also that the Trainer has the method: one that it lost would be one that nobody calls."""
    names = listed()
    assert len(names) == len(set(names))
    assert set(names) - {"zero_grad"} == overridden()  # which is the model's
