"""What it costs to look at a long run of many hosts: ls, log, watch, doctor and report.

    python -m benchmarks.long_run                                # 10,000 steps, 1,000 hosts
    python -m benchmarks.long_run --steps=2000 --hosts=64 --keep=DIRECTORY

The journal is made by its own rules, and each host's events are those that a job writes: two files of events and two of
pulses, as long as they may be. Of all hosts but the first, what no command reads is a hole in the file. Each command is
a process of its own; CPU time and memory are what the kernel says of it.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

from orchestrator.observe import event_log, events
from orchestrator.observe.event_log import LoggedEvent, encode
from orchestrator.policy import every_nth, last
from orchestrator.rules import codec, journal
from orchestrator.rules.attempt_id import AttemptId
from orchestrator.rules.keys import journal_key
from orchestrator.rules.records import Head, LiveStep

_STEP_S, _PULSE_S = 60.0, 5.0
_RESTARTS = 4
_SLOW = 7  # the host that is slowest
_REAL_BYTES = 1 << 20  # of each file of the other hosts, its end
COMMANDS = ("ls", "ls --wide", "log", "watch --once", "doctor --read_only", "report -o {report}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--hosts", type=int, default=1000)
    parser.add_argument("--keep", type=Path, help="make the run here, and leave it")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.keep or Path(temporary)
        root, page = folder / "run", folder / "report.html"
        if not root.exists():
            make(root, args.steps, args.hosts)
        print(f"{args.steps} steps, {args.hosts} hosts, {held(root / 'events') / 2**30:.1f} GiB of events\n")
        print("| command | exit code | seconds | CPU seconds | memory, MiB | lines |\n|---|---|---|---|---|---|")
        for words in COMMANDS:
            print(
                f"| `{words.partition(' -o')[0]}` | {measured(root, words.format(report=page).split())} |", flush=True
            )
        print(f"\nreport.html: {page.stat().st_size / 2**20:.1f} MiB")


def measured(root: Path, words: list[str]) -> str:
    command = [sys.executable, "-m", "orchestrator.cli", words[0], str(root), *words[1:]]
    reading, writing = os.pipe()
    began = time.perf_counter()
    child = os.posix_spawn(sys.executable, command, os.environ, file_actions=[(os.POSIX_SPAWN_DUP2, writing, 1)])
    os.close(writing)
    with open(reading, "rb") as output:
        lines = output.read().count(b"\n")
    _, status, used = os.wait4(child, 0)
    seconds, cpu_s = time.perf_counter() - began, used.ru_utime + used.ru_stime
    code = os.waitstatus_to_exitcode(status)
    return f"{code} | {seconds:.1f} | {cpu_s:.1f} | {used.ru_maxrss / 1024:.0f} | {lines}"


def held(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())


def make(root: Path, steps: int, hosts: int) -> None:
    """A run that goes on now: it was started again a few times, and once in a while a save was aborted."""
    (root / "journal").mkdir(parents=True)
    (root / "steps").mkdir()
    (root / "events").mkdir()
    first = time.time() - steps * _STEP_S
    epochs = make_journal(root, steps, first)
    own = lines_of(0, steps, first, epochs, hosts)
    write(root / "events", 0, own, whole=True)
    for process in range(1, hosts):
        write(root / "events", process, lines_of(process, steps, first, epochs, hosts), whole=False)


def make_journal(root: Path, steps: int, first: float) -> list[int]:
    """Returns each step's epoch. The kept steps' data is not there."""
    head: Head | None = None
    keep = last(5) | every_nth(100)

    def append(rule: journal.Rule, at: float) -> None:
        nonlocal head
        following = rule(head, journal.Stamp("host-0/process-0", at, "id"))
        assert isinstance(following, Head)
        head = following
        (root / journal_key(head.version)).write_bytes(codec.encode(head))

    epochs: list[int] = []
    for step in range(steps):
        at = first + step * _STEP_S
        if step % (steps // _RESTARTS) == 0:
            append(journal.open_epoch, at)
        assert head is not None
        epochs.append(head.epoch)
        attempt = AttemptId(step, f"e{head.epoch:04d}-a01")
        if step % 97 == 5:
            aborted = partial(journal.abort, epoch=head.epoch, attempt=attempt, failures=(), reason="process 2 voted")
            append(aborted, at + 4)
            continue
        entry = LiveStep(*attempt, "00000000", "t", 1 << 40, {"loss": 1 / (step + 1)}, at)
        append(partial(journal.commit, epoch=head.epoch, entry=entry, keep=keep), at + 4)
        if step % 100 == 99:
            append(partial(journal.collected, attempts=[old.id for old in head.retired]), at + 5)
    return epochs


def lines_of(process: int, steps: int, first: float, epochs: list[int], hosts: int) -> tuple[bytes, bytes]:
    """(events, pulses), the newest that find room; of processes but the first only what may be read."""
    most = steps if process == 0 else min(steps, _REAL_BYTES // 1200)
    told: list[bytes] = []
    for step in range(steps - most, steps):
        epoch, at = epochs[step], first + step * _STEP_S
        line = partial(LoggedEvent, process=process, host=f"host-{process}", machine=f"node-{process}", epoch=epoch)
        if step == 0 or epochs[step - 1] != epoch:
            told.append(encode(line(at, event=events.EpochOpened(epoch, "r", hosts))))
        slow = 1 + 3 * (process == _SLOW) + (step * 7919 + process) % 13 / 13
        for name, after in {"staging": 0.0, "writing": 0.1, "sealing": slow, "waiting": slow + 0.2}.items():
            event = events.SavePhase(step, f"e{epoch:04d}-a01", name, after, 1 << 30 if after >= slow else 0)
            told.append(encode(line(at + after, event=event)))
        told.append(encode(line(at + 0.2, event=events.SaveStarted(step, f"e{epoch:04d}-a01", 0.2))))
        committed = events.SaveCommitted(step, f"e{epoch:04d}-a01", 5.0, 1 << 40)
        told.append(encode(line(at + 5, event=committed)))
    now, pulses = time.time(), []
    count = min(int(steps * _STEP_S / _PULSE_S), 2 * event_log.PULSE_BYTES // 240)
    for index in range(count if process == 0 else min(count, 1000)):
        beat = events.Pulse("training", steps - 1, 30.0, 0.3, "", steps, 0.9, 42.0)
        here = LoggedEvent(now - index * _PULSE_S, process, f"host-{process}", f"node-{process}", epochs[-1], beat)
        pulses.append(encode(here))
    return b"".join(told), b"".join(reversed(pulses))


def write(folder: Path, process: int, bodies: tuple[bytes, bytes], whole: bool) -> None:
    """As `EventLog` leaves it: what does not fit into one file is in the one before it."""
    for kind, body, room in (("", bodies[0], event_log.FILE_BYTES), (".pulse", bodies[1], event_log.PULSE_BYTES)):
        name = f"{process:05d}{kind}"
        if whole and len(body) > room:
            cut = body.rfind(b"\n", 0, len(body) - room // 2) + 1
            (folder / f"{name}.old.jsonl").write_bytes(body[max(0, body.find(b"\n", cut - room) + 1) : cut])
            body = body[cut:]
        with (folder / f"{name}.jsonl").open("wb") as file:
            if not whole:
                os.truncate(file.fileno(), room - len(body) - 1)
                file.seek(room - len(body) - 1)
                file.write(b"\n")
            file.write(body)
        if not whole:
            with (folder / f"{name}.old.jsonl").open("wb") as file:
                os.truncate(file.fileno(), room)


if __name__ == "__main__":
    main()
