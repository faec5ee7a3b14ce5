"""The emulator of Cloud Storage as a process of its own: one for the whole test session, ended with it."""

from __future__ import annotations

import atexit
import functools
import json
import os
import subprocess
import sys
import urllib.request
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from launch.gcs_emulator.__main__ import environ

REPO = Path(__file__).parent.parent
BUCKET = "test-bucket"


class EmulatorProcess:
    """`python -m launch.gcs_emulator` on a free port."""

    def __init__(self, *flags: str) -> None:
        command = [sys.executable, "-m", "launch.gcs_emulator", "--port=0", f"--buckets={BUCKET}", *flags]
        self.process = subprocess.Popen(command, cwd=REPO, stdout=subprocess.PIPE, text=True)
        atexit.register(self.end)
        assert self.process.stdout
        self.url = self.process.stdout.readline().split()[-1]
        assert self.url.startswith("http://127.0.0.1:"), self.url
        self.environ = environ(self.url)

    def end(self) -> None:
        self.process.kill()
        self.process.wait(10)

    def ask(
        self, method: str, path: str, body: bytes | None = None, **headers: str
    ) -> tuple[int, dict[str, str], bytes]:
        """One plain request, without any client library. Returns status, headers and body."""
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        request = urllib.request.Request(self.url + path, body, named, method=method)
        try:
            with urllib.request.urlopen(request, timeout=30) as reply:
                return reply.status, dict(reply.headers), reply.read()
        except urllib.error.HTTPError as error:
            return error.code, dict(error.headers), error.read()

    def counts(self, *, reset: bool = False) -> dict[str, Any]:
        _, _, body = self.ask("DELETE" if reset else "GET", "/_emulator/counts")
        return dict(json.loads(body))

    def set_faults(self, **faults: float) -> None:
        status, _, body = self.ask("PUT", "/_emulator/faults", json.dumps(faults).encode())
        assert status == 200, body

    @contextmanager
    def faults(self, **faults: float) -> Iterator[None]:
        self.set_faults(**faults)
        try:
            yield
        finally:
            self.set_faults()


@functools.cache
def emulator() -> EmulatorProcess:
    """The session's emulator; this process's environment points to it from now on."""
    running = EmulatorProcess()
    os.environ.update(running.environ)
    return running


def new_root() -> str:
    """A prefix that nobody else uses, in the session's emulator."""
    emulator()
    return f"gs://{BUCKET}/{uuid.uuid4().hex}/run"
