"""Every built-in task trains, evaluates and predicts on its shipped rows, on 1 and on 2 ranks.

Run: python -m pytest tests/tasks/test_built_in_tasks.py
"""

from __future__ import annotations

from typing import Any

import pytest

from lora_fsdp.tasks import list_tasks
from tests.support.built_in import RECIPES, data_arguments, predict_all, save_chat_model, train_all
from tests.support.ranks import launch_environment, run_ranks

pytestmark = pytest.mark.distributed
each_recipe = pytest.mark.parametrize("recipe", RECIPES)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """All tasks in two launches: what one process and each of two ranks found."""
    folder = tmp_path_factory.mktemp("built_in")
    base = save_chat_model(folder / "base")
    [alone] = run_ranks(train_all, base, folder / "alone", world_size=1)
    environment = launch_environment("fsdp2_cpu.yaml")
    ranks = run_ranks(train_all, base, folder / "ranks", environment=environment)
    [predicted] = run_ranks(predict_all, folder / "ranks", world_size=1)
    return {"alone": alone, "ranks": ranks, "predicted": predicted}


def test_every_built_in_task_has_a_recipe() -> None:
    tasks = {data_arguments(recipe).task for recipe in RECIPES}
    built_in = {info.name for info in list_tasks() if info.origin.startswith("lora_fsdp.")}
    assert built_in - {"sentiment"} == tasks


@each_recipe
@pytest.mark.slow
def test_two_ranks_find_what_one_process_finds(results: dict[str, Any], recipe: str) -> None:
    alone = results["alone"][recipe]
    for found in (rank[recipe] for rank in results["ranks"]):
        assert found["written"] == alone["written"]
        assert found["metrics"] == pytest.approx(alone["metrics"], abs=1e-5)


@each_recipe
@pytest.mark.slow
def test_the_saved_adapter_gives_the_metrics_of_training(
    results: dict[str, Any], recipe: str
) -> None:
    trained, predicted = results["ranks"][0][recipe], results["predicted"][recipe]
    assert predicted["written"] == trained["written"]
    expected = {f"eval_{name}": value for name, value in predicted["metrics"].items()}
    assert trained["metrics"] == pytest.approx(expected, abs=1e-5)
    assert len(expected) > 1
