"""`lora-fsdp report`: a page about a run, a sweep, or about several runs side by side."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from lora_fsdp.arguments.option import option
from lora_fsdp.cli.command import Command, print_json
from lora_fsdp.cli.terminal import write
from lora_fsdp.errors import ArgumentError


@dataclass
class ReportOptions:
    """Which runs."""

    runs: list[str] = field(
        default_factory=list, metadata={"help": "Output folder of a run, or of several."}
    )
    output: str = option(".", "Of a comparison: the HTML file, or a folder for it.")
    pdf: bool = option(False, "Also print the page as a PDF beside it (Chromium, Chrome, Edge).")
    json: bool = option(False, "Print the page's path as JSON.")


def report(options: ReportOptions) -> int:
    """Write the page; one run's lies in its folder."""
    if not options.runs:
        raise ArgumentError("RUNS is missing: name the output folder of a run, or of several.")
    from lora_fsdp.reporting import write_comparison, write_report
    from lora_fsdp.reporting.pdf import browser, write_pdf
    from lora_fsdp.sweeps.earlier import SWEEP_FILE
    from lora_fsdp.sweeps.outcome.page import write_sweep_report
    from lora_fsdp.sweeps.outcome.summing_up import read_summary

    program = browser() if options.pdf else None
    root = Path(options.runs[0])
    if len(options.runs) == 1 and (root / SWEEP_FILE).is_file():
        page = write_sweep_report(root, read_summary(root))
    elif len(options.runs) == 1:
        page = write_report(root)
    else:
        page = write_comparison(options.runs, options.output)
    written = {"page": page}
    if program is not None:
        written["pdf"] = write_pdf(page, program=program)
    if options.json:
        print_json({name: str(path) for name, path in written.items()})
    else:
        for path in written.values():
            write(f"wrote {path}")
    return 0


COMMANDS = (
    Command(
        name="report",
        summary="Write a page about a run, finished or not, or compare several.",
        examples=(
            "report runs/mine",
            "report runs/mine --pdf",
            "report runs/mine runs/other --output comparison.html",
        ),
        options=(ReportOptions,),
        run=report,
        positional="runs",
    ),
)
