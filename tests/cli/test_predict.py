"""A finished adapter at work from the command line.

Run: python -m pytest tests/cli/test_predict.py
"""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from lora_fsdp import DataArguments, FineTuningArguments, LoraArguments, ModelArguments, finetune
from lora_fsdp.cli.main import main
from tests.support.tiny import LABELS, toy_table

ROOT = Path(__file__).resolve().parents[2]
NEW = ["predicted_label", "probability", *(f"probability/{label}" for label in LABELS)]


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Threads that wait for each other on a busy machine cost more than all else here."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def adapter(model_folder, tmp_path_factory):
    """A run's output folder."""
    folder = tmp_path_factory.mktemp("run")
    table = folder / "table.csv"
    toy_table(40).to_csv(table, index=False)
    finetune(
        model_args=ModelArguments(model_name_or_path=str(model_folder)),
        lora_args=LoraArguments(lora_target_modules=["all-linear"]),
        data_args=DataArguments(
            task="classification",
            instruction="Say how it sounds:",
            text_column="text",
            label_column="label",
            data_file=str(table),
            max_length=128,
        ),
        training_args=FineTuningArguments(
            output_dir=str(folder / "run"),
            max_steps=3,
            save_strategy="no",
            disable_tqdm=True,
            learning_rate=1e-2,
        ),
    )
    return folder / "run"


def run(capsys, *words):
    code = main([str(word) for word in words])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_base_that_was_moved(adapter, model_folder, tmp_path, capsys):
    moved, copy = tmp_path / "moved", tmp_path / "far" / "away" / "adapter"
    shutil.copytree(model_folder, moved)
    shutil.copytree(adapter, copy)
    settings = json.loads((copy / "adapter_config.json").read_text())
    settings["base_model_name_or_path"] = str(tmp_path / "gone")
    (copy / "adapter_config.json").write_text(json.dumps(settings))
    (copy / "manifest.json").unlink()
    asked = ("predict", "--text", "a fine day", "--adapter", copy)
    code, _, error = run(capsys, *asked)
    assert (code, "--base" in error) == (2, True)
    code, found, _ = run(capsys, *asked, "--base", moved)
    assert code == 0
    assert any(label in found for label in LABELS)


def predict(capsys, table, adapter, output, *more):
    return run(capsys, "predict", table, "--adapter", adapter, "--output", output, *more)


def read_csv(path):
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.reader(file))


# Cells that a parser that guesses types would change, and what CSV must quote.
TRICKY = [
    ["id", "text", "note"],
    ["007", "the flight was late", "NA"],
    ["1.0", 'a "quoted", bad\nflight', ""],
    ["", "good crew 日本 🙂", "null"],
    ["4", "  ", "no text here"],
    ["5", "", "nor here"],
    ["6", "thanks for help", "1e400"],
]


