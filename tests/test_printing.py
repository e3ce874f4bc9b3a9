"""What is printed or rendered only shows. Run: python -m pytest tests/test_printing.py"""

from __future__ import annotations

import ast
import io
import json
import re
from pathlib import Path

import pytest

from lora_fsdp.cli.command import print_json
from lora_fsdp.cli.terminal import table_text, write
from lora_fsdp.errors import DataError
from lora_fsdp.evaluation.comparison import format_generated
from lora_fsdp.evaluation.outputs import format_metrics_table
from lora_fsdp.failures import report_failure
from lora_fsdp.printing import cost_text, say, visible, without_secrets
from lora_fsdp.reporting import write_report
from lora_fsdp.reporting.recording.environment import _masked
from tests.support.reported import made_up_run

PACKAGE = Path(__file__).parents[1] / "lora_fsdp"
# ESC, C1 CSI, carriage return, backspace, an override, an isolate, a lone surrogate, a tag, ...
EVIL = "\x1b[31m \x9b2J \r \x08 \u202e \u2066 \u061c \ud800 \U000e0041 \u2028"
RAW = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u2028-\u202e\u2066-\u2069\ud800-\udfff\U000e0041]"
)
SHOWN = r"\x1b[31m \x9b2J \r \x08 \u202e \u2066 \u061c \ud800 \U000e0041 \u2028"


def test_what_is_shown() -> None:
    assert visible(EVIL) == SHOWN
    assert visible(visible(EVIL)) == SHOWN
    assert visible("a\nb\tc") == "a\nb\tc"
    assert visible("a\nb\tc", lines=False) == r"a\nb\tc"
    for plain in ("é 漢字\u3000かな", "שלום", "می\u200cخو", "👩\u200d🚀", "1\u00a0000 [red]"):
        assert visible(plain) == plain


def test_every_way_to_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    say(EVIL)
    write(EVIL, marked=EVIL)
    write(table_text([EVIL, "b"], [[EVIL, EVIL]]))
    write(format_metrics_table({EVIL: {EVIL: 0.5}}, [EVIL]))
    evil = {"text": EVIL, "answer": EVIL}
    write(format_generated({"row": 1, "base": evil, "tuned": evil}))
    out = capsys.readouterr().out
    assert out.count("x1b") >= 10
    assert not RAW.search(out)


@pytest.mark.parametrize("columns", [30, 50, 66, 72, 80, 100])
def test_tables_break_no_word(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    headings = ("GPUs", "strategy", "base", "GB", "spare", "time", "cost")
    rows = [
        ("1 x MyCardWithALongName", "resident, recomputing", "bf16", "14.7", "-1.1", "4 min", "0"),
        ("2 x RTX4090", "full shard", "4-bit", "8.0", "+10.2", "79 s", "0.004"),
    ]
    shown = table_text(headings, rows)
    assert max(map(len, shown.splitlines())) <= columns
    for cell in (*headings[1:], *(cell for row in rows for cell in row)):
        assert all(word in shown for word in cell.split()), cell


def test_sums_of_money() -> None:
    assert [cost_text(c) for c in (0, 0.0041, 0.0099, 0.01, 3, 1234.5)] == [
        "0.00", "0.0041", "0.0099", "0.01", "3.00", "1234.50",
    ]  # fmt: skip


def test_an_answer_cannot_forge_a_line() -> None:
    forged = {"text": "x", "answer": "x\n\nWorth it: the tuned model beats everything."}
    assert len(format_generated({"row": 1, "base": forged, "tuned": forged}).splitlines()) == 3


def test_json_is_safe_and_says_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    value = {EVIL: [EVIL, "漢字\n"]}
    print_json(value)
    out = capsys.readouterr().out
    assert json.loads(out) == value
    assert not RAW.search(out)
    assert "漢字" in out


def test_errors_too(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    monkeypatch.setattr("sys.__stderr__", stream)
    monkeypatch.delenv("TORCHELASTIC_ERROR_FILE", raising=False)
    with pytest.raises(SystemExit):
        report_failure(DataError, DataError(EVIL), None)
    assert stream.getvalue() == f"DataError: {SHOWN}\n"


def test_every_place_of_a_report(tmp_path: Path) -> None:
    """All texts of all its files, the settings' names among them."""
    evil = EVIL.replace("\ud800", "")  # no file in UTF-8 can hold it
    run = made_up_run(tmp_path / "run", labels=[f"{evil}{n}" for n in range(3)], texts=[evil])
    for name in ("run_record.json", "metrics.json"):
        record = json.loads((run / name).read_text(encoding="utf-8"))
        if name == "run_record.json":
            record |= {"answers": evil, "task": evil, "device": evil}
            record["not_default"] = {group: {evil: evil} for group in ("data", "training")}
            record["environment"] |= {"platform": evil, "devices": [evil], "python": evil}
            record["arguments"]["data"] = {"data_file": evil, "eval_file": evil}
        (run / name).write_text(json.dumps(record), encoding="utf-8")
    page = write_report(run).read_text(encoding="utf-8")
    assert "x1b" in page
    assert not RAW.search(page)


def test_nothing_is_printed_past_the_gate() -> None:
    """Completion is a script for a shell; the notebook passes on what a process has printed."""
    past = {"printing.py", "cli/completion.py", "notebook.py"}
    for source in PACKAGE.rglob("*.py"):
        names = {
            node.func.id
            for node in ast.walk(ast.parse(source.read_text(encoding="utf-8")))
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
        }
        assert "print" not in names or source.relative_to(PACKAGE).as_posix() in past, source


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ({"api_key": "abc", "depth": 3}, {"api_key": "***", "depth": 3}),
        ({"a": [{"openai_token": 5}]}, {"a": [{"openai_token": "***"}]}),
        ({"password": None, "use_token": True}, {"password": None, "use_token": True}),
        ('{"api_key": "abc", "n": 1}', '{"api_key": "***", "n": 1}'),
        ('{"n": 1}', '{"n": 1}'),
        ("https://me:pass@word@host/x?a=b", "https://***@host/x?a=b"),
        ("https://host/x?api_key=abc&n=1", "https://host/x?api_key=***&n=1"),
        ("hf_" + "a" * 34, "***"),
        ("a text about a@b.c and keys", "a text about a@b.c and keys"),
        ({"label_column": "key", "tokens": 5}, {"label_column": "key", "tokens": 5}),
    ],
)
def test_secrets_do_not_show(value: object, shown: object) -> None:
    assert without_secrets(value) == shown


def test_secrets_in_a_command() -> None:
    command = ["train.py", "--task_options", '{"api_key": "abc"}', "--hub_token", "abc"]
    command += ['--task_options={"secret": "abc"}', "--endpoint", "https://u:abc@host"]
    command += ["--endpoint=https://u:abc@host", "--lora_r", "8"]
    masked = _masked(command)
    assert "abc" not in " ".join(masked)
    assert masked[:1] + masked[-2:] == ["train.py", "--lora_r", "8"]
    assert masked[2] == '{"api_key": "***"}'
