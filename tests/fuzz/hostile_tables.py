"""Tables as an attacker, or a broken export, would send them."""

from __future__ import annotations

import csv
import io
import json
import random
from pathlib import Path

import pandas as pd

TEXTS = [
    "the flight was late",
    "",
    " ",
    "x" * 3000,
    "=cmd|'/C calc'!A0",
    "@SUM(1+1)",
    "+1-1",
    "-2+3",
    "nul \0 inside",
    "bell \a escape \x1b[2J",
    "\u202eright to left",
    "a\u2028b\u2029c",
    "\ufeffbom",
    "<|end|>",
    "</s><|im_end|>",
    "{{ 7*7 }}",
    "${jndi:ldap://x}",
    "../../etc/passwd",
    "'; DROP--",
    "NaN",
    "null",
    "None",
    "1e999",
    "0x10",
    '"quoted"',
    "a,b;c\td",
    "line\nbreak",
    "\r",
    "\r\n",
    "\ud7ff\ue000",
    "👨‍👩‍👧‍👦",
    "e\u0301" * 50,
    "\U0010ffff",
    "İı",
    "ﬃ",
    "<script>alert(1)</script>",
    "![x](http://x)",
    "%s%n%d",
    "\\",
    "\\N",
    "\\ud800",
    "true",
]
LABELS = ["negative", "neutral", "positive"] * 4 + [
    "",
    " ",
    "NaN",
    "0",
    "1.0",
    "Positive",
    "=1+1",
    "\0",
]
ENCODINGS = [
    "utf-8",
    "utf-8-sig",
    "utf-16",
    "utf-16-le",
    "utf-32",
    "cp1252",
    "cp1251",
    "gb18030",
    "shift_jis",
    "latin-1",
]
NAMED = [
    *[None] * 30,
    "utf-8",
    "latin-1",
    "utf-16",
    "rot13",
    "hex",
    "zip",
    "idna",
    "punycode",
    "utf-7",
    "unicode_escape",
    "raw_unicode_escape",
    "nonsense",
    "undefined",
    "ascii",
    "",
    "base64",
    "mbcs",
    "\0",
]


def hostile_table(random_: random.Random, folder: Path) -> tuple[Path, str | None]:
    """A file, and the encoding to name when it is read."""
    kind = random_.choice(["csv", "csv", "tsv", "jsonl", "jsonl", "json", "parquet", "folder"])
    makers = {"json": _json, "jsonl": _json_lines, "parquet": _parquet}
    if kind == "folder":
        path = folder / "saved"
        path.mkdir()
        for name in ("dataset_info.json", "state.json", "dataset_dict.json", "data.arrow"):
            if random_.random() < 0.6:
                (path / name).write_bytes(_damaged(random_, b'{"splits": ["train"]}'))
        return path, None
    if kind in makers:
        content = makers[kind](random_)
    else:
        content = _delimited(random_, "," if kind == "csv" else "\t")
    if random_.random() < 0.25:
        content = _damaged(random_, content)
    path = folder / f"table.{kind}"
    path.write_bytes(content)
    return path, random_.choice(NAMED)


def _rows(random_: random.Random) -> list[tuple[str, str]]:
    count = random_.choice([0, 1, 2, 5, 12])
    return [(random_.choice(TEXTS), random_.choice(LABELS)) for _ in range(count)]


def _encoded(random_: random.Random, text: str) -> bytes:
    return text.encode(random_.choice(ENCODINGS), errors="replace")