class TestTable:
    def test_csv_rows_come_back_to_the_letter(self, capsys, adapter, tmp_path):
        table, output = tmp_path / "in.csv", tmp_path / "out.csv"
        with table.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows(TRICKY)
        code, out, _ = predict(capsys, table, adapter, output, "--chunk_rows", 2)
        assert code == 0
        answered = read_csv(output)
        assert [row[:3] for row in answered] == TRICKY
        assert answered[0][3:] == NEW
        for row in (answered[4], answered[5]):
            assert row[3:] == [""] * len(NEW)
        for row in (*answered[1:4], answered[6]):
            probabilities = dict(zip(LABELS, map(float, row[5:]), strict=True))
            assert sum(probabilities.values()) == pytest.approx(1, abs=1e-5)
            assert row[3] == max(probabilities, key=probabilities.get)
            assert float(row[4]) == max(probabilities.values())
        assert "6 rows answered" in out
        assert "rows/s" in out
        assert "2 rows have no text and no answer: row 4, 5" in out
        assert sorted(p.name for p in tmp_path.iterdir()) == ["in.csv", "out.csv"]

    def test_answers_do_not_depend_on_the_chunks(self, capsys, adapter, tmp_path):
        table = tmp_path / "in.csv"
        toy_table(23, seed=5).to_csv(table, index=False)
        answers = []
        for size in (1, 7, 100):
            output = tmp_path / f"{size}.csv"
            assert predict(capsys, table, adapter, output, "--chunk_rows", size)[0] == 0
            answers.append(pd.read_csv(output))
        assert list(answers[0]["text"]) == list(toy_table(23, seed=5)["text"])
        for other in answers[1:]:
            pd.testing.assert_frame_equal(answers[0], other, rtol=1e-4)

    def test_they_are_those_of_the_runs_own_evaluation(self, capsys, adapter, tmp_path):
        held_out = pd.read_csv(adapter / "predictions.csv")
        table = tmp_path / "in.csv"
        held_out[["text"]].to_csv(table, index=False)
        assert predict(capsys, table, adapter, tmp_path / "out.csv")[0] == 0
        found = pd.read_csv(tmp_path / "out.csv")
        assert list(found["predicted_label"]) == list(held_out["tuned"])
        for label in LABELS:
            name = f"probability/{label}"
            assert found[name].to_numpy() == pytest.approx(held_out[name].to_numpy(), abs=1e-4)

    def test_json_lines_keep_what_is_written(self, capsys, adapter, tmp_path):
        lines = ['{"text": "good",  "n": 1.0, "big": 12345678901234567890, "x": null}',
                 '{"n": [1, {"a": 2}], "text": "bad é"}', "{}", '{"text": null}']  # fmt: skip
        table, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
        table.write_text("\n".join(lines) + "\n\n", encoding="utf-8")
        assert predict(capsys, table, adapter, output, "--chunk_rows", 4)[0] == 0
        answered = output.read_text(encoding="utf-8").splitlines()
        assert len(answered) == 4
        for line, new in zip(lines, answered, strict=True):
            assert new.startswith(line[:-1])
            assert list(json.loads(new)) == [*json.loads(line), *NEW]
        assert json.loads(answered[2])["predicted_label"] is None

    def test_parquet_keeps_its_types(self, capsys, adapter, tmp_path):
        table = pa.table(
            {
                "text": pa.array([None, *toy_table(20)["text"]]),
                "when": pa.array(range(21), type=pa.timestamp("s")),
                "tags": pa.array([[i] for i in range(21)], type=pa.list_(pa.int8())),
            }
        )
        source, output = tmp_path / "in.parquet", tmp_path / "out.parquet"
        pq.write_table(table, source, row_group_size=3)
        code, out, _ = predict(capsys, source, adapter, output, "--chunk_rows", 8, "--json")
        assert code == 0
        answered = pq.read_table(output)
        assert answered.select(table.column_names).equals(pq.read_table(source))
        assert answered.column_names == [*table.column_names, *NEW]
        assert json.loads(out)["rows_without_text"] == [1]
        assert answered["probability"].null_count == 1
        assert set(answered["predicted_label"].to_pylist()) <= {None, *LABELS}

    def test_other_column_and_taken_names(self, capsys, adapter, tmp_path):
        table = tmp_path / "in.tsv"
        table.write_text("body\tprobability\nbad flight\tmine\n")
        code, _, error = predict(capsys, table, adapter, tmp_path / "out.tsv")
        assert code == 2
        assert "'text'" in error
        assert "'body', 'probability'" in error
        assert "--text_column" in error
        words = [table, adapter, tmp_path / "o.tsv", "--text_column", "body"]
        code, _, error = predict(capsys, *words)
        assert code == 2
        assert "--column_prefix" in error
        assert predict(capsys, *words, "--column_prefix", "new_", "--overwrite")[0] == 0
        assert read_csv(tmp_path / "o.tsv")[0][0].startswith("body\tprobability\tnew_predicted")


