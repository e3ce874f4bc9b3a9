"""How a process of a run ends when something goes wrong: one sentence, once, and an exit code."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from types import TracebackType

from lora_fsdp.errors import LoraFsdpError
from lora_fsdp.printing import say

# The exit codes of the scripts and of the command line.
CRASHED = 1  # a traceback was printed
WRONG_INPUT = 2  # a sentence said what to change
NOT_VERIFIED = 3  # an adapter is not what it should be
FOUND_ERRORS = 5  # `doctor`: the run would fail, or be another one than was asked for
NOT_REACHED = 4  # a server did not answer: the same command may work later
STALLED = 70  # it made no progress (`errors.StalledRankError`)
STOPPED = 75  # on request, with a checkpoint (`errors.TrainingInterrupted`)
INTERRUPTED = 130  # as shells count a process that ended by SIGINT


def report_failure(
    kind: type[BaseException], error: BaseException, traceback: TracebackType | None
) -> None:
    """`sys.excepthook` of a run's processes.

    An error of this library is one sentence on stderr, and of several processes on a machine only
    the first to fail prints it. What fails afterwards on the others, because the first is gone, is
    not worth a traceback. Everything else keeps its traceback.

    Raises:
        SystemExit: with the exit code, which Python heeds when an excepthook raises it.
    """
    own = issubclass(kind, LoraFsdpError)
    earlier = _claim_report("own" if own else "foreign")
    if issubclass(kind, KeyboardInterrupt):
        if earlier is None:
            _print("Interrupted.")
        raise SystemExit(INTERRUPTED)
    if own:
        sentence = f"{kind.__name__}: {error}"
        _leave_for_launcher(sentence)
        if earlier is None:
            _print(sentence)
        raise SystemExit(WRONG_INPUT)
    if earlier != "own":
        sys.__excepthook__(kind, error, traceback)
    raise SystemExit(CRASHED)


def _claim_report(text: str) -> str | None:
    """`None` if no other process of this launch on this machine failed before, else its claim."""
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if not file:  # one process, or a launcher that is not torch's
        return None
    # <launch>/attempt_<n>/<local rank>/error.json
    claim = Path(file).parent.parent / "reported"
    try:
        with claim.open("x", encoding="utf-8") as opened:
            opened.write(text)
    except FileExistsError:
        return claim.read_text(encoding="utf-8") or text
    except OSError:  # the launcher has already cleaned up
        return None
    return None


def _leave_for_launcher(sentence: str) -> None:
    """Where torch's launcher reads what to show for a failed process."""
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if file and Path(file).parent.is_dir():
        extra = {"py_callstack": sentence, "timestamp": str(int(time.time()))}
        contents = {"message": {"message": sentence, "extraInfo": extra}}
        Path(file).write_text(json.dumps(contents), encoding="utf-8")


def _print(text: str) -> None:
    # Not sys.stderr: torch's own hook, around this one, puts its prefix before each line of that.
    say(text, file=sys.__stderr__, flush=True)
