"""Several adapters asked together. Run: python -m pytest tests/sweeps/test_ensemble.py"""

import json
import shutil

import numpy as np
import pandas as pd
import pytest

from lora_fsdp.cli.main import main
from lora_fsdp.errors import ArgumentError
from lora_fsdp.evaluation.ensemble import Ensemble
from lora_fsdp.evaluation.prediction import Predictor, examples_of_texts
from lora_fsdp.sweeps.earlier import adapters_of
from tests.support.sweeps import toy_sweep
from tests.support.tiny import toy_table


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    place = tmp_path_factory.mktemp("ensembles")
    toy_sweep(place, "seeds", seeds=2)
    return place


@pytest.fixture(scope="module")
def alone(place):
    """An adapter of another kind, which shares no pass."""
    toy_sweep(place, "dora", lora_kwargs={"use_dora": True}, lora_dropout=0.1, max_steps=2)
    return place / "dora"


def examples_for(predictor):
    texts = dict(enumerate(toy_table(20, seed=4)["text"], start=1))
    return examples_of_texts(predictor.task, texts, advice="")


def folders_of(place):
    return [place / "seeds" / name for name in ("seed-3", "seed-4")]


def test_probabilities_are_the_mean_of_what_each_adapter_gives_alone(place):
    ensemble = Ensemble.from_adapters(folders_of(place))
    assert ensemble.shared is not None
    examples = examples_for(ensemble)
    alone = [Predictor.from_adapter(folder).outputs(examples) for folder in folders_of(place)]
    found = ensemble.outputs(examples).probabilities
    mean = np.mean([one.probabilities for one in alone], axis=0)
    np.testing.assert_allclose(found, mean, rtol=1e-4)
    assert np.abs(alone[0].probabilities - mean).max() > 1e-3
    columns = ensemble.columns(examples)
    kind = ensemble.task.answer_kind
    answers = [kind.answers(examples, one) for one in alone]
    for row, answer in enumerate(columns["predicted_label"]):
        differing = sum(own[row] != answer for own in answers) / 2
        assert columns["disagreement"][row] == differing


def test_adapters_that_share_no_pass_take_turns(place, alone):
    folders = [place / "seeds" / "seed-3", alone]
    ensemble = Ensemble.from_adapters(folders)
    assert ensemble.shared is None
    examples = examples_for(ensemble)
    each = ensemble.outputs_of_each(examples)
    for folder, found in zip(folders, each, strict=True):
        own = Predictor.from_adapter(folder).outputs(examples)
        np.testing.assert_allclose(found.probabilities, own.probabilities, rtol=1e-4)


def test_a_table_is_answered_by_the_folder_of_a_sweep(place, tmp_path, capsys):
    toy_table(10, seed=4).drop(columns="label").to_csv(tmp_path / "new.csv", index=False)
    output = tmp_path / "answers.csv"
    words = ["predict", str(tmp_path / "new.csv"), "--adapter", str(place / "seeds")]
    assert main([*words, "--output", str(output)]) == 0
    table = pd.read_csv(output)
    assert len(table) == 10
    assert table["disagreement"].between(0, 1).all()
    named = [str(folder) for folder in folders_of(place)]
    again = tmp_path / "again.csv"
    assert main([*words[:2], "--adapter", *named, "--output", str(again)]) == 0
    assert again.read_text() == output.read_text()
    capsys.readouterr()
    assert main(["predict", "--adapter", *named, "--text", "good crew", "--json"]) == 0
    assert "disagreement" in json.loads(capsys.readouterr().out)


def test_of_a_grid_the_best_setting_answers(place, tmp_path):
    shutil.copytree(place / "seeds", tmp_path / "grid")
    file = tmp_path / "grid" / "sweep.json"
    found = json.loads(file.read_text())
    assert adapters_of(tmp_path / "grid") == [tmp_path / "grid" / f"seed-{i}" for i in (3, 4)]
    file.write_text(json.dumps(found | {"best": {"adapters": ["seed-4"]}}))
    assert adapters_of(tmp_path / "grid") == [tmp_path / "grid" / "seed-4"]
    assert adapters_of(place / "seeds" / "seed-3") == [place / "seeds" / "seed-3"]
    file.unlink()
    with pytest.raises(ArgumentError, match="not all finished"):
        adapters_of(tmp_path / "grid")


def test_adapters_of_other_tasks_are_refused(place, tmp_path):
    shutil.copytree(place / "seeds" / "seed-4", tmp_path / "other")
    file = tmp_path / "other" / "task.json"
    task = json.loads(file.read_text())
    file.write_text(json.dumps(task | {"options": task["options"] | {"instruction": "Guess:"}}))
    with pytest.raises(ArgumentError, match="was trained for another task"):
        Ensemble.from_adapters([place / "seeds" / "seed-3", tmp_path / "other"])
    with pytest.raises(ArgumentError, match="two or more adapters"):
        Ensemble.from_adapters([tmp_path / "other", tmp_path / "other"])


def test_a_sweep_takes_several(tmp_path, capsys):
    assert main(["sweep", "--task", "sentiment"]) == 2
    assert "A sweep takes several adapters" in capsys.readouterr().err
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("task: sentiment\nfolds: 3\n")
    assert main(["sweep", "--config", str(recipe), "--dry_run"]) == 0
    assert main(["sweep", "--grid", "lora_r=4,8", "--seeds", "2", "--dry_run"]) == 0
    assert "--grid lora_r=4,8 --seeds 2" in capsys.readouterr().out
