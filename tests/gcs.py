"""The emulator of Cloud Storage as a process of its own: one for the whole test session, ended with it."""

from __future__ import annotations

import functools
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from launch.gcs_emulator.process import EmulatorProcess

REPO = Path(__file__).parent.parent
BUCKET = "test-bucket"


@functools.cache
def emulator() -> EmulatorProcess:
    """The session's emulator; this process's environment points to it from now on."""
    running = EmulatorProcess([BUCKET])
    os.environ.update(running.environ)
    return running


@contextmanager
def faults(gcs: EmulatorProcess, **rates: float) -> Iterator[None]:
    """These faults, and none afterwards."""
    gcs.set_faults(**rates)
    try:
        yield
    finally:
        gcs.set_faults()


def new_root() -> str:
    """A prefix that nobody else uses, in the session's emulator."""
    emulator()
    return f"gs://{BUCKET}/{uuid.uuid4().hex}/run"
