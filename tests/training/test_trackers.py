"""Every figure of the log is in the tracker that is named, and one that cannot be used is refused.

Run: python -m pytest tests/training/test_trackers.py (needs the trackers to be installed)
"""

import json
import math
import re
import sqlite3
from importlib.util import find_spec

import pytest

from lora_fsdp import FineTuningArguments
from lora_fsdp.arguments.trackers import PACKAGES
from lora_fsdp.errors import ArgumentError, MissingPackageError
from tests.support.runs import toy_trainer

# Of a training step and of an evaluation, in the log's own words.
WANTED = {
    "loss", "learning_rate", "grad_norm", "examples_per_second", "tokens_per_second",
    "eta_seconds", "cost", "eval_loss", "eval_macro_f1", "eval_accuracy",
}  # fmt: skip


def in_tensorboard(folder):
    """Its figures, {name: {step: value}}, under the log's names."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    [events] = folder.rglob("events.out.*")
    read = EventAccumulator(str(events)).Reload()
    return {
        as_logged(tag): {event.step: event.value for event in read.Scalars(tag)}
        for tag in read.Tags()["scalars"]
    }


def in_mlflow(folder):
    import mlflow

    client = mlflow.MlflowClient(f"sqlite:///{folder}/mlflow.db")
    [run] = client.search_runs([client.get_experiment_by_name("Default").experiment_id])
    return {
        name: {
            entry.step: entry.value for entry in client.get_metric_history(run.info.run_id, name)
        }
        for name in run.data.metrics
    }


def in_trackio(folder):
    found: dict[str, dict[int, float]] = {}
    with sqlite3.connect(folder / "huggingface.db") as database:
        for (row,) in database.execute("select metrics from metrics"):
            values = json.loads(row)
            step = values.pop("train/global_step")
            for name, value in values.items():
                found.setdefault(as_logged(name), {})[step] = value
    return found


def as_logged(name):
    """`train/loss` is `loss`, and `eval/loss` is `eval_loss`."""
    return re.sub("^eval/", "eval_", name.removeprefix("train/"))


@pytest.mark.filterwarnings("ignore")  # a tracker's own
@pytest.mark.parametrize("read", [in_tensorboard, in_mlflow, in_trackio])
def test_figures(tmp_path, monkeypatch, read):
    name = read.__name__.removeprefix("in_")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path))  # read when it is imported
    pytest.importorskip(name, reason=f"pip install {name} to test it")
    trainer = toy_trainer(
        tmp_path / "run", report_to=[name], max_steps=4, logging_steps=2, eval_strategy="steps",
        eval_steps=2, price_per_hour=1.0,
    )  # fmt: skip
    trainer.train()
    found = read(tmp_path)
    assert found.keys() >= WANTED
    logged = [
        (key, entry["step"], value)
        for entry in trainer.state.log_history
        for key, value in entry.items()
        if key in WANTED
    ]
    assert len(logged) == 2 * len(WANTED)
    for key, step, value in logged:
        assert math.isclose(found[key][step], value, rel_tol=1e-5), (key, step)


@pytest.mark.filterwarnings("ignore")
def test_names_in_the_file_that_wandb_keeps_offline(tmp_path, monkeypatch):
    """Their values are in a form that wandb's own server reads."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    wandb = pytest.importorskip("wandb", reason="pip install wandb to test it")
    toy_trainer(
        tmp_path / "run", report_to=["wandb"], max_steps=2, logging_steps=2, eval_strategy="steps",
        eval_steps=2, price_per_hour=1.0,
    ).train()  # fmt: skip
    wandb.finish()
    [file] = tmp_path.rglob("*.wandb")
    names = re.findall(rb"(?:train|eval)/[a-z0-9_]+", file.read_bytes())
    assert {as_logged(name.decode()) for name in names} >= WANTED


def test_one_that_is_not_installed(tmp_path):
    absent = [name for name in PACKAGES if find_spec(name) is None]
    if not absent:
        pytest.skip("all are installed")
    with pytest.raises(MissingPackageError, match=f"pip install {absent[0]}"):
        FineTuningArguments(output_dir=str(tmp_path), report_to=absent[0])


def test_one_that_does_not_exist(tmp_path):
    with pytest.raises(ArgumentError, match="Did you mean 'tensorboard'"):
        FineTuningArguments(output_dir=str(tmp_path), report_to="tensorbord")


def test_none_is_none(tmp_path):
    assert FineTuningArguments(output_dir=str(tmp_path), report_to="none").report_to == []
