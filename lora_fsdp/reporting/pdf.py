"""A page as a PDF, printed by a browser that is installed anyway."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from pathlib import Path

from lora_fsdp.errors import PdfError

#: Programs that understand Chromium's options, by name or where macOS and Windows keep them.
_BROWSERS = (
    "chromium",
    "chromium-browser",
    "google-chrome",
    "google-chrome-stable",
    "chrome",
    "microsoft-edge",
    "microsoft-edge-stable",
    "msedge",
    "brave-browser",
    "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome",
    "/Applications/Chromium.app/Contents/MacOS/Chromium",
    "/Applications/Microsoft Edge.app/Contents/MacOS/Microsoft Edge",
    r"C:\Program Files\Google\Chrome\Application\chrome.exe",
    r"C:\Program Files (x86)\Microsoft\Edge\Application\msedge.exe",
)
_LIMIT_SECONDS = 120


def browser() -> str:
    """The browser that prints.

    Raises:
        PdfError: none is installed.
    """
    found = next(filter(None, map(shutil.which, _BROWSERS)), None)
    if found is None:
        raise PdfError(
            "--pdf needs a browser to print with, and neither Chromium, Chrome, Edge nor Brave is "
            "here: install one, or open report.html elsewhere and print it to a file."
        )
    return found


def write_pdf(page: Path, *, program: str) -> Path:
    """Print `page` beside itself, everything unfolded, with the browser `program`.

    Raises:
        PdfError: the browser printed nothing; the message has its last line.
    """
    target = page.with_suffix(".pdf")
    with tempfile.TemporaryDirectory(
        prefix="lora-fsdp-pdf-", ignore_cleanup_errors=True
    ) as scratch:
        printed = Path(scratch, "page.pdf")
        command = [
            program,
            "--headless=new",
            "--disable-gpu",
            "--disable-dev-shm-usage",
            "--disable-background-networking",
            "--no-first-run",
            "--no-pdf-header-footer",
            f"--user-data-dir={scratch}/profile",
            f"--print-to-pdf={printed}",
            page.absolute().as_uri(),
        ]
        # Chromium has no sandbox for root; the page is our own and runs no script.
        if hasattr(os, "geteuid") and os.geteuid() == 0:
            command.insert(1, "--no-sandbox")
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, errors="replace", timeout=_LIMIT_SECONDS
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            raise PdfError(f"{program} did not print {page}: {error}") from error
        if not printed.is_file():
            last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
            raise PdfError(f"{program} did not print {page}: {last}")
        # Written under another name first: a PDF that is there is a whole one.
        partial = target.with_name(f".{target.name}.partial")
        shutil.copyfile(printed, partial)
        os.replace(partial, target)
    return target
