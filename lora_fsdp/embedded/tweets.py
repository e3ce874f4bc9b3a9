"""The embedded table: airline tweets with their sentiment, out of a larger corpus."""

from __future__ import annotations

from pathlib import Path

from lora_fsdp.printing import say

AIRLINES = ("@united", "@usairways", "@americanair", "@southwestair", "@jetblue", "@virginamerica")


def write_tweets(corpus: Path, table: Path) -> None:
    """Writes the airlines' tweets of the corpus as a UTF-8 table with columns text, sentiment."""
    import pandas as pd

    rows = pd.read_csv(corpus, encoding="latin-1", keep_default_na=False)
    about_airlines = rows["text"].str.lower().str.contains("|".join(AIRLINES))
    tweets = rows.loc[about_airlines, ["text", "sentiment"]]
    # One line a row: CSV readers disagree about a bare carriage return inside a field.
    tweets["text"] = tweets["text"].str.replace(r"[\r\n]+", " ", regex=True)
    tweets.to_csv(table, index=False, encoding="utf-8", lineterminator="\n")
    counts = tweets["sentiment"].value_counts()
    say(f"    {len(tweets):,} tweets: " + ", ".join(f"{n:,} {name}" for name, n in counts.items()))
