"""Which adapters are asked for. Run: python -m pytest tests/sweeps/test_grid.py"""

import pytest

from lora_fsdp.arguments import FineTuningArguments, LoraArguments
from lora_fsdp.errors import ArgumentError
from lora_fsdp.options import OptionParser
from lora_fsdp.sweeps.grid import asked_adapters, is_several


def training(**settings):
    return FineTuningArguments(output_dir="runs/x", **settings)


def test_one_adapter_is_not_several():
    assert not is_several(training())
    assert is_several(training(search="halving"))  # which is refused, and not ignored
    assert is_several(training(seeds=2))
    assert is_several(training(folds=2))
    assert is_several(training(grid=["lora_r=4"]))


def test_every_combination_with_every_seed(tmp_path):
    asked = asked_adapters(training(grid=["learning_rate=1e-4,3e-4", "lora_r=8,32"], seeds=2))
    assert len(asked) == 8
    assert [one.name for one in asked[:3]] == ["run-1-seed-42", "run-1-seed-43", "run-2-seed-42"]
    assert [one.setting for one in asked] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert {(one.values["learning_rate"], one.values["lora_r"]) for one in asked} == {
        (rate, rank) for rate in (1e-4, 3e-4) for rank in (8, 32)
    }
    own = asked[-1].arguments(training(seeds=2, weight_decay=0.5), tmp_path)
    assert (own.learning_rate, own.weight_decay, own.seed) == (3e-4, 0.5, 43)
    assert (own.seeds, own.grid) == (1, None)
    assert own.output_dir == str(tmp_path / "run-4-seed-43")
    assert asked[-1].adapter(LoraArguments(lora_alpha=7)).lora_r == 32
    assert asked[-1].adapter(LoraArguments(lora_alpha=7)).lora_alpha == 7


def test_names_sort_as_they_were_asked_for():
    asked = asked_adapters(training(grid=["lora_r=" + ",".join(map(str, range(1, 13)))]))
    assert [one.name for one in asked] == sorted(one.name for one in asked)


def test_values_have_the_options_types():
    given = [
        "lora_target_modules=all-linear,q_proj+v_proj",
        "lr_scheduler_type=cosine",
        'lora_kwargs={"use_rslora": true, "bias": "none"},{}',
    ]
    values = [one.values for one in asked_adapters(training(grid=given))]
    assert [one["lora_target_modules"] for one in values[::2]] == [
        ["all-linear"],
        ["q_proj", "v_proj"],
    ] or {tuple(one["lora_target_modules"]) for one in values} == {
        ("all-linear",),
        ("q_proj", "v_proj"),
    }
    assert {str(one["lora_kwargs"]) for one in values} == {
        "{'use_rslora': True, 'bias': 'none'}",
        "{}",
    }
    assert all(one["lr_scheduler_type"] == "cosine" for one in values)


def test_a_yaml_file_with_a_list_of_grids(tmp_path):
    file = tmp_path / "grid.yaml"
    file.write_text("- {learning_rate: [1e-4, 3e-4], lora_r: 8}\n- {lora_r: [4], max_steps: 9}\n")
    asked = asked_adapters(training(grid=[str(file)]))
    assert [one.values.get("learning_rate") for one in asked] == [1e-4, 3e-4, None]
    assert asked[2].values == {"lora_r": 4, "max_steps": 9}


