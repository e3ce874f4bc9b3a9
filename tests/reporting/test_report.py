"""Reports on made-up runs. Run: python -m pytest tests/reporting/test_report.py"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from dataclasses import asdict, fields
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

import lora_fsdp
from lora_fsdp.arguments.fsdp import FsdpSettings
from lora_fsdp.cli.main import main
from lora_fsdp.errors import ArgumentError, DamagedRunError, PdfError, RunNotFoundError
from lora_fsdp.reporting import write_comparison, write_report
from lora_fsdp.reporting.pdf import write_pdf
from lora_fsdp.reporting.sections.figures import SERIES
from lora_fsdp.reporting.sections.sharding import _IN_WORDS
from lora_fsdp.tasks import Example, Prompt, Task
from tests.support.reported import HOSTILE, HOSTILE_TEXTS, made_up_run, save_run

HOSTILE_LABELS = ("<b>bold</b>", '"quoted"', "שלילי", "w" * 300, "_private", "$x_1$")
EVERY_FILE = (
    "run_record.json",
    "data_health.json",
    "log_history.jsonl",
    "metrics.json",
    "predictions.csv",
)


class Page(HTMLParser):
    """What a page holds: its tags, its text, the ids and the links inside it."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.open: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.addresses: list[str] = []
        self.text = ""
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in ("meta", "link"):
            self.open.append(tag)
        facts = dict(attrs)
        assert not any(name.startswith("on") for name in facts)
        if facts.get("id"):
            self.ids.append(str(facts["id"]))
        if tag == "a":
            self.links.append(str(facts["href"]))
        self.addresses += [str(facts[name]) for name in ("src", "href") if facts.get(name)]

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"</{tag}> closes something else"

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.text += data

    @property
    def words(self) -> str:
        return " ".join(self.text.split())


def contents(page: Path) -> dict[str, Any]:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    return json.loads(page.with_suffix(".json").read_text(), parse_constant=refuse)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made_up_run(tmp_path_factory.mktemp("runs") / "plain")


@pytest.fixture
def copy(finished: Path, tmp_path: Path) -> Path:
    """The finished run, to be spoilt."""
    return Path(
        shutil.copytree(finished, tmp_path / "copy", ignore=shutil.ignore_patterns("report*"))
    )


def test_a_finished_run(finished: Path) -> None:
    path = write_report(finished)
    page, found = Page(path), contents(path)
    assert path == finished / "report.html"
    assert found["scores"]["verdict"]["outcome"] == "yes"
    assert "Worth it: the tuned model beats" in page.words
    assert page.open == []
    assert len(page.ids) == len(set(page.ids))
    assert {link for link in page.links if link.startswith("#")} <= {f"#{one}" for one in page.ids}
    assert "script" not in page.tags
    for address in page.addresses:
        assert address.startswith(("#", "data:,", "https://docs.vllm.ai/"))
    figures = sorted(file.name for file in (finished / "report_figures").iterdir())
    assert figures == [
        "calibration.svg",
        "grad_norm.svg",
        "learning_rate.svg",
        "loss.svg",
        "metrics.svg",
    ]


def test_scores_are_those_of_the_run(finished: Path) -> None:
    found = contents(write_report(finished))
    metrics = json.loads((finished / "metrics.json").read_text())["metrics"]
    predictions = pd.read_csv(finished / "predictions.csv")
    assert found["scores"]["rows"] == len(predictions) == 60
    for line in found["scores"]["systems"]:
        for name in ("accuracy", "macro_f1"):
            score = line["scores"][name]
            assert score["value"] == pytest.approx(metrics[line["system"]][name])
            assert score["low"] < score["value"] < score["high"]
    mistakes = int((predictions["target"] != predictions["tuned"]).sum())
    assert found["answers"]["mistakes"] == mistakes
    assert sum(map(sum, found["answers"]["matrix"]["counts"])) == 60
    confidence = [row["probability"] for row in found["answers"]["confident_mistakes"]]
    assert confidence == sorted(confidence, reverse=True)


