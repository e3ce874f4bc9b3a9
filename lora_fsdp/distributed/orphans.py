"""Ranks do not outlive their launcher.

A launcher that is killed with SIGKILL cannot end its ranks. On Linux each rank therefore asks the
kernel for SIGTERM at its parent's death (`PR_SET_PDEATHSIG`, prctl(2)): before and after training
that ends it, during training it is a request to stop like any other SIGTERM. A process that no
launcher started is left alone: whoever starts `python script.py &` from a shell may close that.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1

# Set for its ranks by torchrun (and `accelerate launch` for several), and by `accelerate launch`.
_OF_A_LAUNCHER = ("TORCHELASTIC_RUN_ID", "ACCELERATE_MIXED_PRECISION")


def has_launcher() -> bool:
    """Whether this process's parent is a launcher that it should not outlive."""
    return any(name in os.environ for name in _OF_A_LAUNCHER)


def end_with_launcher() -> None:
    """Have this process sent SIGTERM when its launcher dies; nothing where there is none."""
    if has_launcher() and sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
