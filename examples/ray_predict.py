"""A large table answered on a Ray cluster, by Ray Data (pip install "ray[data]"):

    python examples/ray_predict.py TABLE ADAPTER OUTPUT [WORKERS [TASK_FILE]]

TABLE is a Parquet file or a folder of them, OUTPUT a new folder of Parquet files; every worker sees
ADAPTER, its base and TASK_FILE (of a task of your own) at the same path. The answers are those of
`lora-fsdp predict`. Ray gives each worker a GPU where the cluster has any, starts it again where
its machine dies, and asks anew for what it had not finished. A command that was killed begins anew,
unlike `lora-fsdp predict`.
"""

from __future__ import annotations

import sys

import pandas as pd
import ray
from ray.data import ActorPoolStrategy

from lora_fsdp import Predictor
from lora_fsdp.tasks.files import import_task_file

ROWS_AT_A_TIME = 256


class Answers:
    """A worker with the adapter: a part of the table in, the same with answers out."""

    def __init__(self, adapter: str, task_file: str | None) -> None:
        import_task_file(task_file)
        self.predictor = Predictor.from_adapter(adapter)

    def __call__(self, rows: pd.DataFrame) -> pd.DataFrame:
        """The rows with the columns that `lora-fsdp predict` adds."""
        return self.predictor.answers(rows)


def main(
    table: str, adapter: str, output: str, workers: str = "1", task_file: str | None = None
) -> None:
    """Answer the table."""
    gpus = ray.cluster_resources().get("GPU", 0)
    ray.data.read_parquet(table).map_batches(
        Answers,
        fn_constructor_args=[adapter, task_file],
        compute=ActorPoolStrategy(size=int(workers)),
        batch_format="pandas",
        batch_size=ROWS_AT_A_TIME,
        num_gpus=1 if gpus else 0,
    ).write_parquet(output)


if __name__ == "__main__":
    if not 4 <= len(sys.argv) <= 6:
        sys.exit(__doc__)
    ray.init()
    main(*sys.argv[1:])