class TestResume:
    def test_killed_and_called_again(self, capsys, adapter, tmp_path):
        table, output = tmp_path / "in.csv", tmp_path / "out.csv"
        toy_table(800, seed=2).to_csv(table, index=False)
        words = ["predict", table, "--adapter", adapter, "--output", output, "--chunk_rows", 10]
        process = subprocess.Popen(
            [sys.executable, "-m", "lora_fsdp", *map(str, words)],
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.DEVNULL,
        )
        partial = tmp_path / "out.csv.partial"
        limit = time.monotonic() + 120
        while len(list(partial.glob("0*.csv"))) < 5:
            assert process.poll() is None
            assert time.monotonic() < limit
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert not output.exists()
        done = len(list(partial.glob("0*.csv")))
        assert 5 <= done < 80

        code, out, _ = run(capsys, *words, "--json")
        assert code == 0
        found = json.loads(out)
        assert found["rows"] == 800
        assert found["resumed_rows"] == 10 * done
        answered = pd.read_csv(output)
        assert list(answered["text"]) == list(toy_table(800, seed=2)["text"])
        assert answered["predicted_label"].isin(LABELS).all()
        assert not partial.exists()

    def begun(self, capsys, adapter, tmp_path):
        """A first chunk, and then a row that cannot be read."""
        table = tmp_path / "in.jsonl"
        table.write_text('{"text": "good"}\n{"text": \n')
        code, _, error = predict(capsys, table, adapter, tmp_path / "out.jsonl", "--chunk_rows", 1)
        assert code == 2
        assert "line 2" in error
        assert (tmp_path / "out.jsonl.partial" / "000000000001.jsonl").is_file()
        return table

    def test_another_input_is_not_mixed_in(self, capsys, adapter, tmp_path):
        table = self.begun(capsys, adapter, tmp_path)
        table.write_text('{"text": "late"}\n{"text": "bad"}\n')
        words = [table, adapter, tmp_path / "out.jsonl", "--chunk_rows", 1]
        code, _, error = predict(capsys, *words)
        assert code == 2
        assert "another input" in error
        assert "--overwrite" in error
        assert predict(capsys, *words, "--overwrite")[0] == 0
        texts = [json.loads(x)["text"] for x in (tmp_path / "out.jsonl").read_text().splitlines()]
        assert texts == ["late", "bad"]

    def test_another_chunk_size_is_not_mixed_in(self, capsys, adapter, tmp_path):
        table = self.begun(capsys, adapter, tmp_path)
        words = [table, adapter, tmp_path / "out.jsonl", "--chunk_rows", 2]
        assert "another chunk_rows" in predict(capsys, *words)[2]

    def test_a_finished_output_is_kept(self, capsys, adapter, tmp_path):
        table, output = tmp_path / "in.csv", tmp_path / "out.csv"
        table.write_text("text\ngood\n")
        output.write_text("mine")
        code, _, error = predict(capsys, table, adapter, output)
        assert code == 2
        assert "already there" in error
        assert output.read_text() == "mine"
        assert predict(capsys, table, adapter, table, "--overwrite")[0] == 2  # onto itself
        assert table.read_text() == "text\ngood\n"

    @pytest.mark.parametrize("mistake", ["column", "name taken", "no rows", "broken row"])
    def test_a_mistake_takes_nothing_away(self, capsys, adapter, tmp_path, mistake):
        """Not the finished output, and not the part of an unfinished one."""
        self.begun(capsys, adapter, tmp_path)
        output = tmp_path / "out.jsonl"
        output.write_text("mine")
        table = tmp_path / "other.jsonl"
        table.write_text(
            {
                "column": '{"body": "good"}\n',
                "name taken": '{"text": "good", "probability": 1}\n',
                "no rows": "",
                "broken row": '{"text": \n',
            }[mistake]
        )
        assert predict(capsys, table, adapter, output, "--overwrite")[0] == 2
        assert output.read_text() == "mine"
        assert (tmp_path / "out.jsonl.partial" / "000000000001.jsonl").is_file()

    def test_the_output_is_there_until_it_is_replaced(self, capsys, adapter, tmp_path):
        output, table = tmp_path / "out.jsonl", tmp_path / "in.jsonl"
        output.write_text("mine")
        table.write_text('{"text": "good"}\n{"text": \n')
        words = [table, adapter, output, "--chunk_rows", 1, "--overwrite"]
        assert predict(capsys, *words)[0] == 2  # at its second chunk
        assert output.read_text() == "mine"
        table.write_text('{"text": "good"}\n')
        assert predict(capsys, *words)[0] == 0
        assert json.loads(output.read_text())["text"] == "good"

    @pytest.mark.parametrize("kind", ["folder", "link", "file"])
    @pytest.mark.parametrize("words", [[], ["--overwrite"]])
    def test_a_partial_of_the_users_own(self, capsys, adapter, tmp_path, kind, words):
        table, own = tmp_path / "in.csv", tmp_path / "out.csv.partial"
        table.write_text("text\ngood\n")
        elsewhere = tmp_path / "elsewhere"
        elsewhere.mkdir()
        (elsewhere / "notes.txt").write_text("mine")
        if kind == "file":
            own.write_text("mine")
        elif kind == "link":
            own.symlink_to(elsewhere)
        else:
            elsewhere.rename(own)
        code, _, error = predict(capsys, table, adapter, tmp_path / "out.csv", *words)
        assert code == 2
        assert "is not of an earlier prediction" in error
        assert "mine" in (own if kind == "file" else own / "notes.txt").read_text()


