"""Ctrl-C where Python drops the exception.

Run: python -m pytest tests/training/test_interruption.py
"""

import signal

import pytest

from lora_fsdp.training.watching.interruption import StopRequests


class Interrupted:
    """Gets the signal in its destructor, out of which no exception comes."""

    def __del__(self):
        signal.raise_signal(signal.SIGINT)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_an_interrupt_that_python_drops_ends_the_step():
    before = signal.getsignal(signal.SIGINT)  # a shell's job in the background ignores it
    stop = StopRequests(rank=0, world_size=1, max_hours=None)
    with stop.watching():
        assert not stop.is_last(1)
        Interrupted()  # dropped: the next line is reached
        with pytest.raises(KeyboardInterrupt):
            stop.is_last(2)
    assert signal.getsignal(signal.SIGINT) is before
