"""Adapters that PEFT alone has saved, asked by `predict` and `evaluate`.

Run: python -m pytest tests/cli/test_trained_elsewhere.py
"""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from lora_fsdp.cli.main import main
from tests.support.adapters import save_base
from tests.support.tiny import LABELS, randomise_adapter, toy_table

SAY = "Say how it sounds:"
ASKED = ["--task", "classification", "--labels", *LABELS, "--instruction", SAY]


@pytest.fixture(scope="module")
def foreign(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that PEFT wrote: two files, no tokenizer, no `task.json`, no proof."""
    root = tmp_path_factory.mktemp("elsewhere")
    base = AutoModelForCausalLM.from_pretrained(save_base(root / "base"))
    model = get_peft_model(
        base, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    )
    randomise_adapter(model)
    model.save_pretrained(root / "adapter")
    assert not (root / "adapter" / "tokenizer.json").exists()
    return root / "adapter"


def run(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    code = main([str(word) for word in words])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def likelihoods(folder: Path, text: str) -> torch.Tensor:
    """Of each label after the prompt, by transformers and PEFT alone."""
    from peft import AutoPeftModelForCausalLM

    model = AutoPeftModelForCausalLM.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder.parent / "base")
    prompt = tokenizer(f"Instruction: {SAY}\nInput: {text}\nOutput:")["input_ids"]
    found = []
    for label in LABELS:
        answer = [*tokenizer(f" {label}")["input_ids"], tokenizer.eos_token_id]
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([prompt + answer]), use_cache=False).logits[0]
        chosen = logits[len(prompt) - 1 : -1].log_softmax(-1)
        found.append(chosen.gather(1, torch.tensor(answer)[:, None]).sum())
    return torch.stack(found)


def test_predict_answers_as_peft_alone_does(
    foreign: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = "the crew was friendly"
    code, said, wrong = run(
        capsys, "predict", "--adapter", foreign, "--text", text, *ASKED, "--json"
    )
    assert code == 0, wrong
    answer = json.loads(said)
    expected = likelihoods(foreign, text).softmax(0)
    given = [answer[f"probability/{label}"] for label in LABELS]
    assert given == pytest.approx(expected.tolist(), abs=1e-4)
    assert answer["predicted_label"] == LABELS[int(expected.argmax())]


def test_a_table_is_answered_and_measured(
    foreign: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = toy_table(9).rename(columns={"text": "body", "label": "mood"})
    table.to_csv(tmp_path / "new.csv", index=False)
    columns = ["--text_column", "body"]
    code, _, wrong = run(
        capsys, "predict", tmp_path / "new.csv", "--output", tmp_path / "out.csv",
        "--adapter", foreign, *columns, *ASKED,
    )  # fmt: skip
    assert code == 0, wrong
    answers = pd.read_csv(tmp_path / "out.csv")["predicted_label"]
    code, said, wrong = run(
        capsys, "evaluate", tmp_path / "new.csv", "--adapter", foreign, *columns,
        "--label_column", "mood", *ASKED, "--json",
    )  # fmt: skip
    assert code == 0, wrong
    share = (answers.to_numpy() == table["mood"].to_numpy()).mean()
    assert json.loads(said)["metrics"]["accuracy"] == pytest.approx(share)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "holds no task.json"),
        (["--labels", "a", "b"], "name its --task as well"),
        (["--max_length", "0"], "name its --task as well"),
        (["--task", "classification"], "--labels is missing"),
        (["--task", "sentimant", "--labels", "a"], "No task 'sentimant'"),
        ([*ASKED, "--max_length", "0"], "--max_length must be 1 or more"),
        ([*ASKED, "--task_options", "[1]"], "task_options"),
        ([*ASKED, "--base", "/nowhere/at/all"], "/nowhere/at/all"),
    ],
)
def test_what_is_not_said_is_asked_for_in_a_sentence(
    foreign: Path, capsys: pytest.CaptureFixture[str], words: list[str], said: str
) -> None:
    code, _, wrong = run(capsys, "predict", "--adapter", foreign, "--text", "late", *words)
    assert code != 0
    assert said in wrong
    assert "Traceback" not in wrong


def test_an_adapter_that_says_it_itself_takes_no_other_word(
    foreign: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = tmp_path / "own"
    own.mkdir()
    for file in foreign.iterdir():
        (own / file.name).write_bytes(file.read_bytes())
    (own / "task.json").write_text("{}")
    code, _, wrong = run(capsys, "predict", "--adapter", own, "--text", "late", *ASKED)
    assert code != 0
    assert "says itself how it is asked (task.json)" in wrong
    code, _, wrong = run(capsys, "predict", "--adapter", own, foreign, "--text", "late", *ASKED)
    assert "leave out --task, --labels, --instruction" in wrong
