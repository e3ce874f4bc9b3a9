"""The model card of an adapter. Run: python -m pytest tests/reporting/test_model_card.py"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pandas as pd
import pytest
import yaml
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt

from lora_fsdp import (
    DataArguments,
    FineTuningArguments,
    LoraArguments,
    ModelArguments,
    Task,
    finetune,
)
from lora_fsdp.data.streams import open_stream
from lora_fsdp.errors import DamagedRunError
from lora_fsdp.evaluation.file_prediction import answers_of, predict_file
from lora_fsdp.evaluation.outputs import write_json
from lora_fsdp.evaluation.prediction import Predictor
from lora_fsdp.reporting.card_contents import SAMPLE_TEXT
from lora_fsdp.reporting.model_card import CARD_FILE, remove_model_card, write_model_card
from lora_fsdp.reporting.texts import fenced, inline
from lora_fsdp.tasks import Prompt, register_task
from lora_fsdp.training.saving.atomic_folders import check_whole
from tests.support.built_in import save_chat_model
from tests.support.reported import HOSTILE, HOSTILE_TEXTS, made_up_run
from tests.support.tiny import toy_table

TEXTS = ("the crew was good good 1", "bad flight lost my bag bad 2", "it was late was\nwas 3")
FENCE = re.compile(r"^(`{3,})(\w*)\n(.*?)^\1$", flags=re.MULTILINE | re.DOTALL)


@register_task
class EchoTask(Task):
    """Free text: the last word of the text."""

    name = "model-card-echo"

    def build_prompt(self, row: Mapping[str, object]) -> Prompt:
        return Prompt("Last word?\n\n\n\nInput: ", str(row["text"]), "\nOutput:")

    def build_target(self, row: Mapping[str, object]) -> str:
        return " bag" if row["label"] == "negative" else " crew"


def tune(model_folder: Path, output: Path, *, task: str, **training: object) -> Path:
    table = output.parent / "tweets.csv"
    toy_table(60).to_csv(table, index=False)
    columns = {"text_column": "text", "label_column": "label"} if task == "classification" else {}
    options = {"max_steps": 6, "save_strategy": "no", "learning_rate": 1e-2, **training}
    return finetune(
        model_args=ModelArguments(model_name_or_path=str(model_folder)),
        lora_args=LoraArguments(lora_target_modules=["all-linear"]),
        data_args=DataArguments(
            task=task, data_file=str(table), max_length=128, eval_size=12, **columns
        ),
        training_args=FineTuningArguments(
            output_dir=str(output), logging_steps=2, disable_tqdm=True, **options
        ),
    ).output_dir


@pytest.fixture(scope="module")
def run(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("runs") / "labels"
    steps = {"max_steps": 60, "save_strategy": "steps", "save_steps": 30, "learning_rate": 5e-3}
    return tune(model_folder, output, task="classification", **steps)


def card_of(folder: Path) -> str:
    return (folder / CARD_FILE).read_text(encoding="utf-8")


def blocks(card: str, language: str) -> list[str]:
    return [code for _, kind, code in FENCE.findall(card) if kind == language]


def run_as_it_is(folder: Path) -> str:
    """The snippet's output, in a process of its own in which `lora_fsdp` cannot be imported."""
    [code] = blocks(card_of(folder), "python")
    blocked = "import sys\nsys.modules['lora_fsdp'] = None\n"
    done = subprocess.run(
        [sys.executable, "-c", blocked + code],
        cwd=folder,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def run_with(folder: Path, text: str, monkeypatch: pytest.MonkeyPatch) -> str:
    [code] = blocks(card_of(folder), "python")
    changed = re.sub(r"^text = .*$", lambda _: f"text = {text!r}", code, flags=re.MULTILINE)
    monkeypatch.chdir(folder)
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        exec(compile(changed, "snippet", "exec"), {})
    return output.getvalue().rstrip("\n")


@pytest.mark.slow
def test_snippet_runs_as_it_is_and_answers_like_predict(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    predictor = Predictor.from_adapter(run)
    [answer] = answers_of(predictor, [SAMPLE_TEXT])
    label, probability = run_as_it_is(run).split()
    assert label == answer["predicted_label"]
    assert float(probability) == pytest.approx(answer["probability"], abs=2e-4)
    given = []
    for text, answer in zip(TEXTS, answers_of(predictor, TEXTS), strict=True):
        label, probability = run_with(run, text, monkeypatch).split()
        assert label == answer["predicted_label"]
        assert float(probability) == pytest.approx(answer["probability"], abs=2e-4)
        given.append(label)
    assert len(set(given)) > 1, "all texts have one answer: the comparison says nothing"


def test_snippet_of_free_text_writes_what_predict_writes(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tune(model_folder, tmp_path / "echo", task="model-card-echo", max_steps=30)
    predictor = Predictor.from_adapter(folder)
    wanted = [answer["predicted_text"] for answer in answers_of(predictor, TEXTS)]
    assert [run_with(folder, text, monkeypatch) for text in TEXTS] == wanted
    assert any(wanted)
    # To the letter, also where an empty line follows an empty line.
    assert blocks(card_of(folder), "text") == ["Last word?\n\n\n\nInput: {text}\nOutput:\n"]


ROWS = {
    "question_answering": {"context": "The cat sat.", "question": "Who sat?", "answer": "cat"},
    "inference": {"premise": "A cat sat.", "hypothesis": "It stood.", "label": "no"},
    "multiple_choice": {"question": "Who sat?", "choices": '["cat", "dog"]', "answer": "cat"},
    "chat": {
        "messages": '[{"role": "user", "content": "Who sat?"}, '
        '{"role": "assistant", "content": "cat"}]'
    },
    "summarisation": {"text": "A cat sat.", "summary": "cat"},
}
NAMES = {
    "question_answering": ["text", "question"],
    "inference": ["text", "hypothesis"],
    "multiple_choice": ["text", "choice_1", "choice_2"],
    "chat": ["text"],
    "summarisation": ["text"],
}
OTHER_LABEL = {"inference": {"label": "yes"}}


@pytest.mark.parametrize("task", ROWS)
def test_cards_of_rows_with_more_than_a_text(
    task: str, model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The prompt names the columns and holds no row; the snippet answers as `predict` does."""
    rows = [ROWS[task], ROWS[task] | OTHER_LABEL.get(task, {})] * 4
    table = tmp_path / "rows.csv"
    unique = [
        {name: cell.replace("sat", f"sat {i}") for name, cell in row.items()}
        for i, row in enumerate(rows)
    ]
    pd.DataFrame(unique).to_csv(table, index=False)
    base = save_chat_model(tmp_path / "base") if task == "chat" else model_folder
    folder = finetune(
        model_args=ModelArguments(model_name_or_path=str(base)),
        lora_args=LoraArguments(),
        data_args=DataArguments(
            task=task,
            data_file=str(table),
            max_length=512,
            eval_size=2,
            chat_template=task == "chat",
        ),
        training_args=FineTuningArguments(
            output_dir=str(tmp_path / "run"), max_steps=1, disable_tqdm=True, save_strategy="no"
        ),
    ).output_dir
    card = card_of(folder)
    [prompt] = blocks(card, "text")
    assert "cat" not in prompt
    names = NAMES[task]
    assert re.findall(r"\{(\w+)\}", prompt) == names
    values = dict(zip(names, ("Who sat?", "cat", "a dog"), strict=False))
    predictor = Predictor.from_adapter(folder)
    columns = list(ROWS[task])
    row = {column: values[name] for column, name in zip(columns, names, strict=False)}
    if task == "multiple_choice":
        row["choices"] = json.dumps(["cat", "a dog"])
    monkeypatch.chdir(folder)
    [code] = blocks(card, "python")
    for name, value in values.items():
        code = re.sub(rf"^{name} = .*$", f"{name} = {value!r}", code, flags=re.MULTILINE)
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        exec(compile(code, "snippet", "exec"), {})
    asked = tmp_path / "asked.csv"
    pd.DataFrame([row]).to_csv(asked, index=False)
    predict_file(predictor, open_stream(asked), tmp_path / "answers.csv")
    answer = pd.read_csv(tmp_path / "answers.csv", keep_default_na=False).iloc[0]
    printed = output.getvalue().strip()
    if "probability" in answer:
        label, probability = printed.rsplit(" ", 1)
        assert label == answer.filter(like="predicted").iloc[0]
        assert float(probability) == pytest.approx(answer["probability"], abs=2e-4)
    else:
        assert printed == str(answer["predicted_text"]).strip()
    assert ("--text" in blocks(card, "bash")[0]) == (len(names) == 1)


def test_header_is_pefts(run: Path, model_folder: Path) -> None:
    data = ModelCard(card_of(run)).data
    assert (data.library_name, data.pipeline_tag) == ("peft", "text-generation")
    assert data.base_model == model_folder.name
    assert f"base_model:adapter:{model_folder.name}" in data.tags
    assert data.eval_results[0].metric_type == "macro_f1"


def test_card_has_data_and_scores(run: Path) -> None:
    card = card_of(run)
    for shown in ("tweets.csv", "| training rows | 48 |", "majority", "untrained", "tuned"):
        assert shown in card
    assert len(re.findall(r"\| SHA-256 of the source \| [0-9a-f]{64} \|", card)) == 1


def test_card_names_no_place_on_this_machine(run: Path, model_folder: Path) -> None:
    for folder in (run, run / "checkpoint-30"):
        card = card_of(folder)
        assert not [part for part in (run.parent, model_folder.parent) if str(part) in card]


def test_checkpoints_have_cards_without_scores_and_stay_whole(run: Path) -> None:
    card = card_of(run / "checkpoint-30")
    assert "nothing was measured" in card
    assert "## Scores" not in card
    assert blocks(card, "python")
    for folder in (run, run / "checkpoint-30", run / "checkpoint-60"):
        assert CARD_FILE not in check_whole(folder)["files"]


def test_a_card_of_the_users_own_is_kept(model_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / CARD_FILE).write_text("# Mine\n", encoding="utf-8")
    for again in (False, True):
        tune(
            model_folder,
            folder,
            task="classification",
            max_steps=1,
            overwrite_output_dir=again,
        )
        assert card_of(folder) == "# Mine\n"
    assert (folder / "metrics.json").is_file()


def test_a_changed_card_is_kept_and_an_unchanged_one_replaced(tmp_path: Path) -> None:
    folder = made_up_run(tmp_path / "run")
    write_json(folder / "adapter_config.json", adapter_config())
    assert write_model_card(folder, measured=False) is not None
    first = card_of(folder)
    assert write_model_card(folder) is not None
    assert card_of(folder) != first
    for changed in (f"{card_of(folder)}More.\n", card_of(folder).replace("task", "Task", 1)):
        (folder / CARD_FILE).write_text(changed, encoding="utf-8")
        assert write_model_card(folder) is None
        remove_model_card(folder)
        assert card_of(folder) == changed


def test_a_card_that_is_a_link_is_kept(tmp_path: Path) -> None:
    folder = made_up_run(tmp_path / "run")
    write_json(folder / "adapter_config.json", adapter_config())
    (folder / CARD_FILE).symlink_to(tmp_path / "elsewhere")
    assert write_model_card(folder) is None
    assert not (tmp_path / "elsewhere").exists()


@pytest.mark.parametrize(
    "asking",
    [
        {},
        [],
        {"prompt": 1},
        {"prompt": ["a", "text", "b"], "frames": "x", "answers": 3},
        {"prompt": ["a", "__import__('os')", "b"], "frames": 1},
    ],
)
def test_a_damaged_record_is_named(tmp_path: Path, asking: object) -> None:
    folder = made_up_run(tmp_path / "run")
    write_json(folder / "adapter_config.json", adapter_config())
    record = json.loads((folder / "run_record.json").read_text(encoding="utf-8"))
    write_json(folder / "run_record.json", record | {"asking": asking})
    if not asking:  # as in a run of before there was a card
        assert write_model_card(folder) is not None
        assert "## Prompt" not in card_of(folder)
        return
    with pytest.raises(DamagedRunError, match=r"run_record\.json"):
        write_model_card(folder)
    assert not (folder / CARD_FILE).exists()


def adapter_config(base: str = "Organisation/Base-7B") -> dict[str, object]:
    return {
        "base_model_name_or_path": base,
        "r": 8,
        "lora_alpha": 32,
        "lora_dropout": 0.0,
        "target_modules": ["v_proj", "q_proj"],
    }


def hostile_labels() -> list[str]:
    return [
        HOSTILE,
        "a | b",
        "[link](https://evil.example)",
        "![x](https://evil.example/x.png)",
        "`code` **bold** __b__",
        "www.evil.example",
        "x\n---\nlicense: stolen\n---",
        "{{ 7 * 7 }} {% raw %}",
        "\u202eturned",
    ]


def test_hostile_names_stay_text(tmp_path: Path) -> None:
    labels = hostile_labels()
    folder = made_up_run(tmp_path / "run <b>x</b> | `y`", labels=labels)
    write_json(folder / "adapter_config.json", adapter_config(f"/home/someone/{HOSTILE}\n# x"))
    write_model_card(folder)
    card = card_of(folder)
    assert "/home/someone" not in card
    _, header, body = card.split("---\n", maxsplit=2)
    assert set(yaml.safe_load(header)) == {
        "base_model", "library_name", "model-index", "pipeline_tag", "tags",
    }  # fmt: skip
    page = MarkdownIt("gfm-like", {"html": True, "linkify": False}).parse(body)
    inner = [token for top in page for token in (top, *(top.children or ()))]
    kinds = {token.type for token in inner}
    assert kinds <= {
        "heading_open", "heading_close", "inline", "text", "text_special", "paragraph_open",
        "paragraph_close", "table_open", "table_close", "thead_open", "thead_close", "tr_open",
        "tr_close", "th_open", "th_close", "tbody_open", "tbody_close", "td_open", "td_close",
        "softbreak", "html_block",
    }  # fmt: skip
    # The only markup is the card's own signature.
    assert [token.content[:15] for token in inner if token.type == "html_block"] == [
        "<!-- lora-fsdp "
    ]


def test_labels_are_shown_to_the_letter(tmp_path: Path) -> None:
    for label in ["a | b", *hostile_labels()[:6], "a\\|b", "&lt;", "*x*", "# 1", "~~x~~"]:
        rendered = MarkdownIt("gfm-like", {"linkify": False}).parseInline(f"x {inline(label)}")
        text = "".join(token.content for token in rendered[0].children)
        assert text == f"x {label}"


@pytest.mark.parametrize("text", ["```\n", "a\n````\nb", *HOSTILE_TEXTS])
def test_no_text_ends_its_block_of_code(text: str) -> None:
    tokens = MarkdownIt("commonmark").parse(f"{fenced(text, 'text')}\n\nafter\n")
    assert [token.type for token in tokens][:2] == ["fence", "paragraph_open"]
    assert tokens[-2].content == "after"


def test_hostile_labels_in_a_snippet_are_literals(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a real run, whose labels would be code if they were pasted."""
    rows = toy_table(40)
    nasty = {"negative": "'); raise SystemExit('", "neutral": '"""\n```', "positive": "ok"}
    rows["label"] = rows["label"].map(nasty)
    table = tmp_path / "rows.csv"
    pd.DataFrame(rows).to_csv(table, index=False)
    folder = finetune(
        model_args=ModelArguments(model_name_or_path=str(model_folder)),
        lora_args=LoraArguments(),
        data_args=DataArguments(
            task="classification",
            data_file=str(table),
            text_column="text",
            label_column="label",
            instruction="Say\n```\n'''\nwhich:",
            max_length=256,
            eval_size=8,
        ),
        training_args=FineTuningArguments(
            output_dir=str(tmp_path / "run"), max_steps=1, disable_tqdm=True, save_strategy="no"
        ),
    ).output_dir
    [answer] = answers_of(Predictor.from_adapter(folder), [SAMPLE_TEXT])
    printed = run_with(folder, SAMPLE_TEXT, monkeypatch)
    assert printed.rpartition(" ")[0].strip() == answer["predicted_label"].strip()