def test_a_model_that_is_no_better_is_not_praised(tmp_path: Path) -> None:
    weak = contents(write_report(made_up_run(tmp_path / "weak", skill=0.0, held_out=200)))
    assert weak["scores"]["verdict"]["outcome"] in ("no", "unclear")
    bad = made_up_run(tmp_path / "bad", skill=-4.0, held_out=200)
    page = Page(write_report(bad))
    assert contents(bad / "report.html")["scores"]["verdict"]["outcome"] == "no"
    assert "Not worth it" in page.words
    assert "Worth it: the tuned" not in page.words


@pytest.mark.parametrize("rows", [1, 2, 12])
def test_few_rows_give_no_verdict(tmp_path: Path, rows: int) -> None:
    page = write_report(made_up_run(tmp_path / "few", labels=("no", "yes"), held_out=rows))
    scores = contents(page)["scores"]
    assert scores["verdict"]["outcome"] == "unclear"
    assert "Too few held-out rows" in Page(page).words
    resampled = scores["differences"]["untrained"]["low"]
    assert (resampled is None) == (rows < 10)


def test_everything_from_outside_is_escaped(tmp_path: Path) -> None:
    folder = tmp_path / 'run <b>"bold"</b>'
    path = write_report(made_up_run(folder, labels=HOSTILE_LABELS, texts=HOSTILE_TEXTS, skill=1.0))
    page = Page(path)
    assert page.open == []
    assert "script" not in page.tags
    for shown in (HOSTILE, "<b>bold</b>", "{{ 7 * 7 }} {% raw %}", "&lt;", "$x_1$"):
        assert shown in page.text
    source = path.read_text(encoding="utf-8")
    assert not re.search("[\x00-\x08\x0b-\x1f\u202a-\u202e\u2066-\u2069]", source)
    assert "x" * 300 not in source


def test_many_labels(many_labels_run: Path) -> None:
    path = write_report(many_labels_run)
    found = contents(path)
    assert len(found["answers"]["matrix"]["counts"]) == 77
    assert len(found["answers"]["by_label"]) == 77
    assert path.stat().st_size < 1_000_000


def test_far_too_many_labels_have_no_matrix(copy: Path) -> None:
    table = pd.read_csv(copy / "predictions.csv")
    more = pd.DataFrame(0.0, index=table.index, columns=[f"probability/{n}" for n in range(130)])
    pd.concat([table, more], axis=1).to_csv(copy / "predictions.csv", index=False)
    assert "too many labels" in Page(write_report(copy)).words


def test_labels_are_read_to_the_letter(tmp_path: Path) -> None:
    """pandas would read these as numbers and missing values."""
    folder = made_up_run(tmp_path / "odd", labels=("NA", "007", "1.0", "null"), skill=9.0)
    found = contents(write_report(folder))
    assert found["answers"]["matrix"]["labels"] == ["NA", "007", "1.0", "null"]
    assert found["answers"]["mistakes"] == 0


class WordTask(Task):
    """Free text: repeat a word."""

    name = "word"


def test_free_text(tmp_path: Path) -> None:
    examples = [Example(n, Prompt("Say ", f"word {n}", ":"), f" word {n}") for n in range(40)]
    folder = save_run(tmp_path / "free", WordTask(), examples, examples, 0.8)
    record = json.loads((folder / "metrics.json").read_text())
    wrote = {"text": "word 0 <i>", "answer": "word 0"}
    record["written"] = [{"row": 0, "base": {"text": "", "answer": None}, "tuned": wrote}]
    (folder / "metrics.json").write_text(json.dumps(record))
    path = write_report(folder)
    page, found = Page(path), contents(path)
    assert found["answers"] is None
    assert found["scores"]["metrics"] == ["exact_match", "loss"]
    tuned = found["scores"]["systems"][-1]["scores"]["exact_match"]
    assert tuned["value"] * 40 == found["free_text"]["exact"] > 0
    assert tuned["low"] < tuned["value"] < tuned["high"]
    assert "word 0 <i>" in page.text
    assert "Confusion matrix" not in page.words
    assert found["health"]["leaks"]["exact"]["rows"] == 40


