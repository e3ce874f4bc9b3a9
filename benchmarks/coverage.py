"""Do sets of answers hold the right one as often as they say, and do calibrated probabilities?

    python -m benchmarks.coverage
    python -m benchmarks.coverage --predictions runs/sentiment/predictions.csv

On real probabilities of rows that nobody trained on: those of a TF-IDF regression on 800 airline
tweets for all the others (`make sentiment` brings them), or those of a run. They are divided at
random 200 times into rows to calibrate on and rows to look at. Prints the mean coverage of the sets
over these splits, the share of splits whose coverage is within a point, the sets' mean size, and
the expected calibration error and the loss before and after. Takes a minute on a CPU.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from benchmarks.record import add_option, keep
from lora_fsdp.evaluation.baselines import fit_tfidf
from lora_fsdp.evaluation.calibration import Calibration, answer_sets, figures, fit_calibration
from lora_fsdp.tasks import ClassificationTask, Example, Prompt
from lora_fsdp.tasks.answers import ModelOutputs
from lora_fsdp.tasks.answers.kind import PROBABILITY_OF

TWEETS = Path(__file__).resolve().parents[1] / ".cache" / "default" / "airline_tweets.csv"
COVERAGES = (0.8, 0.9, 0.95)


def main() -> None:
    """Divide, calibrate, count."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--predictions", type=Path, help="predictions.csv of a run")
    parser.add_argument("--splits", type=int, default=200)
    parser.add_argument("--rows", type=int, default=1000, help="rows to calibrate on")
    add_option(parser)
    options = parser.parse_args()
    if options.predictions is None:
        labels, probabilities, right = of_tweets()
    else:
        labels, probabilities, right = of_run(options.predictions)
    rows = min(options.rows, len(right) // 2)
    print(f"{len(right)} rows, {rows} to calibrate on, {options.splits} random splits")
    scores = np.log(np.maximum(probabilities, 1e-12)).astype(np.float32)
    found = [one_split(scores, right, labels, rows, seed) for seed in range(options.splits)]
    table = pd.DataFrame(found)
    kept: dict[str, Any] = {"rows": len(right), "calibrated_on": rows, "splits": options.splits}
    for coverage in COVERAGES:
        held, size = table[f"held {coverage}"], table[f"size {coverage}"]
        within = (abs(held - coverage) <= 0.01).mean()
        kept[f"sets of {coverage:.0%}"] = {
            "mean_coverage": held.mean(),
            "least": held.min(),
            "most": held.max(),
            "within_a_point": within,
            "answers_a_set": size.mean(),
        }
        print(
            f"sets of {coverage:.0%}: mean coverage {held.mean():.4f}, from {held.min():.4f} to "
            f"{held.max():.4f}, within a point in {within:.0%} of the splits, {size.mean():.2f} "
            "answers a set"
        )
    better = (table["loss after"] < table["loss before"]).mean()
    for name in ("error", "loss"):
        before, after = table[f"{name} before"].mean(), table[f"{name} after"].mean()
        kept[name] = {"before": before, "after": after}
        print(f"{name} before {before:.4f}, after {after:.4f}")
    print(f"the loss is lower in {better:.0%} of the splits")
    keep(options.write, {**kept, "splits_with_a_lower_loss": better})


def one_split(
    scores: np.ndarray, right: np.ndarray, labels: list[str], rows: int, seed: int
) -> dict[str, float]:
    """Coverage and size of the sets, and the figures before and after, on the rows left over."""
    order = np.random.default_rng(seed).permutation(len(right))
    fitted, looked_at = order[:rows], order[rows:]
    calibration, _ = fit_calibration(scores[fitted], right[fitted], labels=labels, apart=True) or (
        None,
        None,
    )
    if not isinstance(calibration, Calibration):
        raise SystemExit(f"{rows} rows are too few to calibrate on.")
    before = ModelOutputs(scores[looked_at], np.ones_like(scores[looked_at]))
    after, true = calibration.of(before), right[looked_at]
    found = {
        f"{name} {when}": value
        for when, outputs in (("before", before), ("after", after))
        for name, value in figures(outputs.log_likelihoods, true).items()
    }
    task = ClassificationTask(labels=labels)
    examples = [Example(0, Prompt("", "", ""), None)] * len(true)
    for coverage in COVERAGES:
        sets = answer_sets(task, examples, after, threshold=calibration.threshold(coverage))
        held = [labels[place] in one for place, one in zip(true, sets, strict=True)]
        found[f"held {coverage}"] = float(np.mean(held))
        found[f"size {coverage}"] = float(np.mean([len(one) for one in sets]))
    return found


def of_tweets() -> tuple[list[str], np.ndarray, np.ndarray]:
    """Labels, probabilities and right places of the tweets that a regression has not seen."""
    table = pd.read_csv(TWEETS).drop_duplicates("text")
    order = np.random.default_rng(0).permutation(len(table))
    train, held_out = table.iloc[order[:800]], table.iloc[order[800:]]
    model = fit_tfidf(train["text"].tolist(), train["sentiment"].tolist())
    if model is None:
        raise SystemExit("The tweets teach nothing.")
    labels = list(map(str, model.classes_))
    probabilities = model.predict_proba(held_out["text"].tolist())
    return labels, probabilities, held_out["sentiment"].map(labels.index).to_numpy()


def of_run(file: Path) -> tuple[list[str], np.ndarray, np.ndarray]:
    """The same of a run's held-out rows."""
    table = pd.read_csv(file, keep_default_na=False)
    columns = [name for name in table.columns if name.startswith(PROBABILITY_OF)]
    labels = [name.removeprefix(PROBABILITY_OF) for name in columns]
    return labels, table[columns].to_numpy(float), table["target"].map(labels.index).to_numpy()


if __name__ == "__main__":
    main()
