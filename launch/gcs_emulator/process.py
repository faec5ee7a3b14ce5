"""An emulator of one's own, as a process beside this one: for the demo, tests and benchmarks."""

from __future__ import annotations

import json
import subprocess
import urllib.request
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any

from launch import programs


def environ(url: str) -> dict[str, str]:
    """What a process needs in its environment so that gcsfs, TensorStore and this package use the emulator."""
    return {
        "STORAGE_EMULATOR_HOST": url,
        "TENSORSTORE_GCS_HTTP_URL": url,
        "GOOGLE_CLOUD_PROJECT": "emulator",
        "NO_GCE_CHECK": "true",  # else the search for credentials asks the metadata server for seconds
        "GCE_METADATA_TIMEOUT": "1",
        "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",  # else gcsfs asks for the bucket's type by gRPC, for a minute
    }


class Server:
    """A server of the JSON API that somebody else runs at `url`."""

    def __init__(self, url: str) -> None:
        self.url, self.environ = url, environ(url)

    def ask(
        self, method: str, path: str, body: bytes | None = None, **headers: str
    ) -> tuple[int, dict[str, str], bytes]:
        """One plain request, without any client library. Returns status, headers and body. Raises OSError."""
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        request = urllib.request.Request(self.url + path, body, named, method=method)
        try:
            with urllib.request.urlopen(request, timeout=30) as reply:
                return reply.status, dict(reply.headers), reply.read()
        except urllib.error.HTTPError as error:
            return error.code, dict(error.headers), error.read()


class EmulatorProcess(Server):
    """A running emulator on a free port of this machine. It ends with `end`, or when this process ends."""

    def __init__(self, buckets: Sequence[str], *flags: str) -> None:
        flags = ("--port=0", "--until_stdin_closes", f"--buckets={','.join(buckets)}", *flags)
        command = [*programs.command("gcs-emulator"), *flags]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self._process.stdout is not None
        words = self._process.stdout.readline().split()
        if not words:
            raise OSError(f"the emulator ended with {self._process.wait()} instead of serving")
        super().__init__(words[-1])

    def counts(self, *, reset: bool = False) -> dict[str, Any]:
        """Requests by operation and by class, and faults by kind, since the last reset."""
        _, _, body = self.ask("DELETE" if reset else "GET", "/_emulator/counts")
        return dict(json.loads(body))

    def set_faults(self, **faults: float) -> None:
        """From now on these faults (`faults.Faults`) and no others. Raises ValueError."""
        status, _, body = self.ask("PUT", "/_emulator/faults", json.dumps(faults).encode())
        if status != 200:
            raise ValueError(body.decode())

    def links(self, **speed: float) -> list[dict[str, Any]]:
        """The hosts' links (`links.Link`), with this speed (`links.Speed`) from now on if one is given. ValueError."""
        status, _, body = self.ask("PUT" if speed else "GET", "/_emulator/links", json.dumps(speed).encode())
        if status != 200:
            raise ValueError(body.decode())
        return list(json.loads(body))

    def set_rules(self, group: str, *rules: Mapping[str, Any]) -> None:
        """From now on these rules (`faults.ReplyRule`) of this group and no others of it. Raises ValueError."""
        status, _, body = self.ask("PUT", f"/_emulator/rules/{group}", json.dumps(rules).encode())
        if status != 200:
            raise ValueError(body.decode())

    def hits(self, group: str) -> int:
        """How many requests have met a rule of this group."""
        return int(json.loads(self.ask("GET", f"/_emulator/rules/{group}")[2])["hits"])

    def end(self) -> None:
        self._process.terminate()
        self._process.wait(10)

    def __enter__(self) -> EmulatorProcess:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.end()
