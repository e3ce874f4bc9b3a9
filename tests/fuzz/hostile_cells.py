"""Columns of typed cells in every format, and labels of every sort."""

from __future__ import annotations

import csv
import json
import random
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq

FORMATS = ("csv", "tsv", "jsonl", "json", "parquet", "datasets", "csv.gz")
_KINDS = ("whole", "large", "text", "digits", "truth", "decimal", "list", "object")
_LETTERS = [
    "a",
    "Z",
    "é",
    "漢",
    "🙂",
    " ",
    "0",
    "NA",
    "null",
    "None",
    "-",
    "'",
    '"',
    ",",
    ";",
    "\t",
]


def column(random_: random.Random, kind: str, rows: int) -> list[Any]:
    """Values of one kind, some of them missing."""
    made = {
        "whole": lambda: random_.randrange(-5, 100),
        "large": lambda: random_.choice([10**17 + 1, 2**53 + 1, -(2**63), 2**63 - 1]),
        "text": lambda: "x" + "".join(random_.choices(_LETTERS, k=random_.randrange(6))) + "x",
        "digits": lambda: f"{random_.randrange(1000):05d}",
        "truth": lambda: random_.random() < 0.5,
        "decimal": lambda: random_.choice([0.5, 2.25, 1e16, -0.125, 100000.0]),
        "list": lambda: [random_.randrange(9) for _ in range(random_.randrange(1, 4))],
        "object": lambda: {"a": random_.randrange(9), "b": "é"},
    }[kind]
    missing = random_.random() < 0.5
    values = [None if missing and random_.random() < 0.3 else made() for _ in range(rows)]
    return values if any(value is not None for value in values) else [made(), *values[1:]]


def typed_table(random_: random.Random, work: Path) -> tuple[Path, list[Any], str]:
    """A table of a text and one typed column, the column's values, and what it is."""
    form, kind = random_.choice(FORMATS), random_.choice(_KINDS)
    values = column(random_, kind, random_.randrange(2, 7))
    rows = [{"text": f"t{n}", "answer": value} for n, value in enumerate(values)]
    file = work / f"table.{form}"
    if form == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), file)
    elif form == "datasets":
        datasets.Dataset.from_list(rows).save_to_disk(str(file))
    elif form == "json":
        file.write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    elif form == "jsonl":
        lines = [json.dumps(row, ensure_ascii=False) for row in rows]
        file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    else:
        import gzip

        opened = gzip.open if form.endswith("gz") else open
        with opened(file, "wt", encoding="utf-8", newline="") as stream:
            writer = csv.writer(stream, delimiter="\t" if form == "tsv" else ",")
            writer.writerow(["text", "answer"])
            writer.writerows([row["text"], written_text(row["answer"])] for row in rows)
    return file, values, f"{kind} in {form}"


def written_text(value: Any) -> str:
    """A cell as it stands in a text file, and as it must be read again."""
    if value is None:
        return ""
    if isinstance(value, list | dict):
        return json.dumps(value, ensure_ascii=False)
    return str(value)


def some_labels(random_: random.Random) -> tuple[list[Any], str]:
    """Labels of a column: texts that begin alike, numbers, lists, blanks, letters of all kinds."""
    pools: dict[str, list[Any]] = {
        "begin alike": ["1", "10", "100", "1 0", "a", "ab", "abc"],
        "numbers": [0, 1, 2.0, 10, 3.5, -1],
        "lists": [["a"], ["a", "b"], [], {"a": 1}],
        "blanks": ["a", " a", "a ", "", " ", "\t", "\u3000"],
        "letters": ["é", "e\u0301", "漢字", "🙂", "\u200b", "\u202ex", "<|end|>", "\0"],
        "cases": ["Yes", "yes", "YES", "No"],
        "truth": [True, False, "True", "true"],
        "missing": [None, float("nan"), "nan", "None", "b"],
    }
    name = random_.choice(sorted(pools))
    labels = [random_.choice(pools[name]) for _ in range(random_.randrange(2, 9))]
    return labels, name
