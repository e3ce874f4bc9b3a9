"""The report on one run."""

from __future__ import annotations

from pathlib import Path

from lora_fsdp.reporting.contents import report_contents
from lora_fsdp.reporting.rendering import write_page
from lora_fsdp.reporting.run_files import read_run


def write_report(run_folder: str | Path) -> Path:
    """Write `report.html`, `report.json` and `report_figures/` into the folder of a run.

    A run that has not finished, or failed, is reported on as far as it came.

    Returns:
        the path of `report.html`, one file that needs nothing else and no network.

    Raises:
        RunNotFoundError: there is no run in `run_folder`.
        DamagedRunError: one of its files is damaged; the message names it.
    """
    # Matplotlib takes a second to import, and of a run's processes one alone draws, at its end.
    from lora_fsdp.reporting.sections.figures import run_pictures

    run = read_run(run_folder)
    contents = report_contents(run)
    page = run.folder / "report.html"
    write_page(page, "report.html.jinja", contents, run_pictures(contents))
    return page
