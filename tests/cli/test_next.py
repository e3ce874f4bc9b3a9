"""`lora-fsdp next`. Run: python -m pytest tests/cli/test_next.py"""

import csv
import json

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest

from lora_fsdp import Predictor
from lora_fsdp.cli.main import main
from lora_fsdp.evaluation.labelling.next_rows import margins
from tests.support.sweeps import toy_sweep
from tests.support.tiny import LABELS

HEADER = ["id", "text", "note"]
ROWS = [
    ["1", "the crew was late", "=1+1"],
    ["2", "", "no text"],
    ["03", "good bag, again", 'say "hi"'],
    ["4", "bad\x1b[31m\tflight\x07", "control"],
    ["5", "THE CREW WAS LATE!", "near"],
    ["6", "   ", ""],
    ["7", "thanks for help", "a\nb"],
]
NEW = ["score", "predicted_label", "probability", *(f"probability/{label}" for label in LABELS)]


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    place = tmp_path_factory.mktemp("next")
    toy_sweep(place, "seeds", seeds=2)
    return place / "seeds"


@pytest.fixture
def pool(tmp_path):
    with (tmp_path / "pool.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([HEADER, *ROWS])
    return tmp_path / "pool.csv"


def run(capsys, *words):
    code = main(["next", *map(str, words)])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def read(path):
    with path.open(newline="", encoding="utf-8") as file:
        header, *rows = csv.reader(file)
    return header, rows


def test_the_pools_rows_as_written_with_the_adapters_own_probabilities(
    adapters, pool, tmp_path, capsys
):
    one = adapters / "seed-3"
    output = tmp_path / "next.csv"
    code, said, _ = run(
        capsys, "--unlabelled", pool, "--adapter", one, "-n", 50, "--output_file", output
    )
    assert code == 0
    assert "5 of 7 rows to label next" in said
    assert "-n 50 is more than the pool has" in said
    assert "2 rows have no text and are left out: row 2, 6" in said
    header, rows = read(output)
    assert header == [*HEADER, *NEW]
    assert sorted(row[:3] for row in rows) == sorted(row for row in ROWS if row[1].strip())
    answers = Predictor.from_adapter(one).predict([row[1] for row in rows])
    given = answers[[f"probability/{label}" for label in LABELS]].to_numpy()
    np.testing.assert_allclose([float(row[3]) for row in rows], margins(given), atol=1e-5)
    assert [row[4] for row in rows] == answers["predicted_label"].tolist()
    shouted = {"the crew was late", "THE CREW WAS LATE!"}  # nearly the same: one of them is last
    assert rows[-1][1] in shouted
    assert {row[1] for row in rows[:-1]} & shouted
    code, said, _ = run(
        capsys, pool, "--adapter", one, "-n", 2, "--output_file", output, "--overwrite", "--json"
    )
    assert len(json.loads(said)["rows"]) == 2
    assert len(read(output)[1]) == 2
    assert not list(tmp_path.glob(".*"))


def test_several_adapters_and_other_formats(adapters, tmp_path, capsys):
    frame = pd.DataFrame({"text": [row[1] for row in ROWS], "id": range(7)})
    frame.to_parquet(tmp_path / "pool.parquet")
    frame.to_json(tmp_path / "pool.jsonl.gz", orient="records", lines=True)
    ids = []
    for suffix in (".parquet", ".jsonl.gz"):
        output = tmp_path / f"next{suffix}"
        code, said, wrong = run(
            capsys, tmp_path / f"pool{suffix}", "--adapter", adapters, "-n", 3, "--by", "entropy",
            "--output_file", output, "--column_prefix", "our_",
        )  # fmt: skip
        assert (code, wrong) == (0, "")
        assert "3 of 7 rows" in said
        table = (
            pq.read_table(output).to_pandas()
            if suffix == ".parquet"
            else pd.read_json(output, lines=True)
        )
        assert [f"our_{name}" for name in NEW] == list(table.columns)[2:]
        assert (table["our_score"] > 0).all()
        ids.append(table["id"].tolist())
    assert ids[0] == ids[1]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["-n", "0"], "-n 0: give a number of rows from 1."),
        (["--seed", "-1"], "--seed -1"),
        (["--by", "luck"], "luck"),
        (["--output_file", "next.jsonl"], "name it *.csv"),
        (["--output_file", "no/such/next.csv"], "does not exist"),
        (["--output_file", "pool.csv"], "is the pool"),
        (["--output_file", "there.csv"], "is already there"),
        (["--text_column", "body"], "has no column 'body' (row 1 and after)"),
        (["--adapter", "nowhere"], "nowhere"),
    ],
)
def test_what_cannot_be_done_is_refused(adapters, pool, tmp_path, capsys, monkeypatch, words, says):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there.csv").write_text("")
    given = ["--adapter", adapters / "seed-3", "--output_file", "next.csv"]
    code, _, wrong = run(capsys, pool, *given, *words)
    assert code == 2
    assert says in wrong
    assert len(wrong.strip().splitlines()) == 1
    assert not (tmp_path / "next.csv").exists()


def test_a_pool_without_text_or_with_a_column_of_the_name_is_refused(adapters, tmp_path, capsys):
    given = ["--adapter", adapters / "seed-3", "--output_file", tmp_path / "next.csv"]
    for content, says in {
        "text,score\nhello,1\n": "already has 'score'",
        "text,id\n,1\n": "None of the 1 rows of",
        "text,id\n": "holds no rows",
    }.items():
        (tmp_path / "pool.csv").write_text(content)
        code, _, wrong = run(capsys, tmp_path / "pool.csv", *given)
        assert code == 2
        assert says in wrong


def test_other_kinds_of_answers_are_refused_before_weights_are_read(
    adapters, pool, tmp_path, capsys
):
    other = tmp_path / "other"
    other.mkdir()
    saved = json.loads((adapters / "seed-3" / "task.json").read_text())
    saved |= {"task": "generation", "options": {"text_column": "text", "instruction": "Go:"}}
    (other / "task.json").write_text(json.dumps(saved))  # and no weights
    code, _, wrong = run(capsys, pool, "--adapter", other, "--output_file", tmp_path / "next.csv")
    assert code == 2
    assert "what to label next is told by the probabilities" in wrong
