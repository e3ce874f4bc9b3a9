"""Settings that no run can have. Run: python -m pytest tests/sweeps/test_checking.py"""

import pytest

from lora_fsdp.errors import ArgumentError, TargetModulesError
from lora_fsdp.sweeps.kept_base import KeptBase
from tests.support.sweeps import toy_sweep


@pytest.mark.parametrize(
    ("grid", "says"),
    [
        (["learning_rate=1e-3,-1"], "--grid learning_rate=-1.0: learning_rate -1.0 must be more"),
        (["learning_rate=1e-3,nan"], "learning_rate must be a finite number"),
        (["learning_rate=inf", "lora_r=4"], "learning_rate must be a finite number"),
        (["lora_r=4,0"], "--grid lora_r=0: lora_r 0 must be 1 or more"),
        (["num_train_epochs=1,-3"], "num_train_epochs -3.0 must be more than 0"),
        (["adam_beta1=0.9,2"], "Invalid beta parameter at index 0: 2.0"),
        (["adam_epsilon=-1"], "Invalid epsilon value: -1.0"),
        (["weight_decay=-0.1"], "Invalid weight_decay value"),
        (["per_device_train_batch_size=8,0"], "must be more than 0"),
        (["lora_dropout=0,1"], "lora_dropout 1.0 must be from 0 to less than 1"),
        (["lr_scheduler_type=linear,cosine_with_min_lr"], "min_lr_rate should be set"),
        (["warmup_steps=1,-4"], "warmup_steps >= 0"),
        (["seed=2,-1"], "seed -1 must be from 0"),
        (['lora_kwargs={},{"rank":3}'], "refuses lora_kwargs {'rank': 3}"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_a_setting_that_cannot_be_is_named_before_anything_is_read(grid, says, tmp_path):
    with pytest.raises(ArgumentError) as caught:
        toy_sweep(tmp_path, grid=grid, data={"task_file": "nowhere.py"})
    assert says in str(caught.value)
    assert str(caught.value).startswith("--grid ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("at_once", [None, 1], ids=["pass", "turns"])
def test_a_target_that_is_not_there_is_named_before_the_first_adapter_is_trained(
    at_once, tmp_path, monkeypatch
):
    monkeypatch.delattr(KeptBase, "give_back")
    with pytest.raises(TargetModulesError, match=r"run-2: LoRA target modules .*nowhere"):
        toy_sweep(tmp_path, grid=["lora_target_modules=q_proj,nowhere"], adapters_at_once=at_once)
    assert not list((tmp_path / "run").glob("run-*"))