def test_a_mapping_in_a_recipe(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("output_dir: runs/x\ngrid:\n  learning_rate: [1e-4, 3e-4]\n  lora_r: [8]\n")
    [arguments] = OptionParser((FineTuningArguments,)).parse(["--config", str(recipe)])
    assert [one.values for one in asked_adapters(arguments)] == [
        {"learning_rate": 1e-4, "lora_r": 8},
        {"learning_rate": 3e-4, "lora_r": 8},
    ]


def test_trials_of_the_grid_are_different_and_seeded():
    grid = ["learning_rate=1e-4,2e-4,3e-4", "lora_r=4,8,16"]
    once, again = (asked_adapters(training(grid=grid, search="random", trials=4)) for _ in range(2))
    assert [one.values for one in once] == [one.values for one in again]
    assert len({str(dict(one.values)) for one in once}) == 4
    assert len(asked_adapters(training(grid=grid, search="random", trials=99))) == 9


def test_values_are_drawn_from_between_the_ends_of_a_range():
    grid = ["learning_rate=1e-5..1e-2", "lora_r=2..9", "weight_decay=0.0..0.1", "seed=3"]
    once, again = (asked_adapters(training(grid=grid, search="random", trials=40)) for _ in "ab")
    assert [one.values for one in once] == [one.values for one in again]
    rates = [one.values["learning_rate"] for one in once]
    assert all(1e-5 <= rate <= 1e-2 for rate in rates)
    assert 8 < sum(rate < 3e-4 for rate in rates) < 32  # by the logarithm
    ranks = {one.values["lora_r"] for one in once}
    assert all(isinstance(rank, int) for rank in ranks)
    assert min(ranks) == 2
    assert max(ranks) == 9
    assert all(0 <= one.values["weight_decay"] <= 0.1 for one in once)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"trials": 3}, "--trials takes settings of a --grid"),
        ({"search": "random"}, "--search random takes settings of a --grid"),
        ({"search": "halving", "seeds": 1}, "--search halving takes settings of a --grid"),
        ({"search": "halving", "seeds": 1, "folds": 3}, "takes settings of a --grid"),
        ({"grid": ["lora_r=4,8"], "trials": 2}, "--search grid takes all"),
        ({"grid": ["lora_r=4,8"], "search": "random"}, "needs --trials"),
        ({"grid": ["lora_r=4..8"]}, "lora_r is a range"),
        ({"grid": ["lora_r=4..8"], "search": "halving"}, "lora_r is a range"),
        ({"grid": ["lora_r=8..4"], "search": "random", "trials": 2}, "to a larger one"),
        ({"grid": ["optim=a..b"], "search": "random", "trials": 2}, "--grid optim=a"),
        ({"grid": ["lora_r=4..8,9"], "search": "random", "trials": 2}, "a range, or values"),
        ({"grid": ["lora_r=4..x"], "search": "random", "trials": 2}, "invalid int value: 'x'"),
        ({"grid": ["lora_r=4..9"], "search": "random", "trials": 5000}, "at most 1,000"),
    ],
    ids=str,
)
def test_a_search_that_cannot_be_is_refused(settings, says):
    with pytest.raises(ArgumentError, match=says) as caught:
        asked_adapters(training(seeds=settings.pop("seeds", 2), **settings))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("grid", "says"),
    [
        (["learning_rte=1e-4"], "no such setting. Did you mean 'learning_rate'"),
        (["learning_rate=fast"], "--grid learning_rate=fast: invalid float value: 'fast'"),
        (["lora_r=1.5"], "--grid lora_r=1.5: invalid int value: '1.5'"),
        (["output_dir=a,b"], "it cannot differ between the adapters of a sweep"),
        (["step=eager,fused"], "it cannot differ between"),
        (["max_length=64,128"], "it cannot differ between"),
        (["dtype=float32,bfloat16"], "it cannot differ between"),
        (["adapter_name_or_path=a,b"], "it cannot differ between"),
        (["task=sentiment,topic"], "learn one task from one table; start a sweep for each task"),
        (["data_file=a.csv,b.csv"], "start a sweep for each data_file"),
        (["lora_rank=8,16"], "Did you mean 'lora_r"),
        (["seed=x"], "--grid seed=x: invalid int value"),
        (["optim=adamx"], "--grid optim=adamx"),
        (["lr_scheduler_type=lineer"], "--grid lr_scheduler_type=lineer"),
        (["learning_rate"], "give name=value,value"),
        (["learning_rate="], "give name=value,value"),
        (["lora_r=4", "lora_r=8"], "names lora_r twice"),
        (["nowhere.yaml"], "There is no file .*nowhere.yaml"),
        (['{"lora_r": [4}'], "no.* valid JSON"),
        (["[]"], "must hold settings"),
        (["[3]"], "must hold settings"),
        (['{"lora_r": []}'], "must hold settings"),
        (["lora_r=" + ",".join(map(str, range(1, 1200)))], "has 1,199 settings"),
    ],
    ids=lambda value: value[0][:20] if isinstance(value, list) else "",
)
def test_mistakes_are_one_sentence(grid, says):
    with pytest.raises(ArgumentError, match=says) as caught:
        asked_adapters(training(grid=grid))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["seeds", "folds", "trials", "adapters_at_once"])
def test_numbers_below_the_least_are_refused(name):
    with pytest.raises(ArgumentError, match=f"--{name} must be"):
        training(**{name: 0})


def test_seeds_twice_are_refused():
    with pytest.raises(ArgumentError, match="contradict"):
        asked_adapters(training(grid=["seed=1,2"], seeds=2))
