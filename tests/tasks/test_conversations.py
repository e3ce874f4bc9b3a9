"""The forms in which people have conversations.

Run: python -m pytest tests/tasks/test_conversations.py
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pandas as pd
import pytest

from lora_fsdp.data.streams import open_stream
from lora_fsdp.data.tables import read_table
from lora_fsdp.errors import MalformedRowError
from lora_fsdp.tasks import get_task

PLAIN = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello!"},
    {"role": "user", "content": "Bye, then"},
    {"role": "assistant", "content": "See you."},
]
PARTS = [
    {"role": message["role"], "content": [{"type": "text", "text": message["content"]}]}
    for message in PLAIN
]
PARTS[3]["content"] = [{"type": "text", "text": "Bye, "}, {"type": "text", "text": "then"}]
NAMES = {"system": "system", "user": "human", "assistant": "gpt"}
SHAREGPT = [{"from": NAMES[message["role"]], "value": message["content"]} for message in PLAIN]
ROWS: list[dict[str, Any]] = [
    {"messages": PLAIN},
    {"messages": PARTS},
    {"messages": SHAREGPT},
    {"conversations": SHAREGPT},
    {"conversations": SHAREGPT[1:], "system": "Be brief."},
    {"conversations": PLAIN},
]


@pytest.mark.parametrize("row", ROWS, ids=range(len(ROWS)))
@pytest.mark.parametrize("kind", ["jsonl", "parquet", "csv", "datasets"])
def test_every_form_in_every_file_is_the_same_conversation(
    tmp_path: Path, row: dict[str, Any], kind: str
) -> None:
    path = tmp_path / f"data.{kind}"
    if kind == "jsonl":
        path.write_text(json.dumps(row))
    elif kind == "parquet":
        pd.DataFrame([row]).to_parquet(path)
    elif kind == "csv":
        cells = {name: json.dumps(v) if isinstance(v, list) else v for name, v in row.items()}
        pd.DataFrame([cells]).to_csv(path, index=False)
    else:
        path = tmp_path / "saved"
        datasets.Dataset.from_list([row]).save_to_disk(str(path))
    table = read_table(path)
    task = get_task("chat").bind(table)
    (example,) = task.examples(table)
    turns = tuple((message["role"], message["content"]) for message in PLAIN[:3])
    assert example.prompt.turns == turns
    assert (example.prompt.text, example.target) == ("Bye, then", "See you.")
    if kind != "datasets":
        stream = open_stream(path)
        (chunk,) = stream.chunks(1)
        again = get_task("chat", task.options())
        assert again.build_prompt(stream.records(chunk)[0]) == example.prompt


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"content": [{"type": "image", "url": "x"}]}, "a part of type 'image'"),
        ({"content": [{"type": "text", "text": None}]}, "with texts in both"),
        ({"content": []}, "with texts in both"),
        ({"role": None, "content": None, "from": "human"}, "with texts in both"),
        ({"role": None, "content": None, "from": "tool", "value": "x"}, "role 'tool'"),
    ],
)
def test_what_is_no_message_is_named(change: dict[str, Any], words: str) -> None:
    bad = [*PLAIN[:3], {**PLAIN[3], **change}, PLAIN[4]]
    table = pd.DataFrame({"messages": [PLAIN, bad]}, index=[1, 2])
    with pytest.raises(MalformedRowError, match=rf"row 2 \(column 'messages' .*{words}"):
        get_task("chat").bind(table)
    kept, dropped = get_task("chat").drop_bad_rows(table)
    assert (kept.index.tolist(), dropped) == ([1], 1)