def _delimited(random_: random.Random, separator: str) -> bytes:
    if random_.random() < 0.5:  # well-formed, with hostile cells
        return _well_formed(random_, separator)
    if random_.random() < 0.05:
        return ("text,label\n" + '"' + "long " * 2_000_000 + '",positive\n').encode()
    header = random_.choice(
        ["text,label", "text,label", "text,text", ",", "text", "text,label,extra", "", "label,text"]
    ).replace(",", separator)
    lines = [header]
    for text, label in _rows(random_):
        cell = text
        if random_.random() < 0.7:
            cell = '"' + text.replace('"', '""') + '"'
        fields = [cell, label] + ["more"] * random_.choice([0, 0, 0, 1, 5])
        lines.append(separator.join(fields[: random_.choice([1, 2, 2, 2, len(fields)])]))
    if random_.random() < 0.15:
        lines.append('"never closed')
    return _encoded(random_, random_.choice(["\n", "\r\n", "\r"]).join(lines))


def _well_formed(random_: random.Random, separator: str) -> bytes:
    buffer = io.StringIO(newline="")
    rows = [(text.replace("\0", ""), label.replace("\0", "")) for text, label in _rows(random_)]
    writer = csv.writer(buffer, delimiter=separator)
    writer.writerows([("text", "label"), ("good", "positive"), ("bad", "negative"), *rows])
    return buffer.getvalue().encode()


VALUES = [
    None,
    True,
    3,
    2.5,
    -0.0,
    1e308,
    [],
    [1, [2]],
    {},
    {"a": {"b": []}},
    "text",
    float("nan"),
    float("inf"),
    10**30,
    "\ud800",
]


def _record(random_: random.Random) -> str:
    text, label = random_.choice(TEXTS), random_.choice(LABELS)
    choice = random_.randrange(9)
    if choice == 0:
        return json.dumps({"text": random_.choice(VALUES), "label": label})
    if choice == 1:
        return json.dumps({"text": text, "label": random_.choice(VALUES)})
    if choice == 2:
        return '{"text": "a", "text": "b", "label": "positive", "label": "negative"}'
    if choice == 3:
        return "[" * random_.choice([5, 5000, 200_000])
    if choice == 4:
        return '{"text": ' * random_.choice([3, 20_000])
    if choice == 5:
        return random_.choice(["3", "null", '"text"', "[]", "{}", "{", "NaN", "1" * 6000])
    if choice == 6:
        return '{"text": "\\ud83d alone", "label": "positive"}'
    return json.dumps({"text": text, "label": label}, ensure_ascii=random_.random() < 0.5)


def _json_lines(random_: random.Random) -> bytes:
    return "\n".join(_record(random_) for _ in range(random_.choice([0, 1, 3, 8]))).encode(
        "utf-8", errors="surrogatepass"
    )


def _json(random_: random.Random) -> bytes:
    records = ",".join(_record(random_) for _ in range(random_.choice([0, 1, 3, 8])))
    return f"[{records}]".encode("utf-8", errors="surrogatepass")


def _parquet(random_: random.Random) -> bytes:
    rows = [(text.replace("\0", ""), label) for text, label in _rows(random_)]
    columns: dict[str, object] = {
        "text": [text for text, _ in rows],
        "label": [label for _, label in rows],
    }
    choice = random_.randrange(4)
    if choice == 0:
        columns["text"] = [[1, 2]] * len(rows)
    if choice == 1:
        columns["label"] = [random_.choice([None, 1.5, 2.0])] * len(rows)
    if choice == 2:
        columns["text"] = [text.encode() for text, _ in rows]
    buffer = io.BytesIO()
    pd.DataFrame(columns).to_parquet(buffer)
    return buffer.getvalue()


def _damaged(random_: random.Random, content: bytes) -> bytes:
    choice = random_.randrange(5)
    if choice == 0:
        return content[: random_.randrange(len(content) + 1)]
    if choice == 1 and content:
        flipped = bytearray(content)
        for _ in range(random_.choice([1, 4, 40])):
            flipped[random_.randrange(len(flipped))] ^= 1 << random_.randrange(8)
        return bytes(flipped)
    if choice == 2:
        return content + random_.randbytes(200)
    if choice == 3:
        return random_.randbytes(300)
    return content.replace(b",", b"\0", 1)
