"""The tables of a reader of the tutorials, in the forms that people have them."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from tests.support.documented import ROOT

DATA = ROOT / "examples" / "data"


def write_readers_tables(folder: Path) -> None:
    """The tables that the tutorials name, and for each one of five rows without answers."""
    tickets = pd.read_csv(DATA / "tickets.csv")
    tickets.to_excel(folder / "tickets.xlsx", index=False)
    tickets[["message"]].head(5).to_excel(folder / "new_tickets.xlsx", index=False)

    comments = _comments()
    comments.to_csv(folder / "comments.csv", index=False, sep=";", encoding="cp1252")
    comments.head(5).to_csv(folder / "new_comments.csv", index=False, sep=";")
    hub = folder / "comments_dataset" / "data"
    hub.mkdir(parents=True)
    comments.iloc[:48].to_parquet(hub / "train-00000-of-00001.parquet", index=False)
    comments.iloc[48:].to_parquet(hub / "test-00000-of-00001.parquet", index=False)

    for name, source, texts in (
        ("stays", "reviews", ["review"]),
        ("complaints", "complaints", ["text"]),
        ("feedback", "feedback", ["text"]),
    ):
        table = pd.read_csv(DATA / f"{source}.csv", keep_default_na=False, dtype=str)
        table.to_csv(folder / f"{name}.csv", index=False)
        table[texts].head(5).to_csv(folder / f"new_{name}.csv", index=False)


def _comments() -> pd.DataFrame:
    says = {
        "negative": "Flug {n} was {n} minutes late; nobody said a word, très décevant.",
        "neutral": "Flight {n} landed at gate {n}.",
        "positive": "The crew of flight {n} was wonderful, merci!",
    }
    rows = [(text.format(n=n), label) for n in range(20) for label, text in says.items()]
    return pd.DataFrame(rows, columns=["comment", "sentiment"])
