"""Hosts with a network between them that can be cut: a namespace each, joined by a bridge in one of its own.

Each process also gets a host name and a hosts file: Gloo advertises the address that its host name resolves to.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

from launch.contract import JobContract
from tests.proof.chaos.arena import Arena

PORT = 7777
INSIDE = 'hostname "$0"; mount --bind "$1" /etc/hosts; shift; exec "$@"'


def ip(*words: str) -> None:
    done = subprocess.run(["ip", *words], capture_output=True, text=True, timeout=20)
    if done.returncode:
        raise OSError(f"ip {' '.join(words)}: {done.stderr.strip()}")


class Network:
    """Use `network()`."""

    def __init__(self, count: int, hosts: Path) -> None:
        self._id = uuid.uuid4().hex[:6]
        self._hosts, self._count, self._made = hosts, count, list[str]()

    def name(self, index: int) -> str:
        return f"chaos-{self._id}-{index}"

    def build(self) -> None:
        hub = f"chaos-{self._id}-hub"
        self._add(hub)
        ip("-n", hub, "link", "add", "br0", "type", "bridge")
        ip("-n", hub, "link", "set", "br0", "up")
        lines = ["127.0.0.1 localhost"]
        for index in range(self._count):
            space = self.name(index)
            self._add(space)
            ip("-n", space, "link", "add", "eth0", "type", "veth", "peer", "name", f"port{index}", "netns", hub)
            ip("-n", hub, "link", "set", f"port{index}", "master", "br0", "up")
            ip("-n", space, "addr", "add", f"10.77.0.{index + 1}/24", "dev", "eth0")
            ip("-n", space, "link", "set", "eth0", "up")
            ip("-n", space, "link", "set", "lo", "up")
            lines.append(f"10.77.0.{index + 1} host-{index}")
        self._hosts.write_text("\n".join(lines) + "\n")

    def _add(self, space: str) -> None:
        ip("netns", "add", space)
        self._made.append(space)

    def cut(self, index: int) -> None:
        ip("-n", self.name(index), "link", "set", "eth0", "down")

    def mend(self, index: int) -> None:
        ip("-n", self.name(index), "link", "set", "eth0", "up")

    def start(self, arena: Arena, restart: int, *job_args: str) -> list[subprocess.Popen[bytes]]:
        """One process of the job on each host."""
        started = []
        for index in range(self._count):
            contract = JobContract(f"10.77.0.1:{PORT + restart}", self._count, index, 1, restart, f"host-{index}")
            command = ["ip", "netns", "exec", self.name(index), "unshare", "--mount", "--uts", "sh", "-c", INSIDE]
            command += [f"host-{index}", str(self._hosts), *arena.job(*job_args)]
            started.append(arena.start(command, CHAOS_HEARTBEAT_S="10", **contract.to_environment()))
        return started

    def remove(self) -> None:
        for space in self._made:
            ip("netns", "del", space)


@contextmanager
def network(count: int, base: Path) -> Iterator[Network]:
    """Hosts 0 to `count` - 1, with addresses 10.77.0.1 and up. Raises OSError where namespaces cannot be made."""
    made = Network(count, base / "hosts")
    try:
        made.build()
        yield made
    finally:
        made.remove()


@cache
def why_not() -> str:
    """Why there can be no such network here, '' if there can."""
    if sys.platform != "linux" or not all(shutil.which(tool) for tool in ("ip", "unshare", "mount")):
        return "ip, unshare and mount are needed"
    if os.geteuid() != 0:
        return "network namespaces need root"
    space = f"chaos-probe-{os.getpid()}"
    try:
        ip("netns", "add", space)
        ip("netns", "del", space)
    except OSError as error:
        return str(error)
    return ""