@pytest.mark.parametrize("kept", [1, 2, 3])
def test_an_unfinished_run_shows_what_there_is(copy: Path, kept: int) -> None:
    for name in EVERY_FILE[kept:]:
        (copy / name).unlink()
    page = Page(write_report(copy))
    found = contents(copy / "report.html")
    assert not found["finished"]
    assert page.open == []
    assert "Not finished" in page.words
    assert "metrics.json: the scores; a run writes it last" in page.words
    assert ("Data health" in page.words) == (kept >= 2)
    assert ("Training curves" in page.words) == (kept >= 3)
    if kept == 3:
        assert found["progress"]["steps"] == found["progress"]["max_steps"] == 30
        # 29 steps of 8 examples in 29 seconds.
        assert found["progress"]["examples_per_second"] == pytest.approx(8.0)


@pytest.mark.parametrize("name", EVERY_FILE)
def test_any_file_may_be_missing(copy: Path, name: str) -> None:
    (copy / name).unlink()
    page = Page(write_report(copy))
    assert f"{name}" in page.words
    assert page.open == []


def test_a_log_line_being_written_is_left_out(copy: Path) -> None:
    log = copy / "log_history.jsonl"
    log.write_text(log.read_text() + '{"step": 31, "lo')
    assert contents(write_report(copy))["progress"]["steps"] == 30


def test_a_checkpoints_log_stands_in(copy: Path) -> None:
    (copy / "log_history.jsonl").unlink()
    for step in (9, 10):
        folder = copy / f"checkpoint-{step}"
        folder.mkdir()
        history = [{"step": step, "loss": 1.0}]
        state = {"log_history": history, "max_steps": 40}
        (folder / "trainer_state.json").write_text(json.dumps(state))
    found = contents(write_report(copy))
    assert found["curves"]["loss"] == [[10, 1.0]]
    assert found["usage"]["checkpoint"] == "checkpoint-10"


def test_losses_that_are_not_numbers_are_said_and_left_out(copy: Path) -> None:
    lines = [{"step": 1, "loss": 1.0}, {"step": 2, "loss": float("nan")}, {"step": 3, "loss": 2.0}]
    (copy / "log_history.jsonl").write_text("".join(json.dumps(one) + "\n" for one in lines))
    page = Page(write_report(copy))
    assert "1 of 3 logged values of loss are not finite" in page.words
    assert contents(copy / "report.html")["curves"]["loss"][1] == [2, None]


DAMAGE = {
    "run_record.json": ["{", "[]", '{"not_default": 3}', '{"environment": {}}', '{"fsdp": {}}'],
    "data_health.json": ["", '"text"', "{}", '{"leaks": 7}'],
    "metrics.json": ["{", "{}", '{"metrics": {}, "primary_metric": "macro_f1"}'],
    "predictions.csv": ["", "a,b\n1,2\n", "row,text,target,base,tuned,probability\nx,,,,,0.5\n"],
    "adapter_config.json": ["{}", "[1]"],
    "log_history.jsonl": ["{\n", "3\n", '{"loss": 1}\n', '{"step": 1, "loss": "high"}\n'],
}


@pytest.mark.parametrize(("name", "text"), [(n, t) for n, texts in DAMAGE.items() for t in texts])
def test_a_damaged_file_is_named(copy: Path, name: str, text: str) -> None:
    (copy / name).write_text(text)
    with pytest.raises(DamagedRunError, match=re.escape(name)):
        write_report(copy)
    assert not (copy / "report.html").exists()