class TestWrongInput:
    @pytest.mark.parametrize(
        ("name", "contents", "words"),
        [
            ("in.csv", b"text\n\xff\xfe\xfa\n", "--encoding"),
            ("in.csv", b"text,b\none\n", "line 2"),
            ("in.csv", b"", "is empty"),
            ("in.csv", b"text\n", "holds no rows"),
            ("in.jsonl", b'["a"]\n', "JSON object"),
            ("in.jsonl", b'{"text": "\\ud83d"}\n', "surrogate"),
            ("in.parquet", b"no", "not a Parquet file"),
            ("in.xlsx", b"no", "is no .xlsx workbook"),
            ("in.ods", b"no", "save it as .xlsx or as CSV"),
            ("in.docx", b"no", "use .csv"),
        ],
    )
    def test_table(self, capsys, adapter, tmp_path, name, contents, words):
        table = tmp_path / name
        table.write_bytes(contents)
        code, _, error = predict(capsys, table, adapter, tmp_path / f"out{table.suffix}")
        assert code == 2
        assert words in error
        assert len(error.strip().splitlines()) == 1
        assert not (tmp_path / f"out{table.suffix}").exists()

    def test_options(self, capsys, adapter, tmp_path):
        table = tmp_path / "in.csv"
        table.write_text("text\ngood\n")
        assert "one --text" in run(capsys, "predict")[2]
        assert "--output is missing" in run(capsys, "predict", table, "--adapter", adapter)[2]
        assert "--adapter is missing" in predict(capsys, table, "", tmp_path / "o.csv")[2]
        assert "input's format" in predict(capsys, table, adapter, tmp_path / "o.json")[2]
        assert "task.json" in predict(capsys, table, tmp_path, tmp_path / "o.csv")[2]
        assert "rows from 1" in predict(
            capsys, table, adapter, tmp_path / "o.csv", "--chunk_rows", 0
        )[2]  # fmt: skip


class TestOneText:
    def test_words_and_json(self, capsys, adapter):
        code, out, _ = run(capsys, "predict", "--adapter", adapter, "--text", "bad flight")
        assert code == 0
        assert out.startswith("predicted_label")
        _, out, _ = run(capsys, "predict", "--adapter", adapter, "--text", "bad", "--json")
        assert list(json.loads(out)) == NEW


