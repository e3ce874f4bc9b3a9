"""Plan and doctor of a sweep. Run: python -m pytest tests/sweeps/test_plan.py"""

import json

import pytest

from lora_fsdp.cli.main import main
from lora_fsdp.placement.memory import DeviceMemory
from lora_fsdp.sweeps.plan import adapters_that_fit, share_of_halving
from tests.support.sweeps import OPTIONS, prepared

PLAN = [
    "plan",
    "--model_name_or_path", "7B",
    "--examples", "1000",
    "--tokens_per_example", "60",
    "--gpus", "1xH100",
    "--price_per_hour", "2",
    "--json",
]  # fmt: skip


def planned(capsys, *more):
    assert main([*PLAN, *more]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.slow
def test_a_sweep_takes_the_time_of_all_its_adapters_and_the_memory_of_the_largest(capsys):
    one = planned(capsys, "--lora_r", "8")
    epochs = planned(capsys, "--lora_r", "8", "--num_train_epochs", "6")
    large = planned(capsys, "--lora_r", "256")
    grid = ("--grid", "lora_r=8,256", "learning_rate=1e-4,3e-4", "--seeds", "3")
    found = planned(capsys, *grid)["sweep"]
    assert (found["adapters"], found["settings"]) == (12, 4)
    assert found["bytes"] == large["best"]["bytes"]["total"]
    assert found["seconds"] == pytest.approx(
        6 * (one["best"]["seconds"] + large["best"]["seconds"])
    )
    assert found["cost"] == pytest.approx(2 * found["seconds"] / 3600)
    longer = planned(capsys, "--lora_r", "8", "--grid", "num_train_epochs=3,6")["sweep"]
    assert longer["seconds"] == pytest.approx(one["best"]["seconds"] + epochs["best"]["seconds"])
    halved = planned(capsys, *grid, "--search", "halving")["sweep"]
    assert halved["seconds"] == pytest.approx(found["seconds"] * share_of_halving(4))
    assert "sweep" not in one


def test_halving_costs_what_its_stages_take():
    assert share_of_halving(2) == 1
    assert share_of_halving(3) == pytest.approx((3 / 3 + 1 * 2 / 3) / 3)
    assert share_of_halving(12) == pytest.approx((12 / 9 + 4 * 2 / 9 + 2 * 2 / 3) / 12)


def test_as_many_share_a_pass_as_memory_holds():
    memory = DeviceMemory(0, 100, 0, 0, 2, 2, 4, 10, 2, 5, context=7)
    assert adapters_that_fit(memory, free=100 + 5 + 3 * 20) == 3
    assert adapters_that_fit(memory, free=100 + 5 + 3 * 20 - 1) == 2
    assert adapters_that_fit(memory, free=0) == 1


def test_the_plan_says_it_in_words_and_refuses_a_wrong_grid(capsys):
    assert main([*PLAN[:-1], "--grid", "lora_r=8,16"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "The sweep: 2 adapters of 2 settings, in turns over one base on 1 x H100" in said
    assert "At once: 1 unless" in said
    assert main([*PLAN, "--grid", "lora_rr=8"]) == 2
    assert "Did you mean 'lora_r'" in capsys.readouterr().err


def doctor(place, capsys, *more):
    base, table = prepared(place)
    options = {
        name: value for name, value in OPTIONS.items() if name not in ("labels", "eval_size")
    }
    given = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    arguments = ["doctor", "--model_name_or_path", base, "--data_file", table, *given]
    arguments += ["--output_dir", str(place / "run"), "--accelerate_config", "single", "--json"]
    code = main([*arguments, *more])
    return code, {
        finding["rule"]: finding["sentence"]
        for finding in json.loads(capsys.readouterr().out)["findings"]
    }


def test_the_doctor_names_the_settings_that_are_known_to_diverge(tmp_path, capsys):
    code, found = doctor(
        tmp_path, capsys, "--grid", "learning_rate=1e-3,0.9", "lora_r=4,8", "--lora_alpha", "200"
    )
    assert found["learning-rate-diverges"].startswith("run-3, run-4: --learning_rate 0.9: Adam")
    assert found["lora-scale"].startswith("run-1, run-3: --lora_alpha 200 at --lora_r 4")
    assert code == 0
    code, found = doctor(tmp_path, capsys, "--grid", "learning_rate=-1,1e-3", "lora_r=0,4")
    assert code != 0
    assert found["training-numbers"].startswith("run-1, run-2: --learning_rate -1.0 must be")
    assert found["lora-rank"].startswith("run-1, run-3: --lora_r 0")
    _, found = doctor(tmp_path, capsys, "--learning_rate", "0.9", "--seeds", "2")
    assert found["learning-rate-diverges"].startswith("--learning_rate 0.9")
    _, found = doctor(tmp_path, capsys, "--learning_rate", "0.9", "--optim", "sgd")
    assert "learning-rate-diverges" not in found
