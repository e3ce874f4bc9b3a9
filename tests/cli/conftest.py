"""The command line runs inside the tests' process: what it leaves there is taken back."""

import sys

import pytest

from lora_fsdp.tasks import registry


@pytest.fixture(autouse=True)
def leave_no_trace(monkeypatch):
    monkeypatch.setattr(registry, "_registered", dict(registry._registered))
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
