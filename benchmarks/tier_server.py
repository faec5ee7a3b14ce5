"""What a tier server gives and takes over loopback, beside a bare socket and Python's own file server.

    python -m benchmarks.tier_server [--mib=512] [--rounds=3] [--directory=/dev/shm]

One file of a held step in memory; each line is the best of the rounds: GB/s, and seconds of a core for each GiB, of
this process (whoever restores or trains) and of the servers.
"""

from __future__ import annotations

import argparse
import http.client
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from orchestrator.rules.attempt_id import AttemptId
from orchestrator.run import tier_process
from orchestrator.storage.peer import Peer

RUN, PROCESS = "0123456789abcdef", 3
KEY = AttemptId.of(20, 1, 1).key("state/d/0")
BARE = """import os, socket, sys
listening = socket.create_server(("127.0.0.1", 0))
print(listening.getsockname()[1], flush=True)
while True:
    connection, _ = listening.accept()
    file, sent = os.open(sys.argv[1], os.O_RDONLY), 0
    while more := os.sendfile(connection.fileno(), file, sent, 1 << 30):
        sent += more
    connection.close()
    os.close(file)
"""


def core_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def main(mib: int, rounds: int, folder: Path) -> None:
    size, secret = mib << 20, secrets.token_bytes(32)
    bases = [folder / name / f"orchestrator-{os.getuid()}" for name in "ab"]
    for base in bases:
        base.parent.mkdir()
    began = time.perf_counter()
    servers = [tier_process.start(str(base), secret) for base in bases]
    started_s = (time.perf_counter() - began) / len(servers)
    (first, second), path = servers, bases[0] / RUN / f"process-{PROCESS:05d}" / KEY
    path.parent.mkdir(parents=True)
    for each in (bases[0] / RUN, bases[0] / RUN / f"process-{PROCESS:05d}"):
        each.chmod(0o700)
    path.write_bytes(os.urandom(size))
    bare = subprocess.Popen([sys.executable, "-c", BARE, str(path)], stdout=subprocess.PIPE, text=True)
    plain = subprocess.Popen(
        [sys.executable, "-u", "-m", "http.server", "0", "--bind", "127.0.0.1", "--directory", str(path.parent)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert bare.stdout and plain.stdout
    ports = int(bare.stdout.readline()), int(plain.stdout.readline().split(" port ")[1].split()[0])
    view, peer = memoryview(bytearray(size)), Peer(first.address, secret, RUN)

    def from_bare() -> None:
        done = 0
        with socket.create_connection(("127.0.0.1", ports[0])) as connection:
            while more := connection.recv_into(view[done : done + (1 << 20)]):
                done += more

    def from_plain() -> None:
        connection, done = http.client.HTTPConnection("127.0.0.1", ports[1]), 0
        connection.request("GET", f"/{path.name}")
        answer = connection.getresponse()
        while more := answer.readinto(view[done : done + (1 << 20)]):
            done += more

    def in_pieces(step: int) -> Callable[[], None]:
        def read() -> None:
            for offset in range(0, size, step):
                peer.part(PROCESS).read_into(KEY, offset, view[offset : offset + step])

        return read

    def send() -> None:
        shutil.rmtree(bases[1] / RUN, ignore_errors=True)
        peer.send(PROCESS, [KEY], [second.address])

    print(f"a server listens after {started_s:.2f} s\n{'':28}   GB/s  here  servers (s of a core per GiB)")
    try:
        for name, work, pids in (
            ("bare socket, sendfile", from_bare, [bare.pid]),
            ("http.server", from_plain, [plain.pid]),
            ("tier server, whole", in_pieces(size), [first.pid]),
            ("tier server, 4 MiB", in_pieces(4 << 20), [first.pid]),
            ("tier server, 256 KiB", in_pieces(256 << 10), [first.pid]),
            ("a copy to another server", send, [first.pid, second.pid]),
        ):
            best = min((timed(work, pids) for _ in range(rounds)), key=lambda one: one[0])
            rates = "  ".join(f"{used_s * (1 << 30) / size:.2f}" for used_s in best[1:])
            print(f"{name:28} {size / best[0] / 1e9:6.2f}  {rates}", flush=True)
        for server in servers:
            peak = Path(f"/proc/{server.pid}/status").read_text().partition("VmHWM:")[2].split("\n")[0].strip()
            print(f"a server has taken at most {peak}")
    finally:
        for process in (bare, plain):
            process.kill()
            process.wait()
        for server in servers:
            server.close()


def timed(work: Callable[[], None], pids: list[int]) -> list[float]:
    """Seconds, and seconds of a core here and in each process."""
    before, here, began = [core_s(pid) for pid in pids], time.process_time(), time.perf_counter()
    work()
    took_s = time.perf_counter() - began
    return [took_s, time.process_time() - here, *(core_s(pid) - old for pid, old in zip(pids, before, strict=True))]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mib", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--directory", default="/dev/shm")
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=chosen.directory) as made:
        main(chosen.mib, chosen.rounds, Path(made))
