"""`lora-fsdp evaluate`: a finished adapter's metrics on a table with answers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from lora_fsdp.arguments.option import option
from lora_fsdp.cli.adapter import AdapterOptions, load_predictor
from lora_fsdp.cli.command import Command, print_json, required
from lora_fsdp.cli.terminal import table_text, write


@dataclass
class EvaluateOptions:
    """Which rows."""

    data_file: str | None = option(
        None, "Table with texts and answers, in any form that train takes."
    )
    label_column: str | None = option(None, "Column with the label, if not the training table's.")
    encoding: str | None = option(None, "Text encoding of the file; detected when not given.")
    delimiter: str | None = option(
        None, "Character between the cells of CSV and TSV (';', tab); found when not given."
    )
    sheet: str | None = option(None, "Sheet of a workbook (.xlsx) with several.")
    on_bad_rows: Literal["error", "drop"] = option(
        "error", "Rows without text or with an unknown label: stop, or drop and count."
    )
    max_rows: int | None = option(None, "Use a seeded random sample of this many rows.")
    head: int | None = option(None, "Use the first rows of the file.")
    seed: int = option(42, "Seed of the sample.")
    calibrated: Literal["true", "false"] = option(
        "true", "Read the answers by the calibration that the run fitted on held-out rows."
    )
    json: bool = option(False, "Print JSON.")


def evaluate(options: EvaluateOptions, adapter: AdapterOptions) -> int:
    """Read, score, print."""
    path = required(options.data_file, "DATA_FILE", "a table with texts and their answers")
    from lora_fsdp.data.tables import read_table, sample_rows

    table = read_table(
        path,
        encoding=options.encoding,
        delimiter=options.delimiter,
        sheet=options.sheet,
        nested=True,
    )
    table = sample_rows(table, max_rows=options.max_rows, head=options.head, seed=options.seed)
    predictor = load_predictor(
        adapter, label_column=options.label_column, calibrated=options.calibrated == "true"
    )
    from lora_fsdp.evaluating import evaluate as measure

    measured = measure(
        adapter.adapter, table, predictor=predictor, on_bad_rows=options.on_bad_rows, name=path
    )
    found: dict[str, Any] = {"adapter": adapter.adapter, "data_file": path, **vars(measured)}
    matrix = found.pop("confusion_matrix")
    if matrix is not None:
        found["confusion_matrix"] = matrix.to_dict(orient="split")
    if options.json:
        print_json(found)
    else:
        _print(found)
    return 0


def _print(found: dict[str, Any]) -> None:
    left_out = f", {found['rows_left_out']} left out" if found["rows_left_out"] else ""
    write(f"{found['rows']} rows{left_out}, {found['rows_shortened']} shortened")
    if found["rows_trained_on"]:
        write(
            f"warning: {found['rows_trained_on']} of {found['rows']} rows were trained on, the "
            f"first is row {found['first_row_trained_on']}: these metrics do not say how the "
            "adapter does on new rows"
        )
    if absent := found["labels_without_rows"]:
        write(f"labels without a row, of which nothing is measured: {', '.join(absent)}")
    rows = [(name, f"{value:.4f}") for name, value in found["metrics"].items()]
    write(table_text(("metric", "value"), rows))
    if matrix := found.get("confusion_matrix"):
        counts = zip(matrix["index"], matrix["data"], strict=True)
        write("rows by true label (down) and predicted label (across)")
        write(table_text(("", *matrix["columns"]), [(name, *map(str, r)) for name, r in counts]))


COMMANDS = (
    Command(
        name="evaluate",
        summary="Measure a finished adapter on a table whose answers are known.",
        examples=(
            "evaluate test.csv --adapter runs/mine",
            "evaluate test.csv --adapter runs/mine --label_column team --on_bad_rows drop",
            "evaluate test.csv --adapter runs/mine --json",
        ),
        options=(EvaluateOptions, AdapterOptions),
        run=evaluate,
        positional="data_file",
    ),
)
