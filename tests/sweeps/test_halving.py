"""Successive halving. Run: python -m pytest tests/sweeps/test_halving.py"""

import json
import shutil

import pytest
from safetensors.torch import load_file

import lora_fsdp.sweeps.run as sweep_run
from lora_fsdp.sweeps.halving import best_settings, stages, step_at
from tests.support.sweeps import toy_sweep

GRID = ["learning_rate=1e-4,3e-4,1e-3,3e-3,1e-2"]


def adapter_of(folder):
    return load_file(folder / "adapter_model.safetensors")


def same(one, other):
    return all((value == adapter_of(other)[key]).all() for key, value in adapter_of(one).items())


def halved(place, output, **settings):
    defaults = {"grid": GRID, "search": "halving", "num_train_epochs": 2}
    return toy_sweep(place, output, **{**defaults, **settings})


@pytest.mark.parametrize(
    ("count", "expected"),
    [
        (1, [(1.0, 1)]),
        (2, [(1.0, 2)]),
        (3, [(1 / 3, 3), (1.0, 1)]),
        (12, [(1 / 9, 12), (1 / 3, 4), (1.0, 2)]),
        (27, [(1 / 27, 27), (1 / 9, 9), (1 / 3, 3), (1.0, 1)]),
    ],
)
def test_stages_are_those_of_scikit_learn(count, expected):
    found = stages(count)
    assert [one.settings for one in found] == [settings for _, settings in expected]
    assert [one.share for one in found] == pytest.approx([share for share, _ in expected])
    assert [step_at(one.share, 9) for one in found][-1] == 9
    assert step_at(1 / 27, 9) == 1


def test_a_setting_of_which_one_has_diverged_comes_last():
    scores = {"a": 0.9, "b": None, "c": 0.2, "d": 0.1, "e": 0.5, "f": 0.5}
    setting_of = {"a": 0, "b": 0, "c": 1, "d": 1, "e": 2, "f": 2}
    assert best_settings(scores, setting_of, keep=2, sign=1) == [1, 2]
    assert best_settings(scores, setting_of, keep=1, sign=-1) == [1]


@pytest.mark.parametrize(
    "at_once", [None, pytest.param(1, marks=pytest.mark.slow)], ids=["pass", "turns"]
)
@pytest.mark.slow
def test_who_stays_is_its_whole_run_to_the_bit_and_who_goes_is_named(at_once, tmp_path, capsys):
    found = halved(tmp_path, "halved", adapters_at_once=at_once, lora_dropout=0.1 * (at_once or 0))
    said = capsys.readouterr().out
    assert "left out" in said
    left = [one for one in found.summary.members if one.stopped is None]
    assert len(left) == 2
    scores = json.loads((tmp_path / "halved" / "halving.json").read_text())["scores"]
    [stage] = scores
    assert len(stage) == 5
    assert {one.name for one in left} == set(sorted(stage, key=lambda n: (-stage[n], n))[:2])
    gone = next(one for one in found.summary.members if one.stopped)
    assert gone.stopped == "left out after 1/3 of its steps (successive halving)"
    assert not (tmp_path / "halved" / gone.name / "adapter_config.json").exists()
    assert found.summary.best in {one.setting for one in left}
    whole = toy_sweep(
        tmp_path,
        "whole",
        grid=GRID,
        num_train_epochs=2,
        adapters_at_once=at_once,
        lora_dropout=0.1 * (at_once or 0),
    )
    for one in left:
        assert same(tmp_path / "halved" / one.name, tmp_path / "whole" / one.name), one.name
        folder = tmp_path / "halved" / one.name
        assert not list(folder.glob("checkpoint-*"))
        assert not (folder / "stage_state.safetensors").exists()
    assert len(whole.summary.members) == 5
    assert not list((tmp_path / "halved").glob("together-*"))


class Killed(BaseException):
    """Nothing may catch it."""


@pytest.mark.parametrize(
    "at_once", [2, pytest.param(1, marks=pytest.mark.slow)], ids=["pass", "turns"]
)
@pytest.mark.parametrize("calls", [1, pytest.param(3, marks=pytest.mark.slow)])
@pytest.mark.slow
def test_killed_and_gone_on_with_it_is_the_same(at_once, calls, tmp_path, monkeypatch):
    """Killed after the first or the third pass or turn: within a stage, and about its end."""
    halved(tmp_path, "whole", adapters_at_once=at_once)
    name = "train_over_one_pass" if at_once > 1 else "train_in_turn"
    original, left = getattr(sweep_run, name), [calls]

    def killed(*arguments, **named):
        if not left[0]:
            raise Killed
        left[0] -= 1
        return original(*arguments, **named)

    with monkeypatch.context() as patch:
        patch.setattr(sweep_run, name, killed)
        with pytest.raises(Killed):
            halved(tmp_path, "killed", adapters_at_once=at_once)
    trained = []

    def noting(*arguments, **named):
        trained.append(named.get("stage"))
        return original(*arguments, **named)

    monkeypatch.setattr(sweep_run, name, noting)
    halved(tmp_path, "killed", adapters_at_once=at_once, resume_from_checkpoint="true")
    one, other = (
        json.loads((tmp_path / name / "sweep.json").read_text()) for name in ("whole", "killed")
    )
    assert one == other
    for member in one["members"]:
        if member["stopped"] is None:
            assert same(tmp_path / "whole" / member["name"], tmp_path / "killed" / member["name"])


@pytest.mark.slow
def test_a_stage_whose_score_was_lost_is_scored_again_and_not_trained_on(tmp_path):
    halved(tmp_path, "once", adapters_at_once=1, save_strategy="steps", save_steps=100)
    shutil.copytree(tmp_path / "once", tmp_path / "again")
    root = tmp_path / "again"
    before = json.loads((root / "halving.json").read_text())
    (root / "halving.json").unlink()
    for folder in root.glob("run-*"):
        for file in ("stopped.json", "metrics.json"):
            (folder / file).unlink(missing_ok=True)
    halved(
        tmp_path,
        "again",
        adapters_at_once=1,
        save_strategy="steps",
        save_steps=100,
        resume_from_checkpoint="true",
    )
    assert json.loads((root / "halving.json").read_text()) == before