class TestEvaluateAndCompare:
    def test_metrics_are_those_of_the_run(self, capsys, adapter, tmp_path):
        held_out = pd.read_csv(adapter / "predictions.csv")
        table = tmp_path / "test.csv"
        held_out.rename(columns={"target": "label"})[["text", "label"]].to_csv(table, index=False)
        code, out, _ = run(capsys, "evaluate", table, "--adapter", adapter, "--json")
        assert code == 0
        found = json.loads(out)
        of_run = json.loads((adapter / "metrics.json").read_text())
        assert found["rows"] == len(held_out)
        assert found["metrics"] == pytest.approx(of_run["metrics"]["tuned"], abs=1e-4)
        assert found["confusion_matrix"] == of_run["confusion_matrix"]
        assert found["rows_trained_on"] == 0

    def test_rows_that_were_trained_on_are_said(self, capsys, adapter, tmp_path):
        record = json.loads((adapter / "run_record.json").read_text())
        source = record["arguments"]["data"]["data_file"]
        held_out = set(pd.read_csv(adapter / "predictions.csv")["text"])
        rows = pd.read_csv(source)
        trained = int((~rows["text"].isin(held_out)).sum())
        code, out, _ = run(capsys, "evaluate", source, "--adapter", adapter)
        assert code == 0
        assert trained > 0
        said = " ".join(out.split())
        assert f"warning: {trained} of {len(rows)} rows were trained on" in said
        first = rows.index[~rows["text"].isin(held_out)][0] + 1
        assert f"the first is row {first}:" in said
        copy = tmp_path / "adapter"
        shutil.copytree(adapter, copy)
        (copy / "run_record.json").unlink()
        _, out, _ = run(capsys, "evaluate", source, "--adapter", copy, "--json")
        assert json.loads(out)["rows_trained_on"] is None

    def test_columns_of_another_name(self, capsys, adapter, tmp_path):
        table = tmp_path / "test.csv"
        toy_table(9).rename(columns={"text": "body", "label": "mood"}).to_csv(table, index=False)
        words = ["evaluate", table, "--adapter", adapter, "--text_column", "body"]
        assert run(capsys, *words)[0] == 2
        code, out, _ = run(capsys, *words, "--label_column", "mood")
        assert code == 0
        assert "macro_f1" in out

    def test_compare(self, capsys, adapter, monkeypatch):
        monkeypatch.setenv("COLUMNS", "60")
        code, out, _ = run(capsys, "compare", adapter, "--rows", 3)
        assert code == 0
        assert "3 of 3 answers are those of the run's own evaluation." in out
        assert max(map(len, out.splitlines()[:6])) <= 60

    def test_compare_writes(self, capsys, adapter):
        _, out, _ = run(capsys, "compare", adapter, "--rows", 2, "--generate", "--json")
        found = json.loads(out)
        assert [len(found["rows"]), len(found["written"]), found["agreeing"]] == [2, 2, 2]

    def test_compare_a_checkpoint(self, capsys, adapter, tmp_path):
        """It is asked about the rows of its run, whose own answers are the final adapter's."""
        run_folder = tmp_path / "run"
        checkpoint = run_folder / "checkpoint-4"
        shutil.copytree(adapter, checkpoint, ignore=shutil.ignore_patterns("*.csv", "checkpoint*"))
        code, _, error = run(capsys, "compare", checkpoint)
        assert code == 2
        assert "the run has not ended" in error
        shutil.copy(adapter / "predictions.csv", run_folder)
        code, out, _ = run(capsys, "compare", checkpoint, "--rows", 3)
        assert code == 0
        assert "3 of 3 answers are those of the run's final adapter." in out

    def test_compare_without_a_finished_run(self, capsys, adapter, tmp_path):
        for name in ("task.json", "adapter_config.json", "adapter_model.safetensors",
                     "tokenizer.json", "tokenizer_config.json"):  # fmt: skip
            (tmp_path / name).write_bytes((adapter / name).read_bytes())
        code, _, error = run(capsys, "compare", tmp_path)
        assert code == 2
        assert "predictions.csv" in error
