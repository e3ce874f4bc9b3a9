"""`lora-fsdp next`: of rows without answers, those to label next."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from lora_fsdp.arguments.option import option
from lora_fsdp.cli.adapter import AdaptersOptions, load_adapters
from lora_fsdp.cli.command import Command, print_json, required
from lora_fsdp.cli.predict import Progress, write_without_text
from lora_fsdp.cli.terminal import write
from lora_fsdp.errors import ArgumentError


@dataclass
class NextOptions:
    """Which rows to choose from, and where the chosen ones go."""

    unlabelled: str | None = option(
        None,
        "Pool of rows without answers: .csv, .tsv, .jsonl, .xlsx, .parquet, or .txt with one text "
        "a line (text files also packed).",
    )
    n: int = field(default=50, metadata={"help": "How many rows to choose.", "aliases": ["-n"]})
    output_file: str | None = option(
        None, "File to write, of the same format (of .txt: .csv); must not exist yet."
    )
    by: Literal["margin", "entropy"] = option(
        "margin",
        "How unsure the adapter is of a row: margin = by the lead of the likeliest answer over the "
        "next, entropy = by all probabilities.",
    )
    seed: int = option(0, "Of the clusters over which the rows are spread.")
    calibrated: Literal["true", "false"] = option(
        "true", "Give probabilities by the calibration that the run fitted on held-out rows."
    )
    encoding: str | None = option(None, "Text encoding of the pool; UTF-8 when not given.")
    delimiter: str | None = option(
        None, "Character between the cells of CSV and TSV (';', tab); found when not given."
    )
    sheet: str | None = option(None, "Sheet of a workbook (.xlsx) with several.")
    column_prefix: str = option("", "Put before the new columns' names, if they are taken.")
    overwrite: bool = option(False, "Replace an output that is there.")
    json: bool = option(False, "Print the result as JSON.")


def choose(options: NextOptions, adapter: AdaptersOptions) -> int:
    """Write the rows whose answers would teach most."""
    pool = required(options.unlabelled, "--unlabelled", "the rows to choose from")
    output = Path(required(options.output_file, "--output_file", "the file to write"))
    if options.n < 1:
        raise ArgumentError(f"-n {options.n}: give a number of rows from 1.")
    if not 0 <= options.seed < 2**32:
        raise ArgumentError(f"--seed {options.seed}: give a number from 0 to 2^32 - 1.")
    from lora_fsdp.data.streams import open_stream
    from lora_fsdp.evaluation.labelling.pool import check_can_be_unsure, check_output, choose_next
    from lora_fsdp.evaluation.prediction import read_task
    from lora_fsdp.tasks import get_task
    from lora_fsdp.tasks.files import import_task_file

    stream = open_stream(
        pool, encoding=options.encoding, delimiter=options.delimiter, sheet=options.sheet
    )
    check_output(stream, output, overwrite=options.overwrite)
    folders = adapter.folders()
    import_task_file(adapter.task_file)
    saved = read_task(folders[0])
    check_can_be_unsure(get_task(saved["task"], saved["options"]))
    predictor = load_adapters(adapter, folders, calibrated=options.calibrated == "true")
    progress = Progress()
    found = choose_next(
        predictor,
        stream,
        output,
        count=options.n,
        by=options.by,
        seed=options.seed,
        column_prefix=options.column_prefix,
        on_rows=lambda rows: progress.advance(rows, False),
    )
    progress.close()
    if options.json:
        facts = {
            "output": str(found.output),
            "rows": list(found.rows),
            "rows_of_pool": found.pool,
            "rows_without_text": list(found.without_text),
            "calibrated": predictor.calibration is not None,
        }
        print_json(facts)
        return 0
    write(f"{len(found.rows)} of {found.pool} rows to label next, the first first: {output}")
    if options.n > len(found.rows):
        write(f"-n {options.n} is more than the pool has: all of its rows with a text are ranked")
    write_without_text(found.without_text, "and are left out")
    return 0


COMMANDS = (
    Command(
        name="next",
        summary="Of rows without answers, write those whose answers would teach most.",
        examples=(
            "next pool.csv --adapter runs/mine -n 50 --output_file next.csv",
            "next --unlabelled pool.csv --adapter runs/folds -n 200 --output_file next.csv",
        ),
        options=(NextOptions, AdaptersOptions),
        run=choose,
        positional="unlabelled",
    ),
)
