"""`lora-fsdp predict`: a table in, the same table with answers out; or one text."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lora_fsdp.arguments.option import option
from lora_fsdp.cli.adapter import AdaptersOptions, load_adapters
from lora_fsdp.cli.command import Command, print_json, required
from lora_fsdp.cli.terminal import is_live, write
from lora_fsdp.errors import ArgumentError
from lora_fsdp.printing import say

if TYPE_CHECKING:
    from lora_fsdp.distributed.workers import Workers
    from lora_fsdp.evaluation.answering.columns import Confidence
    from lora_fsdp.evaluation.calibration import Calibration
    from lora_fsdp.evaluation.file_prediction import FilePrediction

_SECONDS_BETWEEN_LINES = 30.0
_ROWS_NAMED = 5


@dataclass
class PredictOptions:
    """What to answer, and where the answers go."""

    data_file: str | None = option(
        None,
        "Table to answer: .csv, .tsv, .jsonl, .xlsx, .parquet, or .txt with one text a line (text "
        "files also packed).",
    )
    output: str | None = option(
        None, "File to write, of the same format (of .txt: .csv); must not exist yet."
    )
    text: str | None = option(None, "Answer this one text instead.")
    encoding: str | None = option(None, "Text encoding of the table; UTF-8 when not given.")
    delimiter: str | None = option(
        None, "Character between the cells of CSV and TSV (';', tab); found when not given."
    )
    sheet: str | None = option(None, "Sheet of a workbook (.xlsx) with several.")
    calibrated: Literal["true", "false"] = option(
        "true", "Give probabilities by the calibration that the run fitted on held-out rows."
    )
    min_probability: float | None = option(
        None, "Leave the answer empty where it is less probable than this (0.9)."
    )
    coverage: float | None = option(
        None,
        "Add the column answer_set: the answers among which the right one is in at least this "
        "share of rows like the held-out ones (0.9).",
    )
    questions: list[str] | None = option(
        None, "Ask only these of a task with several questions, by their columns."
    )
    chunk_rows: int = option(256, "Rows answered and written at a time; lost by a kill.")
    column_prefix: str = option("", "Put before the new columns' names, if they are taken.")
    overwrite: bool = option(False, "Replace an output, finished or not.")
    json: bool = option(False, "Print the result as JSON.")


def predict(options: PredictOptions, adapter: AdaptersOptions) -> int:
    """Answer a text or a table."""
    if (options.text is None) == (options.data_file is None):
        raise ArgumentError("Name a table (predict new.csv) or give one --text, not both.")
    if options.text is not None:
        return _one_text(options, adapter)
    from lora_fsdp.distributed.lost_hosts import watching_hosts

    with watching_hosts():
        return _table(options, adapter)


def _one_text(options: PredictOptions, adapter: AdaptersOptions) -> int:
    text = options.text or ""
    if not text.strip():
        raise ArgumentError("--text is empty.")
    from lora_fsdp.evaluation.file_prediction import answers_of

    calibrated = options.calibrated == "true"
    predictor = load_adapters(
        adapter, adapter.folders(), calibrated=calibrated, questions=options.questions
    )
    [answer] = answers_of(predictor, [text], confidence=_confidence(options))
    if options.json:
        print_json(answer)
        return 0
    for name, value in answer.items():
        write(f"{name:<24} {_shown(value)}")
    if predictor.calibration is not None:
        write(f"probabilities are calibrated: {predictor.calibration.described()}")
    return 0


def _shown(value: Any) -> str:
    if value is None:
        return "(less probable than --min_probability)"
    return value if isinstance(value, str) else format(value, ".4f")


def _confidence(options: PredictOptions) -> Confidence:
    from lora_fsdp.evaluation.answering.columns import Confidence

    return Confidence(options.min_probability, options.coverage)


def _table(options: PredictOptions, adapter: AdaptersOptions) -> int:
    output = Path(required(options.output, "--output", "the file to write"))
    from lora_fsdp.adapter.folder import ADAPTER_FILE
    from lora_fsdp.base.folders import sha256_of_file
    from lora_fsdp.data.streams import open_stream

    stream = open_stream(
        str(options.data_file),
        encoding=options.encoding,
        delimiter=options.delimiter,
        sheet=options.sheet,
    )
    from lora_fsdp.evaluation.file_prediction import predict_file

    workers = _workers()
    folders = adapter.folders()
    predictor = load_adapters(
        adapter,
        folders,
        calibrated=options.calibrated == "true",
        questions=options.questions,
    )
    progress = Progress()
    found = predict_file(
        predictor,
        stream,
        output,
        chunk_rows=options.chunk_rows,
        column_prefix=options.column_prefix,
        identity=" ".join(sha256_of_file(folder / ADAPTER_FILE) for folder in folders),
        confidence=_confidence(options),
        overwrite=options.overwrite,
        on_chunk=progress.advance,
        workers=workers,
    )
    rate = progress.close()
    if workers.is_first:
        _say_found(found, options, rate, calibration=predictor.calibration)
    return 0


def _say_found(
    found: FilePrediction, options: PredictOptions, rate: float, *, calibration: Calibration | None
) -> None:
    """What was done, as JSON or in sentences."""
    if options.json:
        print_json(
            {
                "output": str(found.output),
                "rows": found.rows,
                "resumed_rows": found.resumed,
                "rows_without_text": list(found.without_text),
                "rows_unsure": found.unsure,
                "calibrated": calibration is not None,
                "rows_per_second": round(rate, 2),
            }
        )
        return
    resumed = f", {found.resumed} of them by an earlier call" if found.resumed else ""
    write(f"{found.rows} rows answered{resumed}: {found.output} ({rate:.1f} rows/s)")
    if calibration is not None:
        write(f"probabilities are calibrated: {calibration.described()}")
    if options.min_probability is not None:
        asked = found.rows - found.resumed - len(found.without_text)
        write(f"{found.unsure} of {asked} answers are left empty: less probable than "
              f"{options.min_probability:g}")  # fmt: skip
    write_without_text(found.without_text, "and no answer")


def write_without_text(rows: Sequence[int], outcome: str) -> None:
    """Say which rows have no text, if there are any, and what came of it."""
    if rows:
        more = ", …" if len(rows) > _ROWS_NAMED else ""
        named = ", ".join(map(str, rows[:_ROWS_NAMED]))
        write(f"{len(rows)} rows have no text {outcome}: row {named}{more}")


def _workers() -> Workers:
    """The processes that the launcher started, each on a GPU of its own where there are any."""
    import os

    import torch

    from lora_fsdp.distributed.workers import Workers

    found = Workers.of_launcher()
    if found.size > 1 and torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    return found


class Progress:
    """A bar on a terminal, now and then a line elsewhere; counts only what was answered now."""

    def __init__(self) -> None:
        from tqdm.auto import tqdm

        self.bar = tqdm(unit="row", disable=not is_live(), dynamic_ncols=True, desc="predicting")
        self.began = self.printed = time.perf_counter()
        self.answered = self.rows = 0

    def advance(self, rows: int, done_before: bool) -> None:
        """A chunk is written, or was found written."""
        self.rows += rows
        self.answered += 0 if done_before else rows
        self.bar.update(rows)
        if self.bar.disable and time.perf_counter() - self.printed > _SECONDS_BETWEEN_LINES:
            self.printed = time.perf_counter()
            say(f"{self.rows} rows, {self.rate():.1f} rows/s", file=sys.stderr, flush=True)

    def rate(self) -> float:
        """Rows answered a second, loading of the model not included."""
        return self.answered / max(time.perf_counter() - self.began, 1e-9)

    def close(self) -> float:
        """End the bar; returns the rate."""
        rate = self.rate()
        self.bar.close()
        return rate


COMMANDS = (
    Command(
        name="predict",
        summary="Answer the rows of a table, or one text, with a finished adapter or several.",
        examples=(
            "predict new.csv --adapter runs/mine --output answers.csv",
            "predict new.parquet --adapter runs/mine --output answers.parquet --text_column body",
            "predict new.csv --adapter runs/mine runs/other --output answers.csv",
            "predict new.csv --adapter runs/mine --output answers.csv --min_probability 0.9",
            'predict --adapter runs/mine --text "thanks for the quick response!"',
        ),
        options=(PredictOptions, AdaptersOptions),
        run=predict,
        positional="data_file",
    ),
)
