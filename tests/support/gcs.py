"""The emulator of Cloud Storage as a process of its own: one for the whole test session, ended with it."""

from __future__ import annotations

import functools
import json
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from launch.gcs_emulator.process import EmulatorProcess, Server

REPO = Path(__file__).parents[2]
BUCKET = "test-bucket"
ALL_FAULTS = dict.fromkeys(("too_many", "unavailable", "slow", "cut", "lost"), 0.05)
SERVER = "TEST_GCS_SERVER"  # the URL of another server of the API, for the tests that ask nothing of our emulator's


@functools.cache
def emulator() -> EmulatorProcess:
    """The session's emulator; this process's environment points to it from now on."""
    running = EmulatorProcess([BUCKET])
    os.environ.update(running.environ)
    return running


@functools.cache
def server() -> Server:
    """The server that TEST_GCS_SERVER names, with our bucket in it; the session's emulator without."""
    url = os.environ.get(SERVER)
    if not url:
        return emulator()
    running = Server(url)
    os.environ.update(running.environ)
    made, _, body = running.ask(
        "POST", "/storage/v1/b?project=emulator", json.dumps({"name": BUCKET}).encode(), Content_Type="application/json"
    )
    assert made in (200, 409), body  # 409: it is there
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
    """A prefix that nobody else uses, in the session's emulator or where TEST_GCS_SERVER is."""
    server()
    return f"gs://{BUCKET}/{uuid.uuid4().hex}/run"
