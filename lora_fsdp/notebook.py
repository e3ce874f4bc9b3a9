"""For notebooks: train on several processes from a cell, and see the report below it.

`accelerate.notebook_launcher` is not used. It forks the kernel, which fails once a cell has used a
GPU and can hang once one has computed on the CPU; and it reads no YAML, so that its ranks would get
no FSDP settings. `launch` starts what `accelerate launch` starts: new interpreters, with the YAML's
settings, whose own check stops a run if they are not joined.
"""

from __future__ import annotations

import html
import os
import subprocess
import sys
from collections import deque
from collections.abc import Mapping
from pathlib import Path

from lora_fsdp.errors import ArgumentError, LaunchError
from lora_fsdp.failures import STOPPED
from lora_fsdp.recipes import as_arguments


def launch(
    options: Mapping[str, object],
    *,
    accelerate_config: str | Path | None = None,
    num_processes: int | None = None,
) -> Path:
    """Train as `lora-fsdp train` does, and show its output under the cell as it comes.

    Interrupting the cell, or restarting the kernel, ends the processes; the run can go on from its
    last checkpoint.

    Args:
        options: those of `lora-fsdp train`, without the dashes; `output_dir` among them. A task of
            one's own stands in a file, named by `task_file`: no process sees what a cell defines.
        accelerate_config: an accelerate YAML, or the name of a shipped one; `None` = what fits this
            machine's GPUs.
        num_processes: instead of the YAML's number.

    Returns:
        the run's folder.

    Raises:
        ArgumentError: no `output_dir`, or an option that cannot be written on a command line.
        LaunchError: the run failed; the message has its last line.
    """
    if not options.get("output_dir"):
        raise ArgumentError('The options name no output_dir: add {"output_dir": "runs/mine"}.')
    command = [sys.executable, "-m", "lora_fsdp", "train"]
    given = {"accelerate_config": accelerate_config, "num_processes": num_processes}
    for key, value in {**given, **options}.items():
        command += as_arguments(key, value, source="The options")
    code, last_line = _run(command)
    if code == STOPPED:
        raise LaunchError(
            "The training was stopped and has left a checkpoint: go on with "
            '{"resume_from_checkpoint": True}.'
        )
    if code != 0:
        raise LaunchError(f"The training ended with exit code {code}: {last_line}")
    return Path(str(options["output_dir"]))


class Report:
    """The report of a run; as a cell's last value it is shown below the cell.

    Args:
        run_folder: of a run that has drawn its report.
        height: of the frame, in pixels.
    """

    def __init__(self, run_folder: str | Path, *, height: int = 700) -> None:
        self.page = Path(run_folder) / "report.html"
        self.height = height

    def _repr_html_(self) -> str:
        """In a frame without rights: the page cannot reach the notebook, and needs no server."""
        page = html.escape(self.page.read_text(encoding="utf-8"))
        style = f"width: 100%; height: {self.height}px; border: 1px solid #8888"
        return f'<div><iframe sandbox="" style="{style}" srcdoc="{page}"></iframe></div>'


def _run(command: list[str]) -> tuple[int, str]:
    """Exit code and last line of a command whose output is printed as it comes."""
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        encoding="utf-8",
        errors="replace",
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )
    last: deque[str] = deque(maxlen=1)
    try:
        for line in process.stdout or ():
            print(line, end="")  # not written to the file descriptor, which not all notebooks show
            if line.strip():
                last.append(line.strip())
        return process.wait(), "".join(last)
    finally:
        # On an interrupt; to a process that has ended it is nothing.
        process.terminate()
        process.wait()
        if process.stdout is not None:
            process.stdout.close()
