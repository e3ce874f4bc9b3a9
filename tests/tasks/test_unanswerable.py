"""Questions that a text does not answer. Run: python -m pytest tests/tasks/test_unanswerable.py"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lora_fsdp.data.encoding import Encoder
from lora_fsdp.data.tables import read_table
from lora_fsdp.errors import MalformedRowError
from lora_fsdp.tasks import get_task
from tests.data.test_encoding import chat_tokenizer
from tests.support.tiny import tiny_tokenizer

ROW = {"context": "the flight was late", "question": "who"}
ANSWER = {"text": ["the crew", "crew"], "answer_start": [0, 4]}
NO_ANSWERS = [
    [],
    [""],
    "[]",
    {"text": [], "answer_start": []},
    '{"text": [], "answer_start": []}',
    {"text": np.array([], dtype=object), "answer_start": np.array([])},
]


def table_of(*answers: object) -> pd.DataFrame:
    cells = pd.Series(list(answers), dtype=object)
    return pd.DataFrame({**{name: [text] * len(answers) for name, text in ROW.items()}}).assign(
        answer=cells
    )


@pytest.mark.parametrize("cell", NO_ANSWERS, ids=repr)
@pytest.mark.parametrize("chat", [False, True])
def test_the_end_is_learnt_at_once(cell: object, chat: bool) -> None:
    task, table = get_task("question_answering"), table_of(ANSWER, cell)
    examples = task.bind(table).examples(table)
    assert [example.target for example in examples] == [" the crew", ""]
    assert [example.references for example in examples] == [("the crew", "crew"), ("",)]
    tokenizer = chat_tokenizer() if chat else tiny_tokenizer()
    encoder = Encoder(tokenizer, task=task, chat_template=chat)
    assert encoder.encode(examples)[1].target_ids == [encoder.end_token_id]


def test_saying_nothing_is_right_only_there() -> None:
    task, table = get_task("question_answering"), table_of(ANSWER, [])
    examples = task.examples(table)
    right: dict[str, Any] = {"token_f1": 1.0, "exact_match": 1.0}
    assert task.measure(examples, ["crew", None]) == right
    assert task.measure(examples, [None, "crew"]) == {"token_f1": 0.0, "exact_match": 0.0}


@pytest.mark.parametrize("cell", [None, "", " ", [None], {"text": None}, {}])
def test_nothing_at_all_is_a_mistake(cell: object) -> None:
    with pytest.raises(MalformedRowError, match="1 of 2 rows"):
        get_task("question_answering").bind(table_of(ANSWER, cell))


def test_from_parquet(tmp_path: Path) -> None:
    rows = [{**ROW, "answer": ANSWER}, {**ROW, "answer": {"text": [], "answer_start": []}}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "data.parquet")
    table = read_table(tmp_path / "data.parquet")
    targets = [one.target for one in get_task("question_answering").bind(table).examples(table)]
    assert targets == [" the crew", ""]
