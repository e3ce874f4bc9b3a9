"""Settings searched by Optuna: each trial is a run, judged by rows that no run is reported on.

pip install optuna
python examples/optuna_search.py --model_name_or_path MODEL --data_file tickets.csv \
    --test_file test.csv --output_dir runs/search

`lora-fsdp train --grid` or `--halving` searches without Optuna, several adapters over one pass.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import optuna

from lora_fsdp import evaluate, finetune, load_table, parse_arguments

TRIALS = 10


def search(arguments: dict[str, Any], *, trials: int = TRIALS) -> tuple[optuna.Study, float]:
    """The study, and what its best adapter reaches on the test rows."""
    training, lora = arguments["training_args"], arguments["lora_args"]
    # The test rows are kept from the runs: the best of many trials is too good on its own rows.
    data = replace(arguments["data_args"], test_file=None, test_size=0.0)
    root = Path(training.output_dir)

    def score(trial: optuna.Trial) -> float:
        done = finetune(
            model_args=arguments["model_args"],
            data_args=data,
            lora_args=replace(lora, lora_r=trial.suggest_categorical("lora_r", [4, 8, 16])),
            training_args=replace(
                training,
                output_dir=str(root / f"trial-{trial.number}"),
                learning_rate=trial.suggest_float("learning_rate", 1e-4, 1e-2, log=True),
            ),
        )
        return done.comparison.metrics["tuned"][done.task.primary_metric]

    study = optuna.create_study(
        direction="maximize", sampler=optuna.samplers.TPESampler(seed=training.seed)
    )
    study.optimize(score, n_trials=trials)
    best = root / f"trial-{study.best_trial.number}"
    measured = evaluate(best, load_table(arguments["data_args"].test_file))
    return study, measured.metrics["macro_f1"]


if __name__ == "__main__":
    study, on_test_rows = search(parse_arguments(task="classification"))
    print(f"best: {study.best_params}, {study.best_value:.4f} on the rows it was chosen by")
    print(f"on the test rows: {on_test_rows:.4f}")