def test_a_binary_file_is_named(copy: Path) -> None:
    (copy / "metrics.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DamagedRunError, match=r"metrics\.json"):
        write_report(copy)


def test_a_report_needs_no_torch(finished: Path) -> None:
    """It starts fast, and on machines that only hold the run's files."""
    package = Path(lora_fsdp.__file__).parent
    script = f"""
import sys, types
package = types.ModuleType("lora_fsdp")  # without the front door, which imports everything
package.__path__ = [{str(package)!r}]
sys.modules["lora_fsdp"] = package
from lora_fsdp.reporting import write_report
write_report({str(finished)!r})
print({{"torch", "transformers", "peft"}} & set(sys.modules))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout == "set()\n", done.stderr


def test_a_folder_without_a_run(tmp_path: Path) -> None:
    with pytest.raises(RunNotFoundError, match="holds no run"):
        write_report(tmp_path)
    with pytest.raises(RunNotFoundError, match="no folder"):
        write_report(tmp_path / "nowhere")


def test_a_plan_is_set_beside_what_came(copy: Path) -> None:
    assert "Predicted and measured" not in Page(write_report(copy)).words
    metrics = json.loads((copy / "metrics.json").read_text())
    metrics["plan"] = {"peak_memory_gb": 10.0, "training_seconds": 50.0, "cost": 2.5}
    metrics["peak_memory_gb"] = 12.0
    (copy / "metrics.json").write_text(json.dumps(metrics))
    assert "Predicted and measured" in Page(write_report(copy)).words
    plan = contents(copy / "report.html")["plan"]
    assert [(line["predicted"], line["measured"]) for line in plan] == [
        (10.0, 12.0),
        (50.0, 61.5),
        (2.5, None),
    ]


def test_figures_are_those_of_another_table_without_intervals(copy: Path) -> None:
    """Predictions that do not give the metrics' value must not give it an interval."""
    table = pd.read_csv(copy / "predictions.csv")
    table["tuned"] = np.roll(table["tuned"], 1)
    table.to_csv(copy / "predictions.csv", index=False)
    tuned = contents(write_report(copy))["scores"]["systems"][-1]
    assert tuned["scores"]["macro_f1"]["low"] is None


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("two")
    runs = [
        made_up_run(root / part / "run", skill=skill, held_out=200, seed=seed)
        for part, skill, seed in (("<a>", 0.5, 1), ("b", 4.0, 2))
    ]
    record = json.loads((runs[1] / "run_record.json").read_text())
    record["arguments"]["training"] = {"learning_rate": 0.5, "output_dir": "elsewhere"}
    (runs[1] / "run_record.json").write_text(json.dumps(record))
    return runs


def test_two_runs_side_by_side(two: list[Path], tmp_path: Path) -> None:
    path = write_comparison(two, tmp_path / "new" / "both.html")
    page, found = Page(path), contents(path)
    assert path == tmp_path / "new" / "both.html"
    assert found["names"] == ["<a>/run", "b/run"]
    pair = found["against_first"]["b/run"]
    assert pair["rows"] == 200
    assert pair["differences"]["macro_f1"]["low"] > 0
    assert pair["mcnemar_p_value"] < 0.001
    assert "b/run is better than <a>/run" in page.words
    assert {line["name"]: line["values"] for line in found["settings"]} == {
        "learning_rate": [None, "0.5"]
    }
    assert page.open == []
    assert len(page.ids) == len(set(page.ids))
    assert (tmp_path / "new" / "both_figures" / "loss.svg").is_file()


def test_the_order_decides_the_sign(two: list[Path], tmp_path: Path) -> None:
    found = contents(write_comparison(two[::-1], tmp_path))
    assert (tmp_path / "comparison.html").is_file()
    assert found["against_first"]["<a>/run"]["differences"]["accuracy"]["high"] < 0


def test_other_rows_are_not_paired(two: list[Path], tmp_path: Path) -> None:
    other = made_up_run(tmp_path / "other", held_out=50)
    page = write_comparison([two[0], other], tmp_path / "c.html")
    assert not contents(page)["against_first"]["other"]["same_rows"]
    assert "not scored on the same held-out rows" in Page(page).words


def test_an_unfinished_run_takes_part(two: list[Path], copy: Path, tmp_path: Path) -> None:
    for name in ("metrics.json", "predictions.csv"):
        (copy / name).unlink()
    page = Page(write_comparison([copy, two[0]], tmp_path / "c.html"))
    assert "not finished" in page.words
    assert page.open == []


def test_a_run_has_one_colour_in_all_pictures(two: list[Path], copy: Path, tmp_path: Path) -> None:
    log = copy / "log_history.jsonl"
    lines = [line for line in log.read_text().splitlines() if "eval" not in line]
    log.write_text("\n".join(lines) + "\n")
    write_comparison([copy, two[0]], tmp_path / "c.html")
    loss, evaluated = (
        (tmp_path / "c_figures" / f"{name}.svg").read_text() for name in ("loss", "eval_loss")
    )
    assert SERIES[0] in loss
    assert SERIES[1] in loss
    assert SERIES[0] not in evaluated
    assert SERIES[1] in evaluated


def test_it_takes_two(two: list[Path], tmp_path: Path) -> None:
    for folders in ([], two[:1], [two[0], two[0]]):
        with pytest.raises(ArgumentError, match="two or more different runs"):
            write_comparison(folders, tmp_path)


def test_a_pdf_is_refused_where_there_is_no_browser(
    copy: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("lora_fsdp.reporting.pdf._BROWSERS", ("no-such-browser",))
    assert main(["report", str(copy), "--pdf"]) != 0
    said = capsys.readouterr().err
    assert "--pdf needs a browser to print with" in said
    assert "Traceback" not in said
    assert not (copy / "report.html").exists()


def test_a_browser_that_prints_nothing_is_an_error(tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    page.write_text("<title>x</title>")
    for program, said in (("false", "it said nothing"), (str(tmp_path / "none"), "No such file")):
        with pytest.raises(PdfError, match=said):
            write_pdf(page, program=program)
    assert list(tmp_path.iterdir()) == [page]


def test_settings_of_fsdp_are_sentences(copy: Path) -> None:
    record = json.loads((copy / "run_record.json").read_text())
    record["fsdp"]["settings"] = asdict(
        FsdpSettings(
            reshard_after_forward=True,
            offload=False,
            activation_checkpointing=True,
            layer_classes=("LlamaDecoderLayer",),
            wrap_layers=True,
            replicas=2,
        )
    )
    (copy / "run_record.json").write_text(json.dumps(record))
    page = Page(write_report(copy))
    for sentence in (
        "A gathered layer is freed after its forward pass and gathered again for backward.",
        "The shards are kept on the devices that compute.",
        "Activations are computed again in the backward pass.",
        "Groups are layers of class LlamaDecoderLayer.",
        "There are 2 copies of the sharded base (hybrid sharding).",
    ):
        assert sentence in page.words
    # Every field of the settings is spoken of: a new one needs its sentence.
    assert {*_IN_WORDS, "layer_classes", "replicas"} == {one.name for one in fields(FsdpSettings)}


def test_a_section_that_found_nothing_is_folded_and_says_so(tmp_path: Path) -> None:
    texts = [f"{word} {number}" for number in range(400) for word in ("late", "bag")]
    run = made_up_run(tmp_path / "clean", texts=texts, skill=40.0)
    health = json.loads((run / "data_health.json").read_text())
    for part in ("exact_duplicates", "near_duplicates", "contradictions"):
        health[part] = health[part] | {"rows": 0, "groups": 0}
    for part in ("exact", "near"):
        health["leaks"][part]["rows"] = 0
    health["suspected_training_labels"] = None
    (run / "data_health.json").write_text(json.dumps(health))
    path = write_report(run)
    briefs = contents(path)["briefs"]
    assert briefs["mistakes"] == "none among 60 held-out rows"
    assert briefs["health"] == "nothing found"
    assert "Looked for and not found: same text as another row;" in Page(path).words
    health["leaks"]["near"]["rows"] = 2
    (run / "data_health.json").write_text(json.dumps(health))
    assert contents(write_report(run))["briefs"]["health"] is None
