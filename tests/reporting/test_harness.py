"""A run as a task of lm-evaluation-harness.

Run: python -m pytest tests/reporting/test_harness.py
"""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest
import yaml

from lora_fsdp import DataArguments, FineTuningArguments, LoraArguments, ModelArguments, finetune
from tests.support.adapters import save_base
from tests.support.tiny import LABELS, toy_table


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("harness")
    table = toy_table(60)
    table["text"] += " {{ 7 * 7 }} 'quoted' {% if %}"
    table.to_csv(root / "table.csv", index=False)
    finetune(
        model_args=ModelArguments(str(save_base(root / "base"))),
        lora_args=LoraArguments(lora_target_modules=["all-linear"]),
        data_args=DataArguments(
            task="classification",
            instruction='It\'s {odd}: say how "it" {{ sounds }}:',
            data_file=str(root / "table.csv"),
            eval_size=30,
            max_length=256,
        ),
        training_args=FineTuningArguments(
            output_dir=str(root / "run"),
            max_steps=4,
            learning_rate=1e-2,
            save_strategy="no",
            disable_tqdm=True,
        ),
    )
    return root / "run"


@pytest.mark.slow
def test_the_file_asks_as_the_run_did(run: Path) -> None:
    import jinja2

    task = yaml.safe_load((run / "lm_eval.yaml").read_text())
    prompt = jinja2.Template(task["doc_to_text"]).render(text="a {{ text }}")
    said = 'It\'s {odd}: say how "it" {{ sounds }}:'
    assert prompt == f"Instruction: {said}\nInput: a {{{{ text }}}}\nOutput:"
    assert task["doc_to_choice"] == [f" {label}<|end|>" for label in LABELS]
    for place, label in enumerate(LABELS):
        target = jinja2.Template(task["doc_to_target"]).render(target=label)
        assert target == str(place)


@pytest.mark.filterwarnings("ignore")  # lm_eval's own
def test_lm_eval_gives_the_same_answers(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lm_eval = pytest.importorskip("lm_eval", reason="pip install lm_eval to test it")
    from lm_eval.models.huggingface import HFLM

    monkeypatch.setenv("HF_DATASETS_CACHE", str(run.parent / "cache"))
    monkeypatch.chdir(run)  # the file names the rows beside it
    model = HFLM(pretrained=str(run.parent / "base"), peft=str(run), device="cpu", batch_size=4)
    task = yaml.safe_load((run / "lm_eval.yaml").read_text())
    found = lm_eval.simple_evaluate(model, tasks=[task], log_samples=True, bootstrap_iters=0)
    answers = pd.read_csv(run / "predictions.csv", keep_default_na=False)
    [samples] = found["samples"].values()
    assert len(samples) == len(answers) == 30
    given = [
        LABELS[max(range(3), key=lambda place: sample["filtered_resps"][place][0])]
        for sample in sorted(samples, key=lambda sample: sample["doc_id"])
    ]
    assert given == answers["tuned"].tolist()
    [metrics] = found["results"].values()
    share = (answers["tuned"] == answers["target"]).mean()
    assert metrics["acc,none"] == pytest.approx(share)
